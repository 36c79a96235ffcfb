"""Why the model answered so: attributions by captum's methods on the eager twin of what answers.

    ask = Ask.read({"method": "occlusion", "target": "cat"}, spec)      # BadRequest 400 or 422
    explainer.admit(ask)                                                # BadRequest 413 if it takes too long
    found = explainer.explain(row, ask, index)
    found.attributions                                                  # float32 C×H×W, 1×H×W or F

| method               | what a number says                                              | steps (default)        |
|----------------------|-----------------------------------------------------------------|------------------------|
| integrated-gradients | its share of f(input) − f(baseline); they add up to it          | points of the path, 50 |
| saliency             | slope of f per standard deviation; its size alone for pictures  |                        |
| occlusion            | drop of f when a window, or a feature, becomes the baseline     | windows on a side, 7   |
| grad-cam             | where the last feature map speaks for the class, 0 or more      |                        |
| smooth-grad          | saliency, averaged over noisy copies before its size is taken   | copies, 20             |

f is the logit of the target class, or a regressor's value in its own units. Slopes are taken with respect to the
normalised input, so that channels and features of different spread compare: one unit is a standard deviation of the
training data. Integrated gradients and occlusion are the same in either scale. Occlusion and Grad-CAM know no channels:
1×H×W. Integrated gradients: Sundararajan et al. 2017; saliency: Simonyan et al. 2013; occlusion: Zeiler and Fergus
2013; Grad-CAM: Selvaraju et al. 2017; SmoothGrad: Smilkov et al. 2017.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from handlers.errors import BadRequest, LoadError
from handlers.spec import ImageInput, ModelSpec

if TYPE_CHECKING:  # what computes is imported where it does: whoever only reads an `Ask` needs none of it
    from torch import Tensor, nn

    from handlers.nets import ServingGraph

IG, SALIENCY, OCCLUSION, GRAD_CAM, SMOOTH_GRAD = METHODS = (
    "integrated-gradients",
    "saliency",
    "occlusion",
    "grad-cam",
    "smooth-grad",
)
"""The first is the default."""
BASELINES = {"classification": ("black", "mean", "blur", "white"), "regression": ("mean", "zero")}
"""What counts as nothing, the default first. "mean" is that of the training data."""
FORMATS = ("json", "png", "npy")
CONTROLS = frozenset({"method", "target", "baseline", "steps", "format"})
"""Fields beside the input that say which explanation is wanted; as headers, `X-Explain-Method` and so on."""
MAX_STEPS = 1000

_STEPS = {IG: 50, OCCLUSION: 7, SMOOTH_GRAD: 20}
_WITH_BASELINE = (IG, OCCLUSION)
_NOISE = {"classification": 0.15, "regression": 0.5}
"""SmoothGrad's: of the range from black to white (Smilkov et al., figure 3), or in standard deviations of a feature."""
_CHUNK = 16
"""Copies of the input in one pass; fewer of a large input, to bound memory."""
_CHUNK_NUMBERS = 2**20
_AGAIN = 60.0
"""Seconds between two looks at how fast the net is, where explanations are refused."""
_OVERRUN = 2.0
"""Times the limit, after which explaining stops in any case."""
_LONG = 0.5
"""Seconds; what takes longer is measured once, because a worker's start has a limit of its own."""


@dataclass(frozen=True)
class Ask:
    """Which explanation one request wants. Its values are valid for the model that it was read for."""

    method: str = IG
    target: int | None = None
    """Index of the class; None is the predicted one."""
    baseline: str = ""
    """Empty for methods without one."""
    steps: int | None = None
    """None where they mean nothing."""
    format: str = "json"

    @classmethod
    def read(cls, given: Mapping[str, Any], spec: ModelSpec) -> Ask:
        """From header or field values by the names in `CONTROLS`.

        `BadRequest` 400 for what is not known, 422 for a target that this model does not have.
        """
        method = _one_of(METHODS, given, "method")
        baseline = _one_of(BASELINES[spec.task], given, "baseline")
        format = _one_of(FORMATS, given, "format")
        if format == "png" and not isinstance(spec.input, ImageInput):
            raise BadRequest(400, "format png is a map over a picture; for rows of numbers there are: json, npy")
        steps = _steps(given.get("steps")) or _STEPS.get(method)
        if method not in _STEPS or (method == OCCLUSION and not isinstance(spec.input, ImageInput)):
            steps = None
        target = _target(given.get("target"), spec)
        return cls(method, target, baseline if method in _WITH_BASELINE else "", steps, format)


@dataclass(frozen=True)
class Explanation:
    """One input's attributions, and what they add up to."""

    ask: Ask
    target: int
    """Index of the class; 0 for a regressor."""
    row: NDArray[Any]
    """The input that was explained."""
    attributions: NDArray[np.float32]
    """C×H×W (1×H×W for methods that know no channels) or F."""
    delta: float | None
    """Integrated gradients: their sum − (f(input) − f(baseline)); the error of the numerical integral."""
    baseline_output: float | None
    """f(baseline), for methods with a baseline."""


@dataclass(frozen=True)
class _Pace:
    """Seconds for one pass of n copies: `call` + n·`copy`."""

    call: float
    copy: float

    def seconds(self, copies: int, chunk: int) -> float:
        return math.ceil(copies / chunk) * self.call + copies * self.copy


class Explainer:
    """The twin, ready to explain, and how fast it is.

    Times come from passes at the start; after each explanation the pace is corrected by how long it really took. What
    is refused is never measured, so a slow moment must not refuse for ever: a refusal moves the correction back towards
    the start's figure, and once a minute one pass is timed before anything is refused.
    """

    def __init__(self, graph: ServingGraph, spec: ModelSpec, device: str) -> None:
        _captum()
        self.spec, self.device = spec, device
        self.graph = graph.eval().requires_grad_(False).to(device)
        self.limit = spec.limits.explain_seconds
        self.correction = 1.0
        self.chunk = max(1, min(_CHUNK, _CHUNK_NUMBERS // math.prod(spec.input.shape)))
        self._deadline = math.inf
        self._next_look = 0.0
        self._layer = self._last_feature_map()
        self.methods = tuple(method for method in METHODS if method != GRAD_CAM or self._layer is not None)
        """What this net offers."""
        try:
            self._gradient, self._forward = self._pace(gradient=True), self._pace(gradient=False)
            self._overhead = {method: self._overhead_of(method) for method in self.methods}
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            raise LoadError(f"{spec.twin} cannot be explained: {type(error).__name__}: {text}") from None

    def seconds(self, ask: Ask) -> float:
        """How long that should take."""
        return self._measured(ask) * self.correction

    def admit(self, ask: Ask) -> None:
        """`BadRequest` 422 where the net has no such explanation, 413 where it would take longer than the limit."""
        if ask.method not in self.methods:
            raise BadRequest(422, f"{ask.method} needs a net with convolutions; there are: {', '.join(self.methods)}")
        if self.seconds(ask) > self.limit:
            self._look_again()
        seconds = self.seconds(ask)
        if seconds <= self.limit:
            return
        reason = f"{ask.method} would take about {seconds:.3g} s; at most {self.limit:g} s{self._advice(ask)}"
        self.correction = min(self.correction, 1 + (self.correction - 1) * 0.8)
        raise BadRequest(413, reason)

    def explain(self, row: NDArray[Any], ask: Ask, index: int, spent: float = 0.0) -> Explanation:
        """Attributions of one input (uint8 C×H×W or float32 F), which is left as it is.

        `index` is the class where `ask` names none; `spent` are the seconds that the batch's earlier explanations took.
        `BadRequest` 429 where too few are left, or turn out to be; 500 where the net has no finite slope.
        """
        if spent and spent + self.seconds(ask) > self.limit:
            raise BadRequest(429, "the explanations that came before took the time there is for them; try again")
        began = time.monotonic()
        self._deadline = began + _OVERRUN * self.limit - spent
        try:
            found = self._explain(row, ask, index if ask.target is None else ask.target)
        finally:
            self._deadline = math.inf
            self._learn(time.monotonic() - began, self._measured(ask))
        if not np.isfinite(found.attributions).all():
            raise BadRequest(500, "the model has no finite explanation of this input")
        return found

    def _learn(self, took: float, expected: float) -> None:
        """Short ones count for less: a millisecond of somebody else's says nothing about seconds."""
        weight = 0.3 * min(1.0, took / (0.05 * self.limit))
        self.correction += weight * (min(max(took / expected, 0.25), 4.0) - self.correction)

    def _explain(self, row: NDArray[Any], ask: Ask, index: int) -> Explanation:
        import torch

        picture = isinstance(self.spec.input, ImageInput)
        x = self._normalised(row)
        baseline = self._normalised(self._baseline(row, ask.baseline)) if ask.baseline else None
        with torch.enable_grad():
            found = _HOW[ask.method](self, x, baseline, ask, index).detach()
        if picture and ask.method in (SALIENCY, SMOOTH_GRAD):
            found = found.abs()
        if picture and ask.method == OCCLUSION:
            found = found[:, :1]  # a window covers every channel, and each of them says so
        delta = base = None
        if baseline is not None:
            with torch.no_grad():
                here, base = self._f(torch.cat([x.detach(), baseline]))[:, index].double().tolist()
            delta = float(found.double().sum()) - (here - base) if ask.method == IG else None
        return Explanation(ask, index, row, found[0].cpu().numpy().astype(np.float32), delta, base)

    def _f(self, x: Tensor) -> Tensor:
        """Normalised N×… → logits N×K, or values in their own units N×1."""
        if time.monotonic() > self._deadline:
            raise BadRequest(429, "the worker is slower than usual and gave up explaining; try again")
        out: Tensor = self.graph.net(x)
        if self.spec.task == "classification":
            return out
        return out * self.graph.target_std + self.graph.target_mean

    def _normalised(self, row: NDArray[Any]) -> Tensor:
        """1×…, a copy."""
        import torch

        with torch.no_grad():
            return self.graph.normalise(torch.tensor(row[None], dtype=torch.float32, device=self.device))

    def _baseline(self, row: NDArray[Any], name: str) -> NDArray[Any]:
        """In the input's own units."""
        if name == "mean":
            mean = self.graph.mean[0].cpu().numpy() * (255.0 if self.spec.task == "classification" else 1.0)
            return np.broadcast_to(mean, row.shape)
        if name == "blur":
            from PIL import Image, ImageFilter

            blur = ImageFilter.GaussianBlur(max(row.shape[1:]) / 8)
            return np.stack([np.asarray(Image.fromarray(channel).filter(blur)) for channel in row])
        return np.full(row.shape, 255.0 if name == "white" else 0.0, np.float32)

    def _integrated_gradients(self, x: Tensor, baseline: Tensor | None, ask: Ask, index: int) -> Tensor:
        # The midpoint rule: the weights of captum's usual Gauss-Legendre take seconds of their own at 1000 steps.
        method = _captum().IntegratedGradients(self._f)
        found: Tensor = method.attribute(
            x, baseline, target=index, n_steps=ask.steps or 1, method="riemann_middle", internal_batch_size=self.chunk
        )
        return found

    def _saliency(self, x: Tensor, baseline: Tensor | None, ask: Ask, index: int) -> Tensor:
        found: Tensor = _captum().Saliency(self._f).attribute(x.requires_grad_(), target=index, abs=False)
        return found

    def _smooth_grad(self, x: Tensor, baseline: Tensor | None, ask: Ask, index: int) -> Tensor:
        import torch

        noise = _NOISE[self.spec.task]
        if self.spec.task == "classification":
            noise /= float(self.graph.std.mean())
        attribution = _captum()
        # The same request gets the same answer, and whatever else draws random numbers here is not disturbed.
        with torch.random.fork_rng(devices=[torch.device(self.device)] if self.device != "cpu" else []):
            torch.manual_seed(0)
            found: Tensor = attribution.NoiseTunnel(attribution.Saliency(self._f)).attribute(
                x.requires_grad_(), nt_type="smoothgrad", nt_samples=ask.steps or 1, nt_samples_batch_size=self.chunk,
                stdevs=noise, target=index, abs=False,
            )  # fmt: skip
        return found

    def _occlusion(self, x: Tensor, baseline: Tensor | None, ask: Ask, index: int) -> Tensor:
        attribution = _captum()
        if not isinstance(self.spec.input, ImageInput):
            alone: Tensor = attribution.FeatureAblation(self._f).attribute(
                x, baseline, target=index, perturbations_per_eval=self.chunk
            )
            return alone
        (tall, down), (wide, right) = _windows(self.spec.input.shape, ask.steps or 1)
        channels = self.spec.input.channels
        found: Tensor = attribution.Occlusion(self._f).attribute(
            x, (channels, tall, wide), strides=(channels, down, right), baselines=baseline, target=index,
            perturbations_per_eval=self.chunk,
        )  # fmt: skip
        return found

    def _grad_cam(self, x: Tensor, baseline: Tensor | None, ask: Ask, index: int) -> Tensor:
        from torch import nn

        method = _captum().LayerGradCam(self._f, self._layer)
        found = method.attribute(x.requires_grad_(), target=index, relu_attributions=True)
        return nn.functional.interpolate(found.detach(), size=x.shape[2:], mode="bilinear", align_corners=False)

    def _last_feature_map(self) -> nn.Module | None:
        """What Grad-CAM looks at: the last module with a convolution in it whose output is a map.

        A whole residual stage comes after the projection in its shortcut. Modules that are used twice are left out:
        they have no single output.
        """
        if not isinstance(self.spec.input, ImageInput):
            return None
        import torch
        from torch import Tensor, nn

        seen: list[nn.Module] = []

        def look(module: nn.Module, _: Any, out: Any) -> None:
            if isinstance(out, Tensor) and out.ndim == 4 and min(out.shape[2:]) > 1:
                seen.append(module)

        convolutional = [
            module
            for module in self.graph.net.modules()
            if any(isinstance(part, nn.Conv2d) for part in module.modules())
        ]
        hooks = [module.register_forward_hook(look) for module in convolutional]
        try:
            with torch.no_grad():
                self._f(self._normalised(np.zeros(self.spec.input.shape, np.uint8)))
        finally:
            for hook in hooks:
                hook.remove()
        once = [module for module in seen if seen.count(module) == 1]
        return once[-1] if once else None

    def _passes(self, ask: Ask) -> tuple[int, int]:
        """Copies of the input that go forward and back, and those that go forward alone."""
        if ask.method != OCCLUSION:
            return ask.steps or 1, 2 if ask.baseline else 0
        shape = self.spec.input.shape
        return 0, math.prod(shape if ask.steps is None else _positions(shape, ask.steps)) + 3

    def _measured(self, ask: Ask) -> float:
        backward, forward = self._passes(ask)
        seconds = self._gradient.seconds(backward, self.chunk) + self._forward.seconds(forward, self.chunk)
        return seconds + self._overhead[ask.method]

    def _pace(self, *, gradient: bool) -> _Pace:
        """By one copy and by a chunk of them."""
        one = self._pass(1, gradient)
        if self.chunk == 1:
            return _Pace(0.0, one)
        copy = max((self._pass(self.chunk, gradient) - one) / (self.chunk - 1), one / self.chunk / 4)
        return _Pace(max(one - copy, 0.0), copy)

    def _pass(self, copies: int, gradient: bool, times: int = 3) -> float:
        """Seconds of one pass of so many copies, the best of a few: the first is slower, it gets memory and chooses
        kernels. One that is long is not made again.
        """
        import torch

        shape = self.spec.input.shape
        x = self._normalised(np.zeros(shape, np.float32)).repeat(copies, *[1] * len(shape))
        best = math.inf
        for _ in range(times):
            began = time.perf_counter()
            with torch.set_grad_enabled(gradient):
                out = self._f(x.requires_grad_(gradient)).sum()
                if gradient:
                    torch.autograd.grad(out, x)
            out.item()  # waits for a GPU
            took = time.perf_counter() - began
            best = min(best, took)
            if took > _LONG:
                break
        return best

    def _look_again(self) -> None:
        """Now and then, before something is refused: what is refused is never measured, and a pace that was measured
        while the machine was busy would refuse for ever.
        """
        one = self._gradient.seconds(1, self.chunk)
        if time.monotonic() < self._next_look or one * self.correction > self.limit / 2:
            return
        self._next_look = time.monotonic() + _AGAIN
        self.correction = min(self.correction, self._pass(1, True, times=2) / one)

    def _overhead_of(self, method: str) -> float:
        """What captum takes beside the passes, and proof that the method works with this net."""
        ask = Ask.read({"method": method, "steps": 2}, self.spec)
        row = np.zeros(self.spec.input.shape, np.uint8 if isinstance(self.spec.input, ImageInput) else np.float32)
        for _ in range(2):  # the first is slower
            began = time.perf_counter()
            self._explain(row, ask, 0)
            if (took := time.perf_counter() - began) > _LONG:
                break
        backward, forward = self._passes(ask)
        passes = self._gradient.seconds(backward, self.chunk) + self._forward.seconds(forward, self.chunk)
        return max(took - passes, 0.0)

    def _advice(self, ask: Ask) -> str:
        """How to ask for less."""
        advice = []
        if ask.steps is not None and (fitting := self._most_steps(ask, ask.steps)):
            advice.append(f"at most {fitting} steps")
        others = [
            method
            for method in self.methods
            if method != ask.method and self.seconds(Ask.read({"method": method}, self.spec)) <= self.limit
        ]
        advice += [f"method {others[0]}"] if others else []
        return f"; ask for {' or '.join(advice)}" if advice else ""

    def _most_steps(self, ask: Ask, high: int) -> int:
        """0 if not even one fits."""
        low = 0
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.seconds(replace(ask, steps=middle)) <= self.limit
            low, high = (middle, high) if fits else (low, middle - 1)
        return low


_HOW: dict[str, Callable[[Explainer, Tensor, Tensor | None, Ask, int], Tensor]] = {
    IG: Explainer._integrated_gradients,
    SALIENCY: Explainer._saliency,
    OCCLUSION: Explainer._occlusion,
    GRAD_CAM: Explainer._grad_cam,
    SMOOTH_GRAD: Explainer._smooth_grad,
}


def load(spec: ModelSpec, model_dir: Path, device: str) -> Explainer | None:
    """From the archive's twin; None where there is none. `device` is "cpu" or "cuda:0".

    `LoadError` where the twin does not fit the net, or captum is missing.
    """
    if not spec.twin:
        return None
    import torch

    from handlers import nets

    try:
        graph = nets.serving_graph(spec.net, dict(spec.net_args), task=spec.task)
        graph.load_state_dict(torch.load(model_dir / spec.twin, map_location="cpu", weights_only=True), strict=True)
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise LoadError(f"{spec.twin} does not fit net {spec.net!r}: {type(error).__name__}: {text}") from None
    return Explainer(graph, spec, device if torch.cuda.is_available() else "cpu")


def _captum() -> Any:
    """captum takes 0.6 s and brings matplotlib along, so only a worker that explains imports it."""
    try:
        from captum import attr  # type: ignore[import-untyped]
    except ImportError as error:
        package = error.name or "captum"
        raise LoadError(f"explanations need {package}, which is not installed (spec.json names a twin)") from None
    return attr


def _windows(shape: tuple[int, ...], steps: int) -> tuple[tuple[int, int], ...]:
    """Size and stride of the window on each side: about `steps` of them, each half over the next."""
    strides = [math.ceil(side / (steps + 1)) for side in shape[1:]]
    return tuple((min(side, 2 * stride), stride) for side, stride in zip(shape[1:], strides, strict=True))


def _positions(shape: tuple[int, ...], steps: int) -> list[int]:
    sides = zip(shape[1:], _windows(shape, steps), strict=True)
    return [math.ceil((side - window) / stride) + 1 for side, (window, stride) in sides]


def _one_of(known: tuple[str, ...], given: Mapping[str, Any], name: str) -> str:
    value = _text(given.get(name))
    if value in (None, ""):
        return known[0]
    lowered = value.strip().lower().replace("_", "-") if isinstance(value, str) else None
    if lowered not in known:
        raise BadRequest(400, f"{name} must be one of: {', '.join(known)}")
    return lowered


def _steps(given: Any) -> int | None:
    value = _text(given)
    if value in (None, ""):
        return None
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit() and len(value) < 20:
        value = int(value)
    if type(value) is not int or not 1 <= value <= MAX_STEPS:
        raise BadRequest(400, f"steps must be a whole number from 1 to {MAX_STEPS}")
    return value


def _target(given: Any, spec: ModelSpec) -> int | None:
    """By label first, because labels may be digits too; in a header it may be percent-encoded."""
    value = _text(given)
    if value in (None, ""):
        return None
    labels = spec.classes if spec.task == "classification" else (spec.target,)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise BadRequest(400, "target must be a label or an index")
    for text in (value, value.strip(), unquote(value.strip())):
        if text in labels:
            return labels.index(text)
    number = value.strip()
    if number.isascii() and number.isdigit() and len(number) < 20 and int(number) < len(labels):
        return int(number)
    names = ", ".join(labels)
    there = f"{names[:200]}…" if len(names) > 200 else names
    numbers = f", or an index from 0 to {len(labels) - 1}" if len(labels) > 1 else ""
    raise BadRequest(422, f"this model has no such target; there are: {there}{numbers}")


def _text(value: Any) -> Any:
    """A field of a form or of gRPC arrives as bytes."""
    return bytes(value).decode("utf-8", "replace") if isinstance(value, bytes | bytearray) else value
