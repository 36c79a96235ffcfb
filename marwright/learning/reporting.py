"""The report of one run, for a person: how it learned, how good it is, where it errs.

page = reporting.page(about, recipe, curves, scores, dataset)
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from marwright import report
from marwright.learning.dataset import Dataset
from marwright.learning.evaluation import Evaluation
from marwright.learning.recipe import Recipe

SHOWN = 24
"""Examples at most in the gallery of errors."""
NAMED = 25
"""Classes up to which a confusion matrix names them."""


def page(
    about: dict[str, Any], recipe: Recipe, curves: list[dict[str, float]], scores: Evaluation, dataset: Dataset
) -> str:
    """Self-contained HTML."""
    made = report.Report(about["id"], subtitle=recipe.description)
    tiles: list[tuple[str, report.Cell]] = [(f"test {name}", value) for name, value in scores.metrics.items()]
    if scores.classes:
        tiles.append(("calibration error", scores.calibration_error))
    made.tiles([*tiles, ("test examples", scores.examples), ("training seconds", about["seconds"]["training"])])
    for note in dataset.notes:
        made.paragraph(f"Note: {note}.")
    best = f"Best epoch on the validation part: {about['best_epoch']} of {about['epochs']}."
    made.section("Learning").figure(_curves(curves, int(about["best_epoch"])), alt="curves of the epochs", caption=best)
    if scores.classes:
        made.section("Confusion").figure(_confusion(scores), alt="confusion matrix", caption="Test part.")
        made.section("Classes").table(
            ("class", "precision", "recall", "F1", "examples"),
            [(one.label, one.precision, one.recall, one.f1, one.support) for one in scores.classes],
        )
        made.section("Calibration").figure(
            _calibration(scores), alt="calibration", caption="How often an answer of some confidence was right."
        )
        _errors(made, scores, dataset)
    else:
        made.section("Answers").figure(_scatter(scores, dataset), alt="answers against truth", caption="Test part.")
        _outliers(made, scores, dataset)
    _facts(made, about, recipe)
    return made.html()


def _curves(curves: list[dict[str, float]], best: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    figure, (losses, other) = report.axes(9.0, 3.2, columns=2)
    epochs = [row["epoch"] for row in curves]
    metric = next(name for name in curves[0] if name.startswith("validation_") and name != "validation_loss")
    marker = "o" if len(curves) == 1 else None
    losses.plot(epochs, [row["train_loss"] for row in curves], color=report.SECOND, marker=marker, label="train")
    if metric == "validation_accuracy":  # for values the two losses have different units
        losses.plot(
            epochs, [row["validation_loss"] for row in curves], color=report.ACCENT, marker=marker, label="validation"
        )
    losses.set(xlabel="epoch", ylabel="loss")
    losses.legend(frameon=False)
    other.plot(epochs, [row[metric] for row in curves], color=report.ACCENT, marker=marker)
    other.axvline(best, color=report.INK, linewidth=0.8, linestyle=":")
    other.set(xlabel="epoch", ylabel=metric.replace("_", " "))
    for one in (losses, other):
        one.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _confusion(scores: Evaluation) -> Any:
    counts = np.asarray(scores.confusion)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    few = len(counts) <= NAMED
    side = min(9.0, 2.4 + 0.45 * len(counts)) if few else 7.0
    figure, (one,) = report.axes(side, side * 0.9)
    one.grid(visible=False)
    one.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    one.set(xlabel="answered", ylabel="true")
    if few:
        labels = [_short(score.label) for score in scores.classes]
        one.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
        one.set_yticks(range(len(labels)), labels)
        for (row, column), count in np.ndenumerate(counts):
            if count:
                colour = "white" if shares[row, column] > 0.5 else report.INK
                one.text(column, row, str(count), ha="center", va="center", fontsize=8, color=colour)
    return figure


def _calibration(scores: Evaluation) -> Any:
    figure, (one,) = report.axes(4.4, 4.0)
    one.plot([0, 1], [0, 1], color=report.FAINT)
    sizes = [10 + 190 * point.count / scores.examples for point in scores.bins]
    confidence, accuracy = ([getattr(point, name) for point in scores.bins] for name in ("confidence", "accuracy"))
    one.plot(confidence, accuracy, color=report.ACCENT, linewidth=0.8)
    one.scatter(confidence, accuracy, s=sizes, color=report.ACCENT)
    one.set(xlabel="confidence", ylabel="share that was right", xlim=(0, 1.02), ylim=(-0.02, 1.02))
    return figure


def _scatter(scores: Evaluation, dataset: Dataset) -> Any:
    figure, (one,) = report.axes(4.8, 4.4)
    truth, answers = scores.targets.numpy(), scores.outputs[:, 0].numpy()
    ends = [float(min(truth.min(), answers.min())), float(max(truth.max(), answers.max()))]
    one.plot(ends, ends, color=report.FAINT)
    one.scatter(truth, answers, s=12, color=report.ACCENT)
    one.set(xlabel=f"{_short(dataset.target)}, true", ylabel="answered")
    return figure


def _errors(made: report.Report, scores: Evaluation, dataset: Dataset) -> None:
    confidence, answered = scores.outputs.max(dim=1)
    wrong = (answered != scores.targets).nonzero()[:, 0]
    made.section("Wrong answers")
    if not len(wrong):
        made.paragraph("None in the test part.")
        return
    worst = wrong[confidence[wrong].argsort(descending=True)][:SHOWN]
    pictures, _ = dataset.test.take(worst)
    shown = []
    for position, picture in zip(worst.tolist(), pictures, strict=True):
        true, said = dataset.classes[int(scores.targets[position])], dataset.classes[int(answered[position])]
        caption = f"{said} ({float(confidence[position]):.2f}), is {true}"
        shown.append((_png(picture), "image/png", caption))
    made.paragraph(f"{len(wrong)} of {scores.examples}; the most confident first, as the net saw them.").gallery(shown)


def _outliers(made: report.Report, scores: Evaluation, dataset: Dataset) -> None:
    error = (scores.outputs[:, 0] - scores.targets).abs()
    worst = error.argsort(descending=True)[:10].tolist()
    made.section("Largest errors").table(
        ("example", "answered", "true"),
        [
            (dataset.names[int(dataset.test.rows[i])], float(scores.outputs[i, 0]), float(scores.targets[i]))
            for i in worst
        ],
    )


def _facts(made: report.Report, about: dict[str, Any], recipe: Recipe) -> None:
    parts = ", ".join(f"{count} {name}" for name, count in about["examples"].items())
    made.section("Made of").table(
        ("", ""),
        [
            ("examples", parts),
            ("newly labelled", str(about["new_examples"])),
            ("started from", about["start"]["run"] if about["start"] else "random weights"),
            ("method", about["method"]),
            ("seed", str(about["seed"])),
            ("data", about["data_digest"]),
            ("recipe", about["recipe_digest"]),
            ("code", about["code_digest"]),
            ("commit", about["commit"]),
            ("versions", ", ".join(f"{name} {version}" for name, version in about["versions"].items())),
            ("machine", f"{about['machine']['platform']}, {about['threads']} threads"),
            ("started", about["started"]),
        ],
    )
    made.section("Recipe").table(("key", "value"), [(key, _plain(value)) for key, value in _flat(recipe.to_dict())])


def _flat(document: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in document.items():
        if isinstance(value, dict) and value:
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value))
    return rows


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None or value == {} else str(value)


def _short(label: str) -> str:
    """Fit for an axis: cut, and `$` taken literally."""
    cut = label if len(label) <= 16 else f"{label[:15]}…"
    return cut.replace("$", r"\$")


def _png(picture: Tensor) -> bytes:
    array = picture.numpy()
    stream = io.BytesIO()
    Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0)).save(stream, "PNG")
    return stream.getvalue()
