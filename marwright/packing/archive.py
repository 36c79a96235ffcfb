"""A `.mar`: what is in it, writing it so that the same input gives the same bytes, and proof that it loads.

    record, built = archive.write(run, artifact, recipe, store)
    records.record(store, "digits", "1.0") == record

An archive is written under a temporary name, unpacked into an empty folder, loaded by a clean process that answers its
golden examples, and only then gets its final name. `docs/mar-format.md` describes every member.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import filelock
import yaml
from model_archiver.manifest_components.manifest import Manifest, RuntimeType
from model_archiver.manifest_components.model import Model

import handlers
from marwright import files
from marwright.errors import ArchiveError, ArchiveExists, ArchiveInvalid
from marwright.learning.recipe import Recipe
from marwright.learning.tables import Serving
from marwright.packing import container, exporting, golden, records, reference, replay
from marwright.packing.container import Content
from marwright.packing.exporting import Artifact
from marwright.packing.records import ArchiveRecord
from marwright.runs import Run

MANIFEST = "MAR-INF/MANIFEST.json"
DIGESTS = "MAR-INF/digests.json"
TWIN = "twin.pt"
"""The eager net beside a compiled artifact: what explanations are computed on."""
HANDLERS = {"classification": "handlers.image_classifier", "regression": "handlers.vector_regressor"}


def write(
    run: Run,
    artifact: Artifact,
    recipe: Recipe,
    store: Path,
    *,
    version: str | None = None,
    used: Collection[str] = (),
) -> tuple[ArchiveRecord, bool]:
    """Build the next version, or `version`; (record, True), or (the same content's record, False).

    The recipe names the model and says how it is served: its `[serving]` may change without another training.
    `used` are version numbers that were given away before, whether their files are still there or not.
    Raises ArchiveExists where `version` is taken by something else, ArchiveInvalid where it does not load.
    """
    model = recipe.name
    if model == records.COLLECTOR:
        raise ArchiveError(
            f"no recipe can be called {model}: the model that takes labels is", hint="give it another name"
        )
    twin = exporting.twin(run, artifact) if recipe.serving.explain else None
    spec = replace(artifact.spec, top_k=recipe.serving.top_k, limits=recipe.limits, twin=_twin_name(artifact, twin))
    body = members(run, replace(artifact, spec=spec), recipe.serving, twin)
    twin_size = twin.path.stat().st_size if twin and TWIN in body else 0
    facts = {"run": run.id, "format": spec.format, "workers": recipe.serving.workers, "metrics": dict(spec.metrics)}
    return build(
        store,
        model,
        body,
        facts | {"twin_size": twin_size},
        handler=HANDLERS[spec.task],
        artifact=spec.artifact,
        version=version,
        used=used,
    )


def build(
    store: Path,
    model: str,
    members: Mapping[str, Content],
    facts: Mapping[str, Any],
    *,
    handler: str,
    artifact: str | None = None,
    version: str | None = None,
    used: Collection[str] = (),
) -> tuple[ArchiveRecord, bool]:
    """The archive of these members and its record, as `write`; `facts` are the record's fields that no file tells."""
    digests = _digests(members)
    content = content_digest(digests)
    body = dict(members)
    store.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(store / ".archive.lock"):  # two builds at a time must not choose one number
        same = [each for each in records.records(store, model) if each.content == content]
        same = [each for each in same if version in (None, each.version)]
        if same and (store / same[-1].file).is_file():
            return same[-1], False
        # Where only the file was lost, the same content makes the same bytes again.
        number = same[-1].version if same else _free_number(store, model, version, used)
        body[MANIFEST] = _manifest(model, number, handler, artifact)
        digests |= _digests({MANIFEST: body[MANIFEST]})
        listing = (json.dumps(digests, indent=2, sort_keys=True) + "\n").encode()
        body[DIGESTS] = listing
        file = f"{model}-{number}.mar"
        with files.replacing(store / file) as temporary:
            container.write(temporary, body)
            with ThreadPoolExecutor(1) as beside:  # a gigabyte takes a second, and the proof waits for another process
                sha256 = beside.submit(files.sha256, temporary)
                replay.prove(temporary)
            record = ArchiveRecord(
                model=model,
                version=number,
                file=file,
                sha256=sha256.result(),
                size=temporary.stat().st_size,
                bundle=hashlib.sha256(listing).hexdigest()[:16],
                content=content,
                **facts,
            )
            if same and record.sha256 != same[-1].sha256:
                raise ArchiveInvalid(
                    f"{file} was lost and cannot be built again",
                    [f"its sha256 would be {record.sha256[:12]}…, the record says {same[-1].sha256[:12]}…"],
                    hint="remove its record for good; the same command then builds the next version",
                )
        files.write_json(store / records.record_name(file), asdict(record))
    return record, True


def package() -> dict[str, Content]:
    """The handlers, by path in the archive."""
    folder = Path(str(handlers.__file__)).parent
    return {f"handlers/{path.name}": path for path in sorted(folder.glob("*.py"))}


def _free_number(store: Path, model: str, version: str | None, used: Collection[str]) -> str:
    taken = records.taken(store, model) | set(used)
    number = records.check_version(version) if version else records.next_version(taken)
    if number in taken:
        raise ArchiveExists(
            f"{model} {number} was built already, with other content", hint="leave --version out for the next one"
        )
    return number


def members(run: Run, artifact: Artifact, serving: Serving, twin: Artifact | None = None) -> dict[str, Content]:
    """Everything but MAR-INF, by its path in the archive."""
    found = package()
    found["spec.json"] = artifact.spec.to_json().encode()
    found[artifact.spec.artifact] = artifact.path
    if twin is not None and artifact.spec.twin == TWIN:
        found[TWIN] = twin.path
    found["model-config.yaml"] = model_config(serving)
    found |= golden.members(run, artifact.spec)
    found |= reference.members(run)
    return found


def model_config(serving: Serving) -> bytes:
    """TorchServe's own settings of a model; being in the archive, a rollback restores them too."""
    document = {
        "minWorkers": serving.workers,
        "maxWorkers": serving.workers,
        "batchSize": serving.batch_size,
        "maxBatchDelay": serving.max_batch_delay,
        "responseTimeout": serving.response_timeout,
        "startupTimeout": serving.startup_timeout,
        "handler": {"threads": serving.threads, **({"capture": serving.capture} if serving.capture else {})},
    }
    return yaml.safe_dump(document, sort_keys=False).encode()


def _twin_name(artifact: Artifact, twin: Artifact | None) -> str:
    """An eager artifact is its own twin."""
    if twin is None:
        return ""
    return artifact.spec.artifact if twin.path == artifact.path else TWIN


def _manifest(model: str, version: str, handler: str, artifact: str | None) -> bytes:
    """Made by the stock archiver's own classes; only the time is ours."""
    described = Model(
        model_name=model,
        serialized_file=artifact,
        handler=handler,
        model_version=version,
        config_file="model-config.yaml",
    )
    manifest = Manifest(runtime=RuntimeType.PYTHON.value, model=described)
    manifest.manifest_dict["createdOn"] = "01/01/1980 00:00:00"
    return (str(manifest) + "\n").encode()


def _digests(body: Mapping[str, Content]) -> dict[str, str]:
    return {
        name: files.sha256(content) if isinstance(content, Path) else hashlib.sha256(content).hexdigest()
        for name, content in sorted(body.items())
    }


def content_digest(digests: Mapping[str, str]) -> str:
    """Of all members but MAR-INF: two archives with the same one are one version."""
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
