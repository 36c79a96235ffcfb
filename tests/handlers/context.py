"""TorchServe's context, small: what a handler may ask of it, and what a test may look at afterwards.

    context = FakeContext.at(model_dir, batch_size=8)
    answer = context.ask(handler, [Sent(fields, headers)])[0]
    answer.status, answer.json, answer.headers

The same claims are tested against `ts.context.Context` by the worker contract.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Sent:
    """One request as TorchServe hands it over: fields, and headers beside each field's content type."""

    fields: Mapping[str, Any]
    headers: Mapping[str, Any] = field(default_factory=lambda: {"Host": "localhost"})


@dataclass(frozen=True)
class Answer:
    """One answer as TorchServe would send it."""

    status: int
    body: bytes
    headers: Mapping[str, str]

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class _Slot:
    request: Mapping[str, Any]
    status: int = 200
    phrase: str = ""
    response: dict[str, str] = field(default_factory=dict)


class KnownMetrics:
    """`context.metrics`, small: the counters that a metrics file declares, and what was added to each."""

    def __init__(self, path: Path) -> None:
        declared = _declared(path.read_text(encoding="utf-8"))
        self._counters = {entry["name"]: KnownCounter(entry["name"], entry["dimensions"]) for entry in declared}

    def get_metric(self, metric_name: str) -> KnownCounter:
        return self._counters[metric_name]

    @property
    def sums(self) -> dict[tuple[str, ...], float]:
        """By name and values of the labels."""
        return {(name, *labels): value for name, one in self._counters.items() for labels, value in one.sums.items()}


@functools.cache
def _declared(document: str) -> list[Any]:
    counters: list[Any] = yaml.safe_load(document)["model_metrics"].get("counter", [])
    return counters


class KnownCounter:
    """One counter. What TorchServe would not take is an error here."""

    def __init__(self, name: str, dimension_names: list[str]) -> None:
        self.metric_name, self.dimension_names = name, dimension_names
        self.sums: dict[tuple[str, ...], float] = {}

    def add_or_update(self, value: float, dimension_values: list[str]) -> None:
        assert len(dimension_values) == len(self.dimension_names)
        assert not any(set(text) & set(",|#:\r\n") or not text for text in dimension_values), dimension_values
        assert value >= 0
        key = tuple(dimension_values)
        self.sums[key] = self.sums.get(key, 0) + value


class FakeContext:
    """The part of `ts.context.Context` that handlers use, with the same names and meanings."""

    def __init__(
        self,
        model_name: str,
        model_dir: str,
        manifest: Mapping[str, Any] | None,
        batch_size: int,
        gpu: int | None,
        model_yaml_config: Mapping[str, Any] | None = None,
    ) -> None:
        self.model_name = model_name
        self.manifest = manifest
        self.system_properties = {"model_dir": model_dir, "gpu_id": gpu, "batch_size": batch_size}
        self.model_yaml_config = model_yaml_config
        self.metrics: KnownMetrics | None = None
        self._slots: list[_Slot] = []

    @classmethod
    def at(cls, model_dir: Path, *, batch_size: int = 1, gpu: int | None = None) -> FakeContext:
        """As TorchServe makes it for an unpacked archive."""
        path = model_dir / "MAR-INF" / "MANIFEST.json"
        manifest = json.loads(path.read_text()) if path.exists() else None
        config_file = ((manifest or {}).get("model") or {}).get("configFile")
        config = yaml.safe_load((model_dir / config_file).read_text()) if config_file else {}
        return cls("digits", str(model_dir), manifest, batch_size, gpu, config)

    def ask(self, handler: Any, batch: Sequence[Sent]) -> list[Answer]:
        """One batch through `handler.handle`."""
        self._slots = [_Slot(sent.headers) for sent in batch]
        bodies = handler.handle([dict(sent.fields) for sent in batch], self)
        assert isinstance(bodies, list)
        assert len(bodies) == len(batch)
        return [Answer(slot.status, bytes(body), slot.response) for slot, body in zip(self._slots, bodies, strict=True)]

    def get_request_id(self, idx: int = 0) -> str | None:
        return f"request-{idx}" if idx < len(self._slots) else None

    def get_request_header(self, idx: int, key: str) -> Any:
        return self._slots[idx].request.get(key)

    def get_all_request_header(self, idx: int) -> Mapping[str, Any]:
        return self._slots[idx].request

    def set_response_content_type(self, idx: int, value: str) -> None:
        self.set_response_header(idx, "content-type", value)

    def get_response_content_type(self, idx: int) -> str | None:
        return self._slots[idx].response.get("content-type")

    def set_response_header(self, idx: int, key: str, value: str) -> None:
        self._slots[idx].response[key] = value

    def get_response_headers(self, idx: int) -> dict[str, str]:
        return self._slots[idx].response

    def set_response_status(self, code: int = 200, phrase: str = "", idx: int = 0) -> None:
        self._slots[idx].status, self._slots[idx].phrase = code, phrase

    def get_response_status(self, idx: int) -> tuple[int, str]:
        return self._slots[idx].status, self._slots[idx].phrase
