"""Other servers with the same weights and answers, each in an environment of its own under the work folder.

`benchmarks/peers/<name>/` has each one's exact requirements and its `server.py`, whose docstring says how it was tuned
and why. All run the same ONNX artifact with ONNX Runtime on one thread, decode with OpenCV and answer with orjson where
they let one choose, so that what differs is the server.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from benchmarks.serving import material
from benchmarks.serving.material import Material, Net
from benchmarks.serving.systems import MARKER, Body, Served, System
from tests import torchserve

FOLDER = material.ROOT / "benchmarks" / "peers"


def install(name: str, work: Path) -> None:
    """The environment of the peer that this system is, if it is one and has none yet."""
    if name not in SYSTEMS:
        return
    folder = _environment(name, work)
    wanted = (_folder(name) / "requirements.txt").read_bytes()
    stamp = folder / "installed.txt"
    if stamp.is_file() and stamp.read_bytes() == wanted:
        return
    print(f"installing {name} into {folder}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    pip = [str(folder / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*pip, "--requirement", str(_folder(name) / "requirements.txt")], check=False)
    if done.returncode == 0:  # else its row will say that it could not be installed
        stamp.write_bytes(wanted)


def _folder(name: str) -> Path:
    return FOLDER / name.removesuffix("-batched")


def _environment(name: str, work: Path) -> Path:
    return work / "venvs" / _folder(name).name


def _peer(name: str, **variables: str) -> Callable[[Material, Path, str], AbstractContextManager[Served]]:
    @contextlib.contextmanager
    def opened(made: Material, folder: Path, marker: str) -> Iterator[Served]:
        python = _environment(name, made.folder).absolute() / "bin" / "python"
        if not (python.parent.parent / "installed.txt").is_file():
            raise RuntimeError(
                f"it could not be installed here: pip install -r benchmarks/peers/{_folder(name).name}/requirements.txt"
            )
        net = made.nets["small"]
        shutil.copy(net.onnx, folder / "model.onnx")
        (folder / "labels.json").write_text(json.dumps(net.labels))
        port, other = torchserve.free_ports(2)
        log = folder / "peer.log"
        given = {
            MARKER: marker,
            "PATH": f"{python.parent}:{os.environ['PATH']}",
            "PYTHONPATH": f"{FOLDER}:{_folder(name)}",
            "PEER_PORT": str(port),
            "PEER_OTHER_PORT": str(other),
            "PEER_MODEL": str(folder / "model.onnx"),
            "PEER_LABELS": str(folder / "labels.json"),
            "HOME": str(folder),
            "TMPDIR": str(folder),
            **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
            **variables,
        }
        with log.open("wb") as output:
            begun = time.perf_counter()
            process = subprocess.Popen(
                [str(python), str(_folder(name) / "server.py")],
                cwd=folder,
                env=os.environ | given,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield Served(port, begun, log=log, ended=lambda: process.poll() is not None)
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
            if process.poll() is None:
                process.kill()
                process.wait()

    return opened


def _mlserver_body(net: Net, kind: str, encoded: bytes) -> tuple[bytes, str, Mapping[str, str]]:
    """The inference protocol's own JSON (v2): bytes go as base64."""
    one = {"name": "image", "shape": [1], "datatype": "BYTES", "parameters": {"content_type": "base64"}}
    document = {"inputs": [{**one, "data": [base64.b64encode(encoded).decode()]}]}
    return json.dumps(document).encode(), "application/json", {}


def _bentoml_body(net: Net, kind: str, encoded: bytes) -> tuple[bytes, str, Mapping[str, str]]:
    """A batchable endpoint's own form: a list of one."""
    document = {"encoded": [base64.b64encode(encoded).decode()]}
    return json.dumps(document).encode(), "application/json", {}


def _triton_body(net: Net, kind: str, encoded: bytes) -> tuple[bytes, str, Mapping[str, str]]:
    """v2 with the binary extension: a JSON header, then each element after its length in four bytes."""
    one = {"name": "image", "shape": [1, 1], "datatype": "BYTES", "parameters": {"binary_data_size": len(encoded) + 4}}
    wanted = {"name": "answer", "parameters": {"binary_data": False}}
    header = json.dumps({"inputs": [one], "outputs": [wanted]}).encode()
    body = header + len(encoded).to_bytes(4, "little") + encoded
    return body, "application/octet-stream", {"Inference-Header-Content-Length": str(len(header))}


def _as_it_is(net: Net, kind: str, encoded: bytes) -> tuple[bytes, str, Mapping[str, str]]:
    return encoded, "application/octet-stream", {}


def _system(name: str, path: str, *, body: Body = _as_it_is, inside: bool = False, **variables: str) -> System:
    return System(name, _peer(name, **variables), path=path, body=body, answers="inside" if inside else "labels")


_V2 = "/v2/models/cifar10/infer"
_ALL = (
    _system("fastapi", "/predict"),
    _system("fastapi-batched", "/predict", PEER_BATCH="32"),
    _system("litserve", "/predict"),
    _system("bentoml", "/classify", body=_bentoml_body, inside=True),
    _system("ray", "/predict"),
    _system("mlserver", _V2, body=_mlserver_body, inside=True),
    _system("pytriton", _V2, body=_triton_body, inside=True, LD_LIBRARY_PATH=sysconfig.get_config_var("LIBDIR") or ""),
)
SYSTEMS = {system.name: system for system in _ALL}
