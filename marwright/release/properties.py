"""`config.properties`: where the server listens and what it allows, and the copy of it that TorchServe reads.

    config = ServerConfig.from_file(Path("config.properties"))
    config.inference_url                                     # "http://127.0.0.1:8080"
    write_serving(Path("config.properties"), Path("model_store"), ["digits-1.0.mar"])

The hand-written file is the only place that holds an address: TorchServe binds them and the clients call them. Two
programs with different habits read it: TorchServe's Java reads java.util.Properties (latin-1, escapes, continued
lines), its Python launcher splits each line at the first `=`. So only what both understand alike is accepted here,
and every other line is an error with the file's name, the key and the value.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from marwright import files
from marwright.errors import SettingsError

SERVING = "serving.properties"
"""File name, in the model store, of the generated copy."""

_LOG4J = "-Dlog4j.configurationFile="
_RAW = frozenset({"model_store", "vmargs", "plugins_path"})
"""Keys that only the Python launcher reads: UTF-8, no escapes."""
_REPLACED = frozenset({"model_store", "load_models", "metrics_config", "vmargs"})


@dataclass(frozen=True)
class ServerConfig:
    """What clients and the server's keeper must know of a configuration file; defaults are TorchServe's own."""

    path: Path
    inference_url: str = "http://127.0.0.1:8080"
    management_url: str = "http://127.0.0.1:8081"
    metrics_url: str = "http://127.0.0.1:8082"
    grpc_inference: str = "127.0.0.1:7070"
    grpc_management: str = "127.0.0.1:7071"
    token_auth: bool = True
    token_minutes: float = 60.0
    model_api: bool = False
    job_queue_size: int = 100
    max_request_size: int = 6553500
    max_response_size: int = 6553500
    response_timeout: int = 120
    startup_timeout: int = 120
    default_workers: int = 0
    model_store: Path | None = None
    load_models: tuple[str, ...] = ()

    @classmethod
    def from_file(cls, path: Path) -> ServerConfig:
        """Parse and check `path`; raises SettingsError that names the file, the key and the value."""
        values = _Values(path, read(path))
        if values.flag("enable_envvars_config", False):
            values.refuse("enable_envvars_config", "TS_… variables would move the server away from its clients")
        store = values.text("model_store", "")
        return cls(
            path=path,
            inference_url=values.url("inference_address", cls.inference_url),
            management_url=values.url("management_address", cls.management_url),
            metrics_url=values.url("metrics_address", cls.metrics_url),
            grpc_inference=values.target("grpc_inference", cls.grpc_inference),
            grpc_management=values.target("grpc_management", cls.grpc_management),
            token_auth=not values.flag("disable_token_authorization", False),
            token_minutes=values.number("token_expiration_min", cls.token_minutes),
            model_api=values.flag("enable_model_api", cls.model_api),
            job_queue_size=values.integer("job_queue_size", cls.job_queue_size),
            max_request_size=values.integer("max_request_size", cls.max_request_size),
            max_response_size=values.integer("max_response_size", cls.max_response_size),
            response_timeout=values.integer("default_response_timeout", cls.response_timeout),
            startup_timeout=values.integer("default_startup_timeout", cls.startup_timeout),
            default_workers=values.integer("default_workers_per_model", cls.default_workers),
            model_store=Path(store) if store else None,
            load_models=tuple(name for name in values.text("load_models", "").split(",") if name),
        )

    @property
    def ports(self) -> Mapping[str, int]:
        """Every port that the server binds, by the key that sets it."""
        named = {
            "inference_address": urlsplit(self.inference_url).port,
            "management_address": urlsplit(self.management_url).port,
            "metrics_address": urlsplit(self.metrics_url).port,
            "grpc_inference_port": int(self.grpc_inference.rpartition(":")[2]),
            "grpc_management_port": int(self.grpc_management.rpartition(":")[2]),
        }
        return {key: port for key, port in named.items() if port is not None}


def read(path: Path) -> dict[str, str]:
    """The keys and values of a properties file, escapes undone; values stay strings."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read: {error}", hint="give the path of a config.properties") from error
    values: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        line = line.strip()
        if not line or line.startswith(("#", "!")):
            continue
        where = f"{path}, line {number}"
        key, equals, value = (part.strip() for part in line.partition("="))
        if not equals or not re.fullmatch(r"[\w.-]+", key, re.ASCII):
            raise SettingsError(f"{where} is not key=value: {line}", hint="write key=value, or start it with #")
        if key in values:
            raise SettingsError(f"{where} sets {key} a second time, to {value!r}", hint="keep one of the lines")
        if key not in _RAW:
            value = _unescaped(value, f"{where}, {key}={value}")
        values[key] = value
    return values


def serving_text(config_path: Path, store: Path, archives: Sequence[str]) -> str:
    """What TorchServe is to read: the settings of `config_path`, the store, and exactly these `.mar` files of it."""
    values = read(config_path)
    ServerConfig.from_file(config_path)
    for name in archives:
        if not re.fullmatch(r"[^/\\,=\s]+\.mar", name):
            raise SettingsError(f"{name!r} is not the bare name of a .mar file", hint="name files of the model store")
    folder = config_path.absolute().parent
    lines = [f"# Generated from {config_path.name} and the released archives; replaced, never edited."]
    lines += [f"{key}={_escaped(value)}" for key, value in values.items() if key not in _REPLACED]
    if "metrics_config" in values:
        metrics = _existing(folder, values["metrics_config"], config_path, "metrics_config")
        lines.append(f"metrics_config={_escaped(str(metrics))}")
    if "vmargs" in values:
        lines.append(f"vmargs={_absolute_log4j(folder, values['vmargs'], config_path)}")
    lines.append(f"model_store={store.absolute()}")
    if archives:
        lines.append(f"load_models={','.join(archives)}")
    return "\n".join(lines) + "\n"


def write_serving(config_path: Path, store: Path, archives: Sequence[str]) -> bool:
    """Make `store/serving.properties` say just that, atomically; False when it did already."""
    text = serving_text(config_path, store, archives)
    path = store / SERVING
    if path.is_file() and path.read_bytes() == text.encode():
        return False
    files.write_text(path, text)
    return True


@dataclass(frozen=True)
class _Values:
    """Values of one file, turned into types, with errors that name the file, the key and the value."""

    path: Path
    values: Mapping[str, str]

    def refuse(self, key: str, why: str) -> SettingsError:
        raise SettingsError(f"{self.path}: {key}={self.values[key]}: {why}", hint=f"correct {key} in {self.path}")

    def text(self, key: str, default: str) -> str:
        value = self.values.get(key, default)
        for variable in re.findall(r"\$\$([^$]+)\$\$", value):
            if variable not in os.environ:
                self.refuse(key, f"the environment has no variable {variable}")
            value = value.replace(f"$${variable}$$", os.environ[variable])
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.text(key, str(default)).lower()
        if value not in ("true", "false"):
            self.refuse(key, "neither true nor false")
        return value == "true"

    def integer(self, key: str, default: int) -> int:
        value = self.text(key, str(default))
        if not re.fullmatch(r"\d{1,10}", value, re.ASCII):
            self.refuse(key, "not a whole number")
        return int(value)

    def number(self, key: str, default: float) -> float:
        value = self.text(key, str(default))
        if not re.fullmatch(r"\d*\.?\d+", value, re.ASCII) or float(value) <= 0:
            self.refuse(key, "not a number above 0")
        return float(value)

    def port(self, key: str, value: str) -> int:
        if not re.fullmatch(r"\d{1,5}", value, re.ASCII) or not 1 <= int(value) <= 65535:
            self.refuse(key, "the port is not a number from 1 to 65535")
        return int(value)

    def url(self, key: str, default: str) -> str:
        value = self.text(key, default)
        found = re.fullmatch(r"(https?)://(\[[0-9A-Fa-f:]+\]|[\w.-]+)(?::([^/]*))?/?", value, re.ASCII)
        if found is None:
            return str(self.refuse(key, "not http://host:port"))
        scheme, host, port = found.groups()
        return f"{scheme}://{_callable(host)}:{self.port(key, port or ('443' if scheme == 'https' else '80'))}"

    def target(self, prefix: str, default: str) -> str:
        host, _, port = default.rpartition(":")
        host = _callable(self.text(f"{prefix}_address", host))
        return f"{host}:{self.port(f'{prefix}_port', self.text(f'{prefix}_port', port))}"


def _callable(host: str) -> str:
    """A server may bind every address; its clients on this machine call loopback."""
    return {"0.0.0.0": "127.0.0.1", "[::]": "[::1]", "::": "[::1]"}.get(host, host)


def _existing(folder: Path, value: str, config_path: Path, key: str) -> Path:
    path = folder / value
    if not path.is_file():
        raise SettingsError(f"{config_path}: {key}={value}: there is no file {path}", hint=f"correct {key}")
    return path


def _absolute_log4j(folder: Path, vmargs: str, config_path: Path) -> str:
    """The launcher splits `vmargs` at spaces and log4j wants a URI: percent-encoding answers both."""

    def absolute(argument: str) -> str:
        value = argument.removeprefix(_LOG4J)
        if value == argument or "://" in value:
            return argument
        return _LOG4J + _existing(folder, value, config_path, "vmargs").as_uri()

    return " ".join(absolute(argument) for argument in vmargs.split())


def _escaped(value: str) -> str:
    """As java.util.Properties reads it back: latin-1, so everything above ASCII as UTF-16 escapes."""
    value = value.replace("\\", "\\\\")
    units = value.encode("utf-16-be")
    pairs = (int.from_bytes(units[at : at + 2], "big") for at in range(0, len(units), 2))
    return "".join(chr(unit) if unit < 128 else f"\\u{unit:04x}" for unit in pairs)


def _unescaped(value: str, where: str) -> str:
    if not value.isascii():
        raise SettingsError(f"{where}: Java reads this file as latin-1", hint="write each such letter as \\uXXXX")
    if re.search(r"(?<!\\)(\\\\)*\\$", value):
        raise SettingsError(f"{where}: a line that goes on in the next", hint="write it on one line")

    def plain(found: re.Match[str]) -> str:
        if found[1]:
            return chr(int(found[1], 16))
        return {"t": "\t", "n": "\n", "r": "\r", "f": "\f"}.get(found[2], found[2])

    text = re.sub(r"\\(?:u([0-9A-Fa-f]{4})|(.))", plain, value)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
