"""Why a model answers as it does: one input, its answer and each method's explanation, asked of the running server.

    answer = client.ask("digits", body)
    found = explained.gather(client, answer, body, spec)
    found.explanations[0].method, found.explanations[0].delta, found.refused
    path.write_text(explained.page(found, title="cat.png"), encoding="utf-8")

Everything that is shown comes from the server's answers; only the picture is decoded here, by the handlers' own code,
so that a map lies over the pixels that the model saw.
"""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from handlers import instances, payloads
from handlers.errors import BadRequest
from handlers.explanations import METHODS
from handlers.payloads import Headers
from handlers.spec import ModelSpec, VectorInput
from marwright import report
from marwright.errors import DataError, ServerRefused
from marwright.release.answers import Answer
from marwright.release.client import Client

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SECONDS = 60.0
"""Patience with one explanation: what it may take is the archive's to say, and the server refuses what is too long."""

LEAST_PIXELS = 224
"""Shorter side of a picture on the page: the pixels of a small one are drawn as squares."""


@dataclass(frozen=True)
class Explanation:
    """One method's account of one answer."""

    method: str
    target: str
    """Label of the class, or name of the quantity, that was explained."""
    output: str
    """What the attributions are shares of: "logit", or "value" in units of the target."""
    baseline: str | None
    baseline_prediction: float | None
    """A regressor's value of the baseline."""
    steps: int | None
    delta: float | None
    """Integrated gradients: the sum of the attributions less the difference that they should add up to."""
    attributions: NDArray[Any]
    """H×W, or one for each feature."""
    milliseconds: float
    """From asking to the answer."""

    @classmethod
    def from_json(cls, value: dict[str, Any], spec: ModelSpec, milliseconds: float) -> Explanation:
        """An answer of the handlers."""
        given = value["attributions"]
        if isinstance(spec.input, VectorInput):
            given = [given[name] for name in spec.input.features]
        return cls(
            method=value["method"],
            target=str(value["target"]["label"]),
            output=value["output"],
            baseline=value.get("baseline"),
            baseline_prediction=value.get("baseline_prediction"),
            steps=value.get("steps"),
            delta=value.get("completeness_delta"),
            attributions=np.asarray(given, dtype=np.float64),
            milliseconds=milliseconds,
        )

    @property
    def total(self) -> float:
        """Sum of the attributions."""
        return float(self.attributions.sum())


@dataclass(frozen=True)
class Refused:
    """A method that the model does not offer for this input, in the server's words."""

    method: str
    reason: str


@dataclass(frozen=True)
class Explained:
    """One input, the answer to it, and why."""

    model: str
    version: str
    bundle: str
    prediction: dict[str, float]
    """The top k, best first; or the one value by its name."""
    input: NDArray[Any]
    """What the model saw: uint8 C×H×W, or float32 F."""
    features: tuple[str, ...]
    """Names of a row's numbers; empty for a picture."""
    explanations: tuple[Explanation, ...]
    refused: tuple[Refused, ...]

    def to_json(self) -> dict[str, Any]:
        """Every number of the page; rows of attributions by feature."""
        document: dict[str, Any] = {
            "model": self.model,
            "version": self.version,
            "bundle": self.bundle,
            "prediction": self.prediction,
            "explanations": [],
            "refused": [asdict(each) for each in self.refused],
        }
        for each in self.explanations:
            shown = each.attributions.tolist()
            found = dict(zip(self.features, shown, strict=True)) if self.features else shown
            document["explanations"].append({**asdict(each), "attributions": found, "sum": each.total})
        return document


def gather(
    client: Client,
    answer: Answer,
    body: bytes,
    spec: ModelSpec,
    *,
    methods: Sequence[str] = (),
    target: str | None = None,
    baseline: str | None = None,
    grpc: bool = False,
    content_type: str | None = None,
) -> Explained:
    """Ask the version that gave `answer` to `body` for an explanation by each method, or by all.

    What it does not offer is listed; ServerRefused where it offers nothing at all, DataError where `body` is not one
    input.
    """
    array = _decoded(body, spec)
    explanations: list[Explanation] = []
    refused: list[Refused] = []
    first: ServerRefused | None = None
    for method in methods or METHODS:
        controls = {"method": method, "target": target, "baseline": baseline}
        began = time.perf_counter()
        try:
            given = client.ask(
                answer.model,
                body,
                explain=True,
                grpc=grpc,
                controls={name: value for name, value in controls.items() if value is not None},
                version=answer.version,
                content_type=content_type,
                timeout=SECONDS,
            )
        except ServerRefused as refusal:
            if refusal.status >= 500 and refusal.status != 501:  # that says nothing about the method
                raise
            first = first or refusal
            refused.append(Refused(method, refusal.reason))
            continue
        took = 1000 * (time.perf_counter() - began)
        explanations.append(Explanation.from_json(given.json(), spec, took))
    if not explanations and first is not None:
        raise first
    return Explained(
        model=answer.model,
        version=answer.version,
        bundle=answer.bundle,
        prediction=answer.json(),
        input=array,
        features=spec.input.features if isinstance(spec.input, VectorInput) else (),
        explanations=tuple(explanations),
        refused=tuple(refused),
    )


def _decoded(body: bytes, spec: ModelSpec) -> NDArray[Any]:
    try:
        payload = payloads.parse({"data": body}, Headers(), spec)
        if payload.form != "stock":
            raise DataError(
                "the input is a batch or in a form of KServe's", hint="explain one picture or one row, sent as it is"
            )
        return instances.array(payload.instances[0], spec)
    except BadRequest as error:
        raise DataError(f"the input cannot be shown: {error.reason}") from None


# -------------------------------------------------------------------------------------------------- the page


def table(found: Explained) -> tuple[Sequence[str], list[tuple[str, ...]]]:
    """Titles and rows, all text: a row for each method that answered."""
    titles = ("method", "target", "baseline", "sum", "delta", "ms")
    rows: list[tuple[str, ...]] = []
    for each in found.explanations:
        # Of other methods than integrated gradients a sum says nothing.
        sums = ("", "") if each.delta is None else (f"{each.total:.4g}", f"{each.delta:.2g}")
        rows.append((each.method, each.target, each.baseline or "", *sums, f"{each.milliseconds:.0f}"))
    return titles, rows


def page(found: Explained, *, title: str) -> str:
    """Self-contained HTML."""
    label, best = next(iter(found.prediction.items()))
    made = report.Report(title, subtitle=f"what {found.model} {found.version} answers, and why")
    if found.features:
        _regression(made, found, label, best)
    else:
        _classification(made, found, label, best)
    made.section("Methods").table(
        ("method", "target", "of", "baseline", "steps", "sum", "completeness delta", "ms"),
        [
            (
                each.method,
                each.target,
                each.output,
                each.baseline or "–",
                each.steps,
                None if each.delta is None else each.total,
                each.delta,
                round(each.milliseconds, 1),
            )
            for each in found.explanations
        ],
    )
    made.paragraph(
        "Completeness delta: the sum of the attributions of integrated gradients, less the difference between the"
        " answer to the input and the answer to the baseline that they share out. Milliseconds: from asking to the"
        " answer."
    )
    if found.refused:
        made.section("Refused for this input").table(
            ("method", "the server's reason"), [(each.method, each.reason) for each in found.refused]
        )
    made.section("Who answered").table(
        ("", ""), [("model", found.model), ("version", found.version), ("bundle", found.bundle)]
    )
    return made.html()


def _classification(made: report.Report, found: Explained, label: str, best: float) -> None:
    made.tiles([("answer", label), ("probability", best), ("methods", len(found.explanations))])
    made.section("Input and answer").gallery([(_picture(found.input), "image/png", _size(found.input))], size="large")
    made.figure(_bars(found.prediction), alt="the most probable classes")
    made.section("What decided it")
    made.paragraph(
        "Left: the input in grey, coloured where it mattered. Right: the attributions on their own scale, the channels"
        " added up. Red speaks for the target, blue against it; where a method knows no sign, darker is more."
    )
    made.gallery([(_maps(found.input, each), "image/png", _caption(each)) for each in found.explanations], size="wide")


def _regression(made: report.Report, found: Explained, name: str, value: float) -> None:
    start = next((each for each in found.explanations if each.baseline_prediction is not None), None)
    tiles: list[tuple[str, report.Cell]] = [(name, value)]
    if start is not None and start.baseline_prediction is not None:
        tiles += [
            (f"of the baseline ({start.baseline})", start.baseline_prediction),
            ("difference", value - start.baseline_prediction),
        ]
    made.tiles(tiles)
    made.section("What decided it")
    made.figure(
        _features(found),
        alt="attribution of each feature, by method",
        caption=f"In units of {name}; to the right: it raised the value. Saliency and smooth-grad are slopes: what one"
        " standard deviation more of the feature would change. Sorted by the first method.",
    )
    made.section("Numbers").table(
        ("feature", "input", *(each.method for each in found.explanations)),
        [
            (feature, float(found.input[index]), *(float(each.attributions[index]) for each in found.explanations))
            for index, feature in enumerate(found.features)
        ],
    )
    checks = [each for each in found.explanations if each.delta is not None and each.baseline_prediction is not None]
    if checks:
        made.section("Do they add up?").table(
            ("method", "value", "baseline", "difference", "sum of attributions", "left over"),
            [
                (
                    each.method,
                    value,
                    each.baseline_prediction,
                    value - (each.baseline_prediction or 0.0),
                    each.total,
                    each.delta,
                )
                for each in checks
            ],
        )


def _caption(each: Explanation) -> str:
    parts = [f"{each.method}: {each.target}"]
    if each.baseline is not None:
        parts.append(f"baseline {each.baseline}")
    if each.steps is not None:
        parts.append(f"{each.steps} steps")
    if each.delta is not None:
        parts.append(f"delta {each.delta:.2g}")
    return ", ".join([*parts, f"{each.milliseconds:.0f} ms"])


def _size(array: NDArray[Any]) -> str:
    channels, height, width = array.shape
    return f"as the model saw it: {width}×{height}, {'grey' if channels == 1 else 'colour'}"


def _picture(array: NDArray[Any]) -> bytes:
    """PNG, enlarged by a whole factor."""
    factor = max(1, -(-LEAST_PIXELS // min(array.shape[1:])))
    large = array.repeat(factor, axis=1).repeat(factor, axis=2)
    stream = io.BytesIO()
    Image.fromarray(large[0] if len(large) == 1 else large.transpose(1, 2, 0)).save(stream, "PNG")
    return stream.getvalue()


def _bars(prediction: dict[str, float]) -> Figure:
    figure, (one,) = report.axes(6.4, 0.7 + 0.32 * len(prediction))
    labels = [label if len(label) <= 24 else f"{label[:23]}…" for label in prediction]
    rows = range(len(labels))
    one.barh(rows, list(prediction.values()), color=report.ACCENT)
    one.set_yticks(rows, [label.replace("$", r"\$") for label in labels])
    for row, value in zip(rows, prediction.values(), strict=True):
        one.text(value + 0.01, row, f"{value:.3f}", va="center", color=report.INK)
    one.invert_yaxis()
    one.set(xlim=(0, 1.12), xticks=[0, 0.2, 0.4, 0.6, 0.8, 1], xlabel="probability")
    return figure


def _maps(array: NDArray[Any], each: Explanation) -> bytes:
    """The input with the attributions over it, and the attributions alone with their scale, as one PNG."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    map_, most = each.attributions, float(np.abs(each.attributions).max()) or 1.0
    signed = bool((map_ < 0).any())
    colours = colormaps["RdBu_r" if signed else "Reds"]
    scaled = 0.5 + 0.5 * map_ / most if signed else map_ / most
    grey = array.mean(axis=0) / 255.0
    faint = np.repeat((0.35 + 0.65 * grey)[:, :, None], 3, axis=2)
    share = (np.abs(map_) / most)[:, :, None]
    vivid = colours(0.5 + 0.5 * np.sign(map_) * 0.8 if signed else np.full(map_.shape, 0.8))[:, :, :3]
    figure = Figure(figsize=(5.6, 2.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.imshow(faint * (1 - share) + vivid * share, interpolation="nearest")
    shown = right.imshow(scaled, cmap=colours, vmin=0, vmax=1, interpolation="nearest")
    for one in (left, right):
        one.set_xticks([])
        one.set_yticks([])
    scale = figure.colorbar(shown, ax=right, fraction=0.05, ticks=[0, 0.5, 1])
    scale.ax.set_yticklabels([f"{value:.2g}" for value in ((-most, 0, most) if signed else (0, most / 2, most))])
    scale.ax.tick_params(labelsize=8, colors=report.INK)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150, metadata={"Software": None})
    return stream.getvalue()


def _features(found: Explained) -> Figure:
    first = np.abs(found.explanations[0].attributions)
    order = first.argsort(kind="stable")
    count = len(found.explanations)
    figure, axes = report.axes(max(3.2, 2.4 * count), 0.9 + 0.3 * len(order), columns=count)
    rows = range(len(order))
    for one, each in zip(axes, found.explanations, strict=True):
        values = each.attributions[order]
        one.barh(rows, values, color=[report.SECOND if value > 0 else report.ACCENT for value in values])
        one.axvline(0, color=report.INK, linewidth=0.8)
        one.set_yticks(rows, [found.features[i] for i in order] if one is axes[0] else [""] * len(order))
        one.set_title(each.method, fontsize=10, color=report.INK)
        one.set_xlabel(each.target.replace("$", r"\$"))
    return figure
