"""What makes training quick changes nothing that it should not."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from handlers import nets
from marwright.errors import RunError, SettingsError
from marwright.learning import acceleration, augmentation, graphs, optimisation, reading, training
from marwright.learning.dataset import Chain, Dataset, Part, pieces
from marwright.learning.tables import Sgd
from tests.learning.conftest import tiny

pytestmark = pytest.mark.usefixtures("plain_reports")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_shifted_and_mirrored_at_once_is_shifted_and_then_mirrored() -> None:
    pictures = torch.randint(0, 256, (9, 3, 7, 6), dtype=torch.uint8, generator=seeded(0))
    moves = augmentation.draw(9, flip=True, crop=2, generator=seeded(1))
    assert moves.corners is not None
    assert moves.mirrored is not None
    shifted = augmentation.shift(pictures, moves.corners, 2)
    wanted = torch.where(moves.mirrored[:, None, None, None], shifted.flip(3), shifted)
    assert 0 < int(moves.mirrored.sum()) < 9
    assert torch.equal(augmentation.moved(pictures, moves), wanted)
    part = slice(2, 6)
    some = augmentation.moved(pictures[part], moves.of(part, torch.device("cpu")))
    assert torch.equal(some, wanted[part]), "a share of a batch is moved as in the whole"


def test_two_epochs_together_show_both_sides_of_every_picture() -> None:
    epochs = [augmentation.sides(100, epoch=epoch, generator=seeded(3)) for epoch in range(4)]
    assert torch.equal(epochs[0], ~epochs[1])
    assert torch.equal(epochs[0], epochs[2])
    assert 30 < int(epochs[0].sum()) < 70


def test_alternate_without_flip_is_refused() -> None:
    with pytest.raises(SettingsError, match="alternate = true only with flip = true"):
        tiny(training__regularisation={"alternate": True})


def test_biases_learn_at_their_own_rate_through_a_schedule() -> None:
    net = nn.Linear(3, 2)
    made = optimisation.optimiser(Sgd(name="sgd", lr=0.1, bias_lr=8.0), net, l2=0.5)
    optimisation.set_lr(made, 0.05)
    rates = {len(group["params"][0].shape): group["lr"] for group in made.param_groups}
    assert rates == {2: 0.05, 1: pytest.approx(0.4)}
    assert [group["weight_decay"] for group in made.param_groups] == [0.5, 0.0]


@pytest.mark.parametrize("chained", [False, True])
def test_read_ahead_is_what_would_be_taken(chained: bool) -> None:
    rows = torch.randint(0, 256, (60, 2, 3, 3), dtype=torch.uint8, generator=seeded(0))
    inputs = Chain((rows[:25], rows[25:])) if chained else rows
    part = Part("train", inputs, torch.arange(5, 55), torch.arange(50))
    positions = pieces(torch.randperm(50, generator=seeded(1)), 7)
    ahead = list(reading.batches(part, positions, ahead=True))
    taken = [part.take(one) for one in positions]
    assert len(ahead) == len(taken) == 8
    for one, two in zip(ahead, taken, strict=True):
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])
    assert reading.touch(inputs, part.rows) == 50


def test_the_reader_ends_when_nobody_reads_on_and_tells_its_errors() -> None:
    part = Part("train", torch.zeros(40, 1, 2, 2, dtype=torch.uint8), torch.arange(40), torch.arange(40))
    going = reading.batches(part, pieces(torch.arange(40), 1), ahead=True)
    next(going)
    going.close()  # type: ignore[attr-defined]
    assert not [one for one in threading.enumerate() if one.name == "read-ahead"]
    with pytest.raises(IndexError):
        list(reading.batches(part, [torch.tensor([1, 99])], ahead=True))


def test_bfloat16_trains_float32_weights_alike_when_resumed(tiny_set: Dataset, tmp_path: Path) -> None:
    chosen = tiny(training__precision="bfloat16")

    def stop(row: training.Row) -> None:
        raise KeyboardInterrupt

    whole = training.train(chosen, tiny_set, tmp_path / "whole", progress=False)
    with pytest.raises(KeyboardInterrupt):
        training.train(chosen, tiny_set, tmp_path / "cut", progress=False, watch=stop)
    cut = training.train(chosen, tiny_set, tmp_path / "cut", resume=True, progress=False)
    assert cut.about["resumed_after_epoch"] == 1
    assert cut.weights.read_bytes() == whole.weights.read_bytes()
    state = torch.load(whole.weights, weights_only=True)
    assert {value.dtype for value in state.values()} == {torch.float32}
    plain = training.train(tiny(), tiny_set, tmp_path, progress=False)
    assert plain.weights.read_bytes() != whole.weights.read_bytes(), "it did compute otherwise"


def test_a_compiled_net_without_a_compiler_says_so(tiny_set: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RunError, match=r"no C\+\+ compiler") as caught:
        training.Trainer(tiny(training__compile=True), tiny_set)
    assert "compile = false" in caught.value.hint


def test_a_compilers_own_failure_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failed(Exception):
        __module__ = "torch._inductor.exc"

    def fails(*_: Any, **__: Any) -> Any:
        def call(x: torch.Tensor) -> torch.Tensor:
            raise Failed("no header\nmany lines")

        return call

    monkeypatch.setattr(torch, "compile", fails)
    called = acceleration.called(nn.Identity(), tiny(training__compile=True).training)
    with pytest.raises(RunError, match="cannot be compiled here: no header") as caught:
        called(torch.zeros(1))
    assert "many lines" not in str(caught.value)


def test_nets_that_torch_breaks_on_lie_channels_first() -> None:
    shape = {"channels": 3, "height": 16, "width": 16, "classes": 3, "blocks": 1}
    layouts = {
        filters: acceleration.layout(nets.build("cifar_resnet", **shape, filters=filters), torch.device("cpu"))
        for filters in (4, 8, 16)
    }
    assert layouts == {4: torch.contiguous_format, 8: torch.contiguous_format, 16: torch.channels_last}


def fast(**args: Any) -> Any:
    return tiny(data__height=16, data__width=16, net={"name": "fast_net", "args": {"narrow": 4, "wide": 8, **args}})


def test_the_first_layer_whitens_the_patches_of_the_training_part(folder: Path, cache: Path) -> None:
    from marwright.learning import data

    dataset = data.load(fast(), path=folder, cache=cache, progress=False)
    graph = graphs.build(fast(), dataset)
    net = graph.net
    assert isinstance(net, nets.FastNet)
    inputs, _ = dataset.train.take(torch.arange(len(dataset.train)))
    with torch.no_grad():
        out = net.whiten(graph.normalise(inputs))
    half = out.shape[1] // 2
    assert torch.allclose(out[:, :half], -out[:, half:], atol=1e-5)
    flat = out[:, :half].permute(1, 0, 2, 3).flatten(1)
    covariance = torch.cov(flat)
    spread = covariance.diagonal()
    assert float((covariance - torch.diag(spread)).abs().max()) < 0.02
    assert float(spread.max()) < 1.02
    assert float(spread[0]) > 0.98
    assert not net.whiten.weight.requires_grad


def test_whitening_from_many_pieces_is_that_of_all_patches_together() -> None:
    x = torch.randn(150, 3, 16, 16, generator=seeded(0)) * 2 + torch.tensor([1.0, -2.0, 0.5]).reshape(1, 3, 1, 1)
    net = nets.build("fast_net", channels=3, height=16, width=16, classes=3, narrow=4, wide=8)
    net.prepare(x)
    assert isinstance(net, nets.FastNet)
    with torch.no_grad():
        flat = net.whiten(x)[:, :12].permute(1, 0, 2, 3).flatten(1)
    assert torch.allclose(torch.cov(flat), torch.eye(12), atol=2e-3)


def test_a_net_that_need_not_look_is_shown_nothing(tiny_set: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def looked(*about: Any) -> None:
        raise AssertionError("it was shown examples")

    monkeypatch.setattr(nets.ServingGraph, "normalise", looked)
    graphs.build(tiny(), tiny_set)


def test_with_mirror_a_picture_and_its_mirror_image_get_one_answer() -> None:
    torch.manual_seed(0)
    net = nets.build("fast_net", channels=3, height=16, width=16, classes=4, narrow=4, wide=8, mirror=True).eval()
    assert isinstance(net, nets.FastNet)
    x = torch.randn(3, 3, 16, 16)
    assert torch.allclose(net(x), net(x.flip(3)), rtol=1e-4, atol=1e-9)
    net.mirror = False
    assert not torch.allclose(net(x), net(x.flip(3)), rtol=1e-2, atol=1e-9)
