"""From a recipe's `[net]` to the ServingGraph that is trained, saved and exported.

graph = graphs.build(recipe, dataset)      # fresh weights from the seed; mean and std of the training part
graph = graphs.load(run)                   # a finished run's best weights
graphs.warm(graph, run, recipe, dataset)   # fresh no longer: it answers as that run does
"""

from __future__ import annotations

from typing import Any

import torch

from handlers import nets
from handlers.nets import Net, ServingGraph
from handlers.spec import ImageInput, ModelSpec
from marwright.errors import RunError
from marwright.learning import transfer
from marwright.learning.dataset import Dataset, Part
from marwright.learning.recipe import Recipe
from marwright.runs import Run

CHUNK = 4096
PREPARED = 2048
"""Examples, evenly from the training part, that a net may look at before it learns; fewer where they are large."""
PREPARED_BYTES = 1 << 27


def problems(recipe: Recipe) -> list[str]:
    """What the net of a recipe cannot be: an unknown name, arguments that do not fit, a format it has not."""
    choice = recipe.net
    if transfer.is_name(choice.name):
        return transfer.problems(recipe)
    found = []
    for key, value in (("weights", choice.weights), ("freeze", choice.freeze)):
        if value:
            found.append(f"net.{key} is {value!r}; allowed: nothing, it is for torchvision:<name>")
    args = net_args(recipe, width=2)
    clash = sorted(set(args) & set(choice.args))
    if clash:
        found.append(f"net.args has {', '.join(clash)}; allowed: what the data and training.regularisation do not say")
        return found
    try:
        with torch.device("meta"):
            nets.build(choice.name, **args, **choice.args)
    except ValueError as error:
        found.append(f"net is {choice.name!r} with {dict(choice.args)}: {error}")
    return found


def net_args(recipe: Recipe, *, width: int) -> dict[str, Any]:
    """What the net is told besides the recipe's own `net.args`: `width` is the number of classes or of features."""
    image = recipe.data.image()
    if recipe.task == "classification" and image is not None:
        args: dict[str, Any] = {
            "channels": image.channels,
            "height": image.height,
            "width": image.width,
            "classes": width,
        }
    else:
        args = {"features": width}
    dropout = recipe.training.regularisation.dropout
    return {**args, "dropout": dropout} if dropout else args


def build(recipe: Recipe, dataset: Dataset) -> ServingGraph:
    """A net with fresh weights from torch's current seed, normalised by the training part; or a pretrained one,
    normalised as it was."""
    pretrained = transfer.is_name(recipe.net.name) and recipe.net.weights is not None
    mean, std = transfer.IMAGENET if pretrained else statistics(dataset.train)
    width = len(dataset.classes) if recipe.task == "classification" else len(mean)
    if transfer.is_name(recipe.net.name):
        net: Net = transfer.build(recipe, classes=width)
    else:
        net = nets.build(recipe.net.name, **net_args(recipe, width=width), **recipe.net.args)
    if recipe.task == "classification":
        graph = ServingGraph(net, task=recipe.task, mean=mean, std=std)
        if type(net).prepare is not Net.prepare:
            fit = max(1, PREPARED_BYTES // (4 * dataset.train.inputs[0].numel()))  # float32
            few = torch.linspace(0, len(dataset.train) - 1, min(PREPARED, fit, len(dataset.train))).long()
            net.prepare(graph.normalise(dataset.train.take(few)[0]))
        return graph
    targets = dataset.train.targets.double()
    spread = float(targets.std(unbiased=False))
    return ServingGraph(
        net, task=recipe.task, mean=mean, std=std, target_mean=float(targets.mean()), target_std=spread or 1.0
    )


def spec(recipe: Recipe, dataset: Dataset, graph: ServingGraph, *, run: str, metrics: dict[str, float]) -> ModelSpec:
    """What the trained graph takes and gives; not yet exported."""
    width = len(dataset.classes) if recipe.task == "classification" else dataset.input.shape[0]
    return ModelSpec(
        task=recipe.task,
        net=recipe.net.name,
        net_args={**net_args(recipe, width=width), **recipe.net.args},
        input=dataset.input,
        classes=dataset.classes,
        target=dataset.target,
        outputs=graph.outputs,
        top_k=recipe.serving.top_k,
        run=run,
        data_digest=dataset.digest,
        metrics=metrics,
        limits=recipe.limits,
    )


def load(run: Run) -> ServingGraph:
    """The graph of a run with its weights, ready to answer; works for every recipe."""
    spec = run.spec
    if transfer.is_name(spec.net):
        net = transfer.empty(spec.net, dict(spec.net_args))
        image = spec.input
        channels = image.channels if isinstance(image, ImageInput) else 0
        graph = ServingGraph(net, task=spec.task, mean=[0.0] * channels, std=[1.0] * channels)
    else:
        graph = nets.serving_graph(spec.net, dict(spec.net_args), task=spec.task)
    state = torch.load(run.weights, map_location="cpu", weights_only=True)
    try:
        graph.load_state_dict(state)
    except RuntimeError as error:
        raise RunError(
            f"run {run.id}: weights.pt does not fit the net {spec.net!r}: {error}",
            hint="the net's code has changed since; train again",
        ) from None
    return graph.eval()


def warm(graph: ServingGraph, start: Run, recipe: Recipe, dataset: Dataset) -> None:
    """Give `graph` the weights of `start`, its normalisation included; `RunError` where `misfit` says why not.

    Mean and std stay those that the weights were learned with: the graph begins as exactly the one that answers now.
    """
    if reason := misfit(recipe, dataset, start):
        raise RunError(
            f"training cannot start from run {start.id}: {reason}", hint="train from scratch: without a start"
        )
    graph.load_state_dict(load(start).state_dict())


def misfit(recipe: Recipe, dataset: Dataset, start: Run) -> str:
    """Why the weights of `start` are no initial weights for this recipe and data; empty if they are."""
    spec, width = start.spec, len(dataset.classes) if recipe.task == "classification" else dataset.input.shape[0]
    now = {**net_args(recipe, width=width), **recipe.net.args}
    shapes = [{key: value for key, value in args.items() if key != "dropout"} for args in (dict(spec.net_args), now)]
    if (spec.task, spec.net) != (recipe.task, recipe.net.name) or shapes[0] != shapes[1]:
        return f"its net is {spec.net} {shapes[0]}, the recipe's {recipe.net.name} {shapes[1]}"
    if spec.classes != dataset.classes or spec.target != dataset.target:
        return "it was trained for other classes" if spec.classes else "it was trained for another target"
    if spec.input != dataset.input:
        return f"it takes {spec.input}, the recipe {dataset.input}"
    return ""


def statistics(part: Part) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel (pictures, as shares of 255) or feature; a constant one gets std 1.

    Pictures are counted by value, so the result does not depend on how they are read.
    """
    first = part.inputs[0]
    if first.dtype == torch.uint8:
        counts = torch.zeros(first.shape[0], 256, dtype=torch.int64)
        for inputs, _ in part.batches(CHUNK):
            for channel in range(first.shape[0]):
                counts[channel] += torch.bincount(inputs[:, channel].flatten(), minlength=256)
        values = torch.arange(256, dtype=torch.float64) / 255
        shares = counts.double() / counts.sum(dim=1, keepdim=True)
        mean = shares @ values
        std = ((shares * (values - mean[:, None]) ** 2).sum(dim=1)).sqrt()
    else:
        inputs = part.take(torch.arange(len(part)))[0].double()
        mean, std = inputs.mean(dim=0), inputs.std(dim=0, unbiased=False)
    constant = std < 1e-7 * mean.abs().clamp(min=1e-7)
    return mean.tolist(), torch.where(constant, torch.ones_like(std), std).tolist()
