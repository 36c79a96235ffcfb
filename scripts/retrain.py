"""Learn from newly labelled examples, and roll the result out behind the gate: the loop, once around.

    examples ──▶ train ──▶ export ──▶ archive ──▶ rollout ──▶ answers

A turn can be killed anywhere: the next one finishes an interrupted rollout, goes on with an interrupted training, finds
what was built. A turn with nothing new does nothing, and a second one at a time says so and ends well: both are what a
timer makes. The champion's weights are the initial ones.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import FrameType

import filelock
from apscheduler.events import EVENT_JOB_SUBMITTED
from apscheduler.executors.debug import DebugExecutor
from apscheduler.schedulers.blocking import BlockingScheduler
from apscheduler.triggers.interval import IntervalTrigger

from marwright import cli
from marwright.errors import MarwrightError, RolledBack, SettingsError
from marwright.learning import additions, data, graphs, provenance, recipe, training
from marwright.learning.additions import Difference
from marwright.learning.dataset import Dataset
from marwright.learning.recipe import Recipe
from marwright.packing import exporting, golden, records
from marwright.packing.records import ArchiveRecord
from marwright.release import journal
from marwright.release.server import Server
from marwright.runs import Run
from marwright.settings import Places, ReconcileSettings, RetrainSettings, RolloutSettings
from scripts import archive, reconcile, rollout

SETTINGS = RetrainSettings
NEW = Path("new")
UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
LONGEST = timedelta(days=366)

Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """What became of a turn.

    `phase`: busy (another turn of this model is under way), nothing new, refused before, released (the first version of
    all), waiting (for a running server), or how its rollout ended.
    """

    model: str
    phase: str
    version: str | None = None
    run: str | None = None
    added: int = 0
    """Newly labelled examples that the champion has not learned from."""


@dataclass(frozen=True)
class Champion:
    """The version that should be answering, and the run that it came from where that is still there."""

    record: ArchiveRecord
    run: Run | None


def main(settings: RetrainSettings) -> int:
    every = _schedule(settings)
    if every is None:
        _turn(settings)
        return 0
    return repeat(lambda: _turn(settings), every, turns=settings.turns, as_json=settings.json)


def retrained(settings: RetrainSettings, *, say: Say = lambda step: None) -> Outcome:
    """One turn. RolledBack where the gate refused what came out; `say` hears of each step as it is done."""
    chosen = recipe.load(settings.recipe, recipes_dir=settings.recipes, overrides=settings.overrides())
    with _alone(settings, chosen.name) as alone:
        if not alone:
            say("another retraining of it is under way")
            return Outcome(chosen.name, "busy")
        _finish_what_was_interrupted(settings, chosen.name, say)
        champion = _champion(settings, chosen.name, say)
        examples = _examples(settings, chosen, say)
        news = _news(settings, examples, champion, say)
        if news.nothing:
            return Outcome(chosen.name, "nothing new", champion.record.version if champion else None)
        start = _start(chosen, examples, champion, say)
        run = _trained(settings, chosen, examples, start, say)
        artifact = exporting.export(run, chosen.serving.format)
        record, built, _ = archive.stored(settings, chosen, run, artifact, behind_gate=True)
        say(f"built {record.file}" if built else f"{record.file} was built before")
        outcome = Outcome(chosen.name, "", record.version, run.id, news.added)
        return replace(outcome, phase=_released(settings, record, champion, say))


def repeat(turn: Callable[[], object], every: timedelta, *, turns: int | None = None, as_json: bool = False) -> int:
    """A turn at once, then one each `every`, until SIGTERM (0) or Ctrl-C; or so many `turns`.

    A turn that fails is told, and the schedule goes on. Turns that fall due while one is under way become one.
    """
    done, ending = 0, ""

    def one() -> None:
        nonlocal done, ending
        try:
            turn()
        except MarwrightError as error:
            cli.tell(error, as_json=as_json)
        except KeyboardInterrupt:  # the scheduler would take it for a failed job
            ending = ending or "Ctrl-C"
        except Exception:  # a fault of ours, or a full disk: the next turn may well go
            traceback.print_exc()
        done += 1

    def end(event: object) -> None:
        if ending or done == turns:
            scheduler.shutdown(wait=False)

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal ending
        ending = "SIGTERM"
        raise KeyboardInterrupt

    # In this thread, not in one of a pool: Ctrl-C and SIGTERM then reach the training itself, which leaves its last
    # whole epoch behind, instead of waiting hours for its end.
    scheduler = BlockingScheduler(timezone=UTC, executors={"default": DebugExecutor()})
    scheduler.add_job(
        one,
        IntervalTrigger(seconds=every.total_seconds(), timezone=UTC),
        next_run_time=datetime.now(UTC),
        coalesce=True,
        max_instances=1,
        misfire_grace_time=None,
    )
    scheduler.add_listener(end, EVENT_JOB_SUBMITTED)  # after the scheduler has noted when the next turn is due
    before = signal.signal(signal.SIGTERM, stop)
    try:
        scheduler.start()
    except KeyboardInterrupt:
        ending = ending or "Ctrl-C"
    finally:
        signal.signal(signal.SIGTERM, before)
    if ending == "Ctrl-C":
        raise KeyboardInterrupt
    return 0


def period(text: str) -> timedelta:
    """`30s`, `15m`, `1h`, `1d`."""
    found = re.fullmatch(r"(\d{1,9})([smhd])", text)
    every = timedelta(**{UNITS[found[2]]: int(found[1])}) if found else timedelta()
    if not timedelta() < every <= LONGEST:
        raise SettingsError(
            f"--every is {text!r}", hint="a whole number and s, m, h or d, at most 366d: 30s, 15m, 1h, 1d"
        )
    return every


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
    if settings.json:
        print(json.dumps(asdict(outcome) | {"steps": steps}, ensure_ascii=False), flush=True)
    return outcome


@contextlib.contextmanager
def _alone(settings: RetrainSettings, model: str) -> Iterator[bool]:
    """Whether no other turn of this model is under way; the system frees the lock of one that was killed."""
    settings.store.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(settings.store / f".retrain-{model}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _finish_what_was_interrupted(settings: RetrainSettings, model: str, say: Say) -> None:
    """A rollout that was cut off ends settled, or raises RolledBack; what was kept warm for long enough is retired.

    Without a server there is nothing to do that on.
    """
    if not _running(settings):
        return
    outcome = rollout.resumed(_rollout_settings(settings, model=model, resume=True))
    if outcome is not None:
        say(f"the interrupted rollout of {outcome.version} is {outcome.phase}")
    places = {field.name: getattr(settings, field.name) for field in fields(Places)}
    for line in reconcile.mended(ReconcileSettings(**places, policy=settings.policy), model):
        say(line)


def _champion(settings: RetrainSettings, model: str, say: Say) -> Champion | None:
    with journal.open(settings.store) as book:
        released = book.released(model)
    if released is None:
        return None
    record = records.record(settings.store, model, released.version)
    run = Run(settings.runs / record.run)
    if not run.finished:
        say(f"{run.path}, of which {record.version} was made, is gone")
    return Champion(record, run if run.finished else None)


def _examples(settings: RetrainSettings, chosen: Recipe, say: Say) -> Dataset:
    """The recipe's data and the newly labelled examples. A default folder that is not there holds none."""
    new = settings.new
    if new is None and (NEW / chosen.name).exists():
        new = NEW / chosen.name
    bars = not settings.json and sys.stdout.isatty()  # in a log each would be an empty line
    examples = data.load(chosen, path=settings.data, new=new, cache=settings.runs / "cache", progress=bars)
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


def _start(chosen: Recipe, examples: Dataset, champion: Champion | None, say: Say) -> Run | None:
    """The champion's run, unless its weights do not fit what is trained now."""
    if champion is None or champion.run is None:
        say("from scratch")
        return None
    if reason := graphs.misfit(chosen, examples, champion.run):
        say(f"from scratch, as {champion.run.id} cannot be the start: {reason}")
        return None
    say(f"from the weights of {champion.run.id}")
    return champion.run


def _trained(settings: RetrainSettings, chosen: Recipe, examples: Dataset, start: Run | None, say: Say) -> Run:
    """The finished run: new, gone on with, or there from an earlier turn."""
    there = Run(settings.runs / provenance.run_id(chosen, examples, start)).finished
    run = training.train(chosen, examples, settings.runs, start=start, resume=True, progress=not settings.json)
    scores = ", ".join(f"{name} {value:.4g}" for name, value in run.spec.metrics.items())
    say(f"{'there was' if there else 'trained'} {run.id} ({scores})")
    return run


def _released(settings: RetrainSettings, record: ArchiveRecord, champion: Champion | None, say: Say) -> str:
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
    outcome = rollout.rolled_out(_rollout_settings(settings, model=record.model, version=record.version))
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


def _schedule(settings: RetrainSettings) -> timedelta | None:
    """How often; None for one turn. SettingsError where the options contradict each other."""
    if settings.every is None:
        if settings.turns is not None:
            raise SettingsError("--turns counts the turns of --every, and there is none", hint="--every 1h --turns 3")
        return None
    if settings.once:
        raise SettingsError("--once and --every contradict each other", hint="leave one out")
    if settings.turns is not None and settings.turns < 1:
        raise SettingsError(f"--turns is {settings.turns}", hint="1 or more, or leave it out")
    return period(settings.every)
