"""Ask the running server, over REST or gRPC, and print what it says and who said it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from marwright import cli
from marwright.errors import DataError
from marwright.settings import PredictSettings
from scripts import live

SETTINGS = PredictSettings


def main(settings: PredictSettings) -> int:
    body = read(settings.input, hint="make predict IMAGE=picture.png")
    with live.client(settings) as client:
        model = settings.model or live.only_model(client)
        answer = client.ask(
            model,
            body,
            grpc=settings.grpc,
            controls={} if settings.top_k is None else {"top_k": str(settings.top_k)},
            version=settings.version,
            content_type="application/json" if settings.input.suffix == ".json" else None,
        )
    value = answer.json()
    who = {"model": answer.model, "version": answer.version, "bundle": answer.bundle}
    if settings.json:
        print(json.dumps({"prediction": value, **who}, ensure_ascii=False))
        return 0
    pairs = value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else [value])
    rows = [(str(name), f"{score:.4f}" if isinstance(score, float) else json.dumps(score)) for name, score in pairs]
    cli.print_table(("answer", ""), rows)
    print(f"{model} {answer.version}, bundle {answer.bundle}, over {'gRPC' if settings.grpc else 'REST'}")
    return 0


def read(path: Path, *, hint: str) -> bytes:
    """A request's body, from a file or (`-`) from standard input."""
    try:
        return sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", hint=hint) from None
