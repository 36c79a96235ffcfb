"""From a recipe to a Dataset: find, check, split, decode once.

    dataset = data.load(recipe, path=None, cache=Path("data"))
    dataset.train.take(torch.tensor([0, 1]))
    data.load(recipe, new=Path("new/digits"))        # and newly labelled examples, see `additions`

Pictures are decoded by the worker's own function, into a file under `cache` that is named by what went into it; sets up
to the recipe's `memory_limit` are read from there into memory, bigger ones stay mapped.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from handlers.spec import ImageInput, VectorInput
from marwright.errors import DataError, SettingsError
from marwright.learning import additions, bundled, decoded, splitting
from marwright.learning.dataset import Dataset, Part
from marwright.learning.examples import PARTS, Examples
from marwright.learning.recipe import Recipe
from marwright.learning.tables import BUILT_IN

CACHE = Path("runs") / "cache"


def load(
    recipe: Recipe,
    *,
    path: Path | None = None,
    new: Path | None = None,
    feedback: Examples | None = None,
    cache: Path = CACHE,
    progress: bool = True,
) -> Dataset:
    """The recipe's data. `path` (folder or zip) goes before the recipe's own; `new` holds newly labelled examples, and
    `feedback` those of production (`feedback.selection.examples`).

    `DataError` says what is wrong with the examples, all of a kind at once.
    """
    own = _load(recipe, path, cache, progress=progress)
    if new is None and feedback is None:
        return own
    where = None if new is None else new.expanduser()
    return additions.joined(recipe, own, where, feedback, cache=cache, progress=progress)


def classes(recipe: Recipe, path: Path | None = None, *, cache: Path = CACHE) -> tuple[str, ...]:
    """The labels that the recipe's own data have, in their order; none of a regressor's."""
    return find(recipe, path=path, cache=cache).classes


def _load(recipe: Recipe, path: Path | None, cache: Path, *, progress: bool) -> Dataset:
    found = find(recipe, path=path, cache=cache, progress=progress)
    image = recipe.data.image()
    if image is None:
        rows = np.asarray(found.rows, dtype=np.float32)
        if not np.isfinite(rows).all() or not np.isfinite(np.asarray(found.targets, dtype=np.float64)).all():
            raise DataError("some features or targets are not finite numbers", hint="remove or fill those rows")
        return _dataset(recipe, found, VectorInput(found.features), torch.from_numpy(rows), unreadable=frozenset())
    store = decoded.store(found, image, recipe.limits, cache=cache, progress=progress)
    if store.unreadable and recipe.data.on_unreadable == "error":
        raise decoded.refused(found, store.unreadable)
    streamed = store.bytes > recipe.data.memory_limit
    inputs = torch.from_numpy(store.mapped() if streamed else store.held())
    return _dataset(recipe, found, image, inputs, unreadable=frozenset(store.unreadable), streamed=streamed)


def find(recipe: Recipe, *, path: Path | None = None, cache: Path = CACHE, progress: bool = False) -> Examples:
    """The recipe's examples, listed and hashed, not decoded."""
    source = recipe.data.source
    where = path if path is not None else Path(recipe.data.path) if recipe.data.path else None
    if where is not None and source in BUILT_IN:
        raise SettingsError(
            f"{source} comes with scikit-learn and takes no path ({where})", hint="use the recipe images"
        )
    if where is not None:
        from marwright.learning import folders

        return folders.find(where.expanduser(), progress=progress)
    if source == "folder":
        raise DataError(
            f"recipe {recipe.name} needs examples of yours",
            hint=f"`marwright train --recipe {recipe.name} --data PATH`, a folder or zip of <class>/<file> or "
            "train/<class>/<file> and test/<class>/<file>",
        )
    if source == "digits":
        return bundled.digits()
    if source == "diabetes":
        return bundled.diabetes()
    return bundled.downloaded(source, cache)


def _dataset(
    recipe: Recipe,
    found: Examples,
    model_input: ImageInput | VectorInput,
    inputs: torch.Tensor,
    *,
    unreadable: frozenset[int],
    streamed: bool = False,
) -> Dataset:
    """`inputs` are in the order of `found`, unreadable ones being blank."""
    kept = [i for i in range(len(found)) if i not in unreadable]
    readable = Examples(
        names=[found.names[i] for i in kept],
        digests=[found.digests[i] for i in kept],
        targets=[found.targets[i] for i in kept],
        parts=[found.parts[i] for i in kept],
        raw=found.raw,
        classes=found.classes,
    )
    choice = recipe.data
    parts = splitting.split(
        readable, seed=choice.split_seed, validation_share=choice.validation_share, test_share=choice.test_share
    )
    of_part: dict[str, list[int]] = {name: [] for name in PARTS}
    for i, part in zip(kept, parts, strict=True):
        of_part[part].append(i)
    targets = torch.tensor(list(found.targets), dtype=torch.int64 if found.classes else torch.float32)
    made = {
        name: Part(name, inputs, torch.tensor(rows, dtype=torch.int64), targets[rows]) for name, rows in of_part.items()
    }
    notes = list(found.notes)
    twins = splitting.shared(readable.digests, parts)
    if twins:
        notes.append(f"{twins} examples of validation or test are, byte for byte, in train too")
    if unreadable:
        notes.append(f"{len(unreadable)} unreadable files were skipped")
    return Dataset(
        input=model_input,
        classes=found.classes,
        target=found.target,
        train=made["train"],
        validation=made["validation"],
        test=made["test"],
        digest=found.digest,
        split={
            "seed": choice.split_seed,
            "given": sorted({part for part in found.parts if part}),
            "skipped": [found.names[i] for i in sorted(unreadable)],
            "parts": {name: [found.names[i] for i in rows] for name, rows in of_part.items()},
            "own": found.digest,
            "new": {},
        },
        names=found.names,
        raw=found.raw,
        streamed=streamed,
        notes=tuple(notes),
    )
