"""Artifacts and archives: parity, reproducible bytes, versions, golden examples, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import yaml

from handlers import runtime
from handlers.nets import ServingGraph, serving_graph
from handlers.spec import ModelSpec
from marwright import files, runs
from marwright.errors import ArchiveError, ArchiveExists, ArchiveInvalid, ExportError, ParityError
from marwright.learning import graphs
from marwright.learning.recipe import Recipe
from marwright.packing import archive, container, exporting, golden, records, replay
from marwright.runs import Run
from tests import archives
from tests.archives import Built


@pytest.fixture
def run(digits: Built, tmp_path: Path) -> Run:
    """A copy of the digits run, to be changed."""
    shutil.copytree(digits.run.path, tmp_path / "runs" / digits.run.id)
    return Run(tmp_path / "runs" / digits.run.id)


def test_every_served_format_has_a_loader_and_an_exporter() -> None:
    assert set(exporting.EXPORTERS) == set(runtime.LOADERS)


@pytest.mark.parametrize("format", sorted(exporting.EXPORTERS))
@pytest.mark.parametrize("model", ["digits", "regressor"])
def test_artifacts_answer_like_the_eager_net(model: str, format: str, request: pytest.FixtureRequest) -> None:
    built: Built = request.getfixturevalue(model)
    parity = exporting.export(built.run, format).parity
    assert parity.examples >= 80
    assert parity.difference <= 1e-4


def test_a_wrong_artifact_is_refused_by_parity(run: Run) -> None:
    graph = graphs.load(run).eval()
    spec = run.spec.exported("eager", "weights.pt")
    inputs = np.load(run.path / "examples.npz")["inputs"]
    other = dict(graph.state_dict())
    other["net.fc2.bias"] = other["net.fc2.bias"] + torch.linspace(0, 3, 10)
    torch.save(other, run.path / "weights.pt")
    with pytest.raises(ParityError, match="max"):
        exporting.check_parity(graph, spec, run.path, inputs)


def test_parity_takes_examples_from_all_over_a_large_holdout(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with np.load(run.path / "examples.npz") as saved:
        inputs, labels = saved["inputs"], saved["labels"]
    inputs[-1] = 255
    np.savez(run.path / "examples.npz", inputs=inputs, labels=labels)
    taken: list[np.ndarray] = []
    check = exporting.check_parity

    def watched(graph: ServingGraph, spec: ModelSpec, folder: Path, some: np.ndarray) -> exporting.Parity:
        taken.append(some)
        return check(graph, spec, folder, some)

    monkeypatch.setattr(exporting, "check_parity", watched)
    monkeypatch.setattr(exporting, "EXAMPLES", 10)
    shutil.rmtree(run.path / "export", ignore_errors=True)
    assert exporting.export(run, "eager").parity.examples == 10
    assert np.array_equal(taken[0][0], inputs[0])
    assert np.array_equal(taken[0][-1], inputs[-1])


def test_exporting_twice_makes_the_same_onnx_bytes_and_names_no_path(run: Run) -> None:
    first = exporting.export(run, "onnx").path.read_bytes()
    shutil.rmtree(run.path / "export")
    second = exporting.export(run, "onnx").path.read_bytes()
    assert first == second
    assert str(Path(archive.__file__).parent.parent.parent).encode() not in first
    model = onnx.load_from_string(first)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param


def test_a_torchvision_net_cannot_be_served_eagerly(run: Run) -> None:
    spec = replace(run.spec, net="torchvision:resnet18")
    graph = serving_graph(run.spec.net, dict(run.spec.net_args), task=run.spec.task)
    with pytest.raises(ExportError, match="training time only"):
        exporting.EXPORTERS["eager"](graph, spec, np.zeros((2, 1, 16, 16), np.uint8), run.path)


def test_two_builds_of_one_run_have_the_same_bytes(digits: Built, run: Run, tmp_path: Path) -> None:
    os.utime(run.path / "golden", (0, 0))
    before = os.umask(0o077)
    try:
        again = archives.build(run, tmp_path / "elsewhere")
    finally:
        os.umask(before)
    assert again.record.sha256 == digits.record.sha256 == files.sha256(digits.path)


def test_members_are_stored_sorted_and_undated(digits: Built) -> None:
    with zipfile.ZipFile(digits.path) as opened:
        infos = opened.infolist()
    assert [info.filename for info in infos] == sorted(info.filename for info in infos)
    for info in infos:
        assert info.compress_type == zipfile.ZIP_STORED
        assert info.date_time == (1980, 1, 1, 0, 0, 0)
        assert info.external_attr >> 16 == 0o100644
        assert not info.flag_bits & 0x08, "a streaming reader needs the size in front of the data"


def test_digests_list_every_other_member_and_name_the_bundle(digits: Built) -> None:
    with zipfile.ZipFile(digits.path) as opened:
        raw = opened.read(archive.DIGESTS)
        listed = json.loads(raw)
        found = {name: hashlib.sha256(opened.read(name)).hexdigest() for name in opened.namelist()}
    assert listed == {name: digest for name, digest in found.items() if name != archive.DIGESTS}
    assert hashlib.sha256(raw).hexdigest()[:16] == digits.record.bundle


def test_no_member_names_the_machine(digits: Built) -> None:
    with zipfile.ZipFile(digits.path) as opened:
        text = b"".join(opened.read(name) for name in opened.namelist())
    for word in (str(Path.home()), str(digits.store), str(digits.run.path.parent), os.uname().nodename):
        if len(word) > 4:
            assert word.encode() not in text


def test_golden_examples_are_at_least_sixteen_and_cover_every_class(digits: Built) -> None:
    assert len(digits.golden) >= 16
    with zipfile.ZipFile(digits.path) as opened:
        entries = json.loads(opened.read("golden/golden.json"))
    assert {entry["label"] for entry in entries} == {str(digit) for digit in range(10)}
    for example in digits.golden:
        assert sum(example.answer.values()) == pytest.approx(1, abs=1e-4)


def test_the_manifest_is_the_stock_archivers(digits: Built, tmp_path: Path) -> None:
    """Same files, same flags: what torch-model-archiver makes differs in the time and the handler's spelling alone."""
    import subprocess
    import sys

    unpacked = tmp_path / "unpacked"
    container.unpack(digits.path, unpacked)
    spec = json.loads((unpacked / "spec.json").read_text())
    (tmp_path / "handler.py").write_text("class Handler:\n    pass\n")
    stock_store = tmp_path / "stock"
    stock_store.mkdir()
    subprocess.run(
        [
            str(Path(sys.executable).parent / "torch-model-archiver"),
            *("--model-name", "digits", "--version", digits.record.version, "--handler", str(tmp_path / "handler.py")),
            *("--serialized-file", str(unpacked / spec["artifact"])),
            *("--config-file", str(unpacked / "model-config.yaml"), "--export-path", str(stock_store)),
        ],
        env={"TMPDIR": str(tmp_path), "PATH": os.environ["PATH"]},
        check=True,
        timeout=60,
        capture_output=True,
    )
    with zipfile.ZipFile(stock_store / "digits.mar") as opened:
        stock = json.loads(opened.read(archive.MANIFEST))
    ours = json.loads((unpacked / archive.MANIFEST).read_text())
    assert stock.pop("createdOn") != ours.pop("createdOn")
    assert stock["model"].pop("handler") == "handler.py"
    assert ours["model"].pop("handler") == "handlers.image_classifier"
    assert ours == stock


def test_the_same_content_is_no_new_version(digits: Built) -> None:
    recipe = Recipe.model_validate(digits.run.recipe)
    record, built = archive.write(digits.run, exporting.export(digits.run, "onnx"), recipe, digits.store)
    assert (record, built) == (digits.record, False)


def test_versions_count_up_and_ten_comes_after_nine(run: Run, tmp_path: Path) -> None:
    store = tmp_path / "store"
    assert archives.build(run, store).record.version == "1.0"
    assert archives.build(run, store, workers=2).record.version == "1.1"
    assert archives.build(run, store, version="1.9", workers=3).record.version == "1.9"
    assert archives.build(run, store, workers=4).record.version == "1.10"
    assert archives.build(run, store, workers=5).record.version == "1.11"
    assert [record.version for record in records.records(store)] == ["1.0", "1.1", "1.9", "1.10", "1.11"]


def test_the_recipes_serving_section_is_read_at_packing(run: Run, tmp_path: Path) -> None:
    built = archives.build(run, tmp_path / "store", top_k=2, batch_size=3, max_batch_delay=7)
    unpacked = tmp_path / "unpacked"
    container.unpack(built.path, unpacked)
    assert json.loads((unpacked / "spec.json").read_text())["top_k"] == 2
    assert yaml.safe_load((unpacked / "model-config.yaml").read_text()) == {
        "minWorkers": 1,
        "maxWorkers": 1,
        "batchSize": 3,
        "maxBatchDelay": 7,
        "responseTimeout": 30,
        "startupTimeout": 120,
        "handler": {"threads": 1},
    }
    assert built.record.run == run.id


def test_an_archive_is_never_overwritten(digits: Built, run: Run, tmp_path: Path) -> None:
    store = tmp_path / "store"
    first = archives.build(run, store)
    before = first.path.read_bytes()
    with pytest.raises(ArchiveExists, match=r"digits 1\.0 was built already"):
        archives.build(run, store, version="1.0", workers=2)
    (store / "digits-1.1.mar").write_bytes(b"its record was lost")
    assert archives.build(run, store, workers=2).record.version == "1.2"
    assert first.path.read_bytes() == before


def test_an_archive_that_was_lost_is_built_again_with_the_same_bytes(run: Run, tmp_path: Path) -> None:
    first = archives.build(run, tmp_path / "store")
    first.path.unlink()
    again = archives.build(run, tmp_path / "store")
    assert again.record == first.record
    assert files.sha256(again.path) == first.record.sha256


@pytest.mark.parametrize("version", ["all", "1", "1.0-beta", "1.0.0", "01.0", "v1.0", "1..0", "../1.0", "1.0\n"])
def test_versions_that_torchserve_would_misread_are_refused(version: str, run: Run, tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="not a version"):
        archives.build(run, tmp_path / "store", version=version)


def test_a_number_that_was_given_away_is_not_given_again(run: Run, tmp_path: Path) -> None:
    store = tmp_path / "store"
    recipe = Recipe.model_validate(run.recipe)
    artifact = exporting.export(run, "onnx")
    record, _ = archive.write(run, artifact, recipe, store, used={"1.0", "1.4"})
    assert record.version == "1.5"
    with pytest.raises(ArchiveExists, match=r"1\.4 was built already"):
        archive.write(run, artifact, recipe, store, version="1.4", used={"1.4"})


@pytest.mark.parametrize(
    "change", [{"version": "one"}, {"file": "other-1.0.mar"}, {"model": "../x"}, {"size": None, "more": 1}]
)
def test_a_record_that_is_none_is_told(change: dict[str, object], digits: Built, tmp_path: Path) -> None:
    document = files.read_json(digits.store / "digits-1.0.json")
    files.write_json(tmp_path / "digits-1.0.json", document | change)
    with pytest.raises(ArchiveError, match=r"digits-1\.0\.json is not the record"):
        records.records(tmp_path)


def test_an_archive_that_does_not_load_gets_no_name(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = archive.members

    def broken(*args: object, **options: object) -> dict[str, container.Content]:
        return real(*args, **options) | {"handlers/nets.py": b"raise ImportError('no such thing')\n"}  # type: ignore[arg-type]

    monkeypatch.setattr(archive, "members", broken)
    with pytest.raises(ArchiveInvalid, match="no such thing"):
        archives.build(run, tmp_path / "store", "eager")
    assert not list((tmp_path / "store").glob("*.mar"))
    assert not list((tmp_path / "store").glob(".*.part"))


def test_an_archive_with_a_wrong_golden_answer_gets_no_name(run: Run, tmp_path: Path) -> None:
    built = archives.build(run, tmp_path / "store")
    unpacked = tmp_path / "unpacked"
    container.unpack(built.path, unpacked)
    entries = json.loads((unpacked / "golden/golden.json").read_text())
    entries[3]["answer"] = dict.fromkeys(entries[3]["answer"], 0.1)
    with zipfile.ZipFile(built.path) as opened:
        body: dict[str, container.Content] = {name: opened.read(name) for name in opened.namelist()}
    body["golden/golden.json"] = json.dumps(entries).encode()
    listed = {name: hashlib.sha256(bytes(content)).hexdigest() for name, content in body.items()}  # type: ignore[arg-type]
    body[archive.DIGESTS] = json.dumps({name: listed[name] for name in listed if name != archive.DIGESTS}).encode()
    container.write(tmp_path / "wrong.mar", body)
    with pytest.raises(ArchiveInvalid, match=r"03\.png"):
        replay.prove(tmp_path / "wrong.mar")


def test_a_member_outside_the_folder_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "slip.mar", "w") as opened:
        opened.writestr("../slip.txt", "x")
        opened.writestr("/abs.txt", "x")
        opened.writestr("ok.txt", "x")
    (tmp_path / "into").mkdir()
    with pytest.raises(ArchiveInvalid) as caught:
        container.unpack(tmp_path / "slip.mar", tmp_path / "into")
    assert set(caught.value.issues) == {"../slip.txt", "/abs.txt"}
    assert not list((tmp_path / "into").iterdir())


def test_golden_differences_know_near_ties_top_k_and_nonsense() -> None:
    example = golden.Golden("00.png", b"", "image", {"a": 0.5, "b": 0.4999, "c": 0.0001})
    assert golden.differences([example], [{"b": 0.49995, "a": 0.49995}]) == []
    assert golden.differences([example], [{"c": 0.0001}]) != []
    assert golden.differences([example], [{"a": 0.6, "b": 0.39}]) != []
    assert golden.differences([example], [{"d": 0.5}]) != []
    assert golden.differences([example], [{}]) != []
    assert golden.differences([example], [{"a": float("nan")}]) != []
    value = golden.Golden("00.json", b"", "json", {"progression": 152.0})
    assert golden.differences([value], [{"progression": 152.1}]) == []
    assert golden.differences([value], [{"progression": 153.0}]) != []


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "report.json"

    def interrupted() -> None:
        with files.replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    files.write_json(path, {"b": 1, "a": 2})
    whole = path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == whole


def test_an_unfinished_run_cannot_be_opened(run: Run) -> None:
    (run.path / "evaluation.json").unlink()
    with pytest.raises(Exception, match="not finished"):
        runs.open_run(run.path)


@pytest.fixture(scope="module")
def explained(digits: Built, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The digits archive with its eager twin."""
    return archives.build(digits.run, tmp_path_factory.mktemp("explained"), explain=True)


def test_a_compiled_archive_carries_its_eager_twin_where_the_recipe_wants_explanations(
    explained: Built, digits: Built, tmp_path: Path
) -> None:
    container.unpack(explained.path, tmp_path)
    spec = golden.spec(tmp_path)
    assert (spec.artifact, spec.twin) == ("model.onnx", "twin.pt")
    graph = serving_graph(spec.net, dict(spec.net_args), task=spec.task)
    graph.load_state_dict(torch.load(tmp_path / "twin.pt", weights_only=True))
    with np.load(digits.run.path / "examples.npz") as saved:
        parity = exporting.check_parity(graph.eval(), spec, tmp_path, saved["inputs"])
    assert parity.difference <= 1e-4
    listed = json.loads((tmp_path / archive.DIGESTS).read_text())
    assert listed["twin.pt"] == files.sha256(tmp_path / "twin.pt")
    size = (tmp_path / "twin.pt").stat().st_size
    assert explained.record.twin_size == size
    assert size < explained.record.size - digits.record.size < size + 1000
    assert (golden.spec(digits.path).twin, digits.record.twin_size) == ("", 0)


def test_two_builds_with_a_twin_have_the_same_bytes(explained: Built, run: Run, tmp_path: Path) -> None:
    shutil.rmtree(run.path / "export" / "eager")
    assert archives.build(run, tmp_path / "elsewhere", explain=True).record == explained.record


def test_an_eager_artifact_is_its_own_twin(regressor: Built, tmp_path: Path) -> None:
    built = archives.build(regressor.run, tmp_path, "eager", explain=True)
    spec = golden.spec(built.path)
    assert spec.twin == spec.artifact == "weights.pt"
    assert built.record.twin_size == 0
    with zipfile.ZipFile(built.path) as opened:
        assert [name for name in opened.namelist() if name.endswith(".pt")] == ["weights.pt"]


def test_a_twin_that_a_worker_could_not_load_is_refused(digits: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = exporting.export(digits.run, "onnx")
    foreign = replace(digits.run.spec, net="torchvision:resnet18")
    monkeypatch.setattr(Run, "spec", property(lambda run: foreign))
    with pytest.raises(ExportError, match="training time only") as caught:
        exporting.twin(digits.run, artifact)
    assert "explain = false" in caught.value.hint


def test_an_archive_that_cannot_explain_is_not_built(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = exporting.export(run, "eager")
    weights = torch.load(good.path, weights_only=True)
    weights["net.fc2.bias"][:] = float("nan")
    torch.save(weights, tmp_path / "weights.pt")
    monkeypatch.setattr(exporting, "twin", lambda run, artifact: replace(good, path=tmp_path / "weights.pt"))
    with pytest.raises(ArchiveInvalid, match=r"cannot explain its answers|does not load") as caught:
        archives.build(run, tmp_path / "store", explain=True)
    assert caught.value.issues
    assert not list((tmp_path / "store").glob("*.mar"))


def test_wrong_explanations_are_told_apart(digits: Built) -> None:
    example, spec = digits.golden[0], golden.spec(digits.path)
    right = {"prediction": dict(example.answer), "attributions": [[1.0] * 16] * 16, "completeness_delta": 0.1}
    best = max(example.answer, key=lambda label: example.answer[label])
    right["prediction"] = {best: example.answer[best]}

    def wrong(**changed: object) -> list[str]:
        return replay.unexplained({"saliency": {**right, **changed}}, example, spec)

    assert wrong() == []
    assert "shape [16]" in wrong(attributions=[1.0] * 16)[0]
    assert "all finite" in wrong(attributions=[[float("nan")] * 16] * 16)[0]
    assert "miss what they should add up to by 20" in wrong(completeness_delta=-20.0)[0]
    assert best in wrong(prediction={best: 0.0})[0]
    assert wrong(reason="the net has no slope") == ["saliency: the net has no slope"]
    assert replay.unexplained({}, example, spec) == ["no method is offered"]


def test_records_of_archives_without_a_twin_size_are_read(digits: Built, tmp_path: Path) -> None:
    kept = files.read_json(digits.store / records.record_name(digits.record.file))
    del kept["twin_size"]
    files.write_json(tmp_path / records.record_name(digits.record.file), kept)
    assert records.records(tmp_path) == [digits.record]
