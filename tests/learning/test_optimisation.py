"""Schedules against closed forms and torch's own, optimisers against what their names promise."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from marwright.learning import optimisation
from marwright.learning.tables import Cosine, Exponential, InverseTime, Optimiser, Plateau, Step


def parse(**choice: Any) -> Optimiser:
    made: Optimiser = TypeAdapter(Optimiser).validate_python(choice)
    return made


def rates(scheduler: Any, epochs: int) -> list[float]:
    found = []
    for _ in range(epochs):
        found.append(scheduler.optimizer.param_groups[0]["lr"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch wants an optimiser step first; there is nothing to learn here
            scheduler.step()
    return found


def sgd() -> torch.optim.SGD:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)


def test_step_and_exponential_are_torchs() -> None:
    step = Step(name="step", every=3, factor=0.5)
    ours = [optimisation.factor(step, epoch=i + 0.9, epochs=10) for i in range(10)]
    assert ours == pytest.approx(rates(torch.optim.lr_scheduler.StepLR(sgd(), 3, 0.5), 10))
    exponential = Exponential(name="exponential", factor=0.9)
    ours = [optimisation.factor(exponential, epoch=i, epochs=10) for i in range(10)]
    assert ours == pytest.approx(rates(torch.optim.lr_scheduler.ExponentialLR(sgd(), 0.9), 10))


def test_inverse_time_is_one_over_one_plus_rate_times_epoch() -> None:
    schedule = InverseTime(name="inverse_time", rate=0.5)
    assert [optimisation.factor(schedule, epoch=i, epochs=9) for i in (0, 1, 2, 8)] == [1, 1 / 1.5, 1 / 2, 1 / 5]


def test_cosine_is_torchs_and_warms_up_in_a_line() -> None:
    ours = [optimisation.factor(Cosine(name="cosine"), epoch=i, epochs=10) for i in range(10)]
    assert ours == pytest.approx(rates(torch.optim.lr_scheduler.CosineAnnealingLR(sgd(), 10), 10))
    warm = Cosine(name="cosine", warmup=2, floor=0.1)
    found = [optimisation.factor(warm, epoch=epoch, epochs=10) for epoch in (0, 0.5, 1, 2, 6, 10)]
    assert found == pytest.approx([0, 0.25, 0.5, 1, 0.1 + 0.9 * 0.5, 0.1])


def test_plateau_is_torchs() -> None:
    losses = [1.0, 0.9, 0.95, 0.94, 0.93, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.49, 0.6]
    schedule = Plateau(name="plateau", patience=2, factor=0.5)
    optimiser = sgd()
    torchs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, factor=0.5, patience=2, threshold=1e-4, eps=0)
    for i, loss in enumerate(losses):
        torchs.step(loss)
        ours = optimisation.factor(schedule, epoch=i + 1, epochs=99, losses=losses[: i + 1])
        assert ours == optimiser.param_groups[0]["lr"]


@pytest.mark.parametrize(
    ("choice", "kind"),
    [
        ({"name": "sgd", "lr": 0.1}, torch.optim.SGD),
        ({"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True}, torch.optim.SGD),
        ({"name": "adam", "lr": 0.1}, torch.optim.Adam),
        ({"name": "adamw", "lr": 0.1}, torch.optim.AdamW),
        ({"name": "rmsprop", "lr": 0.01}, torch.optim.RMSprop),
        ({"name": "adagrad", "lr": 0.5}, torch.optim.Adagrad),
    ],
)
def test_every_optimiser_is_its_torch_kind_and_finds_the_minimum(choice: dict[str, Any], kind: type) -> None:
    net = nn.Linear(2, 1)
    made = optimisation.optimiser(parse(**choice), net, l2=0.0)
    assert type(made) is kind
    for key in ("momentum", "nesterov"):
        assert made.param_groups[0].get(key, choice.get(key)) == choice.get(key, made.param_groups[0].get(key))
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.5, 2.0]])
    y = x @ torch.tensor([[1.0], [-1.0]]) + 0.5
    for _ in range(600):
        made.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        made.step()
    assert nn.functional.mse_loss(net(x), y) < 1e-3


def test_l2_shrinks_weights_and_leaves_biases() -> None:
    net = nn.Linear(3, 2)
    before = {name: value.detach().clone() for name, value in net.named_parameters()}
    made = optimisation.optimiser(parse(name="sgd", lr=0.1), net, l2=0.5)
    (net(torch.zeros(1, 3)) * 0).sum().backward()
    made.step()
    assert torch.allclose(net.weight, before["weight"] * (1 - 0.1 * 0.5))
    assert torch.equal(net.bias, before["bias"])


def test_l1_pushes_each_weight_towards_zero_by_the_same() -> None:
    net = nn.Linear(3, 2)
    (net(torch.zeros(1, 3)) * 0).sum().backward()
    optimisation.penalise(net.parameters(), 0.25)
    assert net.weight.grad is not None
    assert net.bias.grad is not None
    assert torch.equal(net.weight.grad, 0.25 * net.weight.sign())
    assert not net.bias.grad.any()


def test_frozen_parameters_are_not_given_to_the_optimiser() -> None:
    net = nn.Linear(3, 2)
    net.weight.requires_grad_(False)
    made = optimisation.optimiser(parse(name="sgd", lr=0.1), net, l2=0.5)
    assert [len(group["params"]) for group in made.param_groups] == [1]
    assert made.param_groups[0]["params"][0] is net.bias


def test_a_warm_up_starts_above_zero_in_the_middle_of_the_first_step() -> None:
    warm = Cosine(name="cosine", warmup=1)
    assert math.isclose(optimisation.factor(warm, epoch=0.5 / 10, epochs=3), 0.05)
