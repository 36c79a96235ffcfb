"""The same archive with other numbers in its `model-config.yaml`: for trying them out, never for the model store.

    variants.write(record, folder, store, "7.0", {"workers": 2, "batch_size": 8, …})    # unpacked in `folder`

Nothing is proved by a clean process here: only the numbers differ from an archive that was.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import yaml

from marwright import files
from marwright.packing import archive, container
from marwright.packing.records import ArchiveRecord

CONFIG = "model-config.yaml"


def serving(path: Path) -> dict[str, int]:
    """What a `.mar` says of workers, batch_size, max_batch_delay and threads."""
    with zipfile.ZipFile(path) as opened:
        document = yaml.safe_load(opened.read(CONFIG))
    return {
        "workers": int(document["minWorkers"]),
        "batch_size": int(document["batchSize"]),
        "max_batch_delay": int(document["maxBatchDelay"]),
        "threads": int((document.get("handler") or {}).get("threads", 1)),
    }


def write(record: ArchiveRecord, folder: Path, store: Path, version: str, serving: Mapping[str, int]) -> ArchiveRecord:
    """The archive of `record`, unpacked in `folder`, as another version in `store` with these numbers."""
    members: dict[str, container.Content] = {
        path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()
    }
    config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    config |= {
        "minWorkers": serving["workers"],
        "maxWorkers": serving["workers"],
        "batchSize": serving["batch_size"],
        "maxBatchDelay": serving["max_batch_delay"],
        "handler": {**(config.get("handler") or {}), "threads": serving["threads"]},
    }
    manifest = files.read_json(folder / archive.MANIFEST)
    manifest["model"]["modelVersion"] = version
    changed = {
        CONFIG: yaml.safe_dump(config, sort_keys=False).encode(),
        archive.MANIFEST: json.dumps(manifest).encode(),
    }
    digests = files.read_json(folder / archive.DIGESTS)
    digests |= {name: hashlib.sha256(content).hexdigest() for name, content in changed.items()}
    changed[archive.DIGESTS] = (json.dumps(digests, indent=2, sort_keys=True) + "\n").encode()
    file = f"{record.model}-{version}.mar"
    with files.replacing(store / file) as temporary:
        container.write(temporary, members | changed)
    bundle = hashlib.sha256(changed[archive.DIGESTS]).hexdigest()[:16]
    return replace(
        record,
        version=version,
        file=file,
        sha256=files.sha256(store / file),
        size=(store / file).stat().st_size,
        bundle=bundle,
        content=archive.content_digest({name: one for name, one in digests.items() if name != archive.MANIFEST}),
        workers=serving["workers"],
    )
