"""What `replay` runs in its clean process: a stand-in for a TorchServe worker.

    python -P clean_worker.py FOLDER        # prints {"answers": [of all golden examples], "explanations": {method: …}}

`Context` has what a handler may use of TorchServe's own. Nothing of Marwright but the
archive's `handlers` is imported.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
from pathlib import Path
from typing import Any

import yaml

STEPS = 200
"""Of integrated gradients: so many that what they leave over is not the integral's error."""


class Context:
    """One load and one batch, like `ts.context.Context`: what a handler reads of requests and says of answers."""

    def __init__(self, folder: Path) -> None:
        self.manifest = json.loads((folder / "MAR-INF" / "MANIFEST.json").read_text(encoding="utf-8"))
        self.model_name = self.manifest["model"]["modelName"]
        self.model_yaml_config = yaml.safe_load((folder / self.manifest["model"]["configFile"]).read_text("utf-8"))
        self.system_properties = {
            "model_dir": str(folder),
            "gpu_id": None,
            "batch_size": 1,
            "server_name": "MMS",
            "server_version": "0.12.0",
            "limit_max_image_pixels": True,
        }
        self.metrics = None
        self.stopping_criteria = None
        self.take([])

    def take(self, headers: list[dict[str, Any]]) -> None:
        """A new batch with these request headers."""
        self._headers = headers
        self._answer_headers: list[dict[str, str]] = [{} for _ in headers]
        self._status: list[tuple[int, str | None]] = [(200, None) for _ in headers]

    def get_request_id(self, idx: int = 0) -> str | None:
        return f"request-{idx}" if idx < len(self._headers) else None

    def get_request_header(self, idx: int, key: str) -> Any:
        return self._headers[idx].get(key)

    def get_all_request_header(self, idx: int) -> dict[str, Any]:
        return self._headers[idx]

    def set_response_header(self, idx: int, key: str, value: str) -> None:
        self._answer_headers[idx][key] = value

    def get_response_headers(self, idx: int) -> dict[str, str]:
        return self._answer_headers[idx]

    def set_response_content_type(self, idx: int, value: str) -> None:
        self.set_response_header(idx, "content-type", value)

    def get_response_content_type(self, idx: int) -> str | None:
        return self._answer_headers[idx].get("content-type")

    def set_response_status(self, code: int = 200, phrase: str = "", idx: int = 0) -> None:
        self._status[idx] = (code, phrase)

    def get_response_status(self, idx: int) -> tuple[int, str | None]:
        return self._status[idx]


def load(folder: Path, context: Context) -> Any:
    """The handler that the manifest names, initialised, as TorchServe's loader does it."""
    module = importlib.import_module(context.manifest["model"]["handler"])
    classes = [value for _, value in inspect.getmembers(module, inspect.isclass) if value.__module__ == module.__name__]
    if len(classes) != 1:
        raise ValueError(f"{module.__name__} defines {len(classes)} classes; TorchServe wants exactly one")
    handler: Any = classes[0]()
    handler.initialize(context)
    return handler


def main(folder: Path) -> None:
    os.nice(19)  # a server on the same cores has requests to answer
    context = Context(folder)
    handler = load(folder, context)
    entries = json.loads((folder / "golden" / "golden.json").read_text(encoding="utf-8"))
    count = max(len(entry["answer"]) for entry in entries)

    def ask(entries: list[dict[str, Any]], headers: dict[str, str]) -> list[Any]:
        """The parsed answers to one batch of golden examples."""
        kinds = {"image": "application/octet-stream", "json": "application/json"}
        context.take([{"body": {"content-type": kinds[entry["kind"]]}, **headers} for entry in entries])
        bodies = [(entry["kind"], (folder / "golden" / entry["file"]).read_bytes()) for entry in entries]
        requests = [{"body": json.loads(body) if kind == "json" else bytearray(body)} for kind, body in bodies]
        return [json.loads(answer) for answer in handler.handle(requests, context)]

    answers = ask(entries, {"explain": "False", "X-Top-K": str(count)})
    explanations = {}
    if handler.explainer is not None:
        handler.explainer.limit = float("inf")  # how fast this machine is now says nothing of the archive
        for method in handler.explainer.methods:
            steps = {"X-Explain-Steps": str(STEPS)} if method == "integrated-gradients" else {}
            wanted = {"X-Explain-Method": method, "X-Top-K": str(count), **steps}
            [explanations[method]] = ask(entries[:1], {"explain": "True", **wanted})
    print(json.dumps({"answers": answers, "explanations": explanations}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
