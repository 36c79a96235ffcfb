"""What a version's own counts say against it after the switch: values in, a sentence out.

watching.complaint(counted, before, limits, version="1.1", champion="1.0", asked=240)      # "" when nothing
"""

from __future__ import annotations

from marwright.release.measured import Figures, Histogram
from marwright.release.policy import WatchPolicy

KEPT = ("requests_total", "handle_seconds", "batch_size", "confidence")
"""The metrics that are looked at, and remembered in the journal for it."""
_LEAST = 0.0025
"""Seconds. A champion that is faster is compared as if it took so long: a few milliseconds come and go by themselves on
a busy machine, and below the lowest bucket nobody knows."""


def complaint(
    counted: Figures, before: Figures | None, limits: WatchPolicy, *, version: str, champion: str | None, asked: float
) -> str:
    """Why the version must go: which metric, its value, what it is compared with, and the limit; "" when nothing.

    `counted` is the version's since the switch, `before` the champion's before the rollout; `asked` is how often
    callers have asked since the switch.
    """
    answered = counted.answered
    rate = counted.failed / answered if answered else 0.0
    if rate > limits.max_error_rate:
        return (
            f"error rate: {version} answered {counted.failed:.0f} of {answered:.0f} requests with 5xx, {rate:.2%},"
            f" limit {limits.max_error_rate:.2%}"
        )
    if before is None or asked < limits.min_requests:
        return ""
    refused, refused_before = counted.refused_share, before.refused_share
    if before.answered >= limits.min_requests and refused - refused_before > limits.max_refused_rise:  # false for NaN
        return (
            f"{version} refuses {refused:.1%} of its requests with 4xx, {champion} refused {refused_before:.1%}:"
            f" {refused - refused_before:.1%} more, limit {limits.max_refused_rise:.1%}"
        )
    # Where callers come faster than before, batches are larger and take longer, whichever version answers them.
    ours, theirs = _pair("batch_size", counted, before)
    grown = ours.whole_bucket_mean / theirs.whole_bucket_mean if ours.observed and theirs.observed else 1.0
    larger = max(1.0, grown)
    for name, q, limit in (("median", 0.5, limits.max_latency_ratio), ("p99", 0.99, limits.max_p99_ratio)):
        ours, theirs = _pair("handle_seconds", counted, before)
        now, then = ours.quantile(q), theirs.quantile(q)
        if _enough(ours, theirs, limits) and now > limit * larger * max(then, _LEAST):  # false for NaN
            batches = f" in batches {larger:.1f} times as large" if larger > 1 else ""
            return (
                f"{name} of handle_seconds is {now * 1000:.1f} ms, {champion} had {then * 1000:.1f} ms:"
                f" {now / then:.2f} times{batches}, limit {limit * larger:.3g}"
            )
    ours, theirs = _pair("confidence", counted, before)
    now, then = ours.bucket_mean, theirs.bucket_mean
    if _enough(ours, theirs, limits) and then - now > limits.max_confidence_drop:
        return (
            f"mean confidence is {now:.3f}, {champion} had {then:.3f}: {then - now:.3f} lower,"
            f" limit {limits.max_confidence_drop:g}"
        )
    return ""


def _enough(ours: Histogram, theirs: Histogram, limits: WatchPolicy) -> bool:
    return min(ours.observed, theirs.observed) >= limits.min_requests


def _pair(name: str, counted: Figures, before: Figures) -> tuple[Histogram, Histogram]:
    return counted.histogram(name), before.histogram(name)
