"""What a load test found: a table, one JSON document, or a page with its time line."""

from __future__ import annotations

import json
from dataclasses import asdict

from marwright import cli, files
from marwright.release import journal
from marwright.release.journal import Entry, Span
from marwright.release.loadtest import report, results
from marwright.settings import LoadreportSettings

SETTINGS = LoadreportSettings


def main(settings: LoadreportSettings) -> int:
    read = results.read(settings.results)
    entries, spans = _journal(settings, str(read.about.get("model", "")))
    found = report.findings(read, entries=entries, spans=spans)
    if settings.html:
        files.write_text(settings.html, report.page(read, found))
    if settings.json:
        print(json.dumps(asdict(found), ensure_ascii=False))
        return 0
    print(f"{found.about.get('model')}: {report.asked(found.about)}")
    for head, rows in (report.table(found), report.version_table(found)):
        cli.print_table(head, [[_cell(cell) for cell in row] for row in rows])
        print()
    for one in found.failures:
        print(f"{one['times']} × {one['outcome']} {one['status'] or ''} {one['detail']}")
    for sentence in report.sentences(found):
        print(sentence)
    if settings.html:
        print(f"page: {settings.html}")
    return 0


def _journal(settings: LoadreportSettings, model: str) -> tuple[tuple[Entry, ...], tuple[Span, ...] | None]:
    """What the store's journal says of a model; nothing where it has never heard of it."""
    if not (settings.store / journal.FILE).is_file():
        return (), None
    with journal.open(settings.store) as book:
        return book.entries(model), book.spans(model) or None


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
