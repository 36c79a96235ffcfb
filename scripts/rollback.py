"""Return to the last settled version: at once while it is warm, else by registering it again."""

from __future__ import annotations

import json
import time

from marwright.errors import RolloutError
from marwright.packing import records
from marwright.release import journal, rollout, turns
from marwright.settings import RollbackSettings
from scripts.rollout import only_model, rig

SETTINGS = RollbackSettings


def main(settings: RollbackSettings) -> int:
    model = settings.model or only_model(settings.store)
    with journal.open(settings.store) as book:
        target, now = book.previous(model), book.released(model)
    if target is None or now is None:
        raise RolloutError(
            f"nothing answered for {model} before {now.version if now else 'anything'}",
            hint="marwright releases; or, without proof: marwright release VERSION",
        )
    record = records.record(settings.store, model, target)
    records.check_whole(record, settings.store)
    began = time.monotonic()
    with (
        turns.only_one(settings.store, model, what=f"rollback of {model} to {target}"),
        rig(settings, record, settings.policy, kind="rollback", why=settings.why) as made,
    ):
        state = rollout.run(rollout.begin(made), made)
    if settings.json:
        print(json.dumps({"model": model, "version": state.version, "was": state.champion}))
    else:
        print(f"{model} {state.version} answers again (was {state.champion}), {time.monotonic() - began:.1f} s")
    return 0
