"""Several processes that train one net together: each takes its part of every batch, all take the same step.

    with distributed.joined() as team:              # started by torchrun, or alone: then the team is one
        run = training.train(recipe, dataset, Path("runs"))

The gradients are averaged by torch's DistributedDataParallel: gloo on CPUs, NCCL on CUDA. So that the result is that of
one process but for the order of sums, norms count the whole batch (`SharedNorm`) and dropout is drawn for the whole
batch (`SharedDropout`) in every process. Only the leader (rank 0) judges and writes.

The processes of one machine find one another through a file and talk over loopback; those of several through what
torchrun says (MASTER_ADDR, MASTER_PORT).
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from marwright.errors import RunError

MEETING = "MARWRIGHT_TRAIN_MEETING"
"""Names the folder in which the processes of one machine meet. Set by whoever starts them."""
STARTED = "MARWRIGHT_TRAIN_STARTED"
"""Names a folder of the parent's, in which the first start leaves a mark: what comes later is a restart."""
TIMEOUT = timedelta(minutes=10)
"""For one exchange between processes that all compute: sums of gradients and of norms."""
PATIENCE = timedelta(days=1)
"""For what one does while the others wait: decoding, another training's lock, judging, the report."""

T = TypeVar("T")


@dataclass
class Share:
    """One process's part of a batch of `total` examples: `here`, and what its mean loss counts beside the others'."""

    total: int
    here: slice
    weight: float


@dataclass
class Team:
    """`rank` of `size` processes; `local` numbers those of one machine."""

    rank: int = 0
    size: int = 1
    local: int = 0
    share: Share = field(default_factory=lambda: Share(0, slice(None), 1.0))
    waiting: Any = None
    """The process group (gloo, of CPU tensors) for exchanges that wait for one process's work."""

    @property
    def leader(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", self.local) if self.size > 1 else torch.device("cuda")

    def take(self, total: int) -> Share:
        """This process's part of a batch of `total`: neighbours, sizes that differ by one at most.

        A batch with fewer examples than there are processes is done by all of them, whole.
        """
        if total < self.size:
            self.share = Share(total, slice(0, total), 1.0)
        else:
            start, stop = (total * k // self.size for k in (self.rank, self.rank + 1))
            self.share = Share(total, slice(start, stop), (stop - start) * self.size / total)
        return self.share

    def told(self, value: T) -> T:
        """The leader's value, in every process; it goes through torch.save."""
        if self.size == 1:
            return value
        payload = _bytes(value) if self.leader else torch.empty(0, dtype=torch.uint8)
        length = torch.tensor([len(payload)])
        dist.broadcast(length, 0, group=self.waiting)
        held = payload if self.leader else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(held, 0, group=self.waiting)
        if self.leader:
            return value
        stream = io.BytesIO(held.numpy().tobytes())
        received: T = torch.load(stream, map_location="cpu", weights_only=True)
        return received

    def summed(self, value: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def any(self, claim: bool) -> bool:
        """Whether it holds in any of the processes."""
        if self.size == 1:
            return claim
        count = torch.tensor([int(claim)])
        dist.all_reduce(count, group=self.waiting)
        return bool(count)

    def first(self, work: Callable[[], T]) -> T:
        """`work()` in each process, one of each machine before the others: they find what it left on the disk."""
        if self.size == 1:
            return work()
        if self.local == 0:
            done = work()
            self.any(False)
            return done
        self.any(False)
        return work()

    def shared(self, net: nn.Module) -> nn.Module:
        """`net` as what is called in training; its norms and dropouts are exchanged for those that share. `RunError`
        where it has layers of chance, or norms, that cannot be."""
        if self.size == 1:
            return net
        _exchange(net, self)
        # Norms keep their running statistics alike by themselves: nothing else needs to be sent around.
        ids = [self.local] if self.device.type == "cuda" else None
        return DistributedDataParallel(net, device_ids=ids, forward_sync_buffers=False)


_team = Team()


def team() -> Team:
    """The one this process is in."""
    return _team


@contextlib.contextmanager
def joined() -> Iterator[Team]:
    """Join the team that the environment (torchrun's variables) speaks of, until the end of the block."""
    global _team
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
        yield _team
        return
    rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    made = Team(rank, size, local)
    _watch_parent()
    if made.device.type == "cuda":
        torch.cuda.set_device(made.device)
    where = os.environ.get(MEETING)
    dist.init_process_group(
        "nccl" if made.device.type == "cuda" else "gloo",
        init_method=f"file://{_meeting(Path(where))}" if where else "env://",
        rank=made.rank,
        world_size=made.size,
        timeout=TIMEOUT,
    )
    made.waiting = dist.new_group(backend="gloo", timeout=PATIENCE)
    _team = made
    try:
        yield made
    finally:
        _team = Team()
        dist.destroy_process_group()


def restarted() -> bool:
    """Whether torchrun has started this team again, because a process was lost or a machine has come. Asked once, by
    all. torchrun itself counts only the first of the two, so the parent has a mark left for it, where there is one."""
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if folder := os.environ.get(STARTED):
        mark = Path(folder) / f"started-{_team.local}"
        again = again or mark.exists()
        mark.touch()
    return _team.any(again)


class SharedNorm(nn.Module):
    """A batch norm over the whole batch, wherever its examples are. Same parameters and buffers, same names.

    Mean and variance are summed over the processes one after the other, which loses no digits; gradients come
    back by the same sums.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(self, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
        super().__init__()
        self.eps, self.momentum = norm.eps, norm.momentum
        self.weight: nn.Parameter | None = norm.weight
        self.bias: nn.Parameter | None = norm.bias
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(norm, name))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # bfloat16 is rounded once, at the end
        if self.training:
            axes = [axis for axis in range(x.ndim) if axis != 1]
            count = _sum(wide.new_full((1,), x.numel() // x.shape[1]))
            mean = _sum(wide.sum(axes)) / count
            var = _sum(((wide - mean.reshape(_column(x))) ** 2).sum(axes)) / count
            self._remember(mean.detach(), (var * count / (count - 1).clamp(min=1)).detach())
        assert mean is not None
        assert var is not None
        scale = (var + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        shift = -mean * scale if self.bias is None else self.bias - mean * scale
        return (wide * scale.reshape(_column(x)) + shift.reshape(_column(x))).to(x.dtype)

    def _remember(self, mean: Tensor, var: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(var.to(self.running_var.dtype), share)


class SharedDropout(nn.Module):
    """Drops what one process with the whole batch would drop: draws for all examples, uses those that are here."""

    def __init__(self, p: float, team: Team) -> None:
        super().__init__()
        self.p, self.team = p, team

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        share = self.team.share
        whole = torch.ones((share.total, *x.shape[1:]), device=x.device, dtype=x.dtype)
        return x * functional.dropout(whole, self.p)[share.here]


def _exchange(net: nn.Module, team: Team) -> None:
    for name, child in net.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            setattr(net, name, SharedNorm(child))
        elif isinstance(child, nn.Dropout):
            setattr(net, name, SharedDropout(child.p, team))
        elif child.training and _apart(child):
            raise RunError(
                f"the net has a {type(child).__name__}, which several processes cannot share as one would do it",
                hint="train without --nproc",
            )
        else:
            _exchange(child, team)


def _apart(layer: nn.Module) -> bool:
    """Whether its answers in training would be other ones in each process: chance, or a norm of a part of the batch."""
    if isinstance(layer, nn.modules.dropout._DropoutNd) or type(layer).__name__ == "StochasticDepth":
        return bool(layer.p)
    if isinstance(layer, nn.MultiheadAttention):
        return bool(layer.dropout)
    return isinstance(layer, nn.modules.batchnorm._BatchNorm | nn.RReLU)


class _Sum(torch.autograd.Function):
    """The sum over all processes, each of which has its own loss: the gradient is the sum of all theirs."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        summed = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        summed = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        return summed


def _sum(value: Tensor) -> Tensor:
    summed: Tensor = _Sum.apply(value)
    return summed


def _column(x: Tensor) -> tuple[int, ...]:
    return (1, -1, *(1,) * (x.ndim - 2))


def _bytes(value: Any) -> Tensor:
    stream = io.BytesIO()
    torch.save(value, stream)
    return torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8)


def _meeting(folder: Path) -> Path:
    """A file for each start: one that a lost team has used holds its addresses."""
    return folder.resolve() / f"team-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _watch_parent() -> None:
    """End this process if the one that started it ends without a word (SIGKILL): nobody would stop it any more."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()
