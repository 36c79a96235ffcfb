"""How each system is started, tuned and asked: TorchServe with the stock handler, ours, and one that does nothing.

    with SYSTEMS["stock-tuned"].open(made, folder, marker) as served:
        served.port, served.begun

`marker` is put into the environment of everything that is started (`MARKER`), so that all processes of a system can be
found: what they hold in memory and what processor time they took is theirs. The other servers are in `peers`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import yaml

from benchmarks.serving import load, material, names
from benchmarks.serving.load import Case
from benchmarks.serving.material import Material, Net
from marwright.learning import recipe
from marwright.packing import archive
from marwright.release.server import Expected, Server
from marwright.release.tokens import Tokens
from tests import torchserve

MARKER = "MARWRIGHT_BENCHMARK"
ECHO = (
    b'{"horse": 0.2763492465019226, "deer": 0.20541951060295105, "bird": 0.16439181566238403, "frog": 0.1166, "cat": 0}'
)
"""As long as an answer."""


@dataclass
class Served:
    """One that was started. It need not answer yet."""

    port: int
    begun: float
    """`time.perf_counter()` when its first process was started."""
    headers: Callable[[], Mapping[str, str]] = dict
    """What each request needs, such as a key; raises as long as that is not known."""
    log: Path | None = None
    ended: Callable[[], bool] = bool
    """Whether it has given up already."""


Body = Callable[[Net, str, bytes], tuple[bytes, str, Mapping[str, str]]]
"""Net, kind and picture → what is sent, its content type, other headers."""


def _as_it_is(net: Net, kind: str, encoded: bytes) -> tuple[bytes, str, Mapping[str, str]]:
    return encoded, "application/octet-stream", {}


@dataclass(frozen=True)
class System:
    name: str
    open: Callable[[Material, Path, str], AbstractContextManager[Served]]
    net: str = "small"
    kinds: tuple[str, ...] = ()
    """Other bodies that it is asked with."""
    path: str = "/predictions/cifar10"
    body: Body = field(default=_as_it_is)
    prepares: Literal["ours", "stock"] = "ours"
    answers: Literal["exact", "labels", "inside"] = "labels"

    @property
    def short(self) -> bool:
        """Asked at 1 and 64 connections alone, with no open loop."""
        return self.name in names.SHORT

    def cases(self, made: Material, kind: str, served: Served) -> list[Case]:
        """Requests as they are sent, and what is right for them."""
        net = made.nets[self.net]
        return [self._case(net, kind, served, picture) for picture in made.pictures[self.net][kind]]

    def _case(self, net: Net, kind: str, served: Served, picture: material.Picture) -> Case:
        body, content_type, headers = self.body(net, kind, picture.encoded)
        lines = [f"POST {self.path} HTTP/1.1", f"Host: 127.0.0.1:{served.port}", "Accept: */*"]
        lines += [f"Content-Type: {content_type}", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in {**headers, **served.headers()}.items()]
        request = "\r\n".join(lines).encode() + b"\r\n\r\n" + body
        pixels = picture.ours if self.prepares == "ours" else picture.stock
        wanted = ECHO if self.answers == "exact" else load.pairs(net.answer(pixels))
        return Case(request, self.answers, wanted)


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """Variables for what is started inside."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


# ---------------------------------------------------------------- ours


def _ours(
    *, profile: str, wire: bool = True, decoder: str = "", tokens: bool = True, net: str = "small"
) -> Callable[[Material, Path, str], AbstractContextManager[Served]]:
    @contextlib.contextmanager
    def opened(made: Material, folder: Path, marker: str) -> Iterator[Served]:
        store = folder / "store"
        workers = _archive(made.nets[net], store, profile, decoder)
        given = {} if tokens else {"disable_token_authorization": "true"}
        expected = {"cifar10": Expected("1.0", workers)}
        with torchserve.home(folder, expected, archives=["cifar10-1.0.mar"], store=store, settings=given) as home:
            with environment(**{MARKER: marker, "MARWRIGHT_WIRE": "on" if wire else "off"}):
                begun = time.perf_counter()
                home.server.start()
            keys = Tokens(home.key_file, home.config)
            header = (lambda: {"Authorization": f"Bearer {keys.key('inference')}"}) if tokens else dict
            port = int(home.config.inference_url.rpartition(":")[2])
            yield Served(port, begun, header, folder / "logs" / "model_log.log")

    return opened


def _archive(net: Net, store: Path, profile: str, decoder: str) -> int:
    """The archive of one of our systems as cifar10 1.0; returns its number of workers."""
    given: dict[str, object] = {"data.path": "-", "serving.explain": False}
    given["serving.profile"] = profile
    chosen = recipe.load(material.RECIPES[net.name], recipes_dir=material.ROOT / "recipes", overrides=given)
    chosen = chosen.model_copy(update={"name": "cifar10"})
    artifact = material.with_pillow(net.artifact) if decoder == "pillow" else net.artifact
    record, _ = archive.write(net.run, artifact, chosen, store, version="1.0")
    return record.workers


# ---------------------------------------------------------------- stock

MODEL = """
from nets import {kind}


class Model({kind}):
    def __init__(self):
        super().__init__({args})
"""
HANDLER = """
from torchvision import transforms
from ts.torch_handler.image_classifier import ImageClassifier


class Classifier(ImageClassifier):
    image_processing = transforms.Compose(
        [transforms.Resize((32, 32)), transforms.ToTensor(), transforms.Normalize({mean}, {std})]
    )
"""
NOTHING = f"""
def handle(data, context):
    return [{ECHO!r}] * len(data) if data else None
"""
QUIET = {
    "vmargs": "-Dlog4j.configurationFile=deploy/log4j2.xml",
    "metrics_mode": "prometheus",
    "job_queue_size": "2000",
    "max_request_size": "20971520",
    "max_response_size": "20971520",
}
BATCHED = {"batchSize": 32, "maxBatchDelay": 1}
TWO = {"minWorkers": 2, "maxWorkers": 2, "responseTimeout": 60, **BATCHED}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def _stock(
    *,
    model: Mapping[str, int] | None = None,
    server: Mapping[str, str] | None = None,
    variables: Mapping[str, str] | None = None,
    net: str = "small",
    nothing: bool = False,
) -> Callable[[Material, Path, str], AbstractContextManager[Served]]:
    @contextlib.contextmanager
    def opened(made: Material, folder: Path, marker: str) -> Iterator[Served]:
        _stock_archive(made.nets[net], folder, model or {}, nothing)
        ports = torchserve.free_ports(len(torchserve.PORTS))
        values = {key: form.format(port) for (key, form), port in zip(torchserve.PORTS.items(), ports, strict=True)}
        values |= {"model_store": str(folder / "store"), "load_models": "cifar10.mar"}
        values |= {"disable_token_authorization": "true", **(server or {})}
        if "vmargs" in values:
            shutil.copytree(material.ROOT / "deploy", folder / "deploy")
            values["vmargs"] = values["vmargs"].replace("deploy/", (folder / "deploy").as_uri() + "/")
        config = folder / "config.properties"
        config.write_text("".join(f"{key}={value}\n" for key, value in values.items()))
        temp = Path(tempfile.mkdtemp(prefix="mw", dir="/tmp"))
        running = Server(config, home=folder, temp=temp)
        try:
            with environment(**{MARKER: marker, **(variables or {})}):
                begun = time.perf_counter()
                running.start()
            yield Served(ports[0], begun, log=folder / "logs" / "model_log.log")
        finally:
            running.stop(timeout=20.0)
            shutil.rmtree(temp, ignore_errors=True)

    return opened


def _stock_archive(net: Net, folder: Path, model: Mapping[str, int], nothing: bool) -> None:
    """By the stock archiver, as its documentation says."""
    (folder / "store").mkdir(parents=True)
    words = ["--model-name", "cifar10", "--version", "1.0", "--handler", "handler.py", "--export-path", "store"]
    if nothing:
        (folder / "handler.py").write_text(NOTHING)
    else:
        shutil.copy(material.ROOT / "handlers" / "nets.py", folder / "nets.py")
        shutil.copy(net.weights, folder / "weights.pth")
        args = ", ".join(f"{name}={value!r}" for name, value in net.args().items())
        (folder / "model.py").write_text(MODEL.format(kind=type(net.graph.net).__name__, args=args))
        (folder / "index_to_name.json").write_text(json.dumps({str(n): label for n, label in enumerate(net.labels)}))
        mean, std = net.normalisation()
        (folder / "handler.py").write_text(HANDLER.format(mean=mean, std=std))
        words += ["--model-file", "model.py", "--serialized-file", "weights.pth"]
        words += ["--extra-files", "index_to_name.json,nets.py"]
    if model:
        (folder / "model-config.yaml").write_text(yaml.safe_dump(dict(model)))
        words += ["--config-file", "model-config.yaml"]
    archiver = Path(sys.executable).parent / "torch-model-archiver"
    temp = folder / "temp"
    temp.mkdir()
    subprocess.run([str(archiver), *words], cwd=folder, check=True, env=os.environ | {"TMPDIR": str(temp)})


def _stock_body(net: Net, kind: str, encoded: bytes) -> tuple[bytes, str, Mapping[str, str]]:
    """The stock handler takes no file of numbers: a tensor is a JSON list of floats, normalised by the caller."""
    if kind != "raw32":
        return _as_it_is(net, kind, encoded)
    with torch.inference_mode():
        normalised = net.graph.normalise(torch.from_numpy(np.load(io.BytesIO(encoded)))[None])[0]
    text = json.dumps([[[round(value, 6) for value in row] for row in plane] for plane in normalised.tolist()])
    return text.encode(), "application/json", {}


OTHER_KINDS = tuple(kind for kind in names.KINDS if kind != "png32")


def _tuned_stock(net: str = "small") -> Callable[[Material, Path, str], AbstractContextManager[Served]]:
    return _stock(model=TWO, server=QUIET, variables=ONE_THREAD, net=net)


_ALL = (
    System("stock", _stock(), prepares="stock"),
    System("stock-batched", _stock(model={"minWorkers": 1, "maxWorkers": 1, **BATCHED}), prepares="stock"),
    System("stock-tuned", _tuned_stock(), kinds=OTHER_KINDS, body=_stock_body, prepares="stock"),
    System("echo", _stock(model=TWO, server=QUIET, variables=ONE_THREAD, nothing=True), answers="exact"),
    System("marwright-latency", _ours(profile="latency")),
    System("marwright-balanced", _ours(profile="balanced")),
    System("marwright-throughput", _ours(profile="throughput"), kinds=OTHER_KINDS),
    System("marwright-plain", _ours(profile="throughput", wire=False, decoder="pillow")),
    System("marwright-no-keys", _ours(profile="throughput", tokens=False)),
    System("stock-tuned-resnet", _tuned_stock("resnet"), net="resnet", body=_stock_body, prepares="stock"),
    System("marwright-throughput-resnet", _ours(profile="throughput", net="resnet"), net="resnet"),
)
SYSTEMS = {system.name: system for system in _ALL}
