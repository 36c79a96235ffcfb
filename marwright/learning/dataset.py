"""A data set that can be learned from: three disjoint parts over one store of inputs.

The store is one tensor (uint8 N×C×H×W, or float32 N×F), in memory or mapped from a file, or a chain of them; nobody who
takes batches from a `Part` can tell which.

    for positions in pieces(order(len(part), part.inputs, generator=generator), 128):
        inputs, targets = part.take(positions)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from handlers.spec import ImageInput, VectorInput
from marwright.learning.examples import Body

BLOCK_BYTES = 4 * 2**20
"""Neighbours in the store that are read together."""
WINDOW_BYTES = 256 * 2**20
"""What is shuffled at a time: random blocks from anywhere, mixed within."""


@dataclass(frozen=True)
class Chain:
    """Stores one after another, read as one: neither is copied, and each may be in memory or mapped."""

    stores: tuple[Tensor, ...]

    def __len__(self) -> int:
        return sum(map(len, self.stores))

    def __getitem__(self, row: int) -> Tensor:
        return self.index_select(0, torch.tensor([row]))[0]

    def element_size(self) -> int:
        return self.stores[0].element_size()

    def index_select(self, dim: int, rows: Tensor) -> Tensor:
        """The inputs at `rows`, in that order; `dim` is 0, as a tensor wants it."""
        first = self.stores[0]
        found = torch.empty((len(rows), *first.shape[1:]), dtype=first.dtype)
        start = 0
        for store in self.stores:
            here = (rows >= start) & (rows < start + len(store))
            found[here] = store.index_select(dim, rows[here] - start)
            start += len(store)
        return found


Inputs = Tensor | Chain


@dataclass(frozen=True)
class Part:
    """`rows` (int64, ascending) says which of `inputs` are in this part; `targets` are theirs."""

    name: str
    inputs: Inputs
    rows: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets at `positions` of this part, in that order."""
        return self.inputs.index_select(0, self.rows[positions]), self.targets[positions]

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All of the part, in order."""
        for positions in pieces(torch.arange(len(self)), size):
            yield self.take(positions)


@dataclass(frozen=True)
class Dataset:
    """What `data.load` gives. `raw(row)` is the request body of an example; `names[row]` says where it came from.

    `split` is `split.json`: which example is in which part; `own` is the digest of the recipe's own data, `new` the
    label of each newly labelled example by its digest. `digests` has the digest of each newly labelled row of the
    store; the recipe's own rows are not in it.
    """

    input: ImageInput | VectorInput
    classes: tuple[str, ...]
    target: str
    train: Part
    validation: Part
    test: Part
    digest: str
    split: Mapping[str, Any]
    names: Sequence[str]
    raw: Callable[[int], Body]
    streamed: bool = False
    notes: tuple[str, ...] = ()
    digests: Mapping[int, str] = field(default_factory=dict)

    @property
    def parts(self) -> tuple[Part, Part, Part]:
        return self.train, self.validation, self.test


def order(count: int, inputs: Inputs, *, generator: torch.Generator) -> Tensor:
    """Positions 0…count-1 in a new order that a disk can follow.

    Blocks of neighbours are shuffled, then examples within windows of many blocks. A part smaller than one window (256
    MB) is shuffled evenly. The order depends on sizes alone, so streaming and memory train alike.
    """
    row_bytes = max(1, inputs[0].numel() * inputs.element_size()) if len(inputs) else 1
    block, window = (max(1, size // row_bytes) for size in (BLOCK_BYTES, WINDOW_BYTES))
    if count <= window:
        return torch.randperm(count, generator=generator)
    blocks = pieces(torch.arange(count), block)
    mixed = torch.cat([blocks[i] for i in torch.randperm(len(blocks), generator=generator).tolist()])
    return torch.cat([part[torch.randperm(len(part), generator=generator)] for part in pieces(mixed, window)])


def pieces(positions: Tensor, size: int) -> list[Tensor]:
    """In order, `size` at a time; the last may be shorter."""
    return [positions[start : start + size] for start in range(0, len(positions), size)]
