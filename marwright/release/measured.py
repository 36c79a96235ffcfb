"""What each version has counted of itself, read from the server's metrics page.

    before = measured.read(client)
    ...
    figures = (measured.read(client) - before).of("digits", "1.1")     # None: not counted
    figures.failed / figures.answered, figures.histogram("handle_seconds").quantile(0.99)

TorchServe counts errors for the whole server, and requests on the default URL for no version. So the handlers count for
themselves (`handlers/metrics.py`), about once a second: what is read here may lag behind by that much (`settled`).

A version without series has not counted: its metrics are switched off, or the server's metrics file does not declare
them. That is `None` here and never zeros, which would look like health.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import unquote

from marwright.release.client import Client

PREFIX = "marwright_"
ASKED = "ts_inference_requests_total"
"""TorchServe's own: counted when a request comes in, under "default" where it names no version."""
NOT_OFFERED = 501
"""A version that does not explain has not failed when it says so."""

Key = tuple[str, str]
_K = TypeVar("_K", bound=tuple[str, ...])

_SAMPLE = re.compile(r'(\w+)\{((?:[^"{}]|"(?:[^"\\]|\\.)*")*)\}\s+(\S+)(?:\s+-?\d+)?\s*')
_LABEL = re.compile(r'(\w+)\s*=\s*"((?:[^"\\]|\\.)*)"')
_ESCAPED = {r"\\": "\\", r"\"": '"', r"\n": "\n"}


@dataclass(frozen=True)
class Histogram:
    """Observations by upper bound: `buckets` maps each bound to the observations up to it, the last bound is +Inf."""

    buckets: Mapping[float, float] = field(default_factory=dict)
    sum: float = 0.0
    count: float = 0.0

    @property
    def mean(self) -> float:
        """NaN without observations. See `bucket_mean`."""
        return self.sum / self.count if self.count else math.nan

    @property
    def observed(self) -> float:
        """As `count`, from the buckets."""
        return self.buckets.get(math.inf, 0.0)

    @property
    def bucket_mean(self) -> float:
        """From the buckets alone, each observation in the middle of its own; what lies beyond the last bound, at it.

        For short times: `sum` and `count` are metrics of their own, and one look may find one of them a second, and
        hundreds of observations, older than the other. NaN without observations.
        """
        return self._middle(0.0)

    @property
    def whole_bucket_mean(self) -> float:
        """As `bucket_mean`, of whole numbers such as batch sizes: up to 1 is 1, and from there up to 2 is 2."""
        return self._middle(1.0)

    def quantile(self, q: float) -> float:
        """As Prometheus' `histogram_quantile`: linear within a bucket, the last finite bound for what lies beyond it.

        NaN without observations, or where the buckets have no +Inf.
        """
        bounds = sorted(self.buckets)
        if math.isnan(q) or len(bounds) < 2 or bounds[-1] != math.inf or not self.buckets[math.inf]:
            return math.nan
        if q < 0 or q > 1:
            return math.copysign(math.inf, q)
        rank = q * self.buckets[math.inf]
        place = next((at for at, bound in enumerate(bounds[:-1]) if self.buckets[bound] >= rank), None)
        if place is None:
            return bounds[-2]
        end = bounds[place]
        if place == 0 and end <= 0:
            return end
        start, below = (bounds[place - 1], self.buckets[bounds[place - 1]]) if place else (0.0, 0.0)
        inside = self.buckets[end] - below
        return start + (end - start) * (rank - below) / inside if inside else math.nan

    def _middle(self, step: float) -> float:
        """`step` is the distance of a bucket's least value from the bound below it."""
        total = start = below = 0.0
        for bound, up_to in sorted(self.buckets.items()):
            total += (up_to - below) * (start if bound == math.inf else (start + step + bound) / 2)
            start, below = bound, up_to
        return total / self.observed if self.observed else math.nan


@dataclass(frozen=True)
class Figures:
    """What one version has counted; of a difference, what it has counted meanwhile."""

    counters: Mapping[tuple[str, ...], float] = field(default_factory=dict)
    """By metric (without its prefix) and the values of its labels, in the order of their names."""

    @property
    def requests(self) -> dict[tuple[str, int], float]:
        """Answers by call and HTTP status."""
        return {
            (call, int(code)): value
            for (call, code), value in self._named("requests_total", 2).items()
            if code.isascii() and code.isdigit()
        }

    @property
    def errors(self) -> dict[tuple[str, str], float]:
        """Refused and failed requests by call and kind."""
        return {(call, kind): value for (call, kind), value in self._named("errors_total", 2).items()}

    @property
    def classes(self) -> dict[str, float]:
        """Predictions by best class."""
        return {unquote(name): value for (name,), value in self._named("predictions_total", 1).items()}

    @property
    def starts(self) -> float:
        """Workers that have started."""
        return self._named("load_seconds_count", 0).get((), 0.0)

    @property
    def answered(self) -> float:
        """Predictions and explanations, refusals included: what TorchServe counts as requests."""
        return sum(value for (call, _), value in self.requests.items() if call != "describe")

    @property
    def failed(self) -> float:
        """Answers with 5xx that are the version's own fault."""
        return sum(value for (_, code), value in self.requests.items() if 500 <= code < 600 and code != NOT_OFFERED)

    @property
    def refused_share(self) -> float:
        """Of predictions, those that were refused with 4xx; NaN without any."""
        codes = {code: value for (call, code), value in self.requests.items() if call == "predict"}
        asked = sum(codes.values())
        return sum(value for code, value in codes.items() if 400 <= code < 500) / asked if asked else math.nan

    def histogram(self, name: str) -> Histogram:
        """By its name without prefix: "handle_seconds", "confidence", …; empty where there is none of that name."""
        buckets: dict[float, float] = {}
        for (bound,), value in self._named(f"{name}_bucket", 1).items():
            number = _number(bound)
            if number is not None and not math.isnan(number):
                buckets[number] = value
        return Histogram(
            dict(sorted(buckets.items())),
            self._named(f"{name}_sum", 0).get((), 0.0),
            self._named(f"{name}_count", 0).get((), 0.0),
        )

    def only(self, *metrics: str) -> Figures:
        """These metrics alone, histograms by their bare names."""
        triples = {f"{name}_{part}" for name in metrics for part in ("bucket", "sum", "count")}
        wanted = triples.union(metrics)
        return Figures({key: value for key, value in self.counters.items() if key[0] in wanted})

    def to_list(self) -> list[list[Any]]:
        """For the journal: only what is not zero. `from_list` gives it back."""
        return [[*key, value] for key, value in self.counters.items() if value]

    @classmethod
    def from_list(cls, rows: list[list[Any]]) -> Figures:
        return cls({tuple(map(str, key)): float(value) for *key, value in rows})

    def __sub__(self, earlier: Figures) -> Figures:
        """What was counted since. One counter that fell means that all began anew: the server was started again."""
        return Figures(_since(self.counters, earlier.counters))

    def _named(self, name: str, labels: int) -> dict[tuple[str, ...], float]:
        return {key[1:]: value for key, value in self.counters.items() if key[0] == name and len(key) == 1 + labels}


@dataclass(frozen=True)
class Snapshot:
    """One look at the metrics page, or the difference of two."""

    at: float
    """Seconds on the monotonic clock; of a difference, how many lie between the two."""
    versions: Mapping[Key, Figures] = field(default_factory=dict)
    asked: Mapping[Key, float] = field(default_factory=dict)
    """Requests as TorchServe counts them, by model and the version that they name, or "default"."""

    def of(self, model: str, version: str) -> Figures | None:
        """None where that version has not counted."""
        return self.versions.get((model, version))

    def asked_of(self, model: str) -> float:
        """Requests to a model, whichever version they name."""
        return sum(value for (name, _), value in self.asked.items() if name == model)

    def answered_of(self, model: str) -> float:
        """Of these, what its versions have counted an answer to."""
        return sum(figures.answered for (name, _), figures in self.versions.items() if name == model)

    def __sub__(self, earlier: Snapshot) -> Snapshot:
        """What was counted between the two; `later - earlier`."""
        return Snapshot(
            self.at - earlier.at,
            {key: figures - earlier.versions.get(key, Figures()) for key, figures in self.versions.items()},
            _since(self.asked, earlier.asked),
        )


def read(client: Client) -> Snapshot:
    """The page as it is now; a ServerError where it cannot be had."""
    return parse(client.metrics(), at=time.monotonic())


def parse(page: str, *, at: float = 0.0) -> Snapshot:
    """A page in Prometheus' text format. Lines that are no samples, and what other programs count, are passed over."""
    versions: dict[Key, dict[tuple[str, ...], float]] = {}
    asked: dict[Key, float] = {}
    for name, labels, value in _samples(page):
        key = (labels.pop("model_name", ""), labels.pop("model_version", ""))
        if not all(key):
            continue
        if name == ASKED:
            asked[key] = asked.get(key, 0.0) + value
        elif name.startswith(PREFIX):
            key = (unquote(key[0]), unquote(key[1]))
            labels.pop("Hostname", None)  # several are added up
            counter = (name.removeprefix(PREFIX), *(labels[label] for label in sorted(labels)))
            counters = versions.setdefault(key, {})
            counters[counter] = counters.get(counter, 0.0) + value
    return Snapshot(at, {key: Figures(counters) for key, counters in versions.items()}, asked)


def settled(client: Client, model: str, *, seconds: float = 2.0) -> Snapshot:
    """The page once the answers to all that was asked of that model before this call are counted; else after `seconds`.

    A request that no handler ever saw (its worker died, its queue was full) is waited for in vain.
    """
    until = time.monotonic() + seconds
    found = read(client)
    asked = found.asked_of(model) or math.inf  # TorchServe may not count
    while found.answered_of(model) < asked and time.monotonic() < until:
        time.sleep(0.1)
        found = read(client)
    return found


def _since(now: Mapping[_K, float], then: Mapping[_K, float]) -> dict[_K, float]:
    if any(now.get(key, 0.0) < value for key, value in then.items()):
        return dict(now)
    return {key: value - then.get(key, 0.0) for key, value in now.items()}


def _samples(page: str) -> Iterator[tuple[str, dict[str, str], float]]:
    for line in page.split("\n"):
        match = _SAMPLE.fullmatch(line)
        value = _number(match[3]) if match else None
        if match and value is not None and math.isfinite(value):  # a counter that is neither is no count
            yield match[1], {name: _unescaped(text) for name, text in _LABEL.findall(match[2])}, value


def _unescaped(text: str) -> str:
    return re.sub(r"\\.", lambda found: _ESCAPED.get(found[0], found[0]), text)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
