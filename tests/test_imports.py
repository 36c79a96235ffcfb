"""The house's one rule, read from the source: imports go scripts → marwright → handlers → what a worker has."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ["learning", "packing", "release", "feedback"]
CODECS = {"deflate", "pyspng", "simplejpeg"}
WORKER_HAS = {"torch", "numpy", "PIL", "handlers", "onnxruntime", "captum", "orjson"}
LATE = ("onnxruntime", "captum", "handlers.turbo", "import turbo")
"""Slow to import, or not every archive needs them."""
EXCEPT = {"wire.py": {"ts"}, "turbo.py": CODECS}
"""The lean codec stands in for TorchServe's own, and looks at it first; the decoder is imported where it is named."""


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at its top or inside a function; `from a import b` gives a and a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def python_files(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert found
    return found


def tops(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", python_files("handlers"), ids=lambda path: path.name)
def test_handlers_import_nothing_that_a_worker_lacks(path: Path) -> None:
    foreign = tops(path) - set(sys.stdlib_module_names) - WORKER_HAS - EXCEPT.get(path.name, set())
    assert not foreign


def test_torchserve_is_imported_when_it_is_replaced_and_not_before() -> None:
    tree = ast.parse((ROOT / "handlers" / "wire.py").read_text(encoding="utf-8"))
    at_top = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert at_top
    assert not any(words.split()[1].split(".")[0] == "ts" for words in at_top)


@pytest.mark.parametrize("path", python_files("handlers"), ids=lambda path: path.name)
def test_onnxruntime_and_captum_are_not_imported_before_they_are_needed(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    at_top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not any(late in ast.unparse(node) for node in at_top for late in LATE)


@pytest.mark.parametrize("path", python_files("marwright"), ids=lambda path: str(path.relative_to(ROOT)))
def test_marwright_never_imports_scripts_or_the_server(path: Path) -> None:
    assert not tops(path) & {"scripts", "ts", "tests"}


@pytest.mark.parametrize("path", python_files("marwright"), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_rooms_to_its_left(path: Path) -> None:
    own = path.relative_to(ROOT / "marwright").parts[0]
    rooms = {name.split(".")[1] for name in imports(path) if name.startswith("marwright.")} & set(ROOMS)
    if own not in ROOMS:
        assert not rooms, "what every room stands on imports none of them"
    else:
        assert all(ROOMS.index(room) <= ROOMS.index(own) for room in rooms)


def test_learning_knows_no_archives_packing_and_feedback_no_http_release_no_training() -> None:
    for path in python_files("marwright/packing", "marwright/feedback"):
        assert not tops(path) & {"requests", "grpc", "http", "socket"}, path
    for path in python_files("marwright/release"):
        assert not any(name.startswith("marwright.learning") for name in imports(path)), path


def test_only_the_feedback_room_knows_databases_that_are_shared() -> None:
    for path in python_files("marwright", "scripts", "handlers"):
        assert "feedback" in path.parts or not tops(path) & {"sqlalchemy", "pg8000"}, path


def test_torchserve_is_imported_where_it_is_compared_and_nowhere_else() -> None:
    users = [path for path in python_files("tests", "benchmarks", "scripts", "marwright") if "ts" in tops(path)]
    assert {path.name for path in users} == {"test_worker_contract.py", "stages.py", "gathering.py"}
