"""Backbones of torchvision with a new head. They exist while training only: a worker has no torchvision.

[net]
name = "torchvision:resnet18"
weights = "resnet18-f37072fd.pth"     # a local file, or "download"
freeze = ["backbone"]                 # or some layers by name: ["conv1", "bn1", "layer1"]
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from handlers.nets import Net
from marwright.errors import DataError, SettingsError

if TYPE_CHECKING:
    from marwright.learning.recipe import Recipe

PREFIX = "torchvision:"
BACKBONE = "backbone"
DOWNLOAD = "download"
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
"""Mean and std that torchvision's weights were trained with."""
_UNFIT = ("googlenet", "inception_v3", "squeezenet1_0", "squeezenet1_1")
"""Nets with side exits, or without a linear layer at the end."""


class Backbone(Net):
    """A torchvision classifier without its last linear layer, and a new one. D is what that layer took.

    Frozen layers keep their weights, and their norms keep their running statistics.
    """

    def __init__(self, name: str, classes: int, *, dropout: float = 0.0, pretrained: bool = False) -> None:
        super().__init__()
        from torchvision import models  # type: ignore[import-untyped]

        weights = models.get_model_weights(name).DEFAULT if pretrained else None
        self.body = models.get_model(name, weights=weights)
        self.width = _behead(self.body, name)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(self.width, classes)
        self.frozen: tuple[str, ...] = ()

    def embed(self, x: Tensor) -> Tensor:
        out: Tensor = torch.flatten(self.body(x), 1)
        return out

    def head(self, embedding: Tensor) -> Tensor:
        out: Tensor = self.fc(self.dropout(embedding))
        return out

    def freeze(self, layers: tuple[str, ...]) -> None:
        """`layers` are names of modules of the backbone, or "backbone" for all. `SettingsError` for another name."""
        there = {name: module for name, module in self.body.named_modules() if name}
        unknown = [name for name in layers if name != BACKBONE and name not in there]
        if unknown:
            children = ", ".join(name for name, _ in self.body.named_children())
            raise SettingsError(
                f"net.freeze names layers that the backbone does not have: {', '.join(unknown)}",
                hint=f"allowed: backbone, {children}, and what is within them",
            )
        self.frozen = layers
        for module in self._frozen():
            for parameter in module.parameters():
                parameter.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode)
        for module in self._frozen():
            module.eval()
        return self

    def _frozen(self) -> list[nn.Module]:
        if not getattr(self, "frozen", ()):
            return []
        if BACKBONE in self.frozen:
            return [self.body]
        return [self.body.get_submodule(name) for name in self.frozen]


def is_name(net: str) -> bool:
    return net.startswith(PREFIX)


def build(recipe: Recipe, *, classes: int) -> Backbone:
    """The backbone with the recipe's weights and a new head from torch's current seed."""
    name, choice = recipe.net.name.removeprefix(PREFIX), recipe.net
    dropout = recipe.training.regularisation.dropout
    if choice.weights == DOWNLOAD:
        net = _downloaded(name, classes, dropout)
    else:
        net = Backbone(name, classes, dropout=dropout)
    if choice.weights not in (None, DOWNLOAD):
        _fill(net, name, Path(str(choice.weights)).expanduser())
    net.freeze(choice.freeze)
    return net


def empty(name: str, args: dict[str, Any]) -> Backbone:
    """The net of a spec, to load a state_dict into."""
    return Backbone(name.removeprefix(PREFIX), int(args["classes"]), dropout=float(args.get("dropout", 0.0)))


def problems(recipe: Recipe) -> list[str]:
    """What a transfer recipe says that is not allowed."""
    from torchvision import models

    found = []
    name = recipe.net.name.removeprefix(PREFIX)
    there = [known for known in models.list_models(module=models) if known not in _UNFIT]
    if name not in there:
        found.append(f"net.name is {recipe.net.name!r}; allowed: torchvision: and one of {', '.join(there)}")
    if recipe.task != "classification":
        found.append(f"task is {recipe.task!r}; allowed with a torchvision net: 'classification'")
    if recipe.data.channels == 1:
        found.append("data.channels is 1; allowed with a torchvision net: 3 (grey pictures become RGB)")
    if recipe.net.args:
        found.append(f"net.args is {dict(recipe.net.args)}; allowed with a torchvision net: nothing")
    if recipe.serving.format == "eager":
        found.append("serving.format is 'eager'; allowed with a torchvision net: 'onnx' (a worker has no torchvision)")
    if recipe.serving.explain:
        found.append("serving.explain is true; allowed with a torchvision net: false (a worker has no torchvision)")
    return found


def _behead(body: Any, name: str) -> int:
    """Replace the last linear layer by nothing; its width."""
    for attribute in ("fc", "classifier", "head", "heads"):
        head = getattr(body, attribute, None)
        if isinstance(head, nn.Linear):
            setattr(body, attribute, nn.Identity())
            return head.in_features
        if isinstance(head, nn.Sequential) and isinstance(head[-1], nn.Linear):
            width = head[-1].in_features
            head[-1] = nn.Identity()
            return width
    raise SettingsError(
        f"torchvision's {name} does not end in a linear layer", hint="try resnet18 or mobilenet_v3_small"
    )


def _downloaded(name: str, classes: int, dropout: float) -> Backbone:
    try:
        return Backbone(name, classes, dropout=dropout, pretrained=True)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"the weights of {name} could not be downloaded: {error}",
            hint='fetch the file elsewhere and name it: weights = "resnet18-f37072fd.pth" under [net]',
        ) from None


def _fill(net: Backbone, name: str, path: Path) -> None:
    """Torchvision's own state_dict for that architecture → the backbone; the old head is left out."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DataError(
            f"no weights at {path}", hint=f'download the file of {name} first, or say weights = "download" under [net]'
        ) from None
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise DataError(
            f"{path} does not hold a state_dict: {error}", hint="give torchvision's own .pth file"
        ) from None
    wanted = net.body.state_dict()
    wrong = [
        f"{key} is missing" if key not in state else f"{key} has shape {tuple(state[key].shape)}"
        for key, value in wanted.items()
        if key not in state or state[key].shape != value.shape
    ]
    if wrong:
        raise DataError(f"{path} is not for {name}: {'; '.join(wrong[:5])}", hint="give the file of that architecture")
    net.body.load_state_dict({key: state[key] for key in wanted})
