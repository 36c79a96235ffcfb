"""Batches of a part, read ahead of the training by a thread of their own where they come from a disk.

    for inputs, targets in reading.batches(part, positions, ahead=dataset.streamed): ...

What is read is the same either way. The thread gathers with numpy, which leaves torch's own threads alone and lets
go of the interpreter meanwhile. Before it gathers from a window (see `dataset.order`) it touches that window's rows
from the first to the last, so that a disk reads forwards, whatever order the batches have them in.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from marwright.learning.dataset import WINDOW_BYTES, Chain, Inputs, Part

AHEAD_BYTES = 64 * 2**20
"""Of batches that wait. Some seconds of training of a small net: more than a window takes to be touched."""
PAGE = 4096

Pair = tuple[Tensor, Tensor]


def batches(part: Part, positions: Sequence[Tensor], *, ahead: bool) -> Iterator[Pair]:
    """Inputs and targets at each of `positions`, in order; `ahead` reads them in a thread."""
    if not ahead or not positions:
        return (part.take(one) for one in positions)
    return _ahead(part, positions)


def _ahead(part: Part, positions: Sequence[Tensor]) -> Iterator[Pair]:
    row_bytes = max(1, part.inputs[0].numel() * part.inputs.element_size())
    depth = max(2, AHEAD_BYTES // (row_bytes * max(1, len(positions[0]))))
    window = max(1, WINDOW_BYTES // row_bytes)
    ready: queue.Queue[Pair | BaseException | None] = queue.Queue(maxsize=depth)
    over = threading.Event()

    def put(item: Pair | BaseException | None) -> None:
        while not over.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return

    def read() -> None:
        try:
            touched = read_rows = 0
            for number, one in enumerate(positions):
                if read_rows >= touched:
                    coming = positions[number : number + max(1, window // max(1, len(one)))]
                    touch(part.inputs, part.rows[torch.cat(list(coming))], over)
                    touched += sum(len(some) for some in coming)
                if over.is_set():
                    return
                put((gather(part.inputs, part.rows[one]), part.targets[one]))
                read_rows += len(one)
            put(None)
        except BaseException as error:  # told to the one who waits
            put(error)

    thread = threading.Thread(target=read, name="read-ahead", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        over.set()
        thread.join(timeout=60.0)


def gather(inputs: Inputs, rows: Tensor) -> Tensor:
    """`inputs.index_select(0, rows)`, by numpy alone."""
    wanted = rows.numpy()
    if not isinstance(inputs, Chain):
        return torch.from_numpy(np.take(inputs.numpy(), wanted, axis=0))
    first = inputs.stores[0]
    found = np.empty((len(wanted), *first.shape[1:]), dtype=first.numpy().dtype)
    start = 0
    for store in inputs.stores:
        here = (wanted >= start) & (wanted < start + len(store))
        found[here] = np.take(store.numpy(), wanted[here] - start, axis=0)
        start += len(store)
    return torch.from_numpy(found)


def touch(inputs: Inputs, rows: Tensor, over: threading.Event | None = None) -> int:
    """Read a byte of every page of `rows`, ascending; how many bytes that was."""
    wanted, start, read = np.unique(rows.numpy()), 0, 0
    for store in inputs.stores if isinstance(inputs, Chain) else (inputs,):
        flat = store.numpy().reshape(len(store), -1).view(np.uint8)
        here = wanted[(wanted >= start) & (wanted < start + len(store))] - start
        for first in range(0, len(here), 1024):
            if over is not None and over.is_set():
                return read
            read += flat[here[first : first + 1024], ::PAGE].size
        start += len(store)
    return read
