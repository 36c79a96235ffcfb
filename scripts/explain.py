"""Ask the running server why, and write one page: the input, the answer, and what each method says decided it."""

from __future__ import annotations

import json

from marwright import cli, files
from marwright.errors import ArchiveError
from marwright.packing import golden, records
from marwright.release import explained
from marwright.settings import ExplainSettings
from scripts import live, predict

SETTINGS = ExplainSettings


def main(settings: ExplainSettings) -> int:
    body = predict.read(settings.image, hint="make explain IMAGE=picture.png")
    kind = "application/json" if settings.image.suffix == ".json" else None
    with live.client(settings) as client:
        model = settings.model or live.only_model(client)
        answer = client.ask(model, body, grpc=settings.grpc, version=settings.version, content_type=kind)
        try:
            record = records.record(settings.store, model, answer.version)
        except ArchiveError as error:
            raise ArchiveError(
                error.message,
                hint=f"{model} {answer.version} answers; name the folder of its archive: --store FOLDER",
            ) from None
        found = explained.gather(
            client,
            answer,
            body,
            golden.spec(settings.store / record.file),
            methods=settings.method,
            target=settings.target,
            baseline=settings.baseline,
            grpc=settings.grpc,
            content_type=kind,
        )
    files.write_text(settings.out, explained.page(found, title=settings.image.name))
    if settings.json:
        print(json.dumps({**found.to_json(), "page": str(settings.out)}, ensure_ascii=False))
        return 0
    cli.print_table(*explained.table(found))
    for refused in found.refused:
        print(f"refused: {refused.method}: {refused.reason}")
    label, value = next(iter(found.prediction.items()))
    print(f"{model} {found.version} answers {label}: {value:.4g}, bundle {found.bundle}; the page is {settings.out}")
    return 0
