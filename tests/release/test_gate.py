"""The gate: what it passes is proved, what it fails is shown, and it errs no more often than the policy says."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from marwright.release import gate, paired
from marwright.release.gate import Observed, Verdict
from marwright.release.policy import GatePolicy

Floats = NDArray[np.float64]
POLICY = GatePolicy()
PER_LOOK = 1 - (1 - POLICY.confidence) / POLICY.looks
CLASSES = 4
PATIENT = settings(deadline=None)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def observed(version: str, outputs: Floats, **changes: object) -> Observed:
    return dataclasses.replace(
        Observed(version, outputs, np.full(len(outputs), 0.01), size=1_000_000, memory=300_000_000), **changes
    )


def answers(truth: NDArray[np.int64], wrong: NDArray[np.bool_], *, confidence: float = 0.9) -> Floats:
    """N×CLASSES probabilities that are right but where `wrong`."""
    outputs = np.full((len(truth), CLASSES), (1 - confidence) / (CLASSES - 1))
    outputs[np.arange(len(truth)), (truth + wrong) % CLASSES] = confidence
    return outputs


def pair(n: int, *, lost: int = 0, won: int = 0, both_wrong: int | None = None) -> tuple[Observed, Observed, Floats]:
    """Champion, challenger, truth; the classes take turns."""
    truth = np.arange(n) % CLASSES
    neither = n // 10 if both_wrong is None else both_wrong
    order = np.arange(n)
    champion = answers(truth, order < neither + won)
    challenger = answers(truth, (order < neither) | ((order >= neither + won) & (order < neither + won + lost)))
    return observed("1.0", champion), observed("1.1", challenger), truth


def decide(champion: Observed, challenger: Observed, truth: Floats, **changes: object) -> Verdict:
    policy = POLICY.model_copy(update={key: value for key, value in changes.items() if key != "look"})
    return gate.decide(champion, challenger, truth, policy, look=changes.get("look", 1))


# ---------------------------------------------------------------- the interval of the accuracy difference


@pytest.mark.parametrize(
    ("won", "lost", "examples", "interval"),
    [
        pytest.param(1, 7, 21, (-0.517, -0.026), id="Fagerland et al. 2014, table V"),
        pytest.param(7, 1, 21, (0.026, 0.517), id="the same, turned round"),
    ],
)
def test_tangos_interval_is_the_published_one(
    won: int, lost: int, examples: int, interval: tuple[float, float]
) -> None:
    assert paired.proportions(lost, won, examples, 0.975) == pytest.approx(interval, abs=0.0005)


@PATIENT
@given(st.integers(1, 10**6), st.floats(0.5, 0.999))
def test_without_a_discordant_pair_the_interval_has_a_closed_form(examples: int, confidence: float) -> None:
    z2 = stats.norm.ppf(confidence) ** 2
    expected = z2 / (examples + z2)
    assert paired.proportions(0, 0, examples, confidence) == pytest.approx((-expected, expected), abs=1e-8)


counts = st.integers(1, 3000).flatmap(
    lambda n: st.integers(0, n).flatmap(lambda lost: st.tuples(st.just(lost), st.integers(0, n - lost), st.just(n)))
)


@PATIENT
@given(counts, st.floats(0.55, 0.999))
@example((1, 0, 1), 0.95)
@example((0, 5, 5), 0.95)
@example((5, 0, 5), 0.95)
def test_the_interval_holds_the_estimate_and_is_a_mirror(found: tuple[int, int, int], confidence: float) -> None:
    lost, won, examples = found
    low, high = paired.proportions(lost, won, examples, confidence)
    assert -1 <= low <= (won - lost) / examples + 1e-9
    assert (won - lost) / examples - 1e-9 <= high <= 1
    assert paired.proportions(won, lost, examples, confidence) == pytest.approx((-high, -low), abs=1e-7)


@PATIENT
@given(counts)
def test_more_confidence_means_a_wider_interval_and_a_win_for_a_loss_a_higher_one(found: tuple[int, int, int]) -> None:
    lost, won, examples = found
    low, high = paired.proportions(lost, won, examples, 0.9)
    wider = paired.proportions(lost, won, examples, 0.99)
    assert wider[0] <= low + 1e-9
    assert high - 1e-9 <= wider[1]
    if lost:
        better = paired.proportions(lost - 1, won + 1, examples, 0.9)
        assert better[0] >= low - 1e-9
        assert better[1] >= high - 1e-9


@pytest.mark.parametrize(("examples", "margin"), [(100, 0.05), (359, 0.02), (1000, 0.005)])
@pytest.mark.parametrize("confidence", [0.95, PER_LOOK])
@pytest.mark.parametrize("factor", [1.0, 1.2, 2.0, 6.0])
def test_a_challenger_at_the_margin_passes_no_more_often_than_the_confidence_allows(
    examples: int, margin: float, confidence: float, factor: float
) -> None:
    """No simulation: every outcome that can be, with its probability. Tango's bound errs by at most a few per mille."""
    loss = margin * factor
    gain = loss - margin
    most = int(stats.binom.ppf(1 - 1e-9, examples, loss))
    error = 0.0
    for won in range(int(stats.binom.ppf(1 - 1e-9, examples, gain)) + 1):
        # The bound falls with each loss: the passing counts of losses are those up to some number.
        passing = [lost for lost in range(most + 1) if lost + won <= examples]
        low, high = 0, len(passing)
        while low < high:
            middle = (low + high) // 2
            if paired.proportions(passing[middle], won, examples, confidence)[0] > -margin:
                low = middle + 1
            else:
                high = middle
        if low:
            given_wins = stats.binom.cdf(low - 1, examples - won, loss / (1 - gain))
            error += float(stats.binom.pmf(won, examples, gain) * given_wins)
    assert error <= (1 - confidence) + 0.002


def run(policy: GatePolicy, examples: int, lost: float, won: float, seed: int) -> str:
    """The outcome of a whole rollout whose challenger loses and wins examples at these rates.

    Of the accuracy alone: the other checks can only make passing rarer.
    """
    drawn = rng(seed).random(examples)
    truth = np.zeros(examples, dtype=int)
    outputs = [np.eye(2)[wrong.astype(int)] for wrong in ((drawn >= lost) & (drawn < lost + won), drawn < lost)]
    confidence = 1 - (1 - policy.confidence) / policy.looks
    outcome = ""
    for look in range(1, policy.looks + 1):
        count = gate.examples_at(look, policy, examples)
        both = [gate.checks.Judged(one[:count], truth[:count]) for one in outputs]
        outcome = gate.checks.accuracy(*both, margin=policy.margin, confidence=confidence).outcome
        if outcome != "inconclusive":
            break
    return outcome


def share(outcome: str, runs: int, simulate: Callable[[int], str]) -> float:
    return Counter(simulate(seed) for seed in range(runs))[outcome] / runs


@pytest.mark.parametrize("looks", [1, 3, 5])
def test_over_all_looks_together_a_challenger_at_the_margin_passes_in_five_percent(looks: int) -> None:
    policy = POLICY.model_copy(update={"looks": looks, "margin": 0.01})
    runs = 1500
    slack = 3 * math.sqrt(0.05 * 0.95 / runs)
    outcomes = Counter(run(policy, 2000, 0.03, 0.02, seed) for seed in range(runs))
    assert outcomes["pass"] / runs <= 0.05 + slack
    assert outcomes["fail"] / runs <= 0.05 + slack


def test_looking_again_without_splitting_the_error_would_err_more_often() -> None:
    """Else the test above could not fail."""
    unsplit = POLICY.model_copy(
        update={"confidence": 1 - 0.05 * 5, "looks": 5, "margin": 0.01}
    )  # 0.05 at each of five looks
    assert share("pass", 1500, lambda seed: run(unsplit, 2000, 0.03, 0.02, seed)) > 0.08


def test_a_better_one_passes_and_one_worse_by_three_points_never() -> None:
    assert share("pass", 300, lambda seed: run(POLICY, 10_000, 0.01, 0.03, seed)) >= 0.99
    worse = Counter(run(POLICY, 10_000, 0.05, 0.02, seed) for seed in range(300))
    assert worse["pass"] == 0
    assert worse["fail"] >= 0.99 * 300


@pytest.mark.parametrize(("disagreement", "margin"), [(0.01, 0.005), (0.05, 0.01), (0.1, 0.02)])
def test_so_many_examples_as_are_needed_let_an_equal_one_pass_nine_times_in_ten(
    disagreement: float, margin: float
) -> None:
    once = POLICY.model_copy(update={"margin": margin, "looks": 1})
    needed = paired.examples_needed(disagreement, margin, once.confidence)
    passed = share("pass", 600, lambda seed: run(once, needed, disagreement / 2, disagreement / 2, seed))
    assert 0.86 <= passed <= 0.94


# ---------------------------------------------------------------- the other statistics


@PATIENT
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=12))
def test_p_of_each_drop_is_the_exact_one_adjusted_by_holm(found: list[tuple[int, int]]) -> None:
    lost, won = np.array(found).T
    adjusted = paired.drops(lost, won)
    single = [stats.binomtest(a, a + b, alternative="greater").pvalue if a + b else 1.0 for a, b in found]
    ordered = sorted(range(len(found)), key=lambda i: single[i])
    running = 0.0
    for place, i in enumerate(ordered):
        running = max(running, min(1.0, single[i] * (len(found) - place)))
        assert adjusted[i] == pytest.approx(running)


def test_mcnemar_is_the_exact_two_sided_test() -> None:
    assert paired.mcnemar(0, 0) == 1
    assert paired.mcnemar(10, 0) == pytest.approx(2 * 0.5**10)
    assert paired.mcnemar(7, 7) == 1


@pytest.mark.parametrize("count", [9, 30, 201])
def test_the_medians_bounds_cover_it_whatever_the_distribution(count: int) -> None:
    generator = rng(1)
    runs, below, above = 2000, 0, 0
    for _ in range(runs):
        low, high = paired.medians(generator.lognormal(0, 2, count), 0.95)
        assert low is not None
        assert high is not None
        below += high < 1
        above += low > 1
    slack = 3 * math.sqrt(0.05 * 0.95 / runs)
    assert below / runs <= 0.05 + slack
    assert above / runs <= 0.05 + slack


def test_a_handful_of_latencies_has_no_bounds() -> None:
    assert paired.medians(np.ones(4), 0.95) == (None, None)
    assert paired.medians(np.arange(5.0), 0.95) == (0.0, 4.0)
    assert paired.means(np.ones(1), 0.95) == (None, None)


def test_the_calibration_error_is_the_weighted_gap_of_its_bins() -> None:
    found = paired.Calibration(np.array([0.95, 0.95, 0.55, 1.0]), np.array([True, False, True, True]), 10)
    assert found.error == pytest.approx(0.5 * 0.0 + 0.25 * 0.45 + 0.25 * 0 + abs(1.9 + 1.0 - 2) / 4)


def test_a_rise_of_the_calibration_error_that_is_allowed_is_seldom_called_too_large() -> None:
    generator = rng(2)
    runs, calls = 200, 0
    for _ in range(runs):
        confidence = generator.beta(8, 1, 400) * 0.9
        right = generator.random(400) < confidence
        first = paired.Calibration(confidence, right, gate.checks.BINS)
        second = paired.Calibration(confidence + 0.05, right, gate.checks.BINS)
        calls += paired.calibration_rise(first, second, 0.95)[0] > 0.05
    assert calls / runs <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)


# ---------------------------------------------------------------- the decision


def test_an_equal_challenger_passes_where_there_are_enough_examples_and_not_before() -> None:
    assert decide(*pair(5000, lost=20, won=20)).outcome == "pass"
    few = decide(*pair(300, lost=2, won=2))
    assert few.outcome == "inconclusive"
    assert few.reason.startswith("accuracy 0.8933 → 0.8933 on 300 examples: anything from 0.02")
    assert "were they equally good, about" in few.reason


def test_a_version_that_lost_three_points_fails_and_says_what_by_how_much_and_what_was_allowed() -> None:
    verdict = decide(*pair(10_000, lost=400, won=100))
    assert verdict.outcome == "fail"
    assert verdict.reason.startswith("accuracy 0.8900 → 0.8600 on 10000 examples: worse by at least 0.025")
    assert "and 0.005 may be lost" in verdict.reason
    check = verdict.check("accuracy")
    assert (check.champion, check.challenger, check.limit) == (0.89, 0.86, -0.005)
    assert (check.low, check.high) == paired.proportions(400, 100, 10_000, PER_LOOK)


def test_shuffled_labels_fail_on_ten_examples_a_class() -> None:
    champion, _, truth = pair(40, both_wrong=0)
    shuffled = observed("1.1", np.roll(champion.outputs, 1, axis=1))
    assert decide(champion, shuffled, truth).outcome == "fail"


@settings(max_examples=60, deadline=None)
@given(st.integers(30, 400), st.data())
def test_the_overall_outcome_is_the_worst_of_the_checks_and_the_verdict_survives_json(
    examples: int, data: st.DataObject
) -> None:
    generator = rng(data.draw(st.integers(0, 10**6)))
    truth = generator.integers(0, CLASSES, examples)
    first, second = (
        observed(
            version,
            generator.dirichlet(np.ones(CLASSES), examples) + data.draw(st.floats(0, 3)) * np.eye(CLASSES)[truth],
            seconds=generator.gamma(2, 0.01, examples),
            memory=data.draw(st.sampled_from([0, 10**8, 2 * 10**8])),
        )
        for version in ("1.0", "1.1")
    )
    verdict = decide(first, second, truth, margin=0.05)
    outcomes = {check.outcome for check in verdict.checks}
    worst = next((one for one in ("fail", "inconclusive") if one in outcomes), "pass")
    assert verdict.outcome == worst
    assert Verdict.from_dict(json.loads(json.dumps(verdict.to_dict(), allow_nan=False))) == verdict
    assert sum(row.examples for row in verdict.classes) == examples
    for bins, one in ((verdict.champion_bins, first), (verdict.challenger_bins, second)):
        right = one.outputs.argmax(axis=1) == truth
        assert sum(one.count for one in bins) == examples
        assert sum(one.accuracy * one.count for one in bins) == pytest.approx(right.sum())
    for row in verdict.latencies:
        assert row.champion == np.quantile(first.seconds, row.share)


def test_a_verdict_says_what_it_was_made_of() -> None:
    verdict = decide(*pair(600, lost=4, won=2), look=2)
    assert [check.name for check in verdict.checks] == [
        "answers",
        "accuracy",
        "mcnemar",
        "classes",
        "calibration",
        "latency",
        "size",
        "memory",
    ]
    assert (verdict.champion, verdict.challenger, verdict.examples) == ("1.0", "1.1", 600)
    assert (verdict.look, verdict.looks, verdict.confidence) == (2, 3, pytest.approx(PER_LOOK))
    mcnemar = verdict.check("mcnemar")
    assert (mcnemar.outcome, mcnemar.champion, mcnemar.challenger) == ("reported", 4, 2)
    with pytest.raises(KeyError):
        verdict.check("speed")


def test_one_class_that_was_given_up_fails_though_the_others_make_up_for_it() -> None:
    truth = np.arange(4000) % CLASSES
    order = rng().random(4000)
    champion = observed("1.0", answers(truth, order < 0.1))
    challenger = observed("1.1", answers(truth, np.where(truth == 2, order < 0.3, order < 0.02)))
    verdict = gate.decide(champion, challenger, truth, POLICY, classes=("a", "b", "c", "d"))
    assert verdict.check("accuracy").outcome == "pass"
    assert verdict.outcome == "fail"
    assert [row.label for row in verdict.classes if row.worse] == ["c"]
    assert verdict.reason.startswith("recall of 'c' 0.8930 → 0.6790 on 1000 examples")
    assert "a drop of 0.05 is allowed" in verdict.reason
    allowing = gate.decide(champion, challenger, truth, POLICY.model_copy(update={"max_class_drop": 0.3}))
    assert allowing.check("classes").outcome == "pass"


def test_equal_classes_are_called_worse_no_more_often_than_the_confidence_allows() -> None:
    """Ten classes of sixty, each as good as before, and no drop is too small to count."""
    generator, runs, calls = rng(3), 400, 0
    truth = np.arange(600) % 10
    for _ in range(runs):
        judged = [gate.checks.Judged(np.eye(10)[(truth + (generator.random(600) < 0.1)) % 10], truth) for _ in range(2)]
        rows = gate.checks.class_rows(*judged, list("abcdefghij"), max_drop=0, confidence=0.95)
        calls += any(row.worse for row in rows)
    assert calls / runs <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)


def test_classes_without_examples_are_left_out() -> None:
    champion, challenger, truth = pair(200)
    only = truth % 2
    verdict = gate.decide(champion, challenger, only, POLICY, classes=("a", "b", "c", "d"))
    assert [row.label for row in verdict.classes] == ["a", "b"]


def test_an_overconfident_challenger_fails_and_a_doubtful_one_is_looked_at_again() -> None:
    truth = np.arange(3000) % CLASSES

    def calibration(confidence: float, count: int) -> gate.Check:
        """A champion that is right as often as it says, and a challenger that says `confidence`."""
        champion, challenger = (rng(seed).random(count) < 0.1 for seed in (4, 5))
        return decide(
            observed("1.0", answers(truth[:count], champion, confidence=0.9)),
            observed("1.1", answers(truth[:count], challenger, confidence=confidence)),
            truth[:count],
        ).check("calibration")

    too_sure = calibration(0.99, 3000)
    assert too_sure.outcome == "fail"
    assert too_sure.low is not None
    assert f"the rise is at least {too_sure.low:.4f} at 98.3 % confidence" in too_sure.sentence
    assert calibration(0.91, 3000).outcome == "pass"
    doubtful = calibration(0.97, 60)
    assert doubtful.estimate is not None
    assert doubtful.estimate > 0.02
    assert doubtful.outcome == "inconclusive"
    assert "the rise may be chance" in doubtful.sentence


@pytest.mark.parametrize(("factor", "outcome"), [(1.0, "pass"), (1.4, "pass"), (1.5, "inconclusive"), (3.0, "fail")])
def test_latency_is_the_median_of_the_paired_ratios(factor: float, outcome: str) -> None:
    champion, challenger, truth = pair(900)
    seconds = rng().gamma(2, 0.01, 900)
    noise = rng(1).lognormal(0, 0.3, 900)
    check = decide(
        dataclasses.replace(champion, seconds=seconds),
        dataclasses.replace(challenger, seconds=seconds * noise * factor),
        truth,
    ).check("latency")
    assert check.outcome == outcome
    assert check.estimate == pytest.approx(factor, rel=0.1)
    assert check.low is not None
    assert check.high is not None
    assert check.low < check.estimate < check.high
    assert check.limit == 1.5


@pytest.mark.parametrize(("name", "limit"), [("size", 2.0), ("memory", 1.5)])
def test_size_and_memory_are_plain_ratios(name: str, limit: float) -> None:
    champion, challenger, truth = pair(100)
    champion = dataclasses.replace(champion, **{name: 1_000_000})

    def check(value: int) -> gate.Check:
        return decide(champion, dataclasses.replace(challenger, **{name: value}), truth).check(name)

    assert check(int(limit * 1_000_000)).outcome == "pass"
    assert check(int(limit * 1_000_000) + 1).outcome == "fail"
    assert check(3_000_000).sentence.endswith(f"1 MB → 3 MB: 3 times, and {limit:g} is allowed")
    unknown = check(0)
    assert (unknown.outcome, unknown.champion, unknown.challenger) == ("reported", 1_000_000, None)
    assert unknown.sentence.endswith("not measured")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_answers_that_are_no_numbers_fail_and_count_as_wrong(bad: float) -> None:
    champion, challenger, truth = pair(5000)
    broken = challenger.outputs.copy()
    broken[-3:, 1] = bad
    verdict = decide(champion, dataclasses.replace(challenger, outputs=broken), truth)
    assert verdict.outcome == "fail"
    assert verdict.reason == "answers that are not finite numbers: 0 → 3 of 5000, and 0 are allowed"
    accuracy = verdict.check("accuracy")
    assert (accuracy.champion, accuracy.challenger) == (0.9, 0.9 - 3 / 5000)
    back = decide(dataclasses.replace(champion, outputs=broken), challenger, truth)
    assert back.outcome == "pass", "a champion's own fault is no reason to keep it"
    assert back.check("answers").champion == 3


# ---------------------------------------------------------------- regressors


def values(n: int, *, spread: float, shift: float = 0.0, seed: int = 0) -> tuple[Observed, Observed, Floats]:
    """A champion off by about 10; a challenger off by about as much, `shift` more, and `spread` apart from it."""
    generator = rng(seed)
    truth = generator.normal(100, 30, n)
    error = generator.uniform(5, 15, n)
    second = error + shift + generator.normal(0, spread, n)
    return observed("1.0", truth + error), observed("1.1", truth + second), truth


def test_a_regressor_is_judged_by_its_mean_absolute_error() -> None:
    verdict = decide(*values(2000, spread=0.1))
    assert verdict.outcome == "pass"
    assert [check.name for check in verdict.checks] == ["answers", "error", "latency", "size", "memory"]
    assert (verdict.task, verdict.metric, verdict.classes, verdict.champion_bins) == ("regression", "error", (), ())
    assert verdict.reason.startswith("mean absolute error 9.943 → 9.945 on 2000 examples")
    worse = decide(*values(2000, spread=0.1, shift=0.5))
    assert worse.outcome == "fail"
    assert "as a share of the champion's, worse by at least 0.05" in worse.reason
    assert worse.check("error").estimate == pytest.approx(-0.05, rel=0.05)
    assert decide(*values(50, spread=5)).outcome == "inconclusive"
    assert Verdict.from_dict(json.loads(json.dumps(worse.to_dict()))) == worse


def test_a_regressor_at_the_margin_passes_in_five_percent() -> None:
    runs = 1000
    passed = 0
    for seed in range(runs):
        champion, challenger, truth = values(200, spread=0.5, shift=0.2, seed=seed)
        check = gate.checks.error(champion.outputs, challenger.outputs, truth, margin=0.02, confidence=0.95)
        passed += check.outcome == "pass"
    assert 0.02 <= passed / runs <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)


def test_a_perfect_champion_is_equalled_only_by_a_perfect_challenger() -> None:
    truth = np.linspace(1, 2, 20)
    perfect, off = observed("1.0", truth), observed("1.1", truth + 1e-6)
    assert decide(perfect, perfect, truth).check("error").outcome == "pass"
    assert decide(perfect, off, truth).check("error").outcome == "fail"
    assert decide(off, perfect, truth).check("error").outcome == "pass"


def test_a_regressor_without_numbers_fails() -> None:
    champion, challenger, truth = values(30, spread=0.1)
    broken = dataclasses.replace(challenger, outputs=np.full(30, np.nan))
    verdict = decide(champion, broken, truth)
    assert verdict.outcome == "fail"
    assert verdict.reason.startswith("answers that are not finite numbers: 0 → 30 of 30")
    json.dumps(verdict.to_dict(), allow_nan=False)
    one = champion.outputs.copy()
    one[0] = np.inf
    assert decide(dataclasses.replace(champion, outputs=one), challenger, truth).check("error").champion is not None


# ---------------------------------------------------------------- looks, and what callers get wrong


@PATIENT
@given(st.integers(1, 20), st.integers(1, 10**6))
def test_looks_see_more_each_time_and_the_last_one_everything(looks: int, available: int) -> None:
    policy = POLICY.model_copy(update={"looks": looks})
    seen = [gate.examples_at(look, policy, available) for look in range(1, looks + 1)]
    assert seen[0] >= 1
    assert all(before <= after for before, after in itertools.pairwise(seen))
    assert seen[-1] == available
    for look in (0, looks + 1):
        with pytest.raises(ValueError, match="look"):
            gate.examples_at(look, policy, available)


def test_what_does_not_fit_together_is_a_programming_error() -> None:
    champion, challenger, truth = pair(20)
    numbers = observed("1.1", np.ones(20))
    wrong = [
        ((champion, challenger, truth[:-1]), "outputs have shapes"),
        ((champion, numbers, truth), "outputs have shapes"),
        ((champion, challenger, truth.reshape(4, 5)), "truth has shape"),
        ((champion, challenger, truth + 1), "class indices"),
        ((champion, challenger, truth * 1.0), "class indices"),
        ((numbers, numbers, np.full(20, np.nan)), "not finite"),
        ((dataclasses.replace(champion, outputs=np.ones((20, 1))),) * 2 + (truth,), "columns"),
        ((champion, dataclasses.replace(challenger, seconds=np.zeros(20)), truth), r"latencies of 1\.1"),
        ((champion, dataclasses.replace(challenger, seconds=np.ones(19)), truth), r"latencies of 1\.1"),
        ((champion, dataclasses.replace(challenger, memory=-1), truth), "size and memory"),
        ((observed("1", np.ones((0, 4))), observed("2", np.ones((0, 4))), truth[:0]), "truth has shape"),
    ]
    for given_, said in wrong:
        with pytest.raises(ValueError, match=said):
            gate.decide(*given_, POLICY)
    with pytest.raises(ValueError, match="columns"):
        gate.decide(champion, challenger, truth, POLICY, classes=("a", "b"))
    with pytest.raises(ValueError, match="look 4 of 3"):
        gate.decide(champion, challenger, truth, POLICY, look=4)


def test_the_same_observations_give_the_same_verdict() -> None:
    assert decide(*pair(500, lost=3, won=5)) == decide(*pair(500, lost=3, won=5))


# ---------------------------------------------------------------- better, and before there is an archive


@PATIENT
@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(0, n))))
def test_without_a_margin_a_pass_is_a_proof_of_better_and_a_fail_one_of_worse(found: tuple[int, int, int]) -> None:
    examples, lost, won = found
    won = min(won, examples - lost)
    verdict = decide(*pair(examples, lost=lost, won=won, both_wrong=0), margin=0.0, looks=1)
    check = verdict.check("accuracy")
    assert check.low is not None
    assert check.high is not None
    outcome = "pass" if check.low > 0 else "fail" if check.high < 0 else "inconclusive"
    assert (check.outcome, str(check.limit)) == (outcome, "0.0")
    assert check.sentence.split(" confidence")[1].startswith(", and it has to be better")
    if lost >= won:
        assert check.outcome != "pass"


def test_a_version_that_is_no_better_passes_without_a_margin_no_more_often_than_the_confidence_allows() -> None:
    """Every outcome of 150 examples of which either version alone has a tenth right, with its probability."""
    examples, rate, error = 150, 0.1, 0.0
    for lost in range(60):
        for won in range(60):
            if paired.proportions(lost, won, examples, 0.95)[0] > 0:
                error += float(
                    stats.multinomial.pmf((lost, won, examples - lost - won), examples, (rate, rate, 1 - 2 * rate))
                )
    assert 0.01 < error <= 0.052


def test_a_regressor_without_a_margin_has_to_be_better_too() -> None:
    truth = np.linspace(0, 100, 200)
    errors = rng(1).normal(0, 10, 200)
    champion, better, other = (
        observed(name, truth + errors * by) for name, by in (("1.0", 1), ("1.1", 0.9), ("1.2", 1))
    )
    assert decide(champion, better, truth, margin=0.0).check("error").outcome == "pass"
    assert decide(champion, other, truth, margin=0.0).check("error").outcome == "inconclusive"
    assert decide(better, champion, truth, margin=0.0).check("error").outcome == "fail"


def test_before_there_is_an_archive_neither_latency_nor_bytes_are_judged() -> None:
    champion, challenger, truth = pair(2000)
    first, second = (Observed(each.version, each.outputs) for each in (champion, challenger))
    verdict = decide(first, second, truth)
    assert verdict.outcome == "pass"
    assert verdict.latencies == ()
    assert {check.name: check.outcome for check in verdict.checks if check.name in ("latency", "size", "memory")} == {
        "size": "reported",
        "memory": "reported",
    }
    assert Verdict.from_dict(json.loads(json.dumps(verdict.to_dict()))) == verdict
    assert decide(champion, second, truth).latencies == ()
