"""Two processes train what one does; Ctrl-C and a SIGKILL on the way change nothing, and leave nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed.run
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousTimeoutError

from marwright.errors import RunError, SettingsError
from marwright.learning import data, distributed, methods, recipe, training
from marwright.learning.dataset import Dataset
from marwright.runs import Run
from marwright.settings import TrainSettings
from scripts import together
from tests.learning.conftest import ROOT, tiny

NORMS = """
task = "classification"
[data]
source = "digits"
channels = 1
height = 16
width = 16
[net]
name = "cifar_resnet"
args = { blocks = 1, filters = 16 }
[training]
epochs = 4
batch_size = 101                # 1259 = 12 · 101 + 47: parts of unequal sizes
optimiser = { name = "sgd", lr = 0.0005, momentum = 0.9, nesterov = true }
schedule = { name = "cosine", warmup = 1 }
regularisation = { l1 = 1e-6, l2 = 0.0005, dropout = 0.25, crop = 1, flip = true, alternate = true }
"""
"""Norms, dropout, chance and a penalty: all that a team must share. The learning rate is low: at a high one this net is
so chaotic that one process with one thread and with two differ as much as any two runs."""
SECONDS = 120.0


def until(claim: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not claim():
        assert time.monotonic() < deadline, f"not in {SECONDS:g} s: {what}"
        time.sleep(0.02)


def curves(run: Run) -> list[training.Row]:
    rows: list[training.Row] = json.loads((run.path / "curves.json").read_text("utf-8"))
    return rows


def children(pid: int) -> dict[int, int]:
    """The ranks of the processes that `pid` has started, and their numbers."""
    found = {}
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    for child in listed.read_text().split() if listed.is_file() else ():
        try:
            lines = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        rank = [line[5:] for line in lines if line.startswith(b"RANK=")]
        if rank:
            found[int(rank[0])] = int(child)
    return found


def alive(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    try:
        return state.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@dataclass
class Story:
    """One process trained `alone`; two were interrupted, then one of them killed, and finished."""

    alone: Run
    together: Run
    interrupted: int
    finished: int
    left: list[str]
    alive: list[int]
    output: str


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    where = tmp_path_factory.mktemp("together")
    (where / "norms.toml").write_text(NORMS, encoding="utf-8")
    (where / "config.properties").write_text((ROOT / "config.properties").read_text("utf-8"), encoding="utf-8")
    chosen = recipe.load(where / "norms.toml")
    dataset = data.load(chosen, cache=where / "runs" / "cache", progress=False)
    alone = training.train(chosen, dataset, where / "alone", progress=False)
    run = Run(where / "runs" / alone.id)
    seen: set[int] = set()

    def started() -> subprocess.Popen[str]:
        words = ["train", "--recipe", str(where / "norms.toml"), "--nproc", "2", "--runs", str(where / "runs")]
        words += ["--config", str(where / "config.properties"), "--store", str(where / "store")]
        return subprocess.Popen(
            [sys.executable, "-m", "scripts", *words], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def epochs() -> int:
        checkpoint = run.path / training.CHECKPOINT
        return len(torch.load(checkpoint, weights_only=True)["curves"]) if checkpoint.is_file() else 0

    def at(parent: subprocess.Popen[str], epoch: int, number: signal.Signals, rank: int | None) -> None:
        until(lambda: epochs() >= epoch or parent.poll() is not None, f"epoch {epoch}")
        ranks = children(parent.pid)
        seen.update(ranks.values())
        os.kill(parent.pid if rank is None else ranks[rank], number)

    first = started()
    second = None
    try:
        at(first, 1, signal.SIGINT, None)
        first.communicate(timeout=SECONDS)
        left = [path.name for path in (where / "runs").rglob("*.part")]
        second = started()
        at(second, 2, signal.SIGKILL, 1)
        output, _ = second.communicate(timeout=SECONDS)
    finally:
        for process in (first, second):
            if process is not None and process.poll() is None:
                process.kill()
    left += [path.name for path in (where / "runs").rglob("*.part")]
    return Story(
        alone, run, first.returncode, second.returncode, left, [pid for pid in seen if alive(pid)], output
    )  # fmt: skip


def test_a_team_that_lost_one_process_goes_on_and_finishes(story: Story) -> None:
    assert story.finished == 0, story.output
    assert story.together.finished
    assert story.together.about["resumed_after_epoch"] >= 2
    assert story.together.about["processes"] == 2


def test_two_processes_give_the_weights_of_one_within_a_tolerance(story: Story) -> None:
    one, two = (torch.load(run.weights, weights_only=True) for run in (story.alone, story.together))
    assert list(one) == list(two)
    furthest = max(float((one[name].double() - two[name].double()).abs().max()) for name in one)
    assert 0 < furthest < 5e-3, "the same but for the order of sums"
    losses = [[row["train_loss"] for row in curves(run)] for run in (story.alone, story.together)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    assert losses[0][-1] < losses[0][0] - 0.05, "they have learned"
    assert story.alone.evaluation["metrics"]["accuracy"] == pytest.approx(
        story.together.evaluation["metrics"]["accuracy"], abs=0.006
    ), "two of 359 examples, at most"


def test_ctrl_c_ends_all_processes_and_leaves_nothing_half_written(story: Story) -> None:
    assert story.interrupted == 130
    assert story.left == []
    assert story.alive == []


def test_only_one_line_for_each_epoch_is_told(story: Story) -> None:
    lines = [line for line in story.output.splitlines() if line.startswith("epoch 4 of 4")]
    assert len(lines) == 1, story.output


@pytest.mark.parametrize(("total", "size"), [(64, 2), (47, 2), (7, 3), (2, 3), (1, 1)])
def test_a_batch_is_shared_out_whole(total: int, size: int) -> None:
    shares = [distributed.Team(rank, size).take(total) for rank in range(size)]
    taken = [position for share in shares for position in range(total)[share.here]]
    assert sorted(set(taken)) == list(range(total))
    # The mean over processes of weight times a process's mean is the mean over examples.
    values = [float(i * i) for i in range(total)]
    means = [sum(values[share.here]) / len(values[share.here]) for share in shares]
    averaged = sum(share.weight * mean for share, mean in zip(shares, means, strict=True)) / size
    assert averaged == pytest.approx(sum(values) / total)


def test_options_go_on_to_the_processes_but_for_those_of_the_parent() -> None:
    settings = TrainSettings(recipe="mnist", epochs=3, resume=False, json=True, nproc=2, runs=Path("elsewhere"))
    words = together._words(settings)
    assert sorted(words) == sorted(
        ["--recipe", "mnist", "--epochs", "3", "--no-resume", "--json", "--runs", "elsewhere"]
    )
    assert together.wanted(settings)
    assert not together.wanted(TrainSettings())


def test_torchruns_own_options_come_last_and_nonsense_is_refused() -> None:
    settings = TrainSettings(nproc=2, torchrun="--nnodes=2 --rdzv-endpoint=host:29400 --max-restarts=0")
    words = together._options(settings, Path("x"))
    assert words[-3:] == ["--nnodes=2", "--rdzv-endpoint=host:29400", "--max-restarts=0"]
    assert not any("loopback" in word or "127.0.0.1" in word for word in words)
    with pytest.raises(SettingsError, match="--no-such-option"):
        together.launch(TrainSettings(nproc=2, torchrun="--no-such-option"))
    with pytest.raises(SettingsError, match="--nproc is 0"):
        together.launch(TrainSettings(nproc=0, torchrun="--nnodes=2"))


def test_a_refusal_in_a_process_is_the_parents_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(distributed.MEETING, str(tmp_path))
    monkeypatch.setenv("RANK", "1")
    with together.told_to_the_parent():
        raise RunError("came apart", hint="lower")
    assert json.loads((tmp_path / "refused-1.json").read_text("utf-8"))["message"] == "came apart"
    monkeypatch.delenv(distributed.MEETING)
    with pytest.raises(RunError, match="came apart"), together.told_to_the_parent():
        raise RunError("came apart")


def test_what_all_would_be_refused_is_tried_once_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The leader finds nothing at the path and ends; the other loses its connection to it."""
    meeting, missing = tmp_path / "meeting", tmp_path / "nowhere.zip"
    meeting.mkdir()
    monkeypatch.setattr(together.tempfile, "TemporaryDirectory", lambda prefix: contextlib.nullcontext(str(meeting)))
    monkeypatch.chdir(ROOT)
    with pytest.raises(RunError, match=re.escape(str(missing))):
        together.launch(TrainSettings(recipe="cifar10", data=missing, runs=tmp_path / "runs", nproc=2))
    assert (meeting / "refused-0.json").is_file()
    assert [path.name for path in meeting.glob("team-*")] in (["team-0"], []), "no second attempt"
    assert "Traceback" not in capfd.readouterr().err


def test_who_only_lost_the_connection_ends_well_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(distributed.MEETING, str(tmp_path))
    with pytest.raises(RuntimeError), together.told_to_the_parent():
        raise RuntimeError("connection closed")
    (tmp_path / "refused-0.json").write_text("{}", encoding="utf-8")
    with together.told_to_the_parent():
        raise RuntimeError("connection closed")


def test_a_restart_is_known_by_the_mark_of_the_first_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    assert not distributed.restarted()
    monkeypatch.setenv(distributed.STARTED, str(tmp_path))
    assert not distributed.restarted()
    assert distributed.restarted()


def test_nonsense_that_torchrun_finds_late_is_refused() -> None:
    with pytest.raises(SettingsError, match="--nnodes=abc"):
        together.launch(TrainSettings(nproc=1, torchrun="--nnodes=abc"))


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ChildFailedError("x", {1: ProcessFailure(1, 7, -9, "")}), "process 1 ended with signal 9"),
        (ChildFailedError("x", {0: ProcessFailure(0, 7, 3, "")}), "process 0 ended with exit status 3"),
        (RendezvousTimeoutError(), "did not meet: RendezvousTimeoutError"),
    ],
)
def test_how_a_team_was_lost_is_said(error: Exception, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(arguments: object) -> None:
        raise error

    monkeypatch.setattr(torch.distributed.run, "run", lost)
    with pytest.raises(RunError, match=says):
        together.launch(TrainSettings(nproc=2))


@pytest.mark.parametrize(
    "layer", [nn.Dropout2d(0.1), nn.BatchNorm3d(2), nn.RReLU(), nn.MultiheadAttention(4, 2, dropout=0.1)]
)
def test_layers_that_cannot_be_shared_are_refused(layer: nn.Module) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(layer))
    with pytest.raises(RunError, match=type(layer).__name__):
        distributed.Team(0, 2).shared(net)
    distributed._exchange(net.eval(), distributed.Team(0, 2))  # frozen ones do nothing


class Threads:
    """`all_reduce` between two threads."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=30)
        self.given: dict[int, torch.Tensor] = {}

    def all_reduce(self, value: torch.Tensor) -> None:
        self.given[threading.get_ident()] = value.clone()
        self.barrier.wait()
        total = torch.stack(list(self.given.values())).sum(dim=0)
        self.barrier.wait()
        value.copy_(total)


@pytest.mark.parametrize(("kind", "within"), [(torch.float64, 1e-12), (torch.bfloat16, 0.02)])
def test_a_shared_norm_is_the_norm_of_the_whole_batch(
    kind: torch.dtype, within: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    whole, weights = (torch.randn(21, 5, 6, 6, generator=generator).to(kind) for _ in range(2))
    whole = whole * 3 + 2
    parts = [slice(0, 10), slice(10, 21)]

    def norm() -> nn.BatchNorm2d:
        made = nn.BatchNorm2d(5).to(torch.promote_types(kind, torch.float32))
        with torch.no_grad():
            made.weight.copy_(torch.linspace(0.5, 2, 5))
            made.bias.copy_(torch.linspace(-1, 1, 5))
        return made

    def step(layer: nn.Module, part: slice) -> list[torch.Tensor]:
        x = whole[part].clone().requires_grad_()
        out = layer(x)
        (out * weights[part]).sum().backward()
        assert out.dtype == kind
        assert x.grad is not None
        assert isinstance(layer.weight, nn.Parameter)
        assert isinstance(layer.bias, nn.Parameter)
        return [out.detach(), x.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var]  # type: ignore[list-item]

    expected = step(norm(), slice(None))
    monkeypatch.setattr(distributed.dist, "all_reduce", Threads().all_reduce)
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(lambda part: step(distributed.SharedNorm(norm()), part), parts)
    joined = [torch.cat(pair) for pair in zip(one[:2], two[:2], strict=True)]
    joined += [sum(pair) for pair in zip(one[2:4], two[2:4], strict=True)]  # type: ignore[misc]
    for found in ([*joined, *one[4:]], [*joined, *two[4:]]):
        for mine, theirs in zip(found, expected, strict=True):
            furthest = float((mine.double() - theirs.double()).abs().max() / theirs.double().abs().max())
            assert furthest <= within


def test_a_method_that_replays_is_for_one_process(
    tiny_set: Dataset, tmp_path: Path, plain_reports: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = training.train(tiny(), tiny_set, tmp_path, progress=False)
    monkeypatch.setattr(distributed, "_team", distributed.Team(0, 2))
    with pytest.raises(RunError, match="is for one process"):
        training.Trainer(tiny(), tiny_set, start, methods.named("replay"))
