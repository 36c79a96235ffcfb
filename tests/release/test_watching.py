"""What a version's counts say against it after the switch."""

from __future__ import annotations

import math
import re

import pytest

from marwright.release import watching
from marwright.release.measured import Figures
from marwright.release.policy import WatchPolicy

LIMITS = WatchPolicy()
BOUNDS = (0.005, 0.01, 0.1, 1.0, float("inf"))


def counted(*, fine: int = 200, failed: int = 0, code: int = 500, seconds: float = 0.004, slow: int = 0) -> Figures:
    """`fine` requests of so many `seconds`, `slow` of which took half a second; and confidence 0.9 or so."""
    below = {bound: sum(each <= bound for each in [0.5] * slow + [seconds] * (fine - slow)) for bound in BOUNDS}
    buckets = {("handle_seconds_bucket", str(bound)): float(count) for bound, count in below.items()}
    return Figures(
        {
            ("requests_total", "predict", "200"): float(fine),
            ("requests_total", "predict", str(code)): float(failed),
            **buckets,
            ("handle_seconds_count",): float(fine),
            **confident(0.9, fine),
        }
    )


def confident(at: float, count: int) -> dict[tuple[str, ...], float]:
    """All in the bucket around `at`."""
    bounds = (round(at - 0.05, 2), round(at + 0.05, 2), math.inf)
    return {("confidence_bucket", str(bound)): float(count * (bound > at)) for bound in bounds}


def in_batches(of: float, seconds: float) -> Figures:
    """As `counted`, in batches of so many requests or a little less."""
    batches = {("batch_size_bucket", str(bound)): 200.0 / of * (bound >= of) for bound in (1, 2, 4, 8, 16, math.inf)}
    return Figures({**counted(seconds=seconds).counters, **batches})


def doubtful(mean: float) -> Figures:
    kept = {key: value for key, value in counted().counters.items() if key[0] != "confidence_bucket"}
    return Figures({**kept, **confident(mean, 200)})


def complaint(
    ours: Figures, before: Figures | None = None, *, asked: float = 200.0, limits: WatchPolicy = LIMITS
) -> str:
    return watching.complaint(ours, before or counted(), limits, version="1.1", champion="1.0", asked=asked)


def test_a_version_like_its_champion_is_left_alone() -> None:
    assert complaint(counted()) == ""
    assert complaint(Figures()) == "", "nothing counted yet"
    assert watching.complaint(counted(), None, LIMITS, version="1.0", champion=None, asked=200) == "", (
        "the first of all"
    )


@pytest.mark.parametrize(
    ("ours", "says"),
    [
        (counted(failed=1), r"error rate: 1\.1 answered 1 of 201 requests with 5xx, 0\.50%, limit 0\.00%"),
        (
            counted(seconds=0.05),
            r"median of handle_seconds is 55\.0 ms, 1\.0 had 2\.5 ms: 22\.00 times, limit 3",
        ),
        (counted(slow=6), r"p99 of handle_seconds is 700\.0 ms, 1\.0 had 4\.9 ms: 141\.\d\d times, limit 10"),
        (doubtful(0.65), r"mean confidence is 0\.650, 1\.0 had 0\.900: 0\.250 lower, limit 0\.2"),
    ],
    ids=["errors", "median", "p99", "confidence"],
)
def test_a_worse_one_is_told_with_metric_both_values_and_limit(ours: Figures, says: str) -> None:
    assert re.fullmatch(says, complaint(ours))


@pytest.mark.parametrize("ours", [counted(seconds=0.05), counted(slow=6), doubtful(0.1)])
def test_few_requests_say_nothing_of_speed_and_confidence(ours: Figures) -> None:
    assert complaint(ours, asked=99) == ""
    assert complaint(ours, counted(fine=99)) == "", "of the champion"
    assert complaint(ours, limits=replace_limits(min_requests=201)) == ""


def test_larger_batches_may_take_longer_as_they_are_larger() -> None:
    before = in_batches(1, seconds=0.006)
    assert complaint(in_batches(16, seconds=0.05), before) == ""
    assert re.fullmatch(
        r"median of handle_seconds is .* 7\.33 times in batches 2\.0 times as large, limit 6",
        complaint(in_batches(2, seconds=0.05), before),
    )
    assert complaint(in_batches(1, seconds=0.05), in_batches(16, seconds=0.006)).endswith("limit 3"), "never less"


def test_a_sum_that_is_older_than_its_count_says_nothing() -> None:
    torn = {("confidence_sum",): 90.0, ("confidence_count",): 200.0, ("handle_seconds_sum",): 1e3}
    assert complaint(Figures({**counted().counters, **torn})) == ""


def test_milliseconds_are_no_reason() -> None:
    """The medians are 0.25 and 4 ms, the 99th percentiles 0.5 and 14 ms."""
    bounds = {"0.0005": (200, 0), "0.0075": (200, 196), "0.0201": (200, 200), "+Inf": (200, 200)}
    fast, busy = (
        Figures(
            {
                **{("handle_seconds_bucket", bound): float(count[side]) for bound, count in bounds.items()},
                ("handle_seconds_count",): 200.0,
                ("requests_total", "predict", "200"): 200.0,
            }
        )
        for side in (0, 1)
    )
    ours, theirs = busy.histogram("handle_seconds"), fast.histogram("handle_seconds")
    assert ours.quantile(0.5) > 10 * theirs.quantile(0.5)
    assert ours.quantile(0.99) > 20 * theirs.quantile(0.99)
    assert complaint(busy, fast) == ""
    assert complaint(counted(slow=6), fast).startswith("p99 of handle_seconds is 700.0 ms, 1.0 had 0.5 ms")


def test_one_error_among_few_requests_is_one_too_many() -> None:
    assert complaint(counted(fine=1, failed=1), asked=1).startswith("error rate")
    assert complaint(counted(fine=99, failed=1), limits=replace_limits(max_error_rate=0.01)) == ""


@pytest.mark.parametrize("code", [400, 413, 415, 422, 429, 501])
def test_a_clients_fault_is_not_the_versions(code: int) -> None:
    assert complaint(counted(failed=100, code=code)) == ""


def test_a_version_that_refuses_what_its_champion_took_goes() -> None:
    refusing = counted(fine=200, failed=600, code=413)
    says = r"1\.1 refuses 75\.0% of its requests with 4xx, 1\.0 refused 0\.0%: 75\.0% more, limit 50\.0%"
    assert re.fullmatch(says, complaint(refusing))
    assert complaint(refusing, counted(fine=200, failed=200, code=415)) == "", "callers were no better before"
    assert complaint(refusing, asked=99) == ""
    assert complaint(refusing, limits=replace_limits(max_refused_rise=0.8)) == ""


def test_a_limit_may_be_wider() -> None:
    wide = replace_limits(max_latency_ratio=1000.0, max_p99_ratio=1000.0, max_confidence_drop=1.0)
    for ours in (counted(seconds=0.05), counted(slow=6), doubtful(0.1)):
        assert complaint(ours, limits=wide) == ""


def test_a_regressor_has_no_confidence_to_lose() -> None:
    values = Figures({key: value for key, value in counted().counters.items() if not key[0].startswith("confidence")})
    assert complaint(values, values) == ""


def replace_limits(**changed: float) -> WatchPolicy:
    return WatchPolicy.model_validate({**LIMITS.model_dump(), **changed})
