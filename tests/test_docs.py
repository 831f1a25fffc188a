"""The site builds without a warning, and every relative link of every page leads to something."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = [target for target, _ in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in target]
    missing = [target for target in links if not (page.parent / target).exists()]
    assert not missing


def test_the_site_builds_and_has_every_page(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for page in (ROOT / "docs").rglob("*.md"):
        built = (tmp_path / "site" / page.relative_to(ROOT / "docs")).with_suffix(".html")
        assert built.is_file(), page
    text = (tmp_path / "site/api.html").read_text(encoding="utf-8")
    for name in ("Predictor", "KurtosisQAT", "export_folder"):
        assert re.search(rf"id=\"ernie_kqat\.[a-z_.]*{name}\"", text)
    assert "cdn" not in text
