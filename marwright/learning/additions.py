"""Newly labelled examples beside the recipe's own data: a folder or zip of `<class>/<file>`, and what production gave.

    dataset = additions.joined(recipe, own, Path("new/digits"), None, cache=cache, progress=False)
    additions.since(dataset, run)          # Difference(own=False, added=37, gone=0): what `run` has not learned from

Every example of the own data stays in the part that it was in. A new one of a folder is in the part that its content
says, however many come later; one of production is in the part that comes with it, and what judges it is not among
them (`feedback.selection`): no version is judged on what the one before has learned from. Only content counts: a file
that got another name, or that is there already, is nothing new.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from handlers.spec import ImageInput
from marwright.errors import DataError
from marwright.learning import decoded, folders, splitting
from marwright.learning.dataset import Chain, Dataset, Part
from marwright.learning.examples import PARTS, Body, Examples
from marwright.learning.recipe import Recipe
from marwright.runs import Run

CHUNK = 4096
NAMED = 3
"""Files that a note names; it counts the others."""


@dataclass(frozen=True)
class Difference:
    """What a data set has and a run has not learned from: other own data, so many new examples; and how many went."""

    own: bool
    added: int
    gone: int

    @property
    def nothing(self) -> bool:
        """Whether there is nothing to learn. Examples that went are nothing new: the folder may be away for a while."""
        return not self.own and not self.added


def since(dataset: Dataset, run: Run) -> Difference:
    """What `dataset` has that `run` did not learn from."""
    before = run.json("split.json", made_by="train")
    learned, there = set(before.get("new", {}).items()), set(dataset.split["new"].items())
    own = dataset.split["own"] != before.get("own", run.about["data_digest"])
    return Difference(own, len(there - learned), len(learned - there))


def joined(
    recipe: Recipe, own: Dataset, where: Path | None, feedback: Examples | None, *, cache: Path, progress: bool
) -> Dataset:
    """`own`, the pictures in `where`, and `feedback`, of the same classes, in its parts ("" goes by content).

    `DataError` for classes that `own` does not have, and for rows of numbers.

    What cannot be read is left out with a note, and so is what contradicts other examples: nobody here can tell which
    label is right, and one wrong label shall not stop the others.
    """
    if not isinstance(own.input, ImageInput):
        raise DataError(
            f"recipe {recipe.name} learns from rows of numbers, newly labelled examples ({where or 'production'}) are"
            " pictures",
            hint="leave --new out; a recipe for rows is trained on its own data: `marwright archive`",
        )
    if feedback is not None and feedback.classes != own.classes:
        raise DataError(
            f"production's examples are of the classes {', '.join(feedback.classes)}, and recipe {recipe.name} of"
            f" {', '.join(own.classes)}",
            hint="a version with other classes starts with feedback of its own: give it another name",
        )
    found = _together(
        own.classes,
        folders.labelled(where, own.classes, progress=progress) if where is not None else None,
        feedback,
    )
    if not len(found):
        return replace(own, notes=(*own.notes, *found.notes))
    store = decoded.store(found, own.input, recipe.limits, cache=cache / "new" / recipe.name, progress=progress)
    for path in store.path.parent.iterdir():  # of earlier turns, and what a killed one left: a turn has new ones each
        if path.stem != store.path.stem:
            path.unlink(missing_ok=True)
    streamed = store.bytes > recipe.data.memory_limit
    inputs = torch.from_numpy(store.mapped() if streamed else store.held())
    choice = recipe.data
    parts = [
        part
        or splitting.by_content(
            digest, seed=choice.split_seed, validation_share=choice.validation_share, test_share=choice.test_share
        )
        for digest, part in zip(found.digests, found.parts, strict=True)
    ]
    kept, left_out = _kept(own, found, inputs, parts, unreadable=store.unreadable)
    notes = (*own.notes, *found.notes, *left_out)
    if not kept:
        return replace(own, notes=notes)
    made = _joined(own, found, inputs, {i: parts[i] for i in kept}, notes)
    return replace(made, streamed=own.streamed or streamed)


def _together(classes: tuple[str, ...], *sources: Examples | None) -> Examples:
    """All that there is, one after another."""
    there = [source for source in sources if source is not None]
    starts = [0, *accumulate(map(len, there))]

    def raw(i: int) -> Body:
        source = bisect_right(starts, i) - 1
        return there[source].raw(i - starts[source])

    return Examples(
        names=[name for source in there for name in source.names],
        digests=[digest for source in there for digest in source.digests],
        targets=[int(target) for source in there for target in source.targets],
        parts=[part for source in there for part in source.parts],
        raw=raw,
        classes=classes,
        notes=tuple(note for source in there for note in source.notes),
    )


def _joined(own: Dataset, found: Examples, inputs: Tensor, parts: dict[int, str], notes: tuple[str, ...]) -> Dataset:
    """`parts` says which of `found` are used, and where."""
    before = own.train.inputs
    assert isinstance(before, Tensor)
    chain, first = Chain((before, inputs)), len(before)
    names = [f"new/{name}" for name in found.names]
    made = {}
    for part in own.parts:
        here = sorted(i for i in parts if parts[i] == part.name)
        targets = torch.tensor([found.targets[i] for i in here], dtype=part.targets.dtype)
        rows = torch.tensor([first + i for i in here], dtype=torch.int64)
        made[part.name] = Part(part.name, chain, torch.cat([part.rows, rows]), torch.cat([part.targets, targets]))
    new = {found.digests[i]: own.classes[int(found.targets[i])] for i in sorted(parts)}
    lines = [own.digest, *(f"{digest} {label}" for digest, label in sorted(new.items()))]
    listed = own.split["parts"]

    def raw(row: int) -> Body:
        return own.raw(row) if row < first else found.raw(row - first)

    return replace(
        own,
        train=made["train"],
        validation=made["validation"],
        test=made["test"],
        digest=hashlib.sha256("\n".join(lines).encode()).hexdigest(),
        split={
            **own.split,
            "parts": {name: listed[name] + [names[i] for i in sorted(parts) if parts[i] == name] for name in PARTS},
            "new": new,
        },
        names=[*own.names, *names],
        raw=raw,
        notes=notes,
        digests={first + i: found.digests[i] for i in sorted(parts)},
    )


def _kept(
    own: Dataset, found: Examples, inputs: Tensor, parts: Sequence[str], *, unreadable: dict[int, str]
) -> tuple[list[int], list[str]]:
    """Indices of the new examples that say something new, and a note on each kind of the others.

    Two pictures are the same if the net sees the same, however the files were written.
    """
    alike: dict[bytes, list[int]] = defaultdict(list)
    for i in range(len(found)):
        if i not in unreadable:
            alike[_seen(inputs[i])].append(i)
    labels = _labels(own, alike)
    kept, known, twice = [], 0, 0
    against: list[int] = []
    disputed: list[int] = []
    for seen, members in alike.items():
        said = {int(found.targets[i]) for i in members}
        if seen in labels:
            against += [i for i in members if int(found.targets[i]) not in labels[seen]]
            known += sum(int(found.targets[i]) in labels[seen] for i in members)
        elif len(said) > 1:
            disputed += members
        else:
            # Of twins that were written differently, hence in different parts, training gets one and the judge none:
            # whichever came first, no version was trained on what judges another.
            kept.append(min(members, key=lambda i: (PARTS.index(parts[i]), found.digests[i], i)))
            twice += len(members) - 1
    notes = []
    if unreadable:
        notes.append(f"{len(unreadable)} new files cannot be read as pictures{_some(found, unreadable)}")
    if known:
        notes.append(f"{known} new examples were in the recipe's data already")
    if twice:
        notes.append(f"{twice} new examples were there more than once")
    if against:
        notes.append(f"{len(against)} new examples contradict the recipe's data, left out{_some(found, against)}")
    if disputed:
        notes.append(f"{len(disputed)} new examples have more than one label, left out{_some(found, disputed)}")
    return kept, notes


def _labels(own: Dataset, wanted: Iterable[bytes]) -> dict[bytes, set[int]]:
    """The labels that the own data have for those pictures, where they have them."""
    looked_for, found = set(wanted), defaultdict(set)
    for part in own.parts:
        for inputs, targets in part.batches(CHUNK):
            for picture, target in zip(inputs, targets.tolist(), strict=True):
                if (seen := _seen(picture)) in looked_for:
                    found[seen].add(int(target))
    return dict(found)


def _seen(picture: Tensor) -> bytes:
    return hashlib.sha256(picture.numpy().tobytes()).digest()


def _some(found: Examples, chosen: Iterable[int]) -> str:
    """Of a folder. Production's have hashes for names, which `marwright feedback forget` would not find in a report."""
    names = sorted(found.names[i] for i in chosen if not found.parts[i])
    return (f": {', '.join(names[:NAMED])}" if names else "") + (", …" if len(names) > NAMED else "")
