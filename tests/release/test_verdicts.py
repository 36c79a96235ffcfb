"""A verdict's page needs nothing else, trusts nobody's text, and says nothing that the verdict does not."""

from __future__ import annotations

import dataclasses
import html
import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from marwright.cli import print_table
from marwright.release import gate, verdicts
from marwright.release.gate import Observed, Verdict
from marwright.release.policy import GatePolicy

NAMES = ("<b>&amp;", "猫 $x$", "a" * 60)


def judged(*, regression: bool = False, names: tuple[str, ...] = NAMES, examples: int = 300) -> Verdict:
    """A champion, and a challenger that is worse, slower and larger."""
    generator = np.random.default_rng(7)
    observed = []
    if regression:
        truth = generator.normal(100, 30, examples)
    else:
        truth = np.arange(examples) % len(names)
    for version, noise in (("1.0", 0.2), ("1.1", 0.4)):
        if regression:
            outputs = truth + generator.normal(0, 50 * noise, examples)
        else:
            outputs = generator.dirichlet(np.ones(len(names)), examples) * noise
            outputs += (1 - noise) * np.eye(len(names))[(truth + (generator.random(examples) < noise)) % len(names)]
        seconds = generator.gamma(3, 0.01 * noise, examples)
        observed.append(Observed(version, outputs, seconds, size=int(1e7 * noise), memory=int(noise > 0.3)))
    return gate.decide(*observed, truth, GatePolicy(), classes=() if regression else names)


def numbers(value: Any) -> Iterator[float]:
    match value:
        case bool() | str() | None:
            return
        case int() | float():
            yield float(value)
        case dict():
            for one in value.values():
                yield from numbers(one)
        case _:
            for one in value:
                yield from numbers(one)


def said(page: str) -> str:
    """What the page says outside of its pictures and its style."""
    return html.unescape(re.sub(r"<[^>]*>", " ", re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)))


@pytest.mark.parametrize("regression", [False, True])
def test_a_page_needs_nothing_else(regression: bool) -> None:
    page = verdicts.page(judged(regression=regression), title="digits 1.1")
    assert page.startswith("<!doctype html>")
    sources = re.findall(r'(?:src|href)="([^"]{0,20})', page)
    assert len(sources) == (2 if regression else 4)
    assert all(source.startswith("data:image/svg+xml") for source in sources)
    assert "<script" not in page
    assert "@import" not in page


@pytest.mark.parametrize("regression", [False, True])
def test_every_number_of_a_page_is_the_verdicts(regression: bool) -> None:
    verdict = judged(regression=regression)
    sentences = [verdict.reason, *(check.sentence for check in verdict.checks)]
    text = said(verdicts.page(verdict, title="digits"))
    for sentence in sentences:
        assert sentence in text
        text = text.replace(sentence, "")
    known = {"1.0", "1.1"}
    for value in numbers(verdict.to_dict()):
        for scaled in (value, 100 * value, 1000 * value, value / 1e6):  # as it is, percent, ms, MB
            known |= {f"{scaled:{form}}" for form in (".4f", "+.4f", ".3g", ".4g", ".0f")}
    shown = re.findall(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?:e[-+]\d+)?(?![\w])", text)
    assert len(shown) > 50
    assert set(shown) <= known


@pytest.mark.parametrize("regression", [False, True])
def test_a_stored_verdict_makes_the_same_page(regression: bool) -> None:
    verdict = judged(regression=regression)
    again = Verdict.from_dict(json.loads(json.dumps(verdict.to_dict())))
    assert verdicts.page(again, title="x") == verdicts.page(verdict, title="x")
    assert verdicts.table(again) == verdicts.table(verdict)


def test_labels_and_titles_are_text_and_not_markup() -> None:
    page = verdicts.page(judged(), title="<script>alert(1)</script>")
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "&lt;b&gt;&amp;amp;" in page
    assert "猫 $x$" in page


def test_the_table_has_a_row_for_each_check_with_its_own_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    verdict = judged()
    titles, rows = verdicts.table(verdict)
    assert titles[2:4] == ("1.0", "1.1")
    assert [row[:2] for row in rows] == [(check.name, check.outcome) for check in verdict.checks]
    by_name = {row[0]: row for row in rows}
    accuracy = verdict.check("accuracy")
    assert by_name["accuracy"][2:] == (
        f"{accuracy.champion:.4f}",
        f"{accuracy.challenger:.4f}",
        f"{accuracy.estimate:+.4f}",
        f"{accuracy.low:+.4f} … {accuracy.high:+.4f}",
        "-0.0050",
    )
    assert by_name["size"][2:] == ("2 MB", "4 MB", "× 2", "", "× 2")
    assert by_name["memory"][2] == "–"
    print_table(titles, rows)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(rows) + 1
    assert all(cell in line for line, row in zip(printed[1:], rows, strict=True) for cell in row)


def test_the_plot_of_the_difference_shows_bounds_estimate_and_margin() -> None:
    check = judged().check("accuracy")
    drawn = verdicts._difference(check, relative=False).axes[0].lines
    assert [list(line.get_xdata()) for line in drawn] == [
        [0, 0],
        [check.limit, check.limit],
        [check.low, check.high],
        [check.low, check.high],
        [check.estimate],
    ]


def test_the_plots_show_recalls_reliability_and_latencies_of_both() -> None:
    verdict = judged()
    bars = verdicts._recalls(verdict).axes[0].patches
    assert [bar.get_height() for bar in bars] == [
        *(row.champion for row in verdict.classes),
        *(row.challenger for row in verdict.classes),
    ]
    _, first, second = verdicts._reliability(verdict).axes[0].lines
    for line, bins in ((first, verdict.champion_bins), (second, verdict.challenger_bins)):
        assert list(line.get_xdata()) == [one.confidence for one in bins]
        assert list(line.get_ydata()) == [one.accuracy for one in bins]
    lines = verdicts._latencies(verdict).axes[0].lines
    assert [list(line.get_xdata()) for line in lines] == [
        [1000 * row.champion for row in verdict.latencies],
        [1000 * row.challenger for row in verdict.latencies],
    ]


def test_of_many_classes_the_plot_shows_those_that_lost_most() -> None:
    verdict = judged(names=tuple(f"c{i}" for i in range(100)), examples=1500)
    heights = [bar.get_height() for bar in verdicts._recalls(verdict).axes[0].patches]
    drops = sorted(row.challenger - row.champion for row in verdict.classes)
    shown = len(heights) // 2
    assert shown == verdicts.SHOWN
    assert sorted(np.subtract(heights[shown:], heights[:shown])) == pytest.approx(drops[:shown])
    page = verdicts.page(verdict, title="x")
    assert "The 40 that lost most." in page
    assert all(f"<td>c{i}</td>" in page for i in range(100))


def test_a_verdict_of_the_fewest_examples_and_of_equal_times_is_shown() -> None:
    probabilities = np.array([[0.9, 0.1]])
    one = Observed("1.0", probabilities, np.array([0.01]), size=1, memory=0)
    verdict = gate.decide(one, dataclasses.replace(one, version="1.1"), np.array([0]), GatePolicy())
    assert "undecided" in verdicts.page(verdict, title="x")
    numbers = dataclasses.replace(one, outputs=probabilities[:, 0])
    verdict = gate.decide(numbers, dataclasses.replace(numbers, version="1.1"), np.array([0.5]), GatePolicy())
    assert "too few to say anything" in verdicts.page(verdict, title="x")
    assert "What was gained or lost" not in verdicts.page(verdict, title="x")


def test_a_verdict_without_latencies_has_no_section_about_them() -> None:
    one = Observed("1.0", np.array([[0.9, 0.1]] * 50))
    verdict = gate.decide(one, dataclasses.replace(one, version="1.1"), np.zeros(50, dtype=np.int64), GatePolicy())
    page = verdicts.page(verdict, title="x")
    assert "Calibration" in page
    assert "Latency" not in page
