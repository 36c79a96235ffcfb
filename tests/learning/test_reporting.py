"""A report is one file that needs nothing else and trusts nobody's text."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from marwright.learning import data, training
from marwright.report import Report, axes, svg
from tests.learning.conftest import fill, tiny


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a run whose classes have hostile and foreign names."""
    where = tmp_path_factory.mktemp("report")
    root = fill(where / "x", {"<b>&amp;": 12, "猫 $x$": 12, "a" * 60: 12})
    dataset = data.load(tiny(), path=root, cache=where / "cache", progress=False)
    run = training.train(tiny(training__epochs=1), dataset, where / "runs", progress=False)
    return (run.path / "report.html").read_text("utf-8")


def test_a_report_needs_nothing_else(page: str) -> None:
    assert page.startswith("<!doctype html>")
    sources = re.findall(r'(?:src|href)="([^"]{0,20})', page)
    assert sources
    assert all(source.startswith("data:image/") for source in sources)
    assert "<script" not in page
    assert "@import" not in page


def test_a_report_shows_scores_plots_and_the_recipe(page: str) -> None:
    for heading in ("Learning", "Confusion", "Classes", "Calibration", "Wrong answers", "Made of", "Recipe"):
        assert f"<h2>{heading}</h2>" in page
    assert page.count("data:image/svg+xml") == 3
    assert "training.optimiser.lr" in page


def test_names_of_classes_are_text_and_not_markup(page: str) -> None:
    assert "&lt;b&gt;&amp;amp;" in page
    assert "<b>&amp;" not in page
    assert "猫 $x$" in page


def test_the_same_figure_has_the_same_bytes() -> None:
    drawn = []
    for _ in range(2):
        figure, (one,) = axes()
        one.plot([1, 2], [3, 4])
        drawn.append(svg(figure))
    assert drawn[0] == drawn[1]
    assert b"<dc:date>" not in drawn[0]


def test_numbers_stand_right_and_nothing_is_a_dash() -> None:
    html = Report("t").table(("name", "value"), [("a", 0.123456), ("b", None)]).html()
    assert '<td class="number">0.1235</td>' in html
    assert '<td class="number">–</td>' in html
    assert "<td>a</td>" in html


def test_a_regression_is_reported_with_its_largest_errors(diabetes: data.Dataset, tmp_path: Path) -> None:
    from marwright.learning import recipe
    from tests.learning.conftest import RECIPES

    chosen = recipe.load("diabetes-mlp", recipes_dir=RECIPES, overrides={"epochs": 2})
    run = training.train(chosen, diabetes, tmp_path, progress=False)
    html = (run.path / "report.html").read_text("utf-8")
    assert "Largest errors" in html
    assert "progression" in html or "test rmse" in html
