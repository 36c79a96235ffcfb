"""`marwright VERB …`: every verb is a file in this folder, with a `SETTINGS` dataclass and a `main(settings)`.

A verb of several parts (`marwright feedback ingest`) has `PARTS` instead: a settings dataclass and a function for each.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from marwright import cli
from marwright.errors import SettingsError
from marwright.release import serving
from marwright.settings import Places

VERBS = {
    "train": "train a recipe into a run folder",
    "export": "turn a run into an artifact, and compare it with the eager net",
    "archive": "package a run as <name>-<version>.mar",
    "serve": "train, export, archive, start TorchServe, wait for a real answer",
    "stop": "stop TorchServe and wait for its end",
    "status": "what is built, what is released, what answers",
    "predict": "ask the running server",
    "explain": "why it answers so: a page with the input, the answer and maps",
    "watch": "live view of models, versions, workers, rates, latencies and the rollout that runs",
    "exporter": "tell Prometheus what the journal says and what the server does",
    "token": "print a valid token",
    "rollout": "bring a built version to answer, behind the gate, without losing a request",
    "rollback": "return to the last settled version",
    "releases": "what answered, what answers now, and why",
    "reconcile": "make the running server what the journal says",
    "release": "make a version the released one, without proof",
    "retrain": "learn from newly labelled examples, and roll the result out behind the gate",
    "feedback": "labels and captured requests: collector, import, ingest, status, forget",
    "prune": "remove archives, runs and requests that nobody needs any more",
    "demo": "the whole loop on a live server, in a few minutes",
    "drift": "whether requests are still what the model has learned from",
    "loadtest": "send requests at their due times and check every answer",
    "loadreport": "what a load test found",
    "tune": "find the best batch size, delay, workers, threads and format on this machine",
    "activate": "write JAVA_HOME and TS_CONFIG_FILE into the venv's activate",
}


def usage() -> str:
    lines = ["usage: marwright VERB [options]      (marwright VERB --help lists them)", ""]
    return "\n".join(lines + [f"  {verb:<12}{line}" for verb, line in VERBS.items()])


def _parts(verb: str, parts: Mapping[str, tuple[type[Any], Any]]) -> str:
    lines = [f"usage: marwright {verb} PART [options]      (marwright {verb} PART --help lists them)", ""]
    return "\n".join(
        lines + [f"  {part:<12}{(kind.__doc__ or '').splitlines()[0]}" for part, (kind, _) in parts.items()]
    )


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else 2
    verb, rest = words[0], words[1:]
    if verb not in VERBS:
        print(f"error: no verb {verb!r}\n\n{usage()}", file=sys.stderr)
        return 2
    # Before torch is imported: threads that wait must not burn the cores that a server on this machine needs (a digits
    # run beside other work: 70 s with spinning threads; alone, waiting passively costs some 8 %).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    module = importlib.import_module(f"scripts.{verb}")
    prog = f"marwright {verb}"
    parts: Mapping[str, tuple[type[Any], Any]] = getattr(module, "PARTS", {})
    if parts:
        part = rest.pop(0) if rest else "--help"
        if part not in parts:
            print(_parts(verb, parts), file=sys.stdout if part in ("-h", "--help") else sys.stderr)
            return 0 if part in ("-h", "--help") and words[1:] else 2
        prog, (kind, run) = f"{prog} {part}", parts[part]
    else:
        kind, run = module.SETTINGS, module.main

    def call(settings: Places) -> int:
        if verb != "stop":  # which must work with a broken configuration, too
            if not settings.config.is_file():
                raise SettingsError(
                    f"there is no {settings.config} here", hint="run it in the checkout, or name it: --config PATH"
                )
            # Whatever else a command does, what TorchServe will read at its next start is right after it.
            serving.refresh(settings.config, settings.store)
        done: int = run(settings)
        return done

    return cli.run(call, kind, rest, prog=prog)


if __name__ == "__main__":
    sys.exit(main())
