"""Which example is in which part: seeded, balanced by class, and by content.

Within a class, examples are ranked by sha256(seed, content). So the split does not depend on the order in which files
were found, and two files with the same bytes are always in the same part. Newly labelled examples have no rank, which
would move as more arrive: each goes where its own hash says (`by_content`), today and ever after.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence

from marwright.errors import DataError
from marwright.learning.examples import PARTS, Examples


def split(found: Examples, *, seed: int, validation_share: float, test_share: float) -> list[str]:
    """The part of each example. Parts that the data has are kept; those it lacks are taken from training.

    Shares are of all examples that get split, at least one of each class. `DataError` for a class too small to be in
    each part, or one that is missing from a part that the data brings.
    """
    parts = [part or "train" for part in found.parts]
    wanted = {
        part: share
        for part, share in (("test", test_share), ("validation", validation_share))
        if part not in found.parts
    }
    free = [i for i, part in enumerate(parts) if part == "train"]
    groups: dict[str, list[int]] = {}
    for i in free:
        groups.setdefault(found.digests[i], []).append(i)
    classes: dict[int, list[str]] = defaultdict(list)
    for digest, members in groups.items():
        classes[int(found.targets[members[0]]) if found.classes else 0].append(digest)
    small = []
    for label, digests in sorted(classes.items()):
        if len(digests) <= len(wanted):
            small.append(f"{found.classes[label] if found.classes else 'all'!r} ({len(digests)})")
            continue
        ranked = sorted(digests, key=lambda digest: hashlib.sha256(f"{seed}:{digest}".encode()).digest())
        start = 0
        for part, share in wanted.items():
            stop = min(start + max(1, round(share * len(ranked))), len(ranked) - 1)
            for digest in ranked[start:stop]:
                for i in groups[digest]:
                    parts[i] = part
            start = stop
    if small:
        raise DataError(
            f"too few different examples to be in {' and '.join(['train', *wanted])}: {', '.join(small)}",
            hint=f"each class needs at least {len(wanted) + 1}; add some, or remove the class",
        )
    _complete(found, parts)
    return parts


def by_content(digest: str, *, seed: int, validation_share: float, test_share: float) -> str:
    """The part of a newly labelled example, whatever else there is: those shares of all there will ever be."""
    place = int.from_bytes(hashlib.sha256(f"{seed}:{digest}".encode()).digest()) / 2**256
    if place < test_share:
        return "test"
    return "validation" if place < test_share + validation_share else "train"


def shared(digests: Sequence[str], parts: Sequence[str]) -> int:
    """How many examples outside train have a twin, byte for byte, in train."""
    train = {digest for digest, part in zip(digests, parts, strict=True) if part == "train"}
    return sum(digest in train for digest, part in zip(digests, parts, strict=True) if part != "train")


def _complete(found: Examples, parts: Sequence[str]) -> None:
    if not found.classes:
        return
    counts = Counter(zip(parts, (int(target) for target in found.targets), strict=True))
    missing = [
        f"{name!r} has none in {part}"
        for part in PARTS
        for label, name in enumerate(found.classes)
        if not counts[part, label]
    ]
    if missing:
        raise DataError(
            f"classes without examples: {'; '.join(missing)}",
            hint="each class needs examples in train and in test; add them, or remove the class from all parts",
        )
