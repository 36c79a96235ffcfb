"""Bring a built version to answer, behind the gate, without losing a request; and back when it is worse.

`rolled_out` and `resumed` are what `retrain` calls, too.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from handlers.spec import ImageInput
from marwright import cli, files
from marwright.errors import ArchiveError, DataError, MarwrightError, RolledBack, ServerUnreachable, SettingsError
from marwright.packing import golden, records
from marwright.packing.records import COLLECTOR, ArchiveRecord
from marwright.release import journal, plan, policy, proof, reconcile, rollout, shadow, turns, verdicts
from marwright.release.journal import Journal
from marwright.release.phases import Kind, Rig, State
from marwright.release.policy import Policy
from marwright.release.reconcile import Difference
from marwright.release.server import Server
from marwright.release.shadow import Holdout, Sample
from marwright.runs import Run
from marwright.settings import Places, RolloutSettings

SETTINGS = RolloutSettings
SAMPLES = 500
"""Holdout examples that join the golden ones as requests to replay, at most."""


@dataclass(frozen=True)
class Outcome:
    """How a rollout ended well: `version` answers, `was` answered before."""

    model: str
    version: str
    phase: str
    was: str | None = None
    warm_until: float | None = None
    """Unix seconds until which `was` stays loaded; None where it does not."""


def main(settings: RolloutSettings) -> int:
    if settings.resume:
        return _resume_all(settings)
    if settings.dry_run:
        record = chosen(settings)
        limits = limits_of(settings, settings.policy, record.model)
        with journal.open(settings.store) as book:
            released = book.released(record.model)
        holdout = None if released is None else _holdout(settings, record)
        planned = plan.calls(record, released.version if released else None, limits, holdout)
        if settings.json:
            print(json.dumps([each.__dict__ for each in planned]))
        else:
            cli.print_table(("phase", "call", ""), [(each.phase, each.call, each.note) for each in planned])
        return 0
    _tell(settings, rolled_out(settings))
    return 0


def rolled_out(settings: RolloutSettings) -> Outcome:
    """The version answers when this returns; RolledBack says why it does not."""
    record = chosen(settings)
    records.check_whole(record, settings.store)
    limits = limits_of(settings, settings.policy, record.model)
    sources = {"holdout": settings.holdout, "samples": settings.samples}
    given = {name: str(path.resolve()) for name, path in sources.items() if path is not None}
    with (
        turns.only_one(settings.store, record.model, what=f"rollout of {record.model} {record.version}"),
        rig(settings, record, limits, given=given) as made,
    ):
        state = rollout.begin(made)
        if state.champion == record.version:
            proof.prove(made.client, record, made.golden(record.version), pinned=False)
            return Outcome(record.model, record.version, "settled", record.version)
        return _ended(settings, state, _with_examples(settings, made))


def resumed(settings: RolloutSettings) -> Outcome | None:
    """Go on with what was interrupted, to its end; None where nothing was. RolledBack where that is its end.

    The policy and the examples are those that it was begun with.
    """
    assert settings.model is not None
    with journal.open(settings.store) as book:
        if rollout.unfinished(book, settings.model) is None:
            return None
    with (
        turns.only_one(settings.store, settings.model, what=f"resuming a rollout of {settings.model}"),
        journal.open(settings.store) as book,
    ):
        state = rollout.unfinished(book, settings.model)
        if state is None:
            return None
        given = {name: Path(path) for name, path in state.given.items() if name in ("holdout", "samples")}
        settings = replace(settings, holdout=given.get("holdout"), samples=given.get("samples"))
        try:
            record = records.record(settings.store, state.model, state.version)
        except ArchiveError as error:
            if state.champion is None:
                raise
            record = records.record(settings.store, state.model, state.champion)
            state = replace(state, failing=state.failing or f"resumed: {error.message}")
        limits = limits_of(settings, settings.policy, state.model)
        if "policy" in state.given:
            limits = Policy.from_dict(state.given["policy"], origin="the journal")
        with rig(settings, record, limits, kind=state.kind, needs_server=False) as made:
            return _ended(settings, *_prepared(settings, state, made))


def _prepared(settings: RolloutSettings, state: State, made: Rig) -> tuple[State, Rig]:
    """An interrupted rollout as it can go on now; where it cannot, on its way back."""
    if made.server.find() is not None:
        made.server.wait_ready({}, timeout=60.0)
    elif state.next != "settled" and not state.failing:
        return replace(state, failing="resumed while TorchServe was not running", innocent=True), made
    if state.failing:
        return state, made
    try:
        return state, _with_examples(settings, made)
    except (MarwrightError, OSError) as error:
        return replace(state, failing=f"resumed: {error}", innocent=True), made


def _resume_all(settings: RolloutSettings) -> int:
    """Every model's, whatever becomes of the others'; the last error is the exit code."""
    trouble: MarwrightError | None = None
    outcomes: list[Outcome] = []
    for model in [settings.model] if settings.model else _models(settings.store):
        try:
            outcome = resumed(replace(settings, model=model))
        except MarwrightError as error:
            if trouble is not None:
                cli.tell(trouble, as_json=settings.json)
            trouble = error
        else:
            outcomes += [outcome] if outcome is not None else []
    for outcome in outcomes:
        _tell(settings, outcome)
    if trouble is not None:
        raise trouble
    if not outcomes:
        print("[]" if settings.json else "nothing to resume")
    return 0


@contextlib.contextmanager
def rig(
    places: Places,
    record: ArchiveRecord,
    limits: Policy,
    *,
    kind: Kind = "rollout",
    given: Mapping[str, str] | None = None,
    needs_server: bool = True,
) -> Iterator[Rig]:
    """What a rollout works with, less the examples; ServerUnreachable where it needs a server and none runs."""
    server = Server(places.serving, home=places.home)
    if needs_server:
        if server.find() is None:
            raise ServerUnreachable("TorchServe is not running", hint="make serve")
        server.wait_ready({}, timeout=60.0)
    patience = limits.server
    with (
        server.client(timeout=patience.answer_seconds, patience=patience.call_seconds) as client,
        journal.open(places.store) as book,
    ):
        yield Rig(
            server=server,
            client=client,
            book=book,
            store=places.store,
            config=places.config,
            policy=limits,
            challenger=record,
            kind=kind,
            given=given or {},
            progress=lambda line: print(line, file=sys.stderr, flush=True),
        )


def limits_of(places: Places, path: Path | None, model: str) -> Policy:
    """The policy file of that name, or the model's, or the default one."""
    return policy.load(path, model, folder=places.home / "policies")


def chosen(settings: RolloutSettings) -> ArchiveRecord:
    """The archive that the options name; never that of the model that takes labels."""
    found = _chosen(settings)
    if found.model == COLLECTOR:
        raise SettingsError(
            f"{COLLECTOR} has no answers that a rollout could compare",
            hint="`marwright feedback collector` loads its newest version, and loses no label",
        )
    return found


def _chosen(settings: RolloutSettings) -> ArchiveRecord:
    given = settings.version
    if given is not None and given.endswith(".mar"):
        path = Path(given)
        found = [each for each in records.records(settings.store) if each.file == path.name]
        if not found or (path.parent != Path() and path.parent.resolve() != settings.store.resolve()):
            raise ArchiveError(
                f"{given} was not built into {settings.store}", hint="make archive builds into the store"
            )
        return found[0]
    model = settings.model or only_model(settings.store)
    if given is not None:
        return records.record(settings.store, model, given)
    built = records.records(settings.store, model)
    if not built:
        raise ArchiveError(f"no archive of {model} in {settings.store}", hint="make archive")
    return built[-1]


def only_model(store: Path) -> str:
    """The one model of which there are archives, beside the one that takes labels; SettingsError where there are
    several."""
    models = sorted({each.model for each in records.records(store)} - {COLLECTOR})
    if not models:
        raise ArchiveError(f"nothing is built in {store}", hint="make archive")
    if len(models) > 1:
        raise SettingsError(f"which model? there are {', '.join(models)}", hint=f"--model {models[0]}")
    return models[0]


def _ended(settings: RolloutSettings, state: State, made: Rig) -> Outcome:
    try:
        state = rollout.run(state, made)
    except RolledBack:
        _show_verdict(settings, made.book, state)
        raise
    _show_verdict(settings, made.book, state)
    warm = state.facts.get("warm_until")
    if settings.wait and warm is not None:
        _retire_when_due(made)
        warm = None
    return Outcome(state.model, state.version, state.ended, state.champion, warm)


def _retire_when_due(made: Rig) -> None:
    """Stay until what is kept warm is retired."""
    for version, until in rollout.due(made.book, made.model).items():
        made.progress(f"{version} is kept warm until {time.strftime('%H:%M:%S', time.localtime(until))}")
        time.sleep(max(0.0, until - time.time()))
        over = Difference(made.model, version, "retire", "its time as the warm version is over")
        made.progress(reconcile.mend(over, made.server, made.client, made.book, made.policy))


def _with_examples(settings: RolloutSettings, made: Rig) -> Rig:
    """With the requests to replay and the labelled examples."""
    holdout = _holdout(settings, made.challenger)
    if settings.samples is not None:
        samples = shadow.from_folder(settings.samples)
    else:
        more = holdout.samples[:SAMPLES] if holdout else ()
        samples = [*shadow.from_golden(made.golden(made.challenger.version)), *more]
    return replace(made, samples=samples, holdout=holdout)


def _holdout(settings: RolloutSettings, record: ArchiveRecord) -> Holdout | None:
    """Labelled examples as requests: those of `--holdout`, or the test part of the challenger's run."""
    path = settings.holdout or settings.runs / record.run / "examples.npz"
    if not path.is_file():
        if settings.holdout is not None:
            raise DataError(f"there is no {path}", hint="an .npz with inputs and labels, as in runs/<run>/examples.npz")
        return None
    spec = golden.spec(settings.store / record.file)
    try:
        with np.load(path, allow_pickle=False) as opened:
            inputs, labels = opened["inputs"], opened["labels"]
    except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is no holdout: {error}", hint="an .npz with the arrays inputs and labels") from None
    whole = labels.shape == inputs.shape[:1] and len(labels) > 0 and labels.dtype.kind in "iuf"
    if not whole or inputs.shape[1:] != spec.input.shape or not np.isfinite(labels).all():
        raise DataError(
            f"{path} has inputs of shape {inputs.shape} and labels of shape {labels.shape}, {labels.dtype};"
            f" {record.model} takes inputs of shape {spec.input.shape}, and one finite label for each",
            hint="inputs N×… as the artifact takes them, labels N",
        )
    known = _labelled_with(settings, record, path)
    if known and (labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= len(known)):
        raise DataError(
            f"{path} has labels that are no classes of {record.model}:"
            f" {labels.dtype}, {labels.min()} to {labels.max()}",
            hint=f"whole numbers from 0 to {len(known) - 1}, in the order of the model's classes",
        )
    # A first look takes the first of them: they must not be sorted by class. The same order again after --resume.
    order = np.random.default_rng(0).permutation(len(labels))
    inputs, labels = inputs[order], labels[order]
    classes = (*known, *(name for name in spec.classes if name not in known))
    if isinstance(spec.input, ImageInput):
        return Holdout([Sample(_npy(one)) for one in inputs], labels, classes)
    rows = [Sample(json.dumps(one.tolist()).encode(), "application/json") for one in inputs]
    return Holdout(rows, labels, classes)


def _labelled_with(settings: RolloutSettings, record: ArchiveRecord, path: Path) -> tuple[str, ...]:
    """The classes that the labels in `path` are numbers of: those of its run, else of the version that answers.

    Not the challenger's own: one whose labels are mixed up would be judged by its own mistake.
    """
    if settings.holdout is None and path.with_name("spec.json").is_file():
        return Run(path.parent).spec.classes
    with journal.open(settings.store) as book:
        released = book.released(record.model)
    of = records.record(settings.store, record.model, released.version) if released else record
    return golden.spec(settings.store / of.file).classes


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def _show_verdict(settings: RolloutSettings, book: Journal, state: State) -> None:
    """The gate's last word on that version as a table, and as a page in the store."""
    verdict = rollout.last_verdict(book, state.model, state.version)
    if verdict is None:
        return
    path = settings.store / "verdicts" / f"{state.model}-{state.version}.html"
    where = f"verdict: {path}"
    try:
        files.write_text(path, verdicts.page(verdict, title=f"{state.model} {state.version}"))
    except OSError as error:  # the journal has it; how the rollout ended is what must be said
        where = f"the verdict's page could not be written: {error}"
    if not settings.json:
        cli.print_table(*verdicts.table(verdict))
        print(where)


def _models(store: Path) -> list[str]:
    """Models that the store or its journal knows."""
    with journal.open(store) as book:
        return sorted({each.model for each in records.records(store)} | {entry.model for entry in book.entries()})


def _tell(settings: RolloutSettings, outcome: Outcome) -> None:
    if settings.json:
        print(json.dumps(outcome.__dict__))
        return
    if outcome.was == outcome.version:
        print(f"{outcome.model} {outcome.version} answers already; its golden examples are answered rightly")
        return
    print(f"{outcome.model} {outcome.version} answers now (was {outcome.was}); the journal says: released, proven")
    if outcome.warm_until is not None:
        until = time.strftime("%H:%M:%S", time.localtime(outcome.warm_until))
        print(f"{outcome.was} stays warm until {until}: `marwright rollback` returns to it; then `marwright reconcile`")
