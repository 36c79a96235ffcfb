"""What production has taught, parted by time: the older examples are learned from, the latest are the judge's alone.

    chosen = selection.select(store.labelled("digits"), policy.learn, classes=("0", "1"), learned=digests)
    dataset = data.load(recipe, feedback=selection.examples(chosen, recipe))
    chosen = selection.apart(chosen, recipe, dataset)      # the judge's examples that nobody has learned from
    inputs, labels = selection.arrays(chosen.judge, image, recipe.limits, chosen.classes)

An example is a picture, however many requests brought it. Which of a source's examples its share keeps goes by their
hash, not by their time: whoever sends a thousand at once has neither the first word nor the last.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from handlers.errors import BadRequest
from handlers.spec import ImageInput, Limits
from marwright.errors import DataError
from marwright.feedback.values import Labelled
from marwright.learning import splitting
from marwright.learning.dataset import Dataset
from marwright.learning.examples import Body, Examples, pixels
from marwright.learning.recipe import Recipe
from marwright.release.policy import LearnPolicy

CHUNK = 4096
SOURCES = 3
"""Whose left-out examples a note names; it counts the others'."""


@dataclass(frozen=True)
class Selection:
    """Each picture once, oldest answer first. `learned` are digests of what the champion has learned from already."""

    learn: tuple[Labelled, ...]
    judge: tuple[Labelled, ...]
    classes: tuple[str, ...]
    learned: frozenset[str]
    notes: tuple[str, ...] = ()

    @property
    def fresh(self) -> tuple[Labelled, ...]:
        """What the champion has not learned from: the later part of `learn`, and `judge`."""
        return (*(one for one in self.learn if one.digest not in self.learned), *self.judge)


def select(
    labelled: Iterable[Labelled],
    policy: LearnPolicy,
    *,
    classes: Sequence[str],
    learned: Collection[str] = (),
    seed: int = 0,
) -> Selection:
    """What is learned from, and what judges. Pure: files are neither read nor looked for.

    Only examples with a kept picture and a known class count. Of what is not in `learned`, the latest
    `policy.judge_share` by the time of the answer is the judge's, everything else is learned from; the time of a
    picture that came more than once is that of its first request. In both, no more than `policy.max_source_share` of a
    class's new examples are of one source; where a class has fewer sources than that takes, none of them count.
    """
    known, learned = frozenset(classes), frozenset(learned)
    usable, notes = _usable(labelled, known)
    pictures, disputes = _pictures(usable, policy)
    notes += disputes
    old = [one for one in pictures if one.digest in learned]
    new = [one for one in pictures if one.digest not in learned]
    judged = round(policy.judge_share * len(new))
    earlier, later = new[: len(new) - judged], new[len(new) - judged :]
    parts = []
    capped: Counter[tuple[str, str]] = Counter()
    for part in (earlier, later):
        kept = _capped(part, policy.max_source_share, seed)
        capped.update((one.label, one.source) for one in part if one.digest not in kept)
        parts.append([one for one in part if one.digest in kept])
    notes += _told(capped, policy.max_source_share)
    learn = sorted([*old, *parts[0]], key=_when)
    return Selection(tuple(learn), tuple(parts[1]), tuple(classes), learned, tuple(notes))


def examples(selection: Selection, recipe: Recipe) -> Examples:
    """What is learned from, as `data.load(feedback=…)` takes it; its validation examples are chosen by content.

    A body raises `DataError` if its file has gone, and `BadRequest`, as for what is no picture, if it is not what was
    hashed: a power cut leaves such.
    """
    index = {label: i for i, label in enumerate(selection.classes)}
    chosen = selection.learn
    parts = [
        splitting.by_content(
            one.digest,
            seed=recipe.data.split_seed,
            validation_share=recipe.data.validation_share,
            test_share=0.0,  # the judge's are the latest, and come from nowhere else
        )
        for one in chosen
    ]
    return Examples(
        names=[f"feedback/{one.digest}" for one in chosen],
        digests=[one.digest for one in chosen],
        targets=[index[one.label] for one in chosen],
        parts=parts,
        raw=lambda i: _body(chosen[i]),
        classes=selection.classes,
    )


def arrays(
    chosen: Sequence[Labelled], image: ImageInput, limits: Limits, classes: Sequence[str]
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pictures as a worker sees them (uint8 N×C×H×W), and indices of their labels (N).

    What cannot be read is left out. `DataError` where a file has gone.
    """
    index = {label: i for i, label in enumerate(classes)}
    decoded, labels = [], []
    for one in chosen:
        seen = _seen(one, image, limits)
        if seen is not None:
            decoded.append(seen)
            labels.append(index[one.label])
    inputs = np.stack(decoded) if decoded else np.empty((0, *image.shape), dtype=np.uint8)
    return inputs, np.array(labels, dtype=np.int64)


def apart(selection: Selection, recipe: Recipe, dataset: Dataset) -> Selection:
    """Without what the judge may not use: pictures that `dataset` has, however their files were written, and twins.

    Of twins among the judge's examples the first one stays; where their labels differ, none.
    """
    image = recipe.data.image()
    if image is None or not selection.judge:
        return selection
    seen = {one.digest: _hash(_seen(one, image, recipe.limits)) for one in selection.judge}
    wanted, there = {value for value in seen.values() if value}, set()
    for part in dataset.parts:
        for inputs, _ in part.batches(CHUNK):
            there |= {value for value in map(_hash, inputs.numpy()) if value in wanted}
    labels = defaultdict(set)
    for one in selection.judge:
        labels[seen[one.digest]].add(one.label)
    kept: dict[str, Labelled] = {}
    for one in selection.judge:
        value = seen[one.digest]
        if value and value not in there and len(labels[value]) == 1:
            kept.setdefault(value, one)
    gone = len(selection.judge) - len(kept)
    note = f"{gone} of the latest pictures do not judge: they are learned from, there twice, or cannot be read"
    notes = (*selection.notes, note) if gone else selection.notes
    return replace(selection, judge=tuple(kept.values()), notes=notes)


def _usable(labelled: Iterable[Labelled], known: frozenset[str]) -> tuple[list[Labelled], list[str]]:
    """Those that can be learned from, and notes on the others."""
    usable = []
    bare, strange = 0, Counter[str]()
    for one in labelled:
        if one.path is None or not one.digest:
            bare += 1
        elif one.label not in known:
            strange[one.label] += 1
        else:
            usable.append(one)
    notes = []
    if bare:
        notes.append(f"{bare} labelled answers have no picture to learn from: none was kept")
    if strange:
        named = ", ".join(f"{label!r}" for label, _ in strange.most_common(SOURCES))
        notes.append(f"{strange.total()} labels name no class of the model: {named}")
    return usable, notes


def _pictures(usable: Iterable[Labelled], policy: LearnPolicy) -> tuple[list[Labelled], list[str]]:
    """Each picture once, by its first answer, with the label that counts; oldest first."""
    by_digest: dict[str, list[Labelled]] = defaultdict(list)
    for one in sorted(usable, key=_when):
        by_digest[one.digest].append(one)
    pictures, again, differing, undecided = [], 0, 0, 0
    for members in by_digest.values():
        again += len(members) - 1
        differing += len({one.label for one in members}) > 1
        winner = _winner(members, policy.conflict)
        if winner is None:
            undecided += 1
            continue
        pictures.append(replace(members[0], label=winner.label, source=winner.source, labelled_at=winner.labelled_at))
    notes = []
    if again:
        notes.append(f"{again} labelled requests brought a picture that was there already")
    if differing:
        settled = differing - undecided
        notes.append(
            f"{differing} pictures have different labels in different requests: of {settled} the label that counts is"
            f" the {policy.conflict}, {undecided} are left out"
        )
    return pictures, notes


def _winner(members: Sequence[Labelled], conflict: str) -> Labelled | None:
    """The one whose label counts: None where labels differ and it cannot be said."""
    if conflict == "majority":
        (best, votes), *others = Counter(one.label for one in members).most_common(2)
        if others and others[0][1] == votes:
            return None
        return max((one for one in members if one.label == best), key=lambda one: one.labelled_at)
    end = max if conflict == "last" else min
    at = end(one.labelled_at for one in members)
    chosen = [one for one in members if one.labelled_at == at]
    return chosen[0] if len({one.label for one in chosen}) == 1 else None


def _capped(part: Sequence[Labelled], share: float, seed: int) -> frozenset[str]:
    """Digests that are kept: of each class, no source has more than `share` of what is kept."""
    if share >= 1:
        return frozenset(one.digest for one in part)
    groups: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for one in part:
        groups[one.label][one.source].append(one.digest)
    kept: set[str] = set()
    for sources in groups.values():
        limit = _limit(sorted(map(len, sources.values())), share)
        for digests in sources.values():
            kept.update(sorted(digests, key=lambda digest: _rank(digest, seed))[:limit])
    return frozenset(kept)


def _limit(counts: Sequence[int], share: float) -> int:
    """The largest number that no source may exceed, so that none has more than `share` of what is left."""
    low, high = 0, max(counts)
    while low < high:
        middle = (low + high + 1) // 2
        kept = [min(count, middle) for count in counts]
        if max(kept) <= share * sum(kept) + 1e-9:
            low = middle
        else:
            high = middle - 1
    return low


def _told(capped: Counter[tuple[str, str]], share: float) -> list[str]:
    """One note on what a source's share left out."""
    if not capped:
        return []
    named = [f"{count} of {label!r} from {source!r}" for (label, source), count in capped.most_common(SOURCES)]
    more = ", …" if len(capped) > SOURCES else ""
    return [
        f"{capped.total()} new examples are left out, as no source may have more than {share:g} of a class's:"
        f" {', '.join(named)}{more}"
    ]


def _when(one: Labelled) -> tuple[float, str, int]:
    return one.time, one.request, one.instance


def _rank(digest: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{digest}".encode()).digest()


def _body(one: Labelled) -> Body:
    """The picture's file, as it was hashed."""
    path = one.path or Path()
    try:
        data = path.read_bytes()
    except OSError:
        raise DataError(
            "a picture of the feedback store went while it was used", hint="the next turn reads the store again"
        ) from None
    if hashlib.sha256(data).hexdigest() != one.digest:
        raise BadRequest(400, "the file is no longer what was hashed")
    return Body(data, path.suffix)


def _seen(one: Labelled, image: ImageInput, limits: Limits) -> NDArray[Any] | None:
    """uint8 C×H×W, or None for what is no picture."""
    try:
        return pixels(_body(one).data, image, limits)
    except BadRequest:
        return None


def _hash(picture: NDArray[Any] | None) -> str:
    return "" if picture is None else hashlib.sha256(np.ascontiguousarray(picture).tobytes()).hexdigest()
