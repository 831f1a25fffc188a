"""The page at `/`, in a headless browser, against real services."""

import asyncio
import re

import pytest
from browser import CHROMIUM, open_page
from running import TOKEN

from ernie_kqat.serving import page as page_module

in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH")
SHOWN = "!document.querySelector('#answer').hidden"
COMPLAINS = "!document.querySelector('#error').hidden"
BEYOND = """[...document.querySelectorAll('body *')].filter(e => e.offsetParent
  && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(e => e.id || e.tagName)"""
LONG = "a film whose title is Rindfleischetikettierungsüberwachungsaufgabenübertragungsgesetz " * 6


def browse(steps):
    """Run `steps(page)` in a browser of its own; returns what the console complained about."""

    async def run():
        async with open_page() as page:
            await steps(page)
            return page.complaints

    return asyncio.run(run())


def test_the_page_needs_nothing_from_anywhere_and_its_policy_covers_it():
    content, policy = page_module.load()
    text = content.decode("utf-8")
    assert not re.search(r"""(src|href)=(?!"data:)|https?://|@import|url\(|\son\w+=|\sstyle=""", text)
    assert len(re.findall(r"'sha256-[A-Za-z0-9+/]{43}='", policy)) == 2
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy


@in_browser
def test_a_sentence_gets_label_score_and_latency_at_phone_and_desktop_width(server):
    found = {}

    async def steps(page):
        for width in (390, 1280):
            await page.open(f"http://{server.http}/", width)
            assert await page.value("document.querySelector('#token-row').hidden")
            await page.type("#text", LONG if width == 390 else "a good film")
            await page.value("document.querySelector('#ask').click()")
            await page.until(SHOWN)
            found[width] = await page.value(
                """({label: document.querySelector('#label').textContent,
                bar: document.querySelector('#bar').getBoundingClientRect().width,
                track: document.querySelector('#track').getBoundingClientRect().width,
                score: +document.querySelector('#track').getAttribute('aria-valuenow'),
                details: document.querySelector('#details').textContent,
                scroll: document.documentElement.scrollWidth - document.documentElement.clientWidth})"""
            )
            assert await page.value(BEYOND) == []

    assert browse(steps) == []
    for width, seen in found.items():
        assert seen["label"] in ("negative", "positive")
        assert 0.5 <= seen["score"] <= 1
        assert seen["bar"] == pytest.approx(seen["score"] * seen["track"], abs=1)
        assert re.search(r"score 0\.\d{4} · \d+\.\d ms in the service, \d+\.\d ms in the browser", seen["details"])
        assert seen["scroll"] == 0, f"the page scrolls sideways at {width}"


@in_browser
def test_the_enter_key_asks_and_an_error_is_shown(server):
    async def steps(page):
        await page.open(f"http://{server.http}/", 800)
        await page.type("#text", "   ")
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
        for kind in ("keyDown", "keyUp"):
            await page.command("Input.dispatchKeyEvent", type=kind, **key)
        await page.until(COMPLAINS)
        assert await page.value("document.querySelector('#error').textContent.length > 10")
        assert not await page.value(SHOWN)
        await page.type("#text", "a good film")
        for kind in ("keyDown", "keyUp"):
            await page.command("Input.dispatchKeyEvent", type=kind, **key)
        await page.until(SHOWN)
        assert not await page.value(COMPLAINS)

    browse(steps)  # the browser itself reports the 400 in its console


@in_browser
def test_the_token_is_asked_for_when_the_service_wants_one(guarded):
    async def steps(page):
        await page.open(f"http://{guarded.http}/", 390)
        await page.until("!document.querySelector('#token-row').hidden")
        await page.type("#text", "a good film")
        await page.type("#token", "wrong")
        await page.value("document.querySelector('#ask').click()")
        await page.until(COMPLAINS)
        await page.type("#token", TOKEN)
        await page.value("document.querySelector('#ask').click()")
        await page.until(SHOWN)
        assert TOKEN not in await page.value("document.documentElement.outerHTML + location.href + document.cookie")

    browse(steps)


@in_browser
def test_a_foreign_script_does_not_run(server):
    async def steps(page):
        await page.open(f"http://{server.http}/", 800)
        await page.value(
            """(() => { const script = document.createElement('script'); script.textContent = 'window.ran = true';
            document.body.append(script); })()"""
        )
        assert not await page.value("!!window.ran")

    assert any("Content Security Policy" in complaint for complaint in browse(steps))
