"""A load test of the running server: every request at its due time, every answer checked, every result kept."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict

from marwright import cli
from marwright.release.client import Client
from marwright.release.loadtest import bodies, run, watch
from marwright.release.loadtest.checks import OUTCOMES, Checks
from marwright.release.loadtest.plan import Load
from marwright.release.loadtest.run import Summary
from marwright.settings import LoadtestSettings
from scripts import live

SETTINGS = LoadtestSettings


def main(settings: LoadtestSettings) -> int:
    with live.client(settings) as client:
        model = settings.model or live.only_model(client)
        about = {"serving": _serving(client, model)}
        config = client.config
    load = Load(
        model=model,
        rate=settings.rate,
        seconds=settings.seconds,
        arrivals=settings.arrivals,
        connections=settings.connections,
        grpc_share=settings.grpc_share,
        pinned_share=settings.pinned_share,
        hung=settings.hung,
        seed=settings.seed,
    )
    sent = bodies.folder(settings.images) if settings.images else bodies.golden(settings.store, model)
    checks = Checks(sent, settings.store, model)
    tokens = live.tokens(settings) if config.token_auth else None
    with contextlib.ExitStack() as stack:
        pinnable = stack.enter_context(watch.Watch(settings.store, model)) if load.pinned_share else tuple
        summary = run.run(
            config, tokens, load, sent, checks, settings.out, pinnable=pinnable, about=about, progress=not settings.json
        )
    if settings.json:
        print(json.dumps(asdict(summary) | {"out": str(summary.out), "failed": summary.failed}))
        return 1 if summary.failed else 0
    _show(summary)
    summary.raise_for_failures()
    return 0


def _serving(client: Client, model: str) -> dict[str, str]:
    """The versions that are loaded as a run begins."""
    found = {}
    for status in client.describe(model, "all"):
        word = "default" if status.default else "loaded"
        found[status.version] = f"{word}, {status.ready_workers} ready, batch {status.batch_size}"
    return found


def _show(summary: Summary) -> None:
    rate = f"{summary.requests / summary.seconds:.0f}"
    cells = [str(summary.counts[outcome]) for outcome in OUTCOMES]
    cli.print_table(("requests", *OUTCOMES, "a second"), [(str(summary.requests), *cells, rate)])
    print(
        f"{summary.out}: `marwright loadreport {summary.out}` has the percentiles; the client used"
        f" {summary.cpu_share:.0%} of a core, at most {summary.most_connections} connections at a time"
    )
