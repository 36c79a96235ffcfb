"""bfloat16 and compiled nets: where they are possible, and a plain word where they are not.

    acceleration.require(training, device)                  # RunError if it cannot be done
    with acceleration.computing(training, device): ...      # the forward pass, in the recipe's precision

Neither pays for every net on every processor: docs/training.md has what was measured.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor, nn

from marwright.errors import RunError
from marwright.learning.tables import Training

COMPILERS = ("g++", "clang++", "c++")


def require(choice: Training, device: torch.device) -> None:
    """`RunError` where this machine cannot compute as the recipe says."""
    if choice.precision == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise RunError(
            f"training.precision is bfloat16, and {torch.cuda.get_device_name(device)} does not compute in it",
            hint='precision = "float32" under [training]',
        )
    if choice.compile and device.type == "cpu" and compiler() is None:
        raise RunError(
            f"training.compile is true, and there is no C++ compiler (looked for {', '.join(COMPILERS)}, and $CXX)",
            hint="install one, or compile = false under [training]",
        )


def compiler() -> str | None:
    """The C++ compiler that torch would use for a CPU."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else list(COMPILERS)
    return next((found for name in names if (found := shutil.which(name))), None)


def layout(net: nn.Module, device: torch.device) -> torch.memory_format:
    """How pictures lie in memory: channels last, which convolutions are fastest with.

    But not for a strided 1×1 convolution of few channels on a CPU: torch 2.14 (oneDNN, AVX-512) writes past its memory
    in the backward pass of one with 4 channels in channels-last, with two threads. 16 and more were sound; nothing
    between them was looked at alone.
    """
    narrow = any(
        isinstance(one, nn.Conv2d) and one.kernel_size == (1, 1) and max(one.stride) > 1 and one.in_channels < 16
        for one in net.modules()
    )
    return torch.contiguous_format if narrow and device.type == "cpu" else torch.channels_last


def computing(choice: Training, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The forward pass in it: matrices and kernels in bfloat16 where the recipe says so, weights stay float32."""
    if choice.precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def called(net: nn.Module, choice: Training) -> Callable[[Tensor], Tensor]:
    """`net`, or the same weights as one compiled function of any batch size where the recipe says so.

    Compilation happens at the first batch; `RunError` says what the compiler said.
    """
    if not choice.compile:
        return net
    made = torch.compile(net, dynamic=True)

    def call(x: Tensor) -> Tensor:
        try:
            out: Tensor = made(x)
        except Exception as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            first = str(error).strip().splitlines()
            raise RunError(
                f"the net cannot be compiled here: {first[0] if first else type(error).__name__}",
                hint="compile = false under [training]",
            ) from error
        return out

    return call
