"""Make the running server what the journal says: finish what was interrupted, switch, load, retire what is due."""

from __future__ import annotations

import json

from marwright.errors import RolledBack
from marwright.packing import records
from marwright.release import journal, loading, reconcile, turns
from marwright.settings import ReconcileSettings, RolloutSettings
from scripts import live, rollout

SETTINGS = ReconcileSettings


def main(settings: ReconcileSettings) -> int:
    done: list[str] = []
    for model in sorted({each.model for each in records.records(settings.store)}):
        done += mended(settings, model)
    if settings.json:
        print(json.dumps(done))
    else:
        print("\n".join(done) or "the server is what the journal says")
    return 0


def mended(settings: ReconcileSettings, model: str) -> list[str]:
    """What was done about one model, a sentence each; nothing where the server is what the journal says."""
    if settings.dry_run:
        with live.client(settings) as client, journal.open(settings.store) as book:
            found = reconcile.differences(book, model, loading.versions(client, model))
        return [f"{each.sentence}: would {each.mend}" for each in found]
    holder = turns.holder(settings.store, model)
    if holder:
        return [f"{model} is being changed by another command: {holder}"]
    done = []
    options = RolloutSettings(
        store=settings.store,
        config=settings.config,
        runs=settings.runs,
        recipes=settings.recipes,
        json=settings.json,
        model=model,
        policy=settings.policy,
    )
    try:
        outcome = rollout.resumed(options)
        if outcome is not None:
            done.append(f"{model} {outcome.version}: the interrupted rollout is {outcome.phase}")
    except RolledBack as back:
        done.append(back.message)
    built = records.records(settings.store, model)
    if not built:
        return done
    limits = rollout.limits_of(settings, settings.policy, model)
    with (
        turns.only_one(settings.store, model, what=f"reconcile of {model}"),
        rollout.rig(settings, built[-1], settings.policy) as made,
    ):
        for _ in range(5):  # each mend may show another difference
            found = reconcile.differences(made.book, model, loading.versions(made.client, model))
            if not found:
                break
            done += [reconcile.mend(each, made.server, made.client, made.book, limits) for each in found]
    return done
