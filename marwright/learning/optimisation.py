"""Optimisers, schedules and penalties.

A schedule is a pure function of where training is and of the validation losses so far, so resuming needs no state.

    factor(Cosine(name="cosine", warmup=1), epoch=2.5, epochs=10, losses=[...])     # times lr
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from marwright.learning.tables import (
    Adam,
    Constant,
    Cosine,
    Exponential,
    InverseTime,
    Optimiser,
    Plateau,
    RmsProp,
    Schedule,
    Sgd,
    Step,
)


def optimiser(choice: Optimiser, net: nn.Module, *, l2: float) -> torch.optim.Optimizer:
    """torch's own, over what is not frozen; `l2` is on matrices and kernels alone.

    Each group has a `scale`: what `set_lr` multiplies its learning rate by. Where torch has a fused step it is used:
    one pass over a weight instead of one for each operation (an eighth of a step of a small net on a CPU).
    """
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    bias = choice.bias_lr if isinstance(choice, Sgd) else 1.0
    groups = [
        {"params": [one for one in trained if one.ndim > 1], "weight_decay": l2, "scale": 1.0},
        {"params": [one for one in trained if one.ndim <= 1], "weight_decay": 0.0, "scale": bias},
    ]
    groups = [group for group in groups if group["params"]]
    made: torch.optim.Optimizer
    if isinstance(choice, Sgd):
        made = torch.optim.SGD(groups, choice.lr, momentum=choice.momentum, nesterov=choice.nesterov, fused=True)
    elif isinstance(choice, Adam):
        kind = torch.optim.Adam if choice.name == "adam" else torch.optim.AdamW
        made = kind(groups, choice.lr, betas=(choice.beta1, choice.beta2), fused=True)
    elif isinstance(choice, RmsProp):
        made = torch.optim.RMSprop(groups, choice.lr, alpha=choice.alpha, momentum=choice.momentum)
    else:
        fused = not any(one.is_cuda for one in trained)  # torch has it for a CPU alone
        made = torch.optim.Adagrad(groups, choice.lr, lr_decay=choice.lr_decay, fused=fused)
    set_lr(made, choice.lr)
    return made


def set_lr(optimiser: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate from now on, in each group times its `scale`."""
    for group in optimiser.param_groups:
        group["lr"] = lr * group["scale"]


def factor(schedule: Schedule, *, epoch: float, epochs: int, losses: Sequence[float] = ()) -> float:
    """What lr is multiplied by at `epoch` (0 at the start, 1.5 in the middle of the second) of `epochs`.

    `losses` are the validation losses of the whole epochs behind.
    """
    whole = math.floor(epoch)
    if isinstance(schedule, Constant):
        return 1.0
    if isinstance(schedule, Step):
        return float(schedule.factor ** (whole // schedule.every))
    if isinstance(schedule, InverseTime):
        return 1.0 / (1.0 + schedule.rate * whole)
    if isinstance(schedule, Exponential):
        return float(schedule.factor**whole)
    if isinstance(schedule, Cosine):
        if epoch < schedule.warmup:
            return epoch / schedule.warmup
        share = min(1.0, (epoch - schedule.warmup) / (epochs - schedule.warmup))
        return schedule.floor + (1.0 - schedule.floor) * 0.5 * (1.0 + math.cos(math.pi * share))
    return _plateau(schedule, losses)


def penalise(parameters: Iterable[nn.Parameter], l1: float) -> None:
    """Add the gradient of l1·Σ|w| to the gradients of matrices and kernels."""
    for parameter in parameters:
        if parameter.grad is not None and parameter.ndim > 1:
            parameter.grad.add_(parameter.detach().sign(), alpha=l1)


def _plateau(schedule: Plateau, losses: Sequence[float]) -> float:
    best, bad, scale = math.inf, 0, 1.0
    for loss in losses:
        if loss < best * (1.0 - schedule.threshold):
            best, bad = loss, 0
        else:
            bad += 1
        if bad > schedule.patience:
            scale, bad = scale * schedule.factor, 0
    return scale
