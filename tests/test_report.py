"""The report page: safe markup, one file, and in a real browser everything is there and fits a phone and a desktop."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from ernie_kqat.analysis import charts, report, training_charts
from ernie_kqat.analysis.activations import ActivationStatistics
from ernie_kqat.analysis.sensitivity import Sensitivity
from ernie_kqat.analysis.training import Training
from ernie_kqat.analysis.weights import WAYS, statistics
from ernie_kqat.analysis.workbench import Score

LAYERS = [
    f"ernie.encoder.layers.{index}.{name}"
    for index in range(2)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "linear1", "linear2")
]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def figure_of_a_line(title="a < b & c"):
    figure, (axes,) = report.canvas()
    axes.plot([1, 2, 3], [3, 1, 2], "o-")
    axes.set_title(title)
    return report.Figure(report.svg(figure), 'a "quoted" caption <b>')


def test_markup_in_text_stays_text():
    hostile = "<script>alert(1)</script>"
    table = report.Table([hostile, hostile], [[hostile, hostile]])
    text = report.page(hostile, hostile, [report.Section(hostile, hostile, (figure_of_a_line(hostile),), table)])
    assert "<script" not in text
    assert text.count(html.escape(hostile)) >= 9


def test_the_page_names_no_other_place():
    text = report.page("T", "s", [report.Section("A", figures=(figure_of_a_line(),))])
    assert "default-src 'none'" in text
    assert re.findall(r"https?:|//|\bsrc=|@import|url\((?!#)", text) == []
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', text))


def test_ids_are_unique_and_every_reference_has_its_target():
    same = figure_of_a_line()
    text = report.page("T", "s", [report.Section("A", figures=(same, same)), report.Section("B", figures=(same,))])
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids)) > 3
    assert set(re.findall(r'(?:href="#|url\(#)([^")]*)', text)) <= set(ids)


def test_the_same_drawing_gives_the_same_bytes():
    first = figure_of_a_line().svg
    assert first == figure_of_a_line().svg
    assert not re.search(r"20\d\d-\d\d", first)
    assert "a &lt; b &amp; c" in first


def test_paragraphs_and_alignment_come_out_as_said():
    section = report.Section("A", "one\n\ntwo", table=report.Table(["layer", "K"], [["q", "1.8"], ["k", "3.0"]]))
    text = report.page("T", "s", [section])
    assert "<p>one</p>" in text
    assert "<p>two</p>" in text
    assert text.count('<th scope="row">') == 2
    assert text.count("<td>") == 2


def every_section():
    """One of every figure, on random layers: two models, a run, activations, sensitivities."""
    rng = np.random.default_rng(0)
    names = ["ernie.embeddings.word_embeddings", *LAYERS, "ernie.pooler.dense", "classifier"]
    models = {
        label: statistics({name: rng.standard_t(freedom, (24, 16)).astype(np.float32) for name in names})
        for label, freedom in (("before", 3), ("after", 30))
    }
    ranges, sqnr = {"moving_average": 8.0, "mse": 5.0}, {"moving_average": 30.0, "mse": 33.0}
    seen = [ActivationStatistics(name, -2.0, 9.0, (4.0, 9.0), 3.0, ranges, sqnr) for name in LAYERS]
    costs = Sensitivity(
        Score(0.9, 0.3, 1.0, 0.0),
        Score(0.6, 0.7, 0.6, 0.9),
        {name: Score(0.88, 0.31, 0.98, 0.1) for name in LAYERS},
        {name: Score(0.7, 0.6, 0.7, 0.6) for name in LAYERS},
    )
    steps = (20, 40, 60)
    run = Training(
        loss=[(step, 1 / step) for step in steps],
        accuracy=[(0, 0.5), (60, 0.9)],
        kurtosis={name: [(step, 2 + 100 / step) for step in steps] for name in LAYERS},
        targets=dict.fromkeys(LAYERS, 2.5),
        norms={name: [(step, 1 / step) for step in steps] for name in ("kurtosis_grad_norm", "task_grad_norm")},
    )
    ends = {
        "fp32": {"accuracy": 0.9, "batch_1": 10.0},
        "simulated": {"accuracy": 0.89},
        "deployed": {"accuracy": 0.88, "batch_1": 5.0},
    }
    wide = report.Table(["layer", *(f"column {index}" for index in range(12))], [[LAYERS[0], *["1.2345"] * 12]] * 3)
    return [
        report.Section("Statistics", "text " * 40, (charts.kurtosis(models, run.targets), charts.outliers(models))),
        report.Section("SQNR", figures=tuple(charts.sqnr(models, way) for way in WAYS)),
        report.Section("Histograms", figures=tuple(charts.histograms(models, 4))),
        report.Section(
            "Activations", figures=(charts.activation_ranges(seen, ""), charts.activation_sqnr(seen, "after"))
        ),
        report.Section("Sensitivity", figures=tuple(charts.sensitivity({"before": costs, "after": costs}))),
        report.Section("Run", figures=(*training_charts.training(run), training_charts.trade_off(ends)), table=wide),
    ]


# The page in two frames of a script's page; the script is the test's, the page's own policy would not let one run.
PROBE = """<!DOCTYPE html><body style="margin:0"><script>
const wait = frame => new Promise(done => frame.addEventListener('load', () => setTimeout(done, 50)));
async function look(width) {
  const frame = document.createElement('iframe');
  frame.style = `width:${width}px;height:900px;border:0`;
  frame.srcdoc = PAGE;
  document.body.append(frame);
  await wait(frame);
  const page = frame.contentDocument, root = page.documentElement, found = {inner: root.clientWidth};
  found.scroll = Math.max(root.scrollWidth, page.body.scrollWidth);
  found.beyond = [...page.querySelectorAll('body *')].filter(e => !e.closest('.table *') && !e.closest('svg *')
    && e.getBoundingClientRect().right > root.clientWidth + 1).map(e => e.tagName);
  found.figures = [...page.querySelectorAll('figure > svg[role=img]')].map(svg => {
    const box = svg.getBoundingClientRect(), scale = svg.getScreenCTM().a;
    const texts = [...svg.querySelectorAll('text')];
    return {width: box.width, height: box.height, label: svg.getAttribute('aria-label'), texts: texts.length,
      smallest: scale * Math.min(...texts.map(t => parseFloat(frame.contentWindow.getComputedStyle(t).fontSize))),
      cut: texts.filter(t => { const b = t.getBoundingClientRect();
        return b.left < box.left - 3 || b.right > box.right + 3 || b.top < box.top - 3 || b.bottom > box.bottom + 3;
      }).map(t => t.textContent)};
  });
  found.headings = [...page.querySelectorAll('h1,h2,h3,h4')].map(h => +h.tagName[1]);
  found.tables = [...page.querySelectorAll('.table')].map(t => [t.clientWidth, t.scrollWidth]);
  found.ids = [...page.querySelectorAll('[id]')].map(e => e.id);
  found.links = [...page.querySelectorAll('nav a')].map(a => !!page.getElementById(a.getAttribute('href').slice(1)));
  found.requests = frame.contentWindow.performance.getEntriesByType('resource').map(e => e.name);
  return found;
}
(async () => {
  const found = {};
  for (const width of [390, 1280]) found[width] = await look(width);
  const out = document.createElement('pre');
  out.id = 'found';
  out.textContent = JSON.stringify(found);
  document.body.replaceChildren(out);
})();
</script></body>"""


def in_browser(page, tmp_path):
    """What the browser makes of `page` in a frame of 390 and of 1280 pixels."""
    wrapper = tmp_path / "wrapper.html"
    literal = json.dumps(page).replace("</", "<\\/")
    wrapper.write_text(PROBE.replace("PAGE", literal), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [CHROMIUM, *flags, "--window-size=1400,1000", "--virtual-time-budget=20000", "--dump-dom", wrapper.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    match = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match, f"the page did not load: {done.stdout[:500]} {done.stderr[-500:]}"
    return {int(width): found for width, found in json.loads(html.unescape(match[1])).items()}


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH")
def test_in_a_browser_every_figure_is_there_and_nothing_overflows(tmp_path):
    sections = every_section()
    figures = [figure for section in sections for figure in section.figures]
    report.write(tmp_path / "report.html", "A report of a model-with-a-rather-long-name", "subtitle", sections)
    seen = in_browser((tmp_path / "report.html").read_text(encoding="utf-8"), tmp_path)
    for width, found in seen.items():
        assert abs(found["inner"] - width) <= 20, "a scroll bar at most"
        assert found["scroll"] <= found["inner"], f"the page scrolls sideways at {width}"
        assert found["beyond"] == []
        assert found["requests"] == []
        assert [figure["label"] for figure in found["figures"]] == [figure.caption for figure in figures]
        for figure in found["figures"]:
            assert figure["width"] >= 300, figure
            assert figure["height"] >= 150, figure
            assert figure["texts"] >= 3, figure
            assert figure["smallest"] >= 7, figure
            assert figure["cut"] == [], figure
        assert found["headings"] == [1] + [2] * len(sections)
        assert found["links"] == [True] * len(sections)
        assert len(found["ids"]) == len(set(found["ids"]))
    (inner, content), *_ = seen[390]["tables"]
    assert content > inner > 300, "a wide table scrolls in its own box"
