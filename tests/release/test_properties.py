"""config.properties: what is read, what is refused, and the copy for TorchServe."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marwright.errors import SettingsError
from marwright.release import properties
from marwright.release.properties import ServerConfig
from tests import torchserve


def config(folder: Path, text: str) -> ServerConfig:
    path = folder / "config.properties"
    path.write_text(text, encoding="utf-8")
    return ServerConfig.from_file(path)


def test_an_empty_file_means_torchserves_own_defaults(tmp_path: Path) -> None:
    found = config(tmp_path, "# nothing\n\n")
    assert found == ServerConfig(path=tmp_path / "config.properties")
    assert found.ports == {
        "inference_address": 8080,
        "management_address": 8081,
        "metrics_address": 8082,
        "grpc_inference_port": 7070,
        "grpc_management_port": 7071,
    }


def test_the_projects_own_file_is_loopback_with_tokens_and_no_remote_urls() -> None:
    found = ServerConfig.from_file(torchserve.PROJECT / "config.properties")
    addresses = (found.inference_url, found.management_url, found.metrics_url)
    assert all(address.startswith("http://127.0.0.1:") for address in addresses)
    assert found.grpc_inference.startswith("127.0.0.1:")
    assert found.grpc_management.startswith("127.0.0.1:")
    assert found.token_auth
    assert found.model_api
    assert properties.read(torchserve.PROJECT / "config.properties")["allowed_urls"] == "(?!)"


def test_every_line_of_the_projects_own_file_has_its_reason() -> None:
    lines = (torchserve.PROJECT / "config.properties").read_text(encoding="utf-8").splitlines()
    commented = False
    for line in lines:
        if not line:
            commented = False
        elif line.startswith("#"):
            commented = True
        else:
            assert commented, line


def test_a_server_on_every_address_is_called_on_loopback(tmp_path: Path) -> None:
    found = config(tmp_path, "inference_address=http://0.0.0.0:8080\ngrpc_inference_address=0.0.0.0\n")
    assert found.inference_url == "http://127.0.0.1:8080"
    assert found.grpc_inference == "127.0.0.1:7070"


def test_an_environment_variable_is_filled_in_as_torchserve_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MW_PORT", "18080")
    assert config(tmp_path, "inference_address=http://127.0.0.1:$$MW_PORT$$\n").ports["inference_address"] == 18080
    monkeypatch.delenv("MW_PORT")
    with pytest.raises(SettingsError, match="MW_PORT"):
        config(tmp_path, "inference_address=http://127.0.0.1:$$MW_PORT$$\n")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("inference_address=http://127.0.0.1:eighty", "inference_address=http://127.0.0.1:eighty"),
        ("inference_address=http://127.0.0.1:0", "port"),
        ("inference_address=127.0.0.1:8080", "not http://host:port"),
        ("management_address=unix:/tmp/x", "management_address"),
        ("grpc_inference_port=70700", "grpc_inference_port=70700"),
        ("grpc_management_port=", "grpc_management_port"),
        ("enable_model_api=yes", "neither true nor false"),
        ("job_queue_size=many", "job_queue_size=many"),
        ("token_expiration_min=0", "token_expiration_min"),
        ("enable_envvars_config=true", "enable_envvars_config"),
        ("just words", "line 1"),
        ("job_queue_size 3", "line 1"),
        ("a=1\na=2", "a second time"),
        ("default_service_handler=über", "latin-1"),
        ("metrics_mode=pro\\", "one line"),
    ],
)
def test_what_one_of_the_two_readers_would_misread_is_refused_by_name(tmp_path: Path, line: str, told: str) -> None:
    with pytest.raises(SettingsError) as caught:
        config(tmp_path, line + "\n")
    assert told in str(caught.value)
    assert "config.properties" in str(caught.value)


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="nowhere"):
        ServerConfig.from_file(tmp_path / "nowhere")


def test_the_serving_copy_is_the_same_settings_with_absolute_paths_and_exactly_the_released_archives(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "a für b"
    folder.mkdir()
    torchserve.write_config(folder / "config.properties", {"load_models": "all", "model_store": "elsewhere"})
    assert properties.write_serving(folder / "config.properties", folder / "store", ["a-1.0.mar", "b-1.10.mar"])
    text = (folder / "store" / "serving.properties").read_text(encoding="utf-8")
    assert text.startswith("# Generated from config.properties")
    found = ServerConfig.from_file(folder / "store" / "serving.properties")
    assert found.load_models == ("a-1.0.mar", "b-1.10.mar")
    assert found.model_store == folder / "store"
    given = properties.read(folder / "config.properties")
    copied = properties.read(folder / "store" / "serving.properties")
    assert copied["metrics_config"] == str(folder / "deploy" / "metrics.yaml")
    assert "a%20f%C3%BCr%20b/deploy/log4j2.xml" in copied["vmargs"]
    assert "metrics_config=" + str(tmp_path) in text
    assert "a f\\u00fcr b/deploy/metrics.yaml" in text
    other = given.keys() - {"load_models", "model_store", "metrics_config", "vmargs"}
    assert {key: copied[key] for key in other} == {key: given[key] for key in other}


def test_without_archives_nothing_is_loaded(tmp_path: Path) -> None:
    torchserve.write_config(tmp_path / "config.properties", {})
    assert "load_models" not in properties.serving_text(tmp_path / "config.properties", tmp_path, [])


def test_writing_the_same_again_changes_nothing(tmp_path: Path) -> None:
    torchserve.write_config(tmp_path / "config.properties", {})
    assert properties.write_serving(tmp_path / "config.properties", tmp_path / "store", ["a-1.0.mar"])
    before = (tmp_path / "store" / "serving.properties").stat()
    assert not properties.write_serving(tmp_path / "config.properties", tmp_path / "store", ["a-1.0.mar"])
    after = (tmp_path / "store" / "serving.properties").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert properties.write_serving(tmp_path / "config.properties", tmp_path / "store", ["a-1.1.mar"])


@pytest.mark.parametrize("name", ["a-1.0", "../a-1.0.mar", "/x/a.mar", "a,b.mar", "a=b.mar", "a b.mar", "all"])
def test_only_bare_file_names_are_loaded(tmp_path: Path, name: str) -> None:
    torchserve.write_config(tmp_path / "config.properties", {})
    with pytest.raises(SettingsError, match="bare name"):
        properties.serving_text(tmp_path / "config.properties", tmp_path, [name])


def test_a_file_that_the_configuration_names_must_be_there(tmp_path: Path) -> None:
    torchserve.write_config(tmp_path / "config.properties", {"metrics_config": "deploy/none.yaml"})
    with pytest.raises(SettingsError, match=r"metrics_config=deploy/none\.yaml"):
        properties.serving_text(tmp_path / "config.properties", tmp_path, [])


@given(st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp", "Zs"]), min_size=1))
def test_what_is_escaped_for_java_is_read_back(value: str) -> None:
    written = properties._escaped(value)
    assert written.isascii()
    assert properties._unescaped(written, "here") == value
