"""When requests are due and what each of them is: pure, seeded, drawn in blocks as a run goes on.

    load = Load(model="digits", rate=2000, seconds=60, grpc_share=0.3)
    for shot in plan.shots(load, bodies=16):
        shot.after, shot.grpc, shot.pin, shot.body

The arrivals and the mix have a generator each, so that another rate or another kind of arrivals keeps the mix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from marwright.errors import SettingsError

Arrivals = Literal["constant", "poisson", "closed"]

_BLOCK = 4096


@dataclass(frozen=True, kw_only=True)
class Load:
    """What to ask of a server; SettingsError where that makes no sense."""

    model: str
    rate: float = 100.0
    """Requests a second; closed arrivals know none."""
    seconds: float = 10.0
    arrivals: Arrivals = "poisson"
    connections: int = 64
    """Of closed arrivals: how many clients, each waiting for its answer before it asks again."""
    grpc_share: float = 0.0
    pinned_share: float = 0.0
    hung: float = 5.0
    """Seconds after its due time at which a request without an answer is given up."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rate", "seconds", "connections", "hung"):
            if not getattr(self, name) > 0:
                raise SettingsError(f"{name} is {getattr(self, name)}", hint="a number above 0")
        for name in ("grpc_share", "pinned_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingsError(f"{name} is {getattr(self, name)}", hint="a share is from 0 to 1")


class Shot(NamedTuple):
    """One request to be."""

    after: float
    """Seconds after the start at which it is due; 0 for closed arrivals."""
    grpc: bool
    pin: float | None
    """None: the default URL. Else a point in [0, 1) that picks one of the versions that can be pinned by then."""
    body: int


def shots(load: Load, bodies: int) -> Iterator[Shot]:
    """Every request of a run, in order of its due time; without end for closed arrivals."""
    arrivals, mix = np.random.default_rng(load.seed).spawn(2)
    start, at = 0, 0.0
    while True:
        if load.arrivals == "poisson":
            after = at + np.cumsum(arrivals.exponential(1 / load.rate, _BLOCK))
            at = float(after[-1])
        elif load.arrivals == "constant":
            after = np.arange(start, start + _BLOCK) / load.rate
        else:
            after = np.zeros(_BLOCK)
        start += _BLOCK
        grpc = mix.random(_BLOCK) < load.grpc_share
        pinned = mix.random(_BLOCK) < load.pinned_share
        points = mix.random(_BLOCK)
        which = mix.integers(bodies, size=_BLOCK)
        columns = (after.tolist(), grpc.tolist(), pinned.tolist(), points.tolist(), which.tolist())
        for when, over_grpc, is_pinned, point, body in zip(*columns, strict=True):
            if when >= load.seconds:
                return
            yield Shot(when, over_grpc, point if is_pinned else None, body)
