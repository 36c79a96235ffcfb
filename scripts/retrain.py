"""Learn from what production has taught, and roll the result out behind the gate: the loop, once around.

    spool ─▶ ingest ─▶ decide ─▶ train ─▶ judge ─▶ archive ─▶ rollout ─▶ answers

A turn can be killed anywhere: the next one finishes an interrupted rollout, goes on with an interrupted training, finds
what was built. A turn with no reason to learn does nothing, and a second one at a time says so and ends well: both are
what a timer makes. The champion's weights are the initial ones, unless the method is scratch.

Newly labelled examples come from the feedback store, by time: the latest are the judge's alone. And from a folder
(`--new`), where somebody put them: those are reason enough, have no times, and the rollout's own gate judges them.
"""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path

from marwright.errors import DataError, MarwrightError, RolledBack
from marwright.feedback import trigger
from marwright.feedback.trigger import Decision
from marwright.learning import additions, data, graphs, methods, provenance, recipe, training
from marwright.learning.additions import Difference
from marwright.learning.dataset import Dataset
from marwright.learning.methods import Method
from marwright.learning.recipe import Recipe
from marwright.packing import exporting, golden, records
from marwright.packing.records import ArchiveRecord
from marwright.release import journal, policy
from marwright.release.policy import Policy
from marwright.release.server import Server
from marwright.runs import Run
from marwright.settings import Places, ReconcileSettings, RetrainSettings, RolloutSettings
from scripts import archive, prune, reconcile, rollout, schedule, taught
from scripts.taught import Champion, Fed, Say

SETTINGS = RetrainSettings
NEW = Path("new")


@dataclass(frozen=True)
class Outcome:
    """What became of a turn.

    `phase`: busy (another turn of this model is under way), nothing new, not yet (labels, but no reason to learn),
    no better (than the champion, says the judge), refused before, released (the first version of all), waiting (for a
    running server), or how its rollout ended.
    """

    model: str
    phase: str
    version: str | None = None
    run: str | None = None
    added: int = 0
    """Newly labelled examples that the champion has not learned from."""


def main(settings: RetrainSettings) -> int:
    if settings.dry_run:
        decision = considered(settings)
        if settings.json:
            document = {"retrain": decision.retrain, "reasons": decision.reasons, "waiting": decision.waiting}
            print(json.dumps({**document, "signals": decision.signals.to_dict()}))
        else:
            print("a turn would learn" if decision.retrain else "a turn would not learn")
            print("\n".join(f"  {sentence}" for sentence in (*decision.reasons, *decision.waiting)))
        return 0
    every = schedule.given(settings.every, once=settings.once, turns=settings.turns)
    if every is None:
        _turn(settings)
        return 0
    return schedule.repeat(lambda: _turn(settings), every, turns=settings.turns, as_json=settings.json)


def considered(settings: RetrainSettings) -> Decision:
    """What the feedback store says to the policy now, without learning; DataError where there is no store."""
    chosen = recipe.load(settings.recipe, recipes_dir=settings.recipes, overrides=settings.overrides())
    limits = policy.load(settings.policy, chosen.name)
    with taught.opened(settings) as store:
        champion = _champion(settings, chosen.name, _quiet)
        if store is None or champion is None:
            raise DataError(
                f"there is nothing to decide by: no {'feedback store' if store is None else 'released version'}",
                hint="make serve; docs/feedback.md says how requests and labels are collected",
            )
        fed = taught.ingested(settings, chosen, limits, store, champion, _quiet)
        return trigger.should_retrain(
            taught.facts(champion, Difference(own=False, added=0, gone=0), fed), limits.trigger
        )


def retrained(settings: RetrainSettings, *, say: Say = lambda step: None) -> Outcome:
    """One turn. RolledBack where the judge or the gate refused what came out; `say` hears of each step as it is
    done."""
    chosen = recipe.load(settings.recipe, recipes_dir=settings.recipes, overrides=settings.overrides())
    limits = policy.load(settings.policy, chosen.name)
    with taught.alone(settings, chosen.name) as alone, taught.opened(settings) as store:
        if not alone:
            say("another retraining of it is under way")
            return Outcome(chosen.name, "busy")
        _finish_what_was_interrupted(settings, chosen.name, say)
        for line in prune.pruned(settings, chosen.name, limits.keep):
            say(line)
        champion = _champion(settings, chosen.name, say)
        fed = None
        if store is not None and champion is not None:
            fed = taught.ingested(settings, chosen, limits, store, champion, say)
        examples = _examples(settings, chosen, fed, say)
        fed = taught.apart(fed, chosen, examples)
        news = _news(settings, examples, champion, say)
        if phase := _decided(limits, champion, news, fed, examples, say):
            return Outcome(chosen.name, phase, champion.record.version if champion else None)
        method, start = _method(settings, limits, chosen, examples, champion, say)
        run = _trained(settings, chosen, examples, start, method, say)
        judged = taught.judged(limits, champion, run, fed, say)
        outcome = Outcome(chosen.name, "", champion.record.version if champion else None, run.id, news.added)
        if judged is not None and judged.outcome != "pass":
            return replace(outcome, phase=taught.stopped(settings, champion, run, examples, judged, fed))
        taught.remembered(run, chosen, fed)
        artifact = exporting.export(run, chosen.serving.format)
        record, built, _ = archive.stored(settings, chosen, run, artifact, behind_gate=True)
        say(f"built {record.file}" if built else f"{record.file} was built before")
        with taught.holdout(settings, chosen, run, fed) as holdout:
            try:
                phase = _released(settings, record, champion, holdout, say)
            except RolledBack:
                if fed is not None and champion is not None and _tried(settings, record):
                    taught.refused(fed, champion, run, examples, by="gate")
                raise
        if phase == "refused before" and fed is not None and champion is not None:
            taught.refused(fed, champion, run, examples, by="gate")
        return replace(outcome, version=record.version, phase=phase)


def _turn(settings: RetrainSettings) -> Outcome:
    """One turn and its line in the log, however it ends."""
    steps: list[str] = []
    model, phase = Path(settings.recipe).stem, "failed"
    try:
        outcome = retrained(settings, say=steps.append)
        phase = outcome.phase
    except MarwrightError as error:
        phase = "rolled back" if isinstance(error, RolledBack) else "failed"
        steps.append(error.message.splitlines()[0])
        raise
    except KeyboardInterrupt:
        phase = "interrupted"
        raise
    finally:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        line = f"{now} {model}: {phase}: {'; '.join(steps)}"
        print(line, file=sys.stderr if settings.json else sys.stdout, flush=True)
        _noted(settings, model, phase, steps)
    if settings.json:
        print(json.dumps(asdict(outcome) | {"steps": steps}, ensure_ascii=False), flush=True)
    return outcome


def _finish_what_was_interrupted(settings: RetrainSettings, model: str, say: Say) -> None:
    """A rollout that was cut off ends settled, or raises RolledBack; what was kept warm for long enough is retired.

    Without a server there is nothing to do that on.
    """
    if not _running(settings):
        return
    outcome = rollout.resumed(_rollout_settings(settings, model=model, resume=True))
    taught.holdout_path(settings, model).unlink(missing_ok=True)
    if outcome is not None:
        say(f"the interrupted rollout of {outcome.version} is {outcome.phase}")
    places = {field.name: getattr(settings, field.name) for field in fields(Places)}
    for line in reconcile.mended(ReconcileSettings(**places, policy=settings.policy), model):
        say(line)


def _champion(settings: RetrainSettings, model: str, say: Say) -> Champion | None:
    with journal.open(settings.store) as book:
        released = book.released(model)
        back = any(entry.detail.get("back") for entry in book.entries(model, event="released")[-1:])
    if released is None:
        return None
    record = records.record(settings.store, model, released.version)
    run = Run(settings.runs / record.run)
    if not run.finished:
        say(f"{run.path}, of which {record.version} was made, is gone")
    preferred = back and not released.why.startswith("rolled back from")  # that was the gate, or a fault
    return Champion(record, run if run.finished else None, datetime.fromisoformat(released.at).timestamp(), preferred)


def _examples(settings: RetrainSettings, chosen: Recipe, fed: Fed | None, say: Say) -> Dataset:
    """The recipe's data and the newly labelled examples. A default folder that is not there holds none."""
    new = settings.new
    if new is None and (NEW / chosen.name).exists():
        new = NEW / chosen.name
    feedback = taught.examples(fed, chosen)
    bars = not settings.json and sys.stdout.isatty()  # in a log each would be an empty line
    cache = settings.runs / "cache"
    examples = data.load(chosen, path=settings.data, new=new, feedback=feedback, cache=cache, progress=bars)
    for note in examples.notes:
        say(note)
    return examples


def _news(settings: RetrainSettings, examples: Dataset, champion: Champion | None, say: Say) -> Difference:
    """What the champion has not learned from."""
    if champion is None:
        say("nothing is released yet")
        return Difference(own=True, added=len(examples.split["new"]), gone=0)
    if champion.run is None:  # its archive knows the digest of what it was made of, and no more
        same = golden.spec(settings.store / champion.record.file).data_digest == examples.digest
        say(f"{champion.record.version} was made of {'the same' if same else 'other'} examples")
        return Difference(own=not same, added=0, gone=0)
    found = additions.since(examples, champion.run)
    say(f"{found.added} new examples")
    if found.own:
        say("the recipe's own data are others")
    if found.gone:
        say(f"{found.gone} that {champion.record.version} has learned from are gone")
    return found


def _decided(
    limits: Policy, champion: Champion | None, news: Difference, fed: Fed | None, examples: Dataset, say: Say
) -> str:
    """Whether to learn now: empty, or the phase that the turn ends with."""
    if champion is None:
        return ""
    if news.nothing and not (fed and fed.selection.fresh):
        return "nothing new"
    facts = taught.facts(champion, news, fed, examples)
    decision = trigger.should_retrain(facts, limits.trigger)
    for sentence in (*decision.reasons, *decision.waiting) if fed else ():
        say(sentence)
    least = limits.judge.min_examples
    if decision.retrain and fed and not (facts.own or facts.folder) and len(fed.selection.judge) < least:
        say(f"{len(fed.selection.judge)} of the latest labelled answers would judge, and {least} are needed")
        return "not yet"
    if decision.retrain:
        return ""
    say(f"{decision.signals.labels} new labelled examples of {limits.trigger.min_labels}")
    return "not yet"


def _method(
    settings: RetrainSettings,
    limits: Policy,
    chosen: Recipe,
    examples: Dataset,
    champion: Champion | None,
    say: Say,
) -> tuple[Method | None, Run | None]:
    """How to learn, and the champion's run to start from, unless its weights do not fit what is trained now."""
    name = settings.method or limits.learn.method
    if champion is None or champion.run is None or name == "scratch":
        say("from scratch")
        return None, None
    if reason := graphs.misfit(chosen, examples, champion.run):
        say(f"from scratch, as {champion.run.id} cannot be the start: {reason}")
        return None, None
    if name != "warm" and not len(methods.fresh(examples, champion.run)):
        say(f"by warm, not {name}: nothing of what is new is in the training part")
        name = "warm"
    say(f"from the weights of {champion.run.id}" + ("" if name == "warm" else f" by {name}"))
    return (None if name == "warm" else methods.named(name)), champion.run


def _trained(
    settings: RetrainSettings,
    chosen: Recipe,
    examples: Dataset,
    start: Run | None,
    method: Method | None,
    say: Say,
) -> Run:
    """The finished run: new, gone on with, or there from an earlier turn."""
    there = Run(settings.runs / provenance.run_id(chosen, examples, start, method)).finished
    run = training.train(
        chosen, examples, settings.runs, start=start, method=method, resume=True, progress=not settings.json
    )
    scores = ", ".join(f"{name} {value:.4g}" for name, value in run.spec.metrics.items())
    say(f"{'there was' if there else 'trained'} {run.id} ({scores})")
    return run


def _released(
    settings: RetrainSettings, record: ArchiveRecord, champion: Champion | None, holdout: Path | None, say: Say
) -> str:
    """Bring the version to answer, unless that was tried before or cannot be now: the turn's phase."""
    if champion is None:
        say(f"{record.version} is the first and will answer at the next start")
        return "released"
    if record.version == champion.record.version:
        return "nothing new"
    if why := _tried(settings, record):
        say(f"{record.version} {why}; `marwright rollout {record.version} --model {record.model}` tries it again")
        return "refused before"
    if not _running(settings):
        say(f"{record.version} waits: TorchServe is not running, the next turn that finds it running rolls it out")
        return "waiting"
    wanted = _rollout_settings(settings, model=record.model, version=record.version)
    outcome = rollout.rolled_out(replace(wanted, holdout=holdout))
    say(f"{outcome.version} answers")
    return outcome.phase


def _tried(settings: RetrainSettings, record: ArchiveRecord) -> str:
    """Whether the journal knows how a rollout of that very version ended: it is not tried over and over."""
    with journal.open(settings.store) as book:
        entries = [entry for entry in book.entries(record.model) if entry.version == record.version]
    last = next((entry for entry in reversed(entries) if entry.event in ("rolled back", "released")), None)
    if last is None:
        return ""
    if last.event == "released":
        return "answered before, and another version was preferred"
    reason = str(last.detail.get("reason", "")).splitlines()[0]
    return "" if last.detail.get("innocent") else f"was rolled back on {last.at[:10]} ({reason})"


def _running(settings: RetrainSettings) -> bool:
    return Server(settings.serving, home=settings.home).find() is not None


def _rollout_settings(
    settings: RetrainSettings, *, model: str, version: str | None = None, resume: bool = False
) -> RolloutSettings:
    return RolloutSettings(
        store=settings.store,
        config=settings.config,
        runs=settings.runs,
        recipes=settings.recipes,
        json=settings.json,
        model=model,
        version=version,
        policy=settings.policy,
        resume=resume,
    )


def _noted(settings: RetrainSettings, model: str, phase: str, steps: list[str]) -> None:
    """For the metrics: when the last turn was, and what became of it. The turn itself is over."""
    with contextlib.suppress(MarwrightError), taught.opened(settings) as store:
        if store is not None:
            store.note("turn", model, {"phase": phase, "steps": steps})


def _quiet(step: str) -> None:
    """Nobody wants to hear it."""
