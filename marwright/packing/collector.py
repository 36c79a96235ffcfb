"""The archive of the model `feedback`, which takes labels: `feedback-<version>.mar`, with no net in it.

    record, built = collector.write(store)

It is built, proved and numbered as every archive is: the same handlers give the same version. Its golden examples are
labels to look at and not to keep (`check`), so a live server can be asked them, too.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from marwright.packing import archive, records
from marwright.packing.container import Content
from marwright.packing.records import ArchiveRecord

HANDLER = "handlers.feedback_collector"
CONFIG = {
    "minWorkers": 1,
    "maxWorkers": 1,
    "batchSize": 32,  # requests that share one wait for the disk
    "maxBatchDelay": 1,  # ms, the least: who comes while the disk is waited for is in the next batch anyway
    "responseTimeout": 60,
    "startupTimeout": 120,
}
_REQUEST = "0b0e5b02-8a56-4bb1-9d2a-5f6d7e0c1a11"
GOLDEN: tuple[dict[str, Any], ...] = (
    {"request": _REQUEST, "label": "cat"},
    {"request": _REQUEST, "label": 17.25, "instance": 3, "source": "annotators", "time": 1700000000},
    {"request": _REQUEST, "label": "grüner Tee", "time": "2024-02-29T12:00:00+01:00", "uid": "first"},
    {"labels": [{"request": _REQUEST, "label": "cat", "instance": index} for index in range(5)]},
)


def write(store: Path, *, used: Collection[str] = ()) -> tuple[ArchiveRecord, bool]:
    """Build the next version: (record, True), or (the same content's record, False). `used`: as in `archive.write`."""
    facts = {"run": "", "format": "", "workers": CONFIG["minWorkers"], "metrics": {}}
    return archive.build(store, records.COLLECTOR, members(), facts, handler=HANDLER, used=used)


def members() -> dict[str, Content]:
    """Everything but MAR-INF, by its path in the archive."""
    found = archive.package()
    found["model-config.yaml"] = yaml.safe_dump(CONFIG, sort_keys=False).encode()
    entries = []
    for number, example in enumerate(GOLDEN):
        name, count = f"{number:02}.json", len(example.get("labels", [example]))
        found[f"golden/{name}"] = json.dumps({**example, "check": True}, ensure_ascii=False).encode()
        entries.append({"file": name, "kind": "json", "answer": {"checked": count}})
    found["golden/golden.json"] = (json.dumps(entries, indent=1, sort_keys=True) + "\n").encode()
    return found
