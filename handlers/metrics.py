"""What a worker counts of itself, so that there are figures for each version and not only for the host.

    meters = Meters(context.metrics, spec, model="digits", version="1.0")
    meters.begin(load_seconds, warm_up_seconds)
    meters.batch(requests, array, outputs, inference_seconds, handle_seconds)

Of the kinds of metric that TorchServe knows, only counters add up over the workers of a version and outlive a worker
that is restarted: so everything here is a counter, histograms too (`_bucket` with its `le`, `_sum`, `_count`). A series
reaches the metrics page when the server's metrics file declares it; `METRICS` is what `deploy/metrics.yaml` must say.

A request pays for keeping a few references. Once a second a thread of its own turns what was kept into figures and
prints one line for each series that grew, so the page is up to a second behind. A metric that fails is said once in the
log and harms nobody. A killed worker (SIGKILL) takes its last second with it; SIGTERM and a normal end do not.

The server keeps the series of a version until the server ends, also after the version is gone: some 180 for a
classifier of ten labels that can explain itself (20 kB of the page), at most 91 more for more labels, 110 for a
regressor.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from handlers import ending
from handlers.errors import KINDS
from handlers.spec import ImageInput, ModelSpec

Series = tuple[str, tuple[str, ...]]
"""A counter's name and the values of its labels, in order."""

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
SPREADS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5)
"""No standard deviation of values from 0 to 1 is above 0.5."""

CALLS = ("predict", "explain", "describe")
OTHER = "(other)"
"""Stands for every class beyond the first `_NAMED`."""

_IDENTITY = ("model_name", "model_version")
_NAMED = 100
_PERIOD = 1.0
"""Seconds between two emissions."""
_PIXELS = 256
"""Pixels of one image that are looked at, at most: rows and columns are left out evenly."""
_WAITING = 8 * 2**20
"""Bytes that may wait for the thread; a request that comes upon more works them off itself."""
_SAFE = "!$&'*+-./;<=>?@[]^_`{}~ "

_Item = TypeVar("_Item")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Metric:
    """One row of the table. A counter, or where `summed` a `_sum` and a `_count`, with `buckets` a whole histogram."""

    name: str
    help: str
    labels: tuple[str, ...] = ()
    """After model_name and model_version."""
    summed: bool = False
    buckets: tuple[float, ...] = ()
    """Upper bounds, +Inf left out."""

    def declared(self) -> list[tuple[str, str, list[str]]]:
        """The counters that the server must know: name, unit and labels in order."""
        unit = "Seconds" if self.name.endswith("_seconds") else "Count"
        labels = [*_IDENTITY, *self.labels]
        if not self.summed:
            return [(self.name, unit, labels)]
        whole = [(f"{self.name}_sum", unit, labels), (f"{self.name}_count", "Count", labels)]
        return [(f"{self.name}_bucket", "Count", [*labels, "le"]), *whole] if self.buckets else whole


METRICS = (
    Metric("marwright_requests_total", "Answers given by handlers.", ("call", "code")),
    Metric("marwright_errors_total", "Requests refused or failed.", ("call", "kind")),
    Metric("marwright_decode_seconds", "Parsing and decoding one predict request.", (), True, SECONDS),
    Metric("marwright_inference_seconds", "Forward pass of a predict request's batch.", (), True, SECONDS),
    Metric("marwright_handle_seconds", "Whole handling of a predict request's batch.", (), True, SECONDS),
    Metric("marwright_explain_seconds", "Computing one explanation.", (), True, SECONDS),
    Metric("marwright_batch_size", "Requests in one batch.", (), True, SIZES),
    Metric("marwright_confidence", "Probability of an instance's top-1 class.", (), True, SHARES),
    Metric("marwright_entropy", "Entropy of an instance's probabilities, 0 to 1.", (), True, SHARES),
    Metric("marwright_predictions_total", "Instances by their top-1 class.", ("class",)),
    Metric("marwright_brightness", "Mean of an image's pixels, 0 to 1.", (), True, SHARES),
    Metric("marwright_contrast", "Standard deviation of an image's pixels, 0 to 0.5.", (), True, SPREADS),
    Metric("marwright_captured_total", "Predict requests written to the spool."),
    Metric("marwright_capture_dropped_total", "Predict requests that the spool lacks or lost.", ("reason",)),
    Metric("marwright_load_seconds", "A worker's start, but for its warm-up.", (), True),
    Metric("marwright_warm_up_seconds", "First forward passes of a worker.", (), True),
)
"""Everything that handlers count. `model_name` and `model_version` come first among the labels of each."""

_BUCKETS = {metric.name: metric.buckets for metric in METRICS}
_OF_CLASSES = {"marwright_confidence", "marwright_entropy", "marwright_predictions_total"}
_OF_IMAGES = {"marwright_brightness", "marwright_contrast"}
DROPS = ("queue", "redact", "full", "disk", "old", "failed")
"""Why a request is not in the spool: the disk was too slow, the redaction failed, the spool is full, the disk refused,
nobody took it in time, or something that nobody thought of."""


class Counted(Protocol):
    """What is asked of a request when its batch is over."""

    call: str
    """One of `CALLS`."""
    status: int
    seconds: float
    """Parsing and decoding."""
    rows: slice
    """Its instances in the batch's array."""


class _Batch(NamedTuple):
    answers: dict[tuple[str, int], int]
    """Requests by call and status."""
    decode: list[float]
    """Seconds, one for each predict request."""
    reached: int
    """Predict requests that came as far as the forward pass."""
    first: NDArray[Any]
    """The first output's rows, of predict requests."""
    pixels: NDArray[Any] | None
    inference: float
    handle: float

    @property
    def bytes(self) -> int:
        """About what it keeps in memory."""
        return 500 + 32 * len(self.decode) + self.first.nbytes + (0 if self.pixels is None else self.pixels.nbytes)


class Meters:
    """One worker's counts. The worker's thread calls; `flush` may be called from any. None of it raises."""

    def __init__(self, cache: Any, spec: ModelSpec, *, model: str, version: str, captures: bool = False) -> None:
        """`cache` is `context.metrics`; with None nothing is counted. `captures` says whether the worker does."""
        self._spec = spec
        self._captures = captures
        self._identity = (text(model), text(version))
        names = [text(label) for label in spec.classes]
        self._classes = names[:_NAMED] + [OTHER] * (len(names) - _NAMED)
        self._step = 1
        if isinstance(spec.input, ImageInput):
            self._step = math.ceil(math.sqrt(spec.input.height * spec.input.width / _PIXELS))
        self._counters = {} if cache is None else _counters(cache)
        self._batches: deque[_Batch] = deque()
        self._explained: deque[float] = deque()
        self._lost: deque[int] = deque()
        self._captured: deque[tuple[str, int]] = deque()
        # Bytes. One is written by the worker's thread alone, the other by whoever holds the lock.
        self._put = self._taken = 0
        self._turn = threading.RLock()
        self._over = threading.Event()
        self._complained = False

    def begin(self, load: float, warm_up: float) -> None:
        """A worker is ready after so many seconds: every series at 0, so that the first event is seen as a growth."""
        if not self._counters:
            return
        self._safely(lambda: self._emit(self._first(load, warm_up)))
        threading.Thread(target=self._run, name="marwright-metrics", daemon=True).start()
        ending.before(self.close)

    def batch(
        self,
        requests: Sequence[Counted],
        array: NDArray[Any],
        outputs: Mapping[str, NDArray[Any]],
        inference: float,
        handle: float,
    ) -> None:
        """A batch is answered. Times in seconds; `array` and `outputs` as the forward pass took and gave them.

        Both are kept for up to a second: they must not be written to.
        """
        if self._counters:
            self._safely(lambda: self._keep(requests, array, outputs, inference, handle))

    def explained(self, seconds: float) -> None:
        """One explanation was computed in so many seconds."""
        if self._counters:
            self._explained.append(seconds)

    def lost(self, requests: int) -> None:
        """A batch of so many requests that the handler could not answer at all: TorchServe says 503 to each."""
        if self._counters:
            self._lost.append(requests)

    def captured(self, requests: int, dropped: str = "") -> None:
        """So many requests are in the spool, or are not, for one of the reasons in `DROPS`. From any thread."""
        if self._counters:
            self._captured.append((dropped, requests))

    def flush(self) -> None:
        """Emit what has come together since the last time."""
        # A signal may come while this very thread is at it, and another thread may be stuck: rather late than never.
        if self._turn.acquire(timeout=1.0):
            try:
                self._safely(lambda: self._emit({series: by for series, by in self._grown().items() if by}))
            finally:
                self._turn.release()

    def close(self) -> None:
        """Emit what is left; nothing is emitted afterwards."""
        self._over.set()
        ending.forget(self.close)
        self.flush()

    def _run(self) -> None:
        while not self._over.wait(_PERIOD):
            self.flush()

    def _safely(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception:
            if not self._complained:
                self._complained = True
                _log.exception("metrics of this worker are incomplete from here on (said once)")

    def _keep(
        self,
        requests: Sequence[Counted],
        array: NDArray[Any],
        outputs: Mapping[str, NDArray[Any]],
        inference: float,
        handle: float,
    ) -> None:
        """What a request waits for: references, no figures."""
        answers: dict[tuple[str, int], int] = {}
        decode: list[float] = []
        reached = others = 0
        for one in requests:
            key = one.call, one.status
            answers[key] = answers.get(key, 0) + 1
            if one.call == "predict":
                decode.append(one.seconds)
                reached += one.rows.stop > 0
            else:
                others += one.rows.stop > 0
        first = outputs[self._spec.outputs[0]]
        if others:
            mine = [one.rows for one in requests if one.call == "predict"]
            first, array = (np.concatenate([rows[:0], *(rows[part] for part in mine)]) for rows in (first, array))
        pixels = None
        if isinstance(self._spec.input, ImageInput):
            # A copy: a view would keep the whole of a large picture in memory.
            pixels = array[:, :, :: self._step, :: self._step].copy() if self._step > 1 else array
        batch = _Batch(answers, decode, reached, first, pixels, inference, handle)
        self._put += batch.bytes
        self._batches.append(batch)
        if self._put - self._taken > _WAITING:
            self.flush()

    def _first(self, load: float, warm_up: float) -> dict[Series, float]:
        grown: dict[Series, float] = {}
        codes = {"predict": (200, 400, 413, 415, 422, 500, 503), "explain": (501,), "describe": (200,)}
        if self._spec.twin:
            codes["explain"] = (*codes["predict"], 429, 501)
        for call, statuses in codes.items():
            for status in statuses:
                self._count_request(grown, call, status, 0)
        for metric in METRICS:
            if metric.name == "marwright_explain_seconds" and not self._spec.twin:
                continue
            if self._applies(metric) and metric.buckets:
                self._observe(grown, metric.name, [])
        for name in self._classes:
            self._count(grown, "marwright_predictions_total", (name,), 0)
        for reason in ("", *DROPS) if self._captures else ():
            self._count_captured(grown, reason, 0)
        self._observe(grown, "marwright_load_seconds", [load])
        self._observe(grown, "marwright_warm_up_seconds", [warm_up])
        return grown

    def _applies(self, metric: Metric) -> bool:
        if metric.name in _OF_IMAGES:
            return isinstance(self._spec.input, ImageInput)
        return metric.name not in _OF_CLASSES or bool(self._classes)

    def _grown(self) -> dict[Series, float]:
        """Take what waits and make figures of it."""
        batches, explained, lost = (_taken(waiting) for waiting in (self._batches, self._explained, self._lost))
        self._taken += sum(one.bytes for one in batches)
        grown: dict[Series, float] = {}
        self._count_request(grown, "predict", 503, sum(lost))
        for reason, count in _taken(self._captured):
            self._count_captured(grown, reason, count)
        self._observe(grown, "marwright_explain_seconds", explained)
        if batches:
            for part in (self._requests, self._answers, self._pictures):
                time.sleep(0)  # a request that waits for the interpreter goes first
                self._safely(partial(part, grown, batches))
        return grown

    def _requests(self, grown: dict[Series, float], batches: Sequence[_Batch]) -> None:
        answers: Counter[tuple[str, int]] = Counter()
        for one in batches:
            answers.update(one.answers)
        for (call, status), count in answers.items():
            self._count_request(grown, call, status, count)
        # A call for the description comes alone and is no work for the model.
        sizes = [sum(count for (call, _), count in one.answers.items() if call != "describe") for one in batches]
        self._observe(grown, "marwright_batch_size", [size for size in sizes if size])
        asked = [len(one.decode) for one in batches]
        self._observe(grown, "marwright_decode_seconds", list(itertools.chain(*(one.decode for one in batches))))
        self._observe(grown, "marwright_handle_seconds", np.repeat([one.handle for one in batches], asked))
        reached = [one.reached for one in batches]
        self._observe(grown, "marwright_inference_seconds", np.repeat([one.inference for one in batches], reached))

    def _answers(self, grown: dict[Series, float], batches: Sequence[_Batch]) -> None:
        """Confidence, entropy and class of each instance; one without a finite answer was an error and is left out."""
        if not self._classes:
            return
        rows = np.concatenate([one.first for one in batches])
        rows = rows[np.isfinite(rows).all(axis=1)].clip(0.0, 1.0)
        if not len(rows):
            return
        self._observe(grown, "marwright_confidence", rows.max(axis=1))
        logs = np.log(rows, out=np.zeros_like(rows), where=rows > 0)
        entropy = -np.einsum("ij,ij->i", rows, logs) / math.log(rows.shape[1])
        self._observe(grown, "marwright_entropy", entropy.clip(0.0, 1.0))
        for index, count in enumerate(np.bincount(rows.argmax(axis=1)).tolist()):
            if count:
                self._count(grown, "marwright_predictions_total", (self._classes[index],), count)

    def _pictures(self, grown: dict[Series, float], batches: Sequence[_Batch]) -> None:
        # A batch of nothing but refusals has no picture, and no rows to reshape.
        pixels = [one.pixels for one in batches if one.pixels is not None and len(one.pixels)]
        if not pixels:
            return
        rows = np.concatenate(pixels).reshape(sum(map(len, pixels)), -1)
        step = max(1, 2**18 // rows.shape[1])  # what fits into a processor's cache as float32
        for start in range(0, len(rows), step):
            values = rows[start : start + step].astype(np.float32)
            mean = values.mean(axis=1, keepdims=True)
            values -= mean
            spread = np.sqrt(np.einsum("ij,ij->i", values, values) / values.shape[1])
            self._observe(grown, "marwright_brightness", mean[:, 0] / 255)
            self._observe(grown, "marwright_contrast", spread / 255)

    def _count(self, grown: dict[Series, float], name: str, labels: tuple[str, ...], by: float) -> None:
        series = (name, (*self._identity, *labels))
        grown[series] = grown.get(series, 0) + by

    def _count_request(self, grown: dict[Series, float], call: str, status: int, by: int) -> None:
        self._count(grown, "marwright_requests_total", (call, str(status)), by)
        if status >= 400:
            self._count(grown, "marwright_errors_total", (call, KINDS.get(status, "failed")), by)

    def _count_captured(self, grown: dict[Series, float], dropped: str, by: int) -> None:
        if dropped:
            self._count(grown, "marwright_capture_dropped_total", (dropped,), by)
        else:
            self._count(grown, "marwright_captured_total", (), by)

    def _observe(self, grown: dict[Series, float], name: str, values: Any) -> None:
        given = np.asarray(values, np.float64)
        bounds = _BUCKETS[name]
        if bounds:
            found = np.cumsum(np.bincount(np.searchsorted(bounds, given), minlength=len(bounds) + 1))
            for bound, count in zip((*bounds, math.inf), found.tolist(), strict=True):
                self._count(grown, f"{name}_bucket", (le(bound),), count)
        self._count(grown, f"{name}_sum", (), float(given.sum()))
        self._count(grown, f"{name}_count", (), len(given))

    def _emit(self, grown: Mapping[Series, float]) -> None:
        for (name, labels), by in grown.items():
            if name in self._counters:
                self._counters[name].add_or_update(by, list(labels))


def text(value: str) -> str:
    """A label's value as the server can carry it: what is not plain ASCII, or means something to it, as %XX of UTF-8.

    Parentheses too, so that no class is taken for `OTHER`. `urllib.parse.unquote` gives it back.
    """
    return quote(value, safe=_SAFE, errors="surrogatepass") or "(empty)"


def le(bound: float) -> str:
    """A bucket's upper bound as Prometheus writes it."""
    return "+Inf" if bound == math.inf else f"{bound:g}"


def _counters(cache: Any) -> dict[str, Any]:
    """The server's counters of those in `METRICS` that it declares with the same labels."""
    found, missing = {}, []
    for name, _, labels in (row for metric in METRICS for row in metric.declared()):
        try:
            counter = cache.get_metric(name)
            if counter.dimension_names != labels:
                raise ValueError("other labels")
            found[name] = counter
        except Exception:
            missing.append(name)
    if missing:
        _log.warning(
            "the server's metrics file does not declare %d of the %d counters of this worker, %s for one, which"
            " are not counted; Marwright's deploy/metrics.yaml does",
            len(missing),
            len(missing) + len(found),
            missing[0],
        )
    return found


def _taken(waiting: deque[_Item]) -> list[_Item]:
    """What is there now. Each step is atomic, so nobody who appends meanwhile needs a lock."""
    return [waiting.popleft() for _ in range(len(waiting))]
