"""A week of `marwright retrain --every`, a day being a minute: labels come in, one lot of them wrong.

    python benchmarks/week.py run        ten minutes
    python benchmarks/week.py show       the table again, and the page from the kept results

A private checkout serves digits on free ports and is left alone with one command, `marwright retrain --every 60s
--turns 7`, while `marwright loadtest` calls it all week. What the world does between two turns:

    Monday     nothing
    Tuesday    450 labelled pictures arrive
    Thursday   450 more, wrongly labelled: the tool wrote the place of the key (1 2 3 … 9 0) for the digit on it
    Friday     somebody sees it and takes them away
    Saturday   they are back, labelled rightly

All pictures are real: scikit-learn's 1797 digits, shuffled once. The first version learns from 300 of them only, so
that labels have something to improve; 597 are never given to Marwright, and each evening the live server answers all of
them on its default URL. The other differences from the recipe and the policy as they come: 5 epochs instead of 10, a
shorter watch, and a warm version is retired within the day; every limit of the gate is that of policies/digits.toml.

Nobody tells the world what to do next: it acts once a day's turn has written its line. The results are written whatever
came of it; the exit code is 1 where the week was not three new versions, one of them refused, without a lost request.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from marwright import files
from marwright import report as pages
from marwright.learning import bundled
from marwright.learning.examples import Examples
from marwright.packing import records
from marwright.release import journal
from marwright.release.client import Client
from marwright.release.loadtest import report
from marwright.release.loadtest import results as raw_results
from marwright.release.server import Server

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests import checkout  # noqa: E402
from tests.checkout import Project  # noqa: E402

RESULTS = Path(__file__).parent / "results"
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
OWN, LOT = 300, 450
"""Pictures that the first version learns from, and in each lot of new ones; the others are held back."""
EPOCHS = 5
POLICY = """
[shadow]
requests = 100

[watch]
seconds = 5.0

[settle]
warm_seconds = 30.0
"""
LINE = re.compile(r"^(\S+\+00:00) digits: ([a-z ]+): (.*)$", re.MULTILINE)
"""What a turn writes when it is over."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="live through the week, and keep the results")
    run.add_argument("--day", type=int, default=60, help="seconds; more than a turn takes")
    run.add_argument("--rate", type=float, default=50.0, help="requests a second")
    verbs.add_parser("show", help="print the tables, write the page")
    options = parser.parse_args()
    if options.verb == "run":
        # Started in the background of a script this process ignores Ctrl-C, and what it starts would, too.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        live(options.day, options.rate)
    document = files.read_json(RESULTS / "week.json")
    files.write_text(RESULTS / "week.html", page(document))
    show(document)
    if problems := unlike(document):
        raise SystemExit("\n".join(problems))


class World:
    """The pictures there are, and the folder where labelled ones arrive."""

    def __init__(self, new: Path) -> None:
        self._found: Examples = bundled.digits()
        order = np.random.default_rng(0).permutation(len(self._found)).tolist()
        self.own, self.first, self.second = order[:OWN], order[OWN : OWN + LOT], order[OWN + LOT : OWN + 2 * LOT]
        self.held_back = order[OWN + 2 * LOT :]
        self._new = new

    def day(self, name: str) -> str:
        """Do what that day brings, and say it."""
        if name == "Tuesday":
            self.label(self.first, self._new)
            return f"{LOT} labelled pictures"
        if name == "Thursday":
            self.label(self.second, self._new, off=-1)
            return f"{LOT} more, labelled wrongly"
        if name == "Friday":
            for path in self._new.rglob("second-*.png"):
                path.unlink()
            return f"those {LOT} taken away"
        if name == "Saturday":
            self.label(self.second, self._new)
            return f"the {LOT} back, labelled rightly"
        return "nothing"

    def label(self, chosen: list[int], folder: Path, *, off: int = 0) -> None:
        """The pictures as `<class>/<file>`; `off` is added to every label."""
        lot = "second" if chosen is self.second else "first"
        for i in chosen:
            target = folder / str((int(self._found.targets[i]) + off) % 10)
            target.mkdir(parents=True, exist_ok=True)
            (target / f"{lot}-{i:04d}.png").write_bytes(self._found.raw(i).data)

    def ask(self, client: Client) -> dict[str, Any]:
        """What the live server says of the held-back pictures, on the default URL: who answered, how many are right."""
        right, versions = 0, Counter[str]()
        for i in self.held_back:
            answer = client.predict("digits", self._found.raw(i).data, content_type="application/octet-stream")
            scores = answer.json()
            right += max(scores, key=scores.__getitem__) == self._found.classes[int(self._found.targets[i])]
            versions[answer.version] += 1
        return {"versions": dict(versions), "right": right, "asked": len(self.held_back)}


def live(day: int, rate: float) -> None:
    """The whole week, in a checkout of its own; whatever was started has ended when this returns."""
    with checkout.fresh("week") as project:
        world = World(project.root / "new" / "digits")
        world.label(world.own, project.root / "labelled" / "digits")
        settle_in(project)
        project.make("serve")
        raw = project.root / "load.csv"
        words = f"--rate {rate:g} --seconds 100000 --grpc-share 0.2 --pinned-share 0.2 --json --out {raw}"
        load = started(project, f"marwright loadtest --model digits {words}", "load.log")
        command = f"marwright retrain --every {day}s --turns {len(DAYS)}"
        retrain = None
        try:
            awaited(lambda: raw.is_file() and raw.stat().st_size > 10_000, load, project.root / "load.log")
            with Server(project.store / "serving.properties", home=project.root, temp=project.temp).client() as client:
                rows = [{"day": "Sunday before", "at": time.time(), "new": "", "evening": world.ask(client)}]
                new, began = world.day(DAYS[0]), time.time()
                retrain = started(project, command, "retrain.log")
                for number, name in enumerate(DAYS):
                    row: dict[str, Any] = {"day": name, "at": began + number * day, "new": new}
                    row |= turn(project.root / "retrain.log", number, retrain)
                    row["evening"] = world.ask(client)
                    rows.append(row)
                    print(json.dumps(row), flush=True)
                    if name == DAYS[-1]:
                        break
                    new = world.day(DAYS[number + 1])
                    # The first turn began after the command did, so the next one is due no earlier than this.
                    if time.time() > began + (number + 1) * day:
                        raise SystemExit(f"{name} was longer than {day} s: give it more, --day")
            code = retrain.wait(60)
        finally:
            for process in filter(None, (retrain, load)):
                ended(process)
        keep(project, raw, {"command": command, "code": code, "day": day, "days": rows})


def settle_in(project: Project) -> None:
    """What this checkout has of its own: the recipe's data, and a policy that is over sooner."""
    path = project.root / "recipes" / "digits.toml"
    text, found = re.subn(r'(?m)^source = "digits".*$', 'source = "folder"\npath = "labelled/digits"', path.read_text())
    text, more = re.subn(r"(?m)^epochs = \d+", f"epochs = {EPOCHS}", text)
    assert (found, more) == (1, 1), "recipes/digits.toml is not as it was"
    path.write_text(text)
    policy = project.root / "policies" / "digits.toml"
    policy.write_text(policy.read_text() + POLICY)


def started(project: Project, line: str, log: str) -> subprocess.Popen[bytes]:
    """A command as typed in the activated environment, left to itself; both outputs go to the log."""
    kept = {name: os.environ[name] for name in ("HOME", "LANG", "LC_ALL", "USER") if name in os.environ}
    kept |= {"PATH": project.path, "TMPDIR": str(project.temp), "TEMP": str(project.temp), "COLUMNS": "120"}
    kept["OMP_WAIT_POLICY"] = "PASSIVE"  # training beside the server: its threads shall sleep, not spin
    with (project.root / log).open("wb") as output:
        return subprocess.Popen(
            ["bash", "-c", f"source .venv/bin/activate && exec {line}"],
            cwd=project.root,
            env=kept,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def ended(process: subprocess.Popen[bytes]) -> None:
    """Ctrl-C, and what it takes."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def awaited(there: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, seconds: float = 600.0) -> None:
    until = time.monotonic() + seconds
    while not there():
        if process.poll() is not None or time.monotonic() > until:
            raise SystemExit(f"{log.name} has not what was waited for:\n{log.read_text(errors='replace')[-3000:]}")
        time.sleep(0.1)


def turn(log: Path, number: int, process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """That turn's line in the log, once it is there."""

    def lines() -> list[tuple[str, str, str]]:
        return LINE.findall(log.read_text(errors="replace"))

    awaited(lambda: len(lines()) > number, process, log)
    at, phase, steps = lines()[number]
    built = re.findall(r"digits-([0-9.]+)\.mar", steps)
    return {"over": at, "phase": phase, "steps": steps.split("; "), "version": built[-1] if built else None}


def keep(project: Project, raw: Path, lived: dict[str, Any]) -> None:
    read = raw_results.read(raw)
    with journal.open(project.store) as book:
        entries, spans = book.entries("digits"), book.spans("digits")
    found = report.findings(read, entries=entries, spans=spans)
    start = float(read.due[0])
    seconds = np.arange(0, found.seconds + 1)
    rate = report.asked(found.about).replace(f", {found.about['seconds']:g} s", "")  # it was ended, not timed
    document = {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"platform": platform.platform(), "cores": os.cpu_count(), "load": os.getloadavg()[2]},
        "packages": {name: installed(name) for name in ("torch", "torchserve", "onnxruntime")},
        **lived,
        "archives": [record.version for record in records.records(project.store, "digits")],
        "journal": [
            {"at": entry.at, "version": entry.version, "event": entry.event, "detail": dict(entry.detail)}
            for entry in entries
            if entry.event in ("archived", "switching", "released", "rolling back", "rolled back", "retired")
        ],
        "load": {
            "start": start,
            "found": asdict(found),
            "table": report.table(found),
            "sentences": [f"Asked all week: {rate}.", *report.sentences(found)],
            # Right answers in each second, one number after the other.
            "answers": {
                one.version: " ".join(
                    str(count)
                    for count in np.histogram(
                        read.done[(read.version == one.version) & (read.outcome == "ok")] - start, seconds
                    )[0]
                )
                for one in found.versions
            },
        },
    }
    RESULTS.mkdir(exist_ok=True)
    files.write_json(RESULTS / "week.json", document)


def unlike(document: dict[str, Any]) -> list[str]:
    """What was not as announced: three new versions, one of them refused, and nobody noticed."""
    days = {row["day"]: row for row in document["days"]}
    wanted = {
        "Monday": ("nothing new", None, "1.0"),
        "Tuesday": ("settled", "1.1", "1.1"),
        "Wednesday": ("nothing new", None, "1.1"),
        "Thursday": ("rolled back", "1.2", "1.1"),
        "Friday": ("nothing new", None, "1.1"),
        "Saturday": ("settled", "1.3", "1.3"),
        "Sunday": ("nothing new", None, "1.3"),
    }
    problems = []
    for day, one in wanted.items():
        row = days[day]
        was = (row["phase"], row["version"], ", ".join(row["evening"]["versions"]))
        if was != one:
            problems.append(f"{day}: {was} instead of {one}")
    counts, beyond = document["load"]["found"]["lines"][0]["counts"], document["load"]["found"]["not_allowed"]
    lost = {name: count for name, count in counts.items() if name != "ok" and count}
    if lost or beyond:
        problems.append(f"the load test: {lost}, {beyond} answers by a version that could not answer")
    if document["code"] or len(document["archives"]) != 4:
        problems.append(f"exit {document['code']}, archives {document['archives']}")
    return problems


def table(document: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[pages.Cell, ...]]]:
    """A row for each day."""
    head = ("day", "what was new", "what became of it", "answers", "right, of held-back ones", "accuracy, %")
    rows: list[tuple[pages.Cell, ...]] = []
    for row in document["days"]:
        evening = row["evening"]
        right, asked = evening["right"], evening["asked"]
        share = round(100 * right / asked, 1)
        rows.append((row["day"], row["new"], became(row), ", ".join(evening["versions"]), f"{right} of {asked}", share))
    return head, rows


def became(row: dict[str, Any]) -> str:
    """What the turn made of the day, in its own words where it refused."""
    if not row.get("phase"):
        return ""
    if row["version"] is None:
        return str(row["phase"])
    if row["phase"] == "settled":
        return f"{row['version']} answers"
    return f"{row['version']} refused: {row['steps'][-1].partition(' answers: ')[2] or row['steps'][-1]}"


def page(document: dict[str, Any]) -> str:
    """Self-contained HTML."""
    found, (head, rows) = document["load"]["found"], document["load"]["table"]
    counts = found["lines"][0]["counts"]
    made = pages.Report(
        "A week of marwright retrain --every",
        subtitle=f"{document['command']}; a day is {document['day']} s; {document['measured']}",
    )
    made.tiles(
        [
            ("new versions", len(document["archives"]) - 1),
            ("refused", sum(row.get("phase") == "rolled back" for row in document["days"])),
            ("requests", sum(counts.values())),
            ("lost or wrong", sum(counts.values()) - counts["ok"]),
            ("accuracy before, %", table(document)[1][0][-1]),
            ("accuracy after, %", table(document)[1][-1][-1]),
        ]
    )
    made.section("Day by day").table(*table(document))
    made.paragraph(
        "Accuracy: each evening the live server was asked on its default URL about pictures that Marwright never saw."
    )
    made.section("Time line").figure(
        answers(document),
        alt="answers a second by version",
        caption="Right answers, by the version that gave them; one that answers no more by default is asked at its"
        " pinned URL until it is retired. Days begin at the dotted lines.",
    )
    made.figure(
        accuracy(document), alt="accuracy by day", caption="Right answers to the held-back pictures, each evening."
    )
    made.section("What the callers saw").table(head, rows)
    for sentence in document["load"]["sentences"]:
        made.paragraph(sentence)
    switches = [(entry["at"], entry["version"], entry["event"], why(entry)) for entry in document["journal"]]
    made.section("Journal").table(("at", "version", "event", "why"), switches)
    machine = document["machine"]
    facts = [("platform", machine["platform"]), ("cores", machine["cores"]), ("load average", machine["load"])]
    made.section("Made of").table(("", ""), [*facts, *document["packages"].items()])
    return made.html()


def why(entry: dict[str, Any]) -> str:
    detail = entry["detail"]
    return str(detail.get("reason") or detail.get("why") or "")


def answers(document: dict[str, Any]) -> Any:
    figure, (one,) = pages.axes(9.0, 3.2)
    load = document["load"]
    versions = {name: [int(count) for count in text.split()] for name, text in load["answers"].items()}
    import matplotlib as mpl

    colours = mpl.colormaps["tab20"](np.arange(len(versions)))
    seconds = np.arange(max(map(len, versions.values())))
    one.stackplot(seconds, list(versions.values()), step="post", labels=list(versions), colors=colours, linewidth=0)
    one.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    for row in document["days"][1:]:
        at = row["at"] - load["start"]
        one.axvline(at, color=pages.INK, linewidth=0.7, linestyle=":")
        one.text(at + 2, 1.0, row["day"], transform=one.get_xaxis_transform(), fontsize=7, va="bottom")
    one.set(xlabel="seconds", ylabel="answers a second", xlim=(0, len(seconds)))
    one.set_ylim(bottom=0)
    return figure


def accuracy(document: dict[str, Any]) -> Any:
    figure, (one,) = pages.axes(9.0, 2.8)
    days = document["days"]
    shares = [100 * row["evening"]["right"] / row["evening"]["asked"] for row in days]
    one.plot(range(len(days)), shares, color=pages.ACCENT, marker="o", markersize=4)
    for i, (row, share) in enumerate(zip(days, shares, strict=True)):
        who = ", ".join(row["evening"]["versions"])
        one.annotate(who, (i, share), textcoords="offset points", xytext=(0, 6), ha="center", fontsize=8)
        if row.get("phase") == "rolled back":
            text = f"{row['version']} refused"
            how: dict[str, Any] = {"textcoords": "offset points", "xytext": (0, -14), "ha": "center", "fontsize": 8}
            one.annotate(text, (i, share), color=pages.SECOND, **how)
    one.set_xticks(range(len(days)), [row["day"] for row in days], fontsize=8)
    one.set(ylabel="accuracy, %")
    one.margins(y=0.25)
    return figure


def show(document: dict[str, Any]) -> None:
    console = Console(width=200)
    for head, rows in (table(document), document["load"]["table"]):
        shown = Table(*head, box=None, pad_edge=False)
        for row in rows:
            shown.add_row(*(f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in row))
        console.print(shown)
        print()
    for sentence in document["load"]["sentences"]:
        print(sentence)


if __name__ == "__main__":
    main()
