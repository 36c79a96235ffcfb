"""The nets, and the graph that serves them.

Every net here is split where a representation ends and the decision begins: `embed(x)` gives the embedding (N×D) and
`head(e)` the logits or the value, so that a worker can answer with both. `ServingGraph` wraps a net with what belongs
to it for ever: the normalisation before and the softmax (or the un-scaling) after. Its buffers are in the state_dict,
so nobody retypes a mean.

    graph = ServingGraph(build("small_cnn", channels=1, height=16, width=16, classes=10), task="classification", ...)
    probabilities, embedding = graph(uint8_images)
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Net(nn.Module, abc.ABC):
    """`forward = head ∘ embed`. Inputs are float and already normalised; `head` gives logits (N×K) or values (N×1)."""

    has_embedding = True
    """False where `embed` is the identity and says nothing that the input does not."""

    @abc.abstractmethod
    def embed(self, x: Tensor) -> Tensor:
        """N×… → N×D."""

    @abc.abstractmethod
    def head(self, embedding: Tensor) -> Tensor:
        """N×D → N×K."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))

    def prepare(self, x: Tensor) -> None:
        """Look at normalised examples of the training part once, before training. Most nets need not."""


class SmallCnn(Net):
    """conv(C→32,3) relu conv(32→64,3) relu maxpool 2, fc →128→K. For pictures of 8×8 to 32×32; D = 128."""

    def __init__(self, channels: int, height: int, width: int, classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        if min(height, width) < 8:
            raise ValueError(f"small_cnn needs pictures of at least 8×8, not {height}×{width}")
        self.conv1 = nn.Conv2d(channels, 32, 3)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(64 * ((height - 4) // 2) * ((width - 4) // 2), 128)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(128, classes)

    def embed(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.conv2(torch.relu(self.conv1(x)))))
        return torch.relu(self.fc1(self.dropout(torch.flatten(x, 1))))

    def head(self, embedding: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.dropout(embedding))
        return out


class LeNet(Net):
    """conv(C→6,5) pool conv(6→16,5) pool, fc →120→84→K, relu between (LeCun et al. 1998, with relu). D = 84."""

    def __init__(self, channels: int, height: int, width: int, classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        rows, columns = (((side - 4) // 2 - 4) // 2 for side in (height, width))
        if min(rows, columns) < 1:
            raise ValueError(f"lenet needs pictures of at least 16×16, not {height}×{width}")
        self.conv1 = nn.Conv2d(channels, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(16 * rows * columns, 120)
        self.fc2 = nn.Linear(120, 84)
        self.dropout = nn.Dropout(dropout)
        self.fc3 = nn.Linear(84, classes)

    def embed(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.conv1(x)))
        x = self.pool(torch.relu(self.conv2(x)))
        return torch.relu(self.fc2(torch.relu(self.fc1(torch.flatten(x, 1)))))

    def head(self, embedding: Tensor) -> Tensor:
        out: Tensor = self.fc3(self.dropout(embedding))
        return out


class _Block(nn.Module):
    """Two 3×3 convolutions and a shortcut; a 1×1 projection where shape changes."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outside)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inside != outside:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


class CifarResNet(Net):
    """ResNet for small pictures: 3×3 stem, no early pooling, three stages (He et al. 2016, section 4.2).

    `blocks` for each stage: 1 → ResNet-8, 3 → ResNet-20. D = 4·`filters`.
    """

    def __init__(
        self,
        channels: int,
        height: int,
        width: int,
        classes: int,
        blocks: int = 3,
        filters: int = 16,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if min(height, width) < 8:
            raise ValueError(f"cifar_resnet needs pictures of at least 8×8, not {height}×{width}")
        self.stem = nn.Sequential(
            nn.Conv2d(channels, filters, 3, padding=1, bias=False), nn.BatchNorm2d(filters), nn.ReLU()
        )
        layers: list[nn.Module] = []
        inside = filters
        for stage in range(3):
            outside = filters * 2**stage
            for block in range(blocks):
                layers.append(_Block(inside, outside, stride=2 if stage > 0 and block == 0 else 1))
                inside = outside
        self.stages = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(inside, classes)

    def embed(self, x: Tensor) -> Tensor:
        embedding: Tensor = self.stages(self.stem(x)).mean(dim=(2, 3))
        return embedding

    def head(self, embedding: Tensor) -> Tensor:
        out: Tensor = self.fc(self.dropout(embedding))
        return out


class _Stage(nn.Module):
    """conv 3×3, maxpool 2, norm, gelu, conv 3×3, norm, gelu: the picture at half its size."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2)
        self.norm1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outside)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.gelu(self.norm1(self.pool(self.conv1(x))))
        return functional.gelu(self.norm2(self.conv2(x)))


class FastNet(Net):
    """A wide and shallow net that learns in few epochs, after the CIFAR-10 speed records (arXiv 2404.00498).

    The first convolution (2×2) is not learned: its filters are the directions in which patches of the training part
    vary, each scaled to unit variance, and their negatives. Three stages follow, `widths` wide, then the maximum over
    each channel, and one layer. D is the last width. With `mirror` an answer is the mean of a picture's and of its
    mirror image's (test-time augmentation): twice the work.
    """

    def __init__(
        self,
        channels: int,
        height: int,
        width: int,
        classes: int,
        narrow: int = 32,
        wide: int = 64,
        mirror: bool = False,
        scale: float = 0.111,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if min(height, width) < 16:
            raise ValueError(f"fast_net needs pictures of at least 16×16, not {height}×{width}")
        self.mirror, self.scale = mirror, scale
        patch = channels * 4
        self.whiten = nn.Conv2d(channels, 2 * patch, 2)
        self.whiten.weight.requires_grad_(False)
        self.stages = nn.Sequential(_Stage(2 * patch, narrow), _Stage(narrow, wide), _Stage(wide, wide))
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(wide, classes, bias=False)

    def prepare(self, x: Tensor) -> None:
        """Whitening from N×C×H×W examples; eigenvectors of the covariance of their 2×2 patches."""
        patch = x.shape[1] * 4
        count, total, squares = 0, x.new_zeros(patch).double(), x.new_zeros(patch, patch).double()
        for some in torch.split(x, 64):  # patches of float64 are eight times as large as the examples
            patches = some.double().unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)
            count += len(patches)
            total += patches.sum(dim=0)
            squares += patches.T @ patches
        mean = total / count
        values, vectors = torch.linalg.eigh(squares / count - torch.outer(mean, mean))
        filters = (vectors / torch.sqrt(values + 5e-4)).T.flip(0).reshape(-1, *self.whiten.weight.shape[1:])
        self.whiten.weight.data.copy_(torch.cat([filters, -filters]))
        assert self.whiten.bias is not None
        nn.init.zeros_(self.whiten.bias)

    def embed(self, x: Tensor) -> Tensor:
        if self.mirror and not self.training:
            return 0.5 * (self._one(x) + self._one(x.flip(3)))
        return self._one(x)

    def head(self, embedding: Tensor) -> Tensor:
        out: Tensor = self.fc(self.dropout(embedding)) * self.scale
        return out

    def _one(self, x: Tensor) -> Tensor:
        x = self.stages(functional.gelu(self.whiten(x)))
        return x.amax(dim=(2, 3))


class Mlp(Net):
    """linear F→H, relu, linear H→O. D = H."""

    def __init__(self, features: int, hidden: int = 20, outputs: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(features, hidden)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden, outputs)

    def embed(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc1(x))

    def head(self, embedding: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.dropout(embedding))
        return out


class LinearNet(Net):
    """linear F→O: ordinary least squares when trained with MSE. No embedding."""

    has_embedding = False

    def __init__(self, features: int, outputs: int = 1) -> None:
        super().__init__()
        self.fc = nn.Linear(features, outputs)

    def embed(self, x: Tensor) -> Tensor:
        return x

    def head(self, embedding: Tensor) -> Tensor:
        out: Tensor = self.fc(embedding)
        return out


NETS: dict[str, Callable[..., Net]] = {
    "small_cnn": SmallCnn,
    "lenet": LeNet,
    "cifar_resnet": CifarResNet,
    "fast_net": FastNet,
    "mlp": Mlp,
    "linear": LinearNet,
}


def build(name: str, **args: Any) -> Net:
    """A fresh net by its name. `ValueError` names the nets there are, or the argument that does not fit."""
    if name not in NETS:
        raise ValueError(f"no net named {name!r}; there are: {', '.join(sorted(NETS))}")
    try:
        return NETS[name](**args)
    except TypeError as error:
        raise ValueError(f"net {name!r}: {error}") from None


class ServingGraph(nn.Module):
    """What is exported: raw input → (probabilities, embedding) or (value, embedding).

    Classification: uint8 N×C×H×W → x/255 → (x − mean)/std by channel → net → softmax → N×K.
    Regression: float32 N×F → (x − mean)/std by feature → net → y·target_std + target_mean → N×1.
    The embedding (N×D) is given where the net has one.
    """

    mean: Tensor
    std: Tensor
    target_mean: Tensor
    target_std: Tensor

    def __init__(
        self,
        net: Net,
        *,
        task: str,
        mean: Sequence[float],
        std: Sequence[float],
        target_mean: float = 0.0,
        target_std: float = 1.0,
    ) -> None:
        super().__init__()
        if not all(math.isfinite(value) and value > 0 for value in (*std, target_std)):
            raise ValueError(f"standard deviations must be positive: {list(std)}, {target_std}")
        self.net = net
        self.task = task
        shape = (1, -1, 1, 1) if task == "classification" else (1, -1)
        self.register_buffer("mean", torch.tensor(list(mean), dtype=torch.float32).reshape(shape))
        self.register_buffer("std", torch.tensor(list(std), dtype=torch.float32).reshape(shape))
        self.register_buffer("target_mean", torch.tensor(float(target_mean)))
        self.register_buffer("target_std", torch.tensor(float(target_std)))

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what `forward` returns, in order."""
        first = "probabilities" if self.task == "classification" else "value"
        return (first, "embedding") if self.net.has_embedding else (first,)

    def normalise(self, x: Tensor) -> Tensor:
        """Raw input (uint8 images, or float rows in their own units) → what the net was trained on."""
        x = x.to(torch.float32)
        if self.task == "classification":
            x = x / 255.0
        return (x - self.mean) / self.std

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        embedding = self.net.embed(self.normalise(x))
        out = self.net.head(embedding)
        if self.task == "classification":
            first = torch.softmax(out, dim=1)
        else:
            first = out * self.target_std + self.target_mean
        return (first, embedding) if self.net.has_embedding else (first,)


def serving_graph(name: str, args: dict[str, Any], *, task: str) -> ServingGraph:
    """An empty ServingGraph to load a state_dict into: its mean, std and scale come from there."""
    net = build(name, **args)
    width = int(args["channels"]) if task == "classification" else int(args["features"])
    return ServingGraph(net, task=task, mean=[0.0] * width, std=[1.0] * width)
