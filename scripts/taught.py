"""What the feedback store says to a turn of `retrain`: what is new, whether to learn, and who judges.

with taught.opened(places) as store:
    fed = taught.ingested(places, chosen, limits, store, champion, say)
    decision = trigger.should_retrain(taught.facts(champion, news, fed), limits.trigger)
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import filelock
import numpy as np
import torch

from marwright import cli, files
from marwright.errors import RolledBack
from marwright.feedback import judge, selection, trigger
from marwright.feedback.database import VARIABLE
from marwright.feedback.drift import Look
from marwright.feedback.judge import Judgement
from marwright.feedback.selection import Selection
from marwright.feedback.store import Labelled, Store
from marwright.feedback.trigger import Facts
from marwright.learning import graphs, reference
from marwright.learning.additions import Difference
from marwright.learning.dataset import Dataset, Part
from marwright.learning.examples import Examples
from marwright.learning.recipe import Recipe
from marwright.packing import golden
from marwright.packing.records import ArchiveRecord
from marwright.release.policy import Policy
from marwright.runs import Run
from marwright.settings import Places
from scripts import drift

Say = Callable[[str], None]

REFUSED = "refused"
REFERENCE = 100
"""Of the latest requests, for a reference of their own; with fewer it is the run's validation part."""
LAST = 30
"""Turns in vain that are looked back at."""


@dataclass(frozen=True)
class Champion:
    """The version that should be answering, and the run that it came from where that is still there."""

    record: ArchiveRecord
    run: Run | None
    released_at: float
    """Unix seconds."""
    preferred: bool = False
    """Somebody went back to it, although there was another."""

    @cached_property
    def learned(self) -> Mapping[str, str]:
        """Labels of the newly labelled examples that it has learned from, by their digests."""
        return dict(self.run.json("split.json", made_by="train").get("new", {})) if self.run else {}


@dataclass(frozen=True)
class Tried:
    """The last time that something was learned from the champion in vain."""

    at: float
    """When its labels were taken in, Unix seconds."""
    labels: int | None = None
    """How many were new then."""
    own: str = ""
    """What the recipe's own data, and the folder of new examples, were."""
    folder: str = ""
    times: int = 0


@dataclass(frozen=True)
class Fed:
    """What the feedback store has for this turn."""

    store: Store
    labelled: list[Labelled]
    selection: Selection
    looks: list[Look]
    """At the champion's requests, newest first."""
    began: float
    """When the labels were taken in, Unix seconds."""
    tried: Tried | None = None


@contextlib.contextmanager
def alone(places: Places, model: str) -> Iterator[bool]:
    """Whether no turn of this model is under way; while this is held, none begins. The system frees the lock of one
    that was killed."""
    places.store.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(places.store / f".retrain-{model}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


@contextlib.contextmanager
def opened(places: Places) -> Iterator[Store | None]:
    """The feedback store; None where nothing was ever collected: no folder, and no database is named."""
    if places.database is None and VARIABLE not in os.environ and not places.feedback.is_dir():
        yield None
        return
    with Store.open(places.feedback, places.database) as store:
        yield store


def ingested(places: Places, chosen: Recipe, limits: Policy, store: Store, champion: Champion, say: Say) -> Fed:
    """Take in what the workers left, look for drift, and choose what is learned from and what judges."""
    began = time.time()
    taken = store.ingest(places.spool)
    if taken.requests or taken.labels or taken.damaged:
        say(f"{taken.requests} requests and {taken.labels} labels taken in")
    if taken.unknown:
        say(f"{taken.unknown} labels are of requests that nobody captured")
    store.prune(
        days=limits.keep.days, unlabelled_days=limits.keep.unlabelled_days, model=chosen.name, spool=places.spool
    )
    looks = drift.looked(places, store, champion.record, limits.trigger)
    if looks and looks[0].drifted:
        say(f"drift: {', '.join(test.name for test in looks[0].tests if test.drifted)}")
    labelled = store.labelled(chosen.name, conflict=limits.learn.conflict)
    classes = golden.spec(places.store / champion.record.file).classes
    picked = selection.select(labelled, limits.learn, classes=classes, learned=champion.learned)
    for note in picked.notes:
        say(note)
    return Fed(store, labelled, picked, looks, began, _tried(store, chosen.name, champion))


def _tried(store: Store, model: str, champion: Champion) -> Tried | None:
    notes = [note for note in store.notes(REFUSED, model, last=LAST) if note.get("champion") == champion.record.run]
    found = None
    if notes:
        last = notes[0]
        times = len({note["run"] for note in notes})
        found = Tried(last["began"], last["labels"], last["own"], last["folder"], times)
    if champion.preferred and (found is None or found.at < champion.released_at):
        # What was known then led to a version that was not wanted.
        return Tried(champion.released_at, times=1)
    return found


def refused(
    fed: Fed,
    champion: Champion,
    run: Run,
    dataset: Dataset,
    *,
    by: Literal["judge", "gate"],
    judgement: Judgement | None = None,
) -> None:
    """Remember that this was in vain: the same labels, the same folder, the same data are no reason again."""
    fed.store.note(
        REFUSED,
        champion.record.model,
        {
            "run": run.id,
            "champion": champion.record.run,
            "by": by,
            "began": fed.began,
            "labels": len(_new(champion, fed)),
            "own": str(dataset.split["own"]),
            "folder": _folder(champion, fed, dataset),
            **({"judgement": judgement.to_dict()} if judgement else {}),
        },
    )


def _new(champion: Champion, fed: Fed) -> list[Labelled]:
    """What the champion has not learned from, or with another label."""
    again = [each for each in fed.selection.learn if champion.learned.get(each.digest, each.label) != each.label]
    return [*fed.selection.fresh, *again]


def _folder(champion: Champion, fed: Fed, dataset: Dataset) -> str:
    """Digest of the new examples that are not from the store and that the champion has not learned from; "" of none."""
    ours = {each.digest for each in fed.selection.learn}
    given = dataset.split["new"].items() - champion.learned.items()
    lines = sorted(f"{digest} {label}" for digest, label in given if digest not in ours)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest() if lines else ""


def examples(fed: Fed | None, chosen: Recipe) -> Examples | None:
    """What is learned from; rows of numbers are collected and watched, and not learned from."""
    if fed is None or chosen.data.image() is None or not fed.selection.learn:
        return None
    return selection.examples(fed.selection, chosen)


def apart(fed: Fed | None, chosen: Recipe, dataset: Dataset) -> Fed | None:
    """With what is really learned from, now that the data are there, and without the pictures that the judge may not
    use."""
    if fed is None:
        return None
    joined = dataset.split["new"]
    learn = tuple(each for each in fed.selection.learn if each.digest in joined)
    return replace(fed, selection=selection.apart(replace(fed.selection, learn=learn), chosen, dataset))


def facts(champion: Champion, news: Difference, fed: Fed | None, dataset: Dataset | None = None) -> Facts:
    """`news` are of the whole data set: what is not from the store is from the folder. What was learned from in vain
    is no news."""
    if fed is None:
        return Facts(0, news.added, news.own, champion.released_at, time.time())
    new, tried = _new(champion, fed), fed.tried
    count, folder, own = len(new), 0, news.own
    if tried is not None:
        # Late labels may bear any time, and a corrected one makes none more.
        late = count - tried.labels if tried.labels is not None else 0
        count = max(late, sum(each.labelled_at > tried.at for each in new))
    if dataset is not None:
        taught = sum(champion.learned.get(each.digest) != each.label for each in fed.selection.learn)
        folder = max(0, news.added - taught)
        if tried is not None and folder and _folder(champion, fed, dataset) == tried.folder:
            folder = 0
        own = own and (tried is None or tried.own != dataset.split["own"])
    return Facts(
        labels=count,
        folder=folder,
        own=own,
        released_at=champion.released_at,
        now=time.time(),
        outcomes=trigger.outcomes(fed.labelled, champion.record.version),
        looks=fed.looks,
        tried_at=tried.at if tried is not None else None,
        vain=tried.times if tried is not None else 0,
    )


def judged(limits: Policy, champion: Champion | None, run: Run, fed: Fed | None, say: Say) -> Judgement | None:
    """What the old and the new holdout say; None where production has taught nothing, or there is nobody to compare
    with: then the rollout's gate judges alone."""
    if champion is None or fed is None or not fed.selection.learn:
        return None
    if champion.run is None:
        say(f"nobody judges before the rollout: the run of {champion.record.version} is gone")
        return None
    if len(fed.selection.judge) < limits.judge.min_examples:
        say(f"only {len(fed.selection.judge)} labelled answers could judge: the rollout's gate judges alone")
        return None
    judged = judge.runs(champion.run, run, fed.selection, limits)
    for reason in judged.reasons:
        say(reason)
    return judged


def stopped(
    places: Places, champion: Champion | None, run: Run, dataset: Dataset, judged: Judgement, fed: Fed | None
) -> str:
    """The phase of a turn whose run the judge did not let pass; RolledBack where it is worse."""
    assert fed is not None
    assert champion is not None
    known = any(note["run"] == run.id for note in fed.store.notes(REFUSED, champion.record.model, last=LAST))
    refused(fed, champion, run, dataset, by="judge", judgement=judged)
    if not places.json:
        cli.print_table(*judged.table())
    if known:
        return "refused before"
    if judged.outcome == "fail":
        raise RolledBack(f"{run.id} is not released", reason=judged.reasons[0], hint="marwright feedback status")
    return "no better"


def remembered(run: Run, chosen: Recipe, fed: Fed | None) -> None:
    """What the version's requests are compared with from now on: the latest of production, where there is enough.

    Once for each run: an archive that waits for its rollout stays what it is.
    """
    mark, image = run.path / "reference.json", chosen.data.image()
    if fed is None or image is None or len(fed.selection.judge) < REFERENCE or mark.exists():
        return
    inputs, labels = selection.arrays(fed.selection.judge, image, chosen.limits, run.spec.classes)
    latest = Part("latest", torch.from_numpy(inputs), torch.arange(len(inputs)), torch.from_numpy(labels))
    reference.write(graphs.load(run), latest, run.path)
    files.write_json(mark, {"from": "production", "rows": len(inputs)})


@contextlib.contextmanager
def holdout(places: Places, chosen: Recipe, run: Run, fed: Fed | None) -> Iterator[Path | None]:
    """The old and the new holdout in one file for the rollout's gate; a killed rollout finds it there again."""
    path = holdout_path(places, chosen.name)
    image = chosen.data.image()
    if fed is None or not fed.selection.judge or image is None:
        yield None
        return
    with np.load(run.file("examples.npz", made_by="train"), allow_pickle=False) as old:
        inputs, labels = selection.arrays(fed.selection.judge, image, chosen.limits, run.spec.classes)
        merged = {"inputs": np.concatenate([old["inputs"], inputs]), "labels": np.concatenate([old["labels"], labels])}
    stream = io.BytesIO()
    np.savez(stream, inputs=merged["inputs"], labels=merged["labels"])
    with files.replacing(path) as temporary:
        temporary.write_bytes(stream.getbuffer())
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def holdout_path(places: Places, model: str) -> Path:
    return places.runs / "feedback" / f"{model}.npz"
