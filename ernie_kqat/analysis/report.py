"""One self-contained HTML page: sections with text, SVG figures and tables. It asks for no network and runs no script."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import files

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

# Inches of a figure. On a phone its 10 point text is 11 pixels high; on a desktop two stand side by side.
WIDTH = 4.2
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#2f5d9e", "#d9822b", "#3f8f5f", "#b8433e", "#7a5aa6", "#8a8f98"
COLORS = (BLUE, ORANGE, GREEN, RED, PURPLE, GREY)
_INK, _RULE = "#2b2f36", "#c9cdd3"
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "text.color": _INK,
    "xtick.color": _RULE,
    "ytick.color": _RULE,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e8eb",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
}


@dataclass(frozen=True)
class Figure:
    """Inline SVG markup, and its caption, which is also its accessible label."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Table:
    """The first column is aligned left, the others, numbers, right."""

    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs of text (an empty line between two), figures, a table."""

    title: str
    text: str = ""
    figures: tuple[Figure, ...] = ()
    table: Table | None = None


def canvas(
    height: float = 2.9, rows: int = 1, columns: int = 1, width: float = WIDTH
) -> tuple[matplotlib.figure.Figure, list[matplotlib.axes.Axes]]:
    """A figure of `width` x `height` inches in the page's style, and its axes, row by row."""
    import matplotlib
    import matplotlib.figure

    with matplotlib.rc_context(_STYLE):
        figure = matplotlib.figure.Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)


def log_axis(axes: matplotlib.axes.Axes, which: str = "x") -> None:
    """Make the `x` or `y` axis of drawn data logarithmic, with plain numbers that do not run into each other.

    Data that are not positive, or span under half a decade, keep their linear axis.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_data_interval()
    if low <= 0 or high < 3 * low:
        return
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    decades = math.log10(high / low)
    subs = (1,) if decades > 2.5 else (1, 2, 5) if decades > 1 else (1, 2, 3, 4, 6, 8)
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def svg(figure: matplotlib.figure.Figure) -> str:
    """A figure as inline SVG: no date, no names, text as text, only those ids that it refers to itself.

    `write` makes the ids unique on the page.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    for legend in (*figure.legends, *(axes.get_legend() for axes in figure.axes)):
        if legend is not None:  # made after `canvas`, so outside its style
            legend.set_frame_on(False)
    out = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.fonttype": "none", "svg.hashsalt": "ernie_kqat"}):
        FigureCanvasSVG(figure).print_svg(out, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = out.getvalue()
    text = text[text.index("<svg") :].replace("xlink:href", "href")
    text = re.sub(r'\s*xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r"<style.*?</style>|<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    used = set(_REFERENCE.findall(text))
    text = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", text)
    return re.sub(r"\n\s*", "\n", text).strip()


def write(path: str | Path, title: str, subtitle: str, sections: Sequence[Section]) -> None:
    """Write the page, whole or not at all."""
    files.write_text(path, page(title, subtitle, sections))


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The page's HTML."""
    count = 0
    bodies = []
    for index, section in enumerate(sections):
        bodies.append(_section(index, section, count))
        count += len(section.figures)
    contents = "\n".join(f'<li><a href="#s{i}">{html.escape(s.title)}</a></li>' for i, s in enumerate(sections))
    return _PAGE.format(
        title=html.escape(title),
        subtitle=html.escape(subtitle),
        css=_CSS,
        contents=contents,
        sections="\n".join(bodies),
    )


def _section(index: int, section: Section, figures_before: int) -> str:
    parts = [f'<section id="s{index}">\n<h2>{html.escape(section.title)}</h2>']
    parts += [f"<p>{html.escape(text.strip())}</p>" for text in section.text.split("\n\n") if text.strip()]
    if section.figures:
        figures = (_figure(figures_before + i, figure) for i, figure in enumerate(section.figures))
        parts.append(f'<div class="figures">\n{"".join(figures)}</div>')
    if section.table:
        parts.append(_table(section.title, section.table))
    return "\n".join([*parts, "</section>"])


def _figure(number: int, figure: Figure) -> str:
    own = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>f{number}-", figure.svg)
    label = html.escape(figure.caption, quote=True)
    own = own.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    return f"<figure>\n{own}\n<figcaption>{html.escape(figure.caption)}</figcaption>\n</figure>\n"


def _table(title: str, table: Table) -> str:
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in table.header)
    rows = "\n".join(
        f'<tr><th scope="row">{html.escape(first)}</th>{"".join(f"<td>{html.escape(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in table.rows
    )
    label = html.escape(f"Table: {title}", quote=True)
    return (
        f'<div class="table" role="region" aria-label="{label}" tabindex="0">\n'
        f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>\n</div>"
    )


_REFERENCE = re.compile(r'(?:href="#|url\(#)([^")]*)')

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p>{subtitle}</p>
</header>
<div class="page">
<nav aria-label="Contents">
<ol>
{contents}
</ol>
</nav>
<main>
{sections}
</main>
</div>
</body>
</html>
"""

_CSS = """
:root { color-scheme: light dark; --paper: #f6f7f8; --card: #fff; --ink: #22262c; --soft: #5d646e; --rule: #dfe2e6;
  --link: #2f5d9e; --stripe: #f2f4f6 }
@media (prefers-color-scheme: dark) { :root { --paper: #15181c; --card: #1c2025; --ink: #e3e6ea; --soft: #a0a7b1;
  --rule: #31363d; --link: #8fb4ea; --stripe: #22272d } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Noto Sans", "DejaVu Sans", sans-serif }
header, .page { max-width: 1240px; margin: 0 auto; padding: 0 16px }
header { padding-top: 28px }
h1 { font-size: 1.65rem; line-height: 1.2; margin: 0 0 6px; overflow-wrap: anywhere; letter-spacing: -.01em }
header p { color: var(--soft); margin: 0; overflow-wrap: anywhere }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 0 0 8px; scroll-margin-top: 12px }
section { padding: 24px 0; border-top: 1px solid var(--rule) }
section p { max-width: 76ch; margin: 0 0 12px; overflow-wrap: anywhere }
a { color: var(--link); text-decoration-thickness: 1px; text-underline-offset: 3px }
a:focus-visible, .table:focus-visible { outline: 2px solid var(--link); outline-offset: 2px }
nav { margin: 20px 0 24px }
nav ol { margin: 0; padding-left: 2em; color: var(--soft); font-size: .95rem }
nav li { padding: 2px 0 }
main { min-width: 0 }
.figures { display: grid; grid-template-columns: minmax(0, 1fr); gap: 16px; margin: 8px 0 16px; align-items: start }
figure { margin: 0; padding: 8px; background: #fff; color: #22262c; border: 1px solid var(--rule); border-radius: 6px;
  min-width: 0 }
figure svg { display: block; width: 100%; height: auto }
figure svg * { stroke-linejoin: round; stroke-linecap: butt }
figure svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif
  !important }
figcaption { color: #5d646e; font-size: .85rem; line-height: 1.4; margin-top: 6px }
.table { overflow-x: auto; background: var(--card); border: 1px solid var(--rule); border-radius: 6px }
table { border-collapse: collapse; width: 100%; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { padding: 5px 12px; text-align: right; white-space: nowrap; font-weight: normal }
th:first-child { text-align: left }
thead th { color: var(--soft); border-bottom: 1px solid var(--rule); font-weight: 600 }
tbody tr:nth-child(even) { background: var(--stripe) }
@media (min-width: 720px) { .figures { grid-template-columns: repeat(2, minmax(0, 1fr)) }
  .figures > figure:only-child { max-width: 480px; width: 100%; grid-column: 1 / -1 } }
@media (min-width: 1080px) { .page { display: grid; grid-template-columns: 200px minmax(0, 1fr); column-gap: 36px }
  nav { position: sticky; top: 16px; align-self: start; max-height: calc(100vh - 32px); overflow-y: auto }
  section:first-child { border-top: 0 } }
@media print { .page { display: block } nav { display: none } figure { break-inside: avoid } }
"""
