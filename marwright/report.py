"""How a report looks: one HTML file that needs nothing else, with its plots inside as SVG.

    page = Report("digits-3f2a9c0d41b7", subtitle="Handwritten digits")
    page.section("Scores").table(("class", "recall"), [("7", 0.98)])
    page.figure(figure, alt="confusion matrix")      # a matplotlib Figure
    path.write_text(page.html())

Same content, same bytes. Text is escaped, whoever it came from.
"""

from __future__ import annotations

import base64
import html
import io
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, ACCENT, SECOND, FAINT = "#1f2933", "#2166ac", "#d6604d", "#c5ced8"
"""Colours of plots: text and axes, the first and second line, the grid."""

Cell = str | float | int | None

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2933; background: #fff; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.subtitle, figcaption, .note { color: #52606d; } .note { font-size: .9rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; }
.tile { border: 1px solid #e4e7eb; border-radius: .5rem; padding: .6rem 1rem; min-width: 8rem; }
.tile b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #e4e7eb; text-align: left; vertical-align: top; }
td.number, th.number { text-align: right; }
figure { margin: .8rem 0; } figure img { max-width: 100%; height: auto; }
.gallery { display: flex; flex-wrap: wrap; gap: .8rem; } .gallery figure { margin: 0; width: 7rem; font-size: .8rem; }
.gallery img { width: 6rem; height: 6rem; object-fit: contain; image-rendering: pixelated; background: #f5f7fa; }
.gallery.large figure { width: 14rem; } .gallery.large img { width: 14rem; height: auto; }
.gallery.wide figure { width: 29rem; max-width: 100%; font-size: .9rem; }
.gallery.wide img { width: 100%; height: auto; image-rendering: auto; background: none; }
"""


class Report:
    """A page that grows from top to bottom; every method but `html` returns the report itself."""

    def __init__(self, title: str, *, subtitle: str = "") -> None:
        self._title = title
        self._parts = [f"<h1>{_text(title)}</h1>"]
        if subtitle:
            self._parts.append(f'<p class="subtitle">{_text(subtitle)}</p>')

    def section(self, title: str) -> Report:
        return self._add(f"<h2>{_text(title)}</h2>")

    def paragraph(self, text: str) -> Report:
        return self._add(f'<p class="note">{_text(text)}</p>')

    def tiles(self, values: Iterable[tuple[str, Cell]]) -> Report:
        """A few headline numbers."""
        tiles = "".join(f'<div class="tile"><b>{_text(_shown(value))}</b>{_text(name)}</div>' for name, value in values)
        return self._add(f'<div class="tiles">{tiles}</div>')

    def table(self, head: Sequence[str], rows: Iterable[Sequence[Cell]]) -> Report:
        """Numbers stand to the right."""
        body = [list(row) for row in rows]
        numeric = [
            bool(body) and all(isinstance(row[i], int | float) or row[i] is None for row in body)
            for i in range(len(head))
        ]
        lines = [_row("th", head, numeric), *(_row("td", row, numeric) for row in body)]
        return self._add(f'<div class="scroll"><table>{"".join(lines)}</table></div>')

    def figure(self, figure: Figure, *, alt: str, caption: str = "") -> Report:
        return self._add(_figure(_uri(svg(figure), "image/svg+xml"), alt, caption))

    def gallery(self, pictures: Iterable[tuple[bytes, str, str]], *, size: Literal["", "large", "wide"] = "") -> Report:
        """Pictures side by side, small ones unless `size` says otherwise: bytes, MIME type, what to say below."""
        shown = "".join(_figure(_uri(data, mime), caption, caption) for data, mime, caption in pictures)
        return self._add(f'<div class="{f"gallery {size}".strip()}">{shown}</div>')

    def html(self) -> str:
        body = "\n".join(self._parts)
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{_text(self._title)}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
        )

    def _add(self, part: str) -> Report:
        self._parts.append(part)
        return self


def axes(width: float = 6.4, height: float = 3.6, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure in our colours and its axes, without a window system."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    found = list(figure.subplots(1, columns, squeeze=False)[0])
    for one in found:
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(colors=INK)
        one.grid(color=FAINT, linewidth=0.5)
        one.set_axisbelow(True)
    return figure, found


def svg(figure: Figure) -> bytes:
    """The figure as SVG: no date and no random ids, text as text."""
    import matplotlib as mpl

    stream = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "marwright", "svg.fonttype": "none"}), warnings.catch_warnings():
        # Labels in a script that the plotting font lacks: the browser has it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


def _figure(source: str, alt: str, caption: str) -> str:
    below = f"<figcaption>{_text(caption)}</figcaption>" if caption else ""
    return f'<figure><img src="{source}" alt="{_text(alt)}">{below}</figure>'


def _uri(data: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def _row(tag: str, cells: Sequence[Cell], numeric: Sequence[bool]) -> str:
    marked = (
        f'<{tag} class="number">{_text(_shown(cell))}</{tag}>' if number else f"<{tag}>{_text(_shown(cell))}</{tag}>"
        for cell, number in zip(cells, numeric, strict=True)
    )
    return f"<tr>{''.join(marked)}</tr>"


def _shown(value: Cell) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _text(text: str) -> str:
    return html.escape(text, quote=True)
