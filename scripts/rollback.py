"""Return to the last settled version: at once while it is warm, else by registering it again."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import replace

from marwright.errors import RolledBack, RolloutError
from marwright.packing import records
from marwright.release import journal, rollout, turns
from marwright.settings import RollbackSettings
from scripts.rollout import limits_of, only_model, rig

SETTINGS = RollbackSettings


def main(settings: RollbackSettings) -> int:
    model = settings.model or only_model(settings.store)
    began = time.monotonic()
    with turns.only_one(settings.store, model, what=f"rollback of {model}"):
        was, version = _rolled_back(settings, model)
    seconds = time.monotonic() - began
    if settings.json:
        print(json.dumps({"model": model, "version": version, "was": was, "seconds": seconds}))
    else:
        print(f"{model} {version} answers again (was {was}), {seconds:.1f} s")
    return 0


def _rolled_back(settings: RollbackSettings, model: str) -> tuple[str | None, str | None]:
    """(what answered, what answers now)."""
    limits = limits_of(settings, settings.policy, model)
    with journal.open(settings.store) as book:
        left = rollout.unfinished(book, model)
        target, now = book.previous(model), book.released(model)
    if left is not None and left.kind == "rollout":  # it is sent back instead of on
        record = records.record(settings.store, model, left.version)
        with rig(settings, record, limits) as made, contextlib.suppress(RolledBack):
            rollout.run(replace(left, failing=left.failing or f"rolled back: {settings.why}"), made)
        return left.version, left.champion
    if target is None or now is None:
        raise RolloutError(
            f"nothing answered for {model} before {now.version if now else 'anything'}",
            hint="marwright releases; or, without proof: marwright release VERSION",
        )
    record = records.record(settings.store, model, target)
    records.check_whole(record, settings.store)
    with rig(settings, record, limits, kind="rollback", given={"why": settings.why}) as made:
        state = rollout.run(rollout.begin(made), made)
    return state.champion, state.version
