"""A worker starts when its archive is whole and its artifact is what `spec.json` says, or says in one line why not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import handlers
from handlers import base, runtime
from handlers.errors import LoadError
from handlers.settings import WorkerSettings
from tests.handlers import archives
from tests.handlers.conftest import handler_class
from tests.handlers.context import FakeContext


def edit_spec(root: Path, **changes: Any) -> None:
    path = root / "spec.json"
    document = json.loads(path.read_text())
    document.update(changes)
    path.write_text(json.dumps(document))
    archives.seal(root)


def refusal(start: Any, root: Path, caplog: pytest.LogCaptureFixture, **options: Any) -> str:
    """The cause, which must be one line in the log and the RuntimeError's message."""
    with pytest.raises(RuntimeError) as refused:
        start(root, **options)
    lines = [record.getMessage() for record in caplog.records if base.FAILED in record.getMessage()]
    assert lines == [f"{base.FAILED} {refused.value}"]
    assert "\n" not in lines[0]
    return str(refused.value)


def test_every_format_and_task_starts(started: Any) -> None:
    handler, _ = started
    assert handler.runtime.device == "cpu"
    assert handler.version == "1.0"


@pytest.mark.parametrize(
    "name", ["handlers/images.py", "spec.json", "weights.pt", "model-config.yaml", "MAR-INF/MANIFEST.json"]
)
def test_a_changed_file_is_refused(start: Any, copied: Any, caplog: pytest.LogCaptureFixture, name: str) -> None:
    root = copied()
    (root / name).write_bytes((root / name).read_bytes() + b"\n")
    assert refusal(start, root, caplog).startswith(f"{name} was changed after the archive was built")


def test_a_missing_file_is_refused(start: Any, copied: Any, caplog: pytest.LogCaptureFixture) -> None:
    root = copied()
    (root / "handlers" / "kserve.py").unlink()
    assert "handlers/kserve.py is listed" in refusal(start, root, caplog)


@pytest.mark.parametrize("name", ["handlers/extra.py", "sitecustomize.py", "torch.so", "deep/er.pyc"])
def test_code_that_nobody_listed_is_refused(
    start: Any, copied: Any, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    root = copied()
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_text("")
    assert refusal(start, root, caplog).endswith(f"does not list: {name}")


def test_other_new_files_and_compiled_code_do_no_harm(start: Any, copied: Any) -> None:
    root = copied()
    (root / "core.1234").write_text("")
    (root / "handlers" / "__pycache__").mkdir()
    (root / "handlers" / "__pycache__" / "base.cpython-311.pyc").write_text("")
    start(root)


@pytest.mark.parametrize("content", [None, "not json", "[]", '{"../x": "00"}', '{"/etc/passwd": "00"}'])
def test_without_a_sound_list_of_digests_nothing_is_served(
    start: Any, copied: Any, caplog: pytest.LogCaptureFixture, content: str | None
) -> None:
    root = copied()
    path = root / "MAR-INF" / "digests.json"
    path.unlink() if content is None else path.write_text(content)
    assert "digests.json" in refusal(start, root, caplog, model="digits")


def test_what_matters_must_be_listed(start: Any, copied: Any, caplog: pytest.LogCaptureFixture) -> None:
    root = copied()
    path = root / "MAR-INF" / "digests.json"
    members = json.loads(path.read_text())
    del members["weights.pt"]
    path.write_text(json.dumps(members))
    assert "does not list 'weights.pt'" in refusal(start, root, caplog)


def test_the_bundle_digest_is_that_of_the_list(start: Any, copied: Any) -> None:
    root = copied()
    digest = archives.seal(root)
    handler, _ = start(root)
    assert handler.bundle.digest == digest
    assert len(digest) == 16


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"format": "torchscript"}, "names the format 'torchscript'"),
        ({"artifact": ""}, "does not list ''"),
        ({"net": "vgg"}, "no net named 'vgg'"),
        ({"net_args": {"channels": 1, "height": 16, "width": 16, "classes": 9}}, "size mismatch"),
        ({"outputs": ["probabilities"]}, "spec.json says ['probabilities']"),
        ({"classes": ["a", "b"]}, "answers with shape"),
        ({"task": "regression", "target": "x", "outputs": ["value"], "input": {"kind": "vector", "features": ["a"]}},
         "answers for classification"),
        ({"top_k": 0}, "top_k"),
        ({"input": {"kind": "image", "channels": 1, "height": 16, "width": 16, "decoder": "spng"}}, "decoder 'spng'"),
        ({"input": {"kind": "image", "channels": 1, "height": 20, "width": 16}}, "fails on a batch of 1"),
        ({"colour": "blue"}, "one too many"),
    ],
)  # fmt: skip
def test_a_spec_that_does_not_fit_the_artifact_is_refused(
    start: Any, copied: Any, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], cause: str
) -> None:
    root = copied()
    edit_spec(root, **changes)
    assert cause in refusal(start, root, caplog)


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"outputs": ["probabilities"]}, "gives ['probabilities', 'embedding']"),
        ({"classes": ["a", "b"]}, "answers with shape"),
        ({"input": {"kind": "image", "channels": 1, "height": 20, "width": 16}}, "expected any number of [1, 20, 16]"),
    ],
)
def test_an_onnx_model_that_does_not_fit_its_spec_is_refused(
    start: Any, copied: Any, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], cause: str
) -> None:
    root = copied("digits", "onnx")
    edit_spec(root, **changes)
    assert cause in refusal(start, root, caplog)


@pytest.mark.parametrize("format", ["eager", "onnx"])
def test_an_artifact_that_is_rubbish_is_refused(
    start: Any, copied: Any, caplog: pytest.LogCaptureFixture, format: str
) -> None:
    root = copied("digits", format)
    name = "weights.pt" if format == "eager" else "model.onnx"
    (root / name).write_bytes(b"rubbish")
    archives.seal(root)
    assert name in refusal(start, root, caplog)


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_weights_cannot_carry_code(start: Any, copied: Any, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    root = copied()
    torch.save({"bomb": Bomb(tmp_path / "crater")}, root / "weights.pt")
    archives.seal(root)
    assert "weights.pt does not fit" in refusal(start, root, caplog)
    assert not (tmp_path / "crater").exists()


def test_a_model_that_answers_nan_is_not_served(start: Any, copied: Any, caplog: pytest.LogCaptureFixture) -> None:
    root = copied("diabetes")
    state = torch.load(root / "weights.pt", weights_only=True)
    state["target_std"].fill_(float("nan"))
    torch.save(state, root / "weights.pt")
    archives.seal(root)
    assert "NaN" in refusal(start, root, caplog)


@pytest.mark.parametrize("version", ["", "1.0\r\nX-Evil: 1", "één"])
def test_a_version_that_cannot_be_a_header_is_refused(
    start: Any, copied: Any, caplog: pytest.LogCaptureFixture, version: str
) -> None:
    root = copied()
    path = root / "MAR-INF" / "MANIFEST.json"
    manifest = json.loads(path.read_text())
    manifest["model"]["modelVersion"] = version
    path.write_text(json.dumps(manifest))
    archives.seal(root)
    assert "modelVersion" in refusal(start, root, caplog)


def test_loaders_refuse_an_artifact_that_is_not_there(tmp_path: Path) -> None:
    for format in runtime.LOADERS:
        with pytest.raises(LoadError, match="not in the archive"):
            runtime.load(archives.spec("digits", format, "nothing.bin"), tmp_path, threads=1, gpu=None)


@pytest.mark.parametrize(
    ("environ", "config", "threads"),
    [
        ({}, None, 1),
        ({"OMP_NUM_THREADS": "7"}, {}, 1),
        ({}, {"handler": None}, 1),
        ({}, {"handler": {"threads": 3}}, 3),
        ({"MARWRIGHT_THREADS": "2"}, {"handler": {"threads": 3}}, 2),
        ({"MARWRIGHT_THREADS": ""}, {"handler": {"threads": 3}}, 3),
    ],
)
def test_threads_are_set_and_never_inherited(environ: dict[str, str], config: Any, threads: int) -> None:
    assert WorkerSettings.read(environ, config) == WorkerSettings(threads)


@pytest.mark.parametrize(
    ("environ", "config", "wire"),
    [
        ({}, {}, True),
        ({"MARWRIGHT_WIRE": "off"}, {}, False),
        ({}, {"handler": {"wire": False}}, False),
        ({"MARWRIGHT_WIRE": "on"}, {"handler": {"wire": False}}, True),
    ],
)
def test_the_lean_codec_is_on_unless_switched_off(environ: dict[str, str], config: Any, wire: bool) -> None:
    assert WorkerSettings.read(environ, config).wire is wire


@pytest.mark.parametrize(
    ("environ", "config", "cause"),
    [
        ({"MARWRIGHT_THREADS": "many"}, {}, "MARWRIGHT_THREADS is 'many'"),
        ({"MARWRIGHT_THREADS": "0"}, {}, "allowed: a whole number"),
        ({}, {"handler": {"threads": True}}, "handler.threads is True"),
        ({}, {"handler": {"threads": 1.5}}, "handler.threads is 1.5"),
        ({}, {"handler": {"thread": 1}}, "unknown keys thread"),
        ({}, {"handler": [1]}, "expected a table"),
    ],
)
def test_settings_that_mean_nothing_are_refused(environ: dict[str, str], config: Any, cause: str) -> None:
    with pytest.raises(LoadError, match=cause):
        WorkerSettings.read(environ, config)


def test_torch_gets_as_many_threads_as_it_was_given(start: Any, copied: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    root = copied()
    start(root)
    assert torch.get_num_threads() == 1
    monkeypatch.setenv("MARWRIGHT_THREADS", "2")
    handler, _ = start(root)
    assert torch.get_num_threads() == 2
    assert handler.describe()["threads"] == 2


def test_onnx_runtime_gets_its_threads_and_does_not_spin(unpacked: Any) -> None:
    root = unpacked("digits", "onnx")
    loaded: Any = runtime.load(archives.spec("digits", "onnx", "model.onnx"), root, threads=3, gpu=None)
    options = loaded.session.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 1)
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_each_handler_module_defines_one_class_and_no_function() -> None:
    for model, module in archives.HANDLERS.items():
        assert handler_class(model).__module__ == module
        assert not hasattr(sys.modules[module], "handle")


START = """
import sys, logging
sys.path[:0] = {path!r}
logging.basicConfig(stream=sys.stdout, format="%(message)s")
from handlers import image_classifier
from tests.handlers.context import FakeContext
from pathlib import Path
handler = image_classifier.ImageClassifier()
handler.initialize(FakeContext.at(Path({root!r}), batch_size=4))
loaded = sorted(name for name in sys.modules if name.split(".")[0] in ("ts", "marwright", "torchvision", "onnxruntime"))
print("ready", handler.bundle.digest, loaded)
"""


def run(root: Path, path: list[str]) -> subprocess.CompletedProcess[str]:
    checkout = str(Path(handlers.__file__).parent.parent)
    script = START.format(path=[*path, checkout], root=str(root))
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, cwd=root,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}, timeout=120, check=False,
    )  # fmt: skip


def test_in_a_process_of_its_own_the_archive_serves_itself_and_imports_little(copied: Any) -> None:
    root = copied()
    ended = run(root, [str(root)])
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["ready", archives.seal(root), "[]"]


def test_a_checkout_that_shadows_the_archive_is_refused_with_both_paths(copied: Any, tmp_path: Path) -> None:
    root = copied()
    ended = run(root, [])
    assert ended.returncode == 1
    (line,) = [line for line in ended.stdout.splitlines() if line.startswith(base.FAILED)]
    assert str(Path(handlers.__file__).parent) in line
    assert str(root / "handlers") in line


def test_a_context_without_an_archive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        handler_class("digits")().initialize(FakeContext("x", str(tmp_path), None, 1, None))
