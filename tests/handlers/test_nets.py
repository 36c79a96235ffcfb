"""The nets' shapes, and what the serving graph adds to them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from handlers import nets
from handlers.nets import ServingGraph

IMAGES = {
    "small_cnn": ({"channels": 1, "height": 16, "width": 16, "classes": 10}, 128),
    "lenet": ({"channels": 3, "height": 32, "width": 32, "classes": 10}, 84),
    "cifar_resnet": ({"channels": 3, "height": 32, "width": 32, "classes": 10, "blocks": 1}, 64),
    "fast_net": ({"channels": 3, "height": 32, "width": 32, "classes": 10}, 64),
}
ROWS = {"mlp": ({"features": 10}, 20), "linear": ({"features": 10}, None)}


def test_every_net_is_tested() -> None:
    assert IMAGES.keys() | ROWS.keys() == nets.NETS.keys()


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("count", [1, 3])
def test_a_classifier_gives_probabilities_and_an_embedding(name: str, count: int) -> None:
    args, width = IMAGES[name]
    graph = nets.serving_graph(name, args, task="classification").eval()
    shape = (count, args["channels"], args["height"], args["width"])
    probabilities, embedding = graph(torch.randint(0, 256, shape, dtype=torch.uint8))
    assert graph.outputs == ("probabilities", "embedding")
    assert probabilities.shape == (count, args["classes"])
    assert embedding.shape == (count, width)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(count))


@pytest.mark.parametrize("name", ROWS)
def test_a_regressor_gives_a_value(name: str) -> None:
    args, width = ROWS[name]
    graph = nets.serving_graph(name, args, task="regression").eval()
    outputs = graph(torch.zeros(3, 10))
    assert outputs[0].shape == (3, 1)
    assert len(outputs) == len(graph.outputs) == (1 if width is None else 2)


@pytest.mark.parametrize("name", nets.NETS)
def test_forward_is_head_after_embed(name: str) -> None:
    args = {**IMAGES, **ROWS}[name][0]
    net = nets.build(name, **args).eval()
    shape = (2, args["channels"], args["height"], args["width"]) if name in IMAGES else (2, 10)
    x = torch.randn(shape)
    torch.testing.assert_close(net(x), net.head(net.embed(x)), rtol=0, atol=0)


def test_images_are_normalised_by_channel_with_what_the_state_dict_holds() -> None:
    args = IMAGES["lenet"][0]
    made = ServingGraph(nets.build("lenet", **args), task="classification", mean=[0.1, 0.2, 0.3], std=[1, 2, 4])
    again = nets.serving_graph("lenet", args, task="classification")
    again.load_state_dict(made.state_dict(), strict=True)
    white = again.normalise(torch.full((1, 3, 32, 32), 255, dtype=torch.uint8))[0, :, 0, 0]
    torch.testing.assert_close(white, torch.tensor([0.9, 0.4, 0.175]))


def test_a_regressors_scale_is_undone() -> None:
    net = nets.build("linear", features=1)
    torch.nn.init.constant_(net.fc.weight, 1.0)  # type: ignore[union-attr, arg-type]
    torch.nn.init.constant_(net.fc.bias, 0.0)  # type: ignore[union-attr, arg-type]
    graph = ServingGraph(net, task="regression", mean=[10.0], std=[2.0], target_mean=100.0, target_std=5.0)
    assert graph(torch.tensor([[14.0]]))[0].item() == pytest.approx(110.0)


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        ("vgg", {}, "no net named 'vgg'; there are: cifar_resnet, fast_net, lenet"),
        ("mlp", {"colour": 1}, "unexpected keyword argument 'colour'"),
        ("small_cnn", {"channels": 1, "height": 4, "width": 4, "classes": 2}, "at least 8×8"),
        ("lenet", {"channels": 1, "height": 14, "width": 14, "classes": 2}, "at least 16×16"),
        ("cifar_resnet", {"channels": 1, "height": 4, "width": 4, "classes": 2}, "at least 8×8"),
    ],
)
def test_a_net_that_cannot_be_says_why(name: str, args: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        nets.build(name, **args)


@pytest.mark.parametrize("std", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_must_be_positive(std: float) -> None:
    with pytest.raises(ValueError, match="standard deviations"):
        ServingGraph(nets.build("mlp", features=1), task="regression", mean=[0.0], std=[std])
