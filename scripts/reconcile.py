"""Make the running server what the journal says: finish what was interrupted, switch, load, retire what is due."""

from __future__ import annotations

import json
from collections.abc import Iterator

from marwright import cli
from marwright.errors import MarwrightError, RolledBack
from marwright.packing import records
from marwright.release import journal, loading, reconcile, turns
from marwright.settings import ReconcileSettings, RolloutSettings
from scripts import live, rollout

SETTINGS = ReconcileSettings


def main(settings: ReconcileSettings) -> int:
    done: list[str] = []
    troubles: dict[str, MarwrightError] = {}  # by message: a server that is not there is said once
    for model in sorted({each.model for each in records.records(settings.store)}):
        try:
            for sentence in mended(settings, model):
                done.append(sentence)
        except MarwrightError as error:  # the other models are to be mended all the same
            troubles[error.message] = error
    if settings.json:
        print(json.dumps(done))
    elif done or not troubles:
        print("\n".join(done) or "the server is what the journal says")
    if troubles:
        *others, last = troubles.values()
        for other in others:
            cli.tell(other, as_json=settings.json)
        raise last
    return 0


def mended(settings: ReconcileSettings, model: str) -> Iterator[str]:
    """What is done about one model, a sentence each as it is done; none where the server is what the journal says."""
    if settings.dry_run:
        with live.client(settings) as client, journal.open(settings.store) as book:
            found = reconcile.differences(book, model, loading.versions(client, model))
        yield from (f"{each.sentence}: would {each.mend}" for each in found)
        return
    holder = turns.holder(settings.store, model)
    if holder:
        yield f"{model} is being changed by another command: {holder}"
        return
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
            yield f"{model} {outcome.version}: the interrupted rollout is {outcome.phase}"
    except RolledBack as back:
        yield back.message
    built = records.records(settings.store, model)
    if not built:
        return
    limits = rollout.limits_of(settings, settings.policy, model)
    with (
        turns.only_one(settings.store, model, what=f"reconcile of {model}"),
        rollout.rig(settings, built[-1], limits) as made,
    ):
        tried: set[tuple[str, str]] = set()
        while True:  # each mend may show another difference; one that did not help is not made again
            found = reconcile.differences(made.book, model, loading.versions(made.client, model))
            left = [each for each in found if (each.version, each.mend) not in tried]
            if not left:
                return
            for each in left:
                tried.add((each.version, each.mend))
                yield reconcile.mend(each, made.server, made.client, made.book, limits)
