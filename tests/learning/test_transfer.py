"""A torchvision backbone with a new head: weights from a file, layers frozen, nothing else moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from marwright.errors import DataError, SettingsError
from marwright.learning import evaluation, graphs, provenance, training, transfer
from marwright.learning.dataset import Dataset
from marwright.learning.recipe import Recipe
from tests.learning.conftest import tiny

pytestmark = pytest.mark.usefixtures("plain_reports")

NAME = "torchvision:mobilenet_v3_small"


def chosen(**net: Any) -> Recipe:
    return tiny(net={"name": NAME, **net}, training__epochs=1, training__optimiser={"name": "adam", "lr": 0.001})


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """torchvision's own file for that net, with random weights."""
    from torchvision import models  # type: ignore[import-untyped]

    path = tmp_path_factory.mktemp("weights") / "mobilenet_v3_small.pth"
    torch.save(models.mobilenet_v3_small().state_dict(), path)
    return path


def test_a_frozen_backbone_keeps_its_weights_and_the_head_learns(
    weights: Path, tiny_set: Dataset, tmp_path: Path
) -> None:
    run = training.train(chosen(weights=str(weights), freeze=["backbone"]), tiny_set, tmp_path, progress=False)
    before, after = torch.load(weights, weights_only=True), torch.load(run.weights, weights_only=True)
    body = {name.removeprefix("net.body."): value for name, value in after.items() if name.startswith("net.body.")}
    assert body
    assert all(torch.equal(value, before[name]) for name, value in body.items())
    assert after["mean"].flatten().tolist() == pytest.approx(transfer.IMAGENET[0])

    graph = training.load_graph(run)
    assert evaluation.evaluate(graph, tiny_set.test, classes=tiny_set.classes).metrics == run.spec.metrics
    assert run.spec.net == NAME
    assert graph.outputs == ("probabilities", "embedding")
    with torch.inference_mode():
        assert graph(tiny_set.test.take(torch.arange(2))[0])[1].shape == (2, 1024)


def test_only_the_named_layers_are_frozen(weights: Path, tiny_set: Dataset) -> None:
    graph = graphs.build(chosen(weights=str(weights), freeze=["features.0"]), tiny_set)
    graph.train()
    frozen = {name for name, value in graph.named_parameters() if not value.requires_grad}
    assert frozen
    assert all(name.startswith("net.body.features.0.") for name in frozen)
    modes = {name: module.training for name, module in graph.net.named_modules()}
    assert not modes["body.features.0.1"]
    assert modes["body.features.1"]
    with pytest.raises(SettingsError, match="stem") as caught:
        graphs.build(chosen(freeze=["stem"]), tiny_set)
    assert "features" in caught.value.hint


def test_without_weights_the_whole_net_learns(tiny_set: Dataset, tmp_path: Path) -> None:
    run = training.train(chosen(), tiny_set, tmp_path, progress=False)
    assert run.finished
    assert run.spec.net_args["classes"] == 3


def test_weights_that_are_not_there_or_of_another_net_are_refused(
    weights: Path, tiny_set: Dataset, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="no weights at"):
        graphs.build(chosen(weights=str(tmp_path / "none.pth")), tiny_set)
    (tmp_path / "noise.pth").write_bytes(b"noise")
    with pytest.raises(DataError, match="does not hold a state_dict"):
        graphs.build(chosen(weights=str(tmp_path / "noise.pth")), tiny_set)
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(DataError, match="is not for mobilenet_v3_small"):
        graphs.build(chosen(weights=str(tmp_path / "other.pth")), tiny_set)


def test_an_unreachable_download_says_what_to_do(tiny_set: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("network is unreachable")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", unreachable)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    with pytest.raises(DataError, match="could not be downloaded") as caught:
        graphs.build(chosen(weights="download"), tiny_set)
    assert "weights = " in caught.value.hint


def test_the_weights_file_names_the_run_by_its_content(weights: Path, tiny_set: Dataset, tmp_path: Path) -> None:
    copy = tmp_path / "copy.pth"
    copy.write_bytes(weights.read_bytes())
    one, two = (provenance.run_id(chosen(weights=str(path)), tiny_set) for path in (weights, copy))
    assert one == two != provenance.run_id(chosen(), tiny_set)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "efficientnet_b0", "shufflenet_v2_x0_5"])
def test_common_backbones_lose_their_head_and_embed(name: str) -> None:
    net = transfer.Backbone(name, 4).eval()
    with torch.inference_mode():
        embedding = net.embed(torch.zeros(2, 3, 32, 32))
        assert embedding.shape == (2, net.width)
        assert net.head(embedding).shape == (2, 4)
