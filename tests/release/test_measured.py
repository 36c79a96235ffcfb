"""What the metrics page says of each version: parsed, subtracted, and summed up as Prometheus does."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marwright.release import measured
from marwright.release.measured import Figures, Histogram

PAGE = """\
# HELP marwright_requests_total Torchserve prometheus counter metric with unit: Count
# TYPE marwright_requests_total counter
marwright_requests_total{model_name="digits",model_version="1.0",call="predict",code="200",Hostname="h",} 90.0
marwright_requests_total{model_name="digits",model_version="1.0",call="predict",code="500",Hostname="h",} 3.0
marwright_requests_total{model_name="digits",model_version="1.0",call="explain",code="501",Hostname="h",} 2.0
marwright_requests_total{model_name="digits",model_version="1.0",call="describe",code="200",Hostname="h",} 7.0
marwright_requests_total{model_name="digits",model_version="1.1",call="predict",code="200",Hostname="h",} 5.0
marwright_errors_total{model_name="digits",model_version="1.0",call="predict",kind="failed",Hostname="h",} 3.0
marwright_handle_seconds_bucket{model_name="digits",model_version="1.0",le="0.01",Hostname="h",} 50.0
marwright_handle_seconds_bucket{model_name="digits",model_version="1.0",le="0.1",Hostname="h",} 90.0
marwright_handle_seconds_bucket{model_name="digits",model_version="1.0",le="+Inf",Hostname="h",} 93.0
marwright_handle_seconds_sum{model_name="digits",model_version="1.0",Hostname="h",} 4.65
marwright_handle_seconds_count{model_name="digits",model_version="1.0",Hostname="h",} 93.0
marwright_predictions_total{model_name="digits",model_version="1.0",class="a%2Cb%7C%23",Hostname="h",} 4.0
marwright_load_seconds_count{model_name="digits",model_version="1.0",Hostname="h",} 2.0
ts_inference_requests_total{model_name="digits",model_version="default",hostname="h",} 96.0
ts_inference_requests_total{model_name="digits",model_version="1.1",hostname="h",} 5.0
Requests5XX{Level="Host",Hostname="h",} 40.0
CPUUtilization{Level="Host",Hostname="h",} NaN
"""

counts = st.integers(0, 10**9).map(float)
keys = st.tuples(st.sampled_from(["requests_total", "handle_seconds_bucket"]), st.text(max_size=3))
figures = st.dictionaries(keys, counts, max_size=8).map(Figures)


def test_a_page_gives_each_versions_own_figures() -> None:
    page = measured.parse(PAGE)
    assert page.versions.keys() == {("digits", "1.0"), ("digits", "1.1")}
    found = page.of("digits", "1.0")
    assert found is not None
    assert found.requests == {("predict", 200): 90, ("predict", 500): 3, ("explain", 501): 2, ("describe", 200): 7}
    assert (found.answered, found.failed, found.starts) == (95, 3, 2)
    assert found.errors == {("predict", "failed"): 3}
    assert found.classes == {"a,b|#": 4}
    times = found.histogram("handle_seconds")
    assert times.buckets == {0.01: 50, 0.1: 90, math.inf: 93}
    assert math.isclose(times.mean, 0.05)
    assert math.isclose(times.bucket_mean, (50 * 0.005 + 40 * 0.055 + 3 * 0.1) / 93)
    assert (page.asked_of("digits"), page.answered_of("digits")) == (101, 100)


def test_batches_of_one_have_one_request_on_average() -> None:
    def mean(*up_to: float) -> float:
        return Histogram(dict(zip((1, 2, 4, 8, math.inf), up_to, strict=True))).whole_bucket_mean

    assert mean(5, 5, 5, 5, 5) == 1.0
    assert mean(0, 5, 5, 5, 5) == 2.0
    assert mean(5, 10, 10, 10, 10) == 1.5
    assert mean(0, 0, 2, 2, 2) == 3.5, "three and four"
    assert mean(0, 0, 0, 0, 2) == 8.0, "or more"


def test_what_is_not_counted_is_none_and_not_zero() -> None:
    for page in ("", PAGE.replace("marwright_", "other_")):
        assert measured.parse(page).of("digits", "1.0") is None
    found = measured.parse(PAGE).of("digits", "1.1")
    assert found is not None
    assert math.isnan(found.histogram("confidence").mean)
    assert math.isnan(found.histogram("confidence").bucket_mean)
    assert math.isnan(found.histogram("confidence").quantile(0.5))


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{}",
        "marwright_requests_total 3",
        'marwright_requests_total{model_name="m"} 3',
        'marwright_requests_total{model_name="m",model_version="1"} three',
        'marwright_requests_total{model_name="m",model_version="1"} NaN',
        'marwright_requests_total{model_name="m",model_version="1"} +Inf',
        'marwright_requests_total{model_name="m",model_version="1"',
        'marwright_requests_total{model_name="m",model_version="1} 3',
        "<html><body>502 Bad Gateway</body></html>",
    ],
)
def test_a_line_that_is_no_sample_is_passed_over(line: str) -> None:
    assert measured.parse(f"{line}\n{PAGE}{line}") == measured.parse(PAGE)


def test_labels_may_be_odd_and_timestamps_there() -> None:
    page = (
        r'marwright_requests_total{ call = "predict",code="200", model_version="1",model_name="a\"},\\ b"} 3e0 1700000'
    )
    assert measured.parse(page).versions == {('a"},\\ b', "1"): Figures({("requests_total", "predict", "200"): 3.0})}


def test_hosts_are_added_up() -> None:
    found = measured.parse(PAGE + PAGE.replace('"h"', '"other"')).of("digits", "1.1")
    assert found is not None
    assert found.answered == 10


@settings(deadline=None)
@given(st.text(max_size=200), st.text(alphabet='marwight_{}",=\\ 0123\n#', max_size=200))
def test_no_page_is_too_odd(one: str, other: str) -> None:
    measured.parse(one + "\n" + other)
    found = measured.parse(f"{PAGE}{one}")
    assert {("digits", "1.0"), ("digits", "1.1")} <= found.versions.keys()


@settings(deadline=None)
@given(st.text(min_size=1))
def test_class_names_come_back(name: str) -> None:
    line = 'marwright_predictions_total{{class="{}",model_name="m",model_version="1"}} 2'
    found = measured.parse(line.format(quote(name, safe=""))).of("m", "1")
    assert found is not None
    assert found.classes == {name: 2}


@settings(deadline=None)
@given(figures, figures)
def test_a_difference_and_what_was_before_make_what_is_now(earlier: Figures, more: Figures) -> None:
    every = earlier.counters.keys() | more.counters.keys()
    now = Figures({key: earlier.counters.get(key, 0) + more.counters.get(key, 0) for key in every})
    found = now - earlier
    assert {key: value for key, value in found.counters.items() if value} == {
        key: value for key, value in more.counters.items() if value
    }
    assert now - Figures() == now


@settings(deadline=None)
@given(figures)
def test_figures_survive_the_journal(one: Figures) -> None:
    back = Figures.from_list(json.loads(json.dumps(one.to_list())))
    assert back == Figures({key: value for key, value in one.counters.items() if value})
    assert not any((one - back).counters.values())


def test_a_server_that_was_started_again_counts_from_zero() -> None:
    earlier = measured.parse(PAGE, at=10.0)
    later = measured.parse(PAGE.replace(" 90.0", " 4.0").replace(" 93.0", " 400.0"), at=12.5)
    between = later - earlier
    assert between.at == 2.5
    assert between.of("digits", "1.0") == later.of("digits", "1.0"), "also what happens to be larger than before"
    other = between.of("digits", "1.1")
    assert other is not None
    assert other.answered == 0
    assert (measured.parse("") - earlier).of("digits", "1.0") is None
    assert (earlier - measured.parse("")).of("digits", "1.0") == earlier.of("digits", "1.0")


def histogram(observed: Sequence[float], bounds: Sequence[float]) -> Histogram:
    buckets = {bound: float(sum(value <= bound for value in observed)) for bound in (*bounds, math.inf)}
    return Histogram(buckets, sum(observed), len(observed))


def test_quantiles_are_those_of_prometheus() -> None:
    """By its definition: linear in the bucket that holds the rank, from zero in the first one."""
    times = histogram([0.05] * 50 + [0.3] * 40 + [9.0] * 10, (0.1, 0.5, 1.0))
    assert times.quantile(0.25) == pytest.approx(0.05)
    assert times.quantile(0.5) == pytest.approx(0.1)
    assert times.quantile(0.7) == pytest.approx(0.1 + 0.4 * 20 / 40)
    assert times.quantile(0.9) == pytest.approx(0.5)
    assert times.quantile(0.99) == 1.0, "what lies beyond the last finite bound is said to be there"
    assert times.quantile(-0.1) == -math.inf
    assert times.quantile(1.1) == math.inf
    assert math.isnan(times.quantile(math.nan))
    assert math.isnan(Histogram({0.1: 3.0, 0.5: 4.0}, 1.0, 4.0).quantile(0.5)), "no +Inf"
    assert math.isnan(Histogram({math.inf: 4.0}, 1.0, 4.0).quantile(0.5))


@settings(deadline=None)
@given(st.lists(st.floats(0.0, 12.0), min_size=1, max_size=60), st.floats(0.01, 1.0))
def test_a_quantile_lies_in_the_bucket_of_the_true_one(observed: list[float], q: float) -> None:
    bounds = (0.1, 0.5, 1.0, 5.0)
    true = sorted(observed)[max(0, math.ceil(q * len(observed) - 1e-9) - 1)]
    found = histogram(observed, bounds).quantile(q)
    low = max((bound for bound in bounds if bound < true), default=0.0)
    high = min((bound for bound in bounds if bound >= true), default=bounds[-1])
    assert min(low, bounds[-1]) - 1e-6 <= found <= high + 1e-6


@settings(deadline=None)
@given(st.lists(st.floats(0.0, 12.0), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_a_later_page_less_an_earlier_one_is_the_histogram_of_what_came_between(
    observed: list[float], chance: random.Random
) -> None:
    bounds = (0.1, 0.5, 1.0, 5.0)
    cut = chance.randint(0, len(observed))

    def page(values: Sequence[float]) -> str:
        of = histogram(values, bounds)
        line = 'marwright_x_{}{{model_name="m",model_version="1"{}}} {!r}\n'
        lines = [line.format("bucket", f',le="{bound}"'.replace("inf", "+Inf"), n) for bound, n in of.buckets.items()]
        return "".join([*lines, line.format("sum", "", float(of.sum)), line.format("count", "", float(of.count))])

    between = (measured.parse(page(observed)) - measured.parse(page(observed[:cut]))).of("m", "1")
    assert between is not None
    found, wanted = between.histogram("x"), histogram(observed[cut:], bounds)
    assert (found.buckets, found.count) == (wanted.buckets, wanted.count)
    assert math.isclose(found.sum, wanted.sum, abs_tol=1e-9)
