"""Where a request's processor time goes: frontend and workers, and stage by stage inside a worker, by sampling.

    python benchmarks/profiles.py run --data cifar10.zip --rounds 3      # three minutes; replaces its files in results/
    python benchmarks/profiles.py show

cifar10's small net, 32×32 PNGs; the profiles, and the experiment of `gathering.py`. `profiles.csv` has the processor
time of java and of the workers, by what the kernel says of each process; `profile-*.txt` are samples of one worker
under load, its stacks folded as flame graphs are made of (py-spy, 500 a second, native code too, what waits left out).
py-spy is installed beside the nets, in runs/serving, the first time.
"""

from __future__ import annotations

import argparse
import collections
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import psutil

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import levers, rows  # noqa: E402
from benchmarks.serving import load, material  # noqa: E402
from marwright import files  # noqa: E402

RESULTS = Path(__file__).parent / "results"
OUT = RESULTS / "profiles.csv"
SAMPLER = "py-spy==0.4.2"
GATHERED = "batches formed in the worker"
LOADS = (("latency", 1), ("balanced", 8), ("throughput", 64), (GATHERED, 8), (GATHERED, 64))
"""Profile, connections."""
SERVING: dict[str, dict[str, Any]] = {
    "latency": {"workers": 1, "batch_size": 1},
    "balanced": {"workers": 2, "batch_size": 4},
    "throughput": {"workers": 2, "batch_size": 8},
    GATHERED: {"workers": 8, "batch_size": 1, "model": "gathering"},
}
SAMPLED = (("latency", 1), ("throughput", 64))
LONG = 4.0
"""Seconds of load."""

STAGES = (
    ("forward pass", r"handlers/runtime\.py|onnxruntime/"),
    ("decoding", r"handlers/(turbo|images|instances)\.py"),
    ("reading and writing frames", r"handlers/wire\.py"),
    ("reading what is asked", r"handlers/(payloads|kserve)\.py"),
    ("answers", r"handlers/(answers|envelope)\.py"),
    ("metrics", r"handlers/metrics\.py|(^|/)ts/metrics/"),
    ("the handler's own way", r"handlers/base\.py"),
    ("`ts`, sending", r"(^|/)ts/"),
)
"""What the innermost Python frame of ours says that a sample was; the first that fits a frame."""
WAITING = re.compile(r"(^|;)(__libc_)?recv \([^;]*$")
"""A stack that ends there waits for the next frame; the sampler does not always see that."""
FRAME = re.compile(r"\((?P<file>[^()]+\.py):\d+\)$")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("run")
    verb.add_argument("--data", type=Path, help="cifar10 as a zip or folder")
    verb.add_argument("--rounds", type=int, default=3)
    verbs.add_parser("show")
    options = parser.parse_args()
    if options.verb == "run":
        run(options)
    print(section() or "nothing was measured yet")


def run(options: argparse.Namespace) -> None:
    made, sampler = material.make(levers.WORK, options.data), _sampler()
    OUT.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="mw-", dir="/tmp") as name:
        program = load.build(Path(name))
        for profile, serving in SERVING.items():
            with levers.opened(made, Path(name) / profile, {}, **serving) as (port, keys, folder):
                path = f"/predictions/{serving.get('model', 'cifar10')}"
                manifest = load.write(folder / "sent", levers.cases(made, port, path, keys))
                java, workers = _processes(folder)
                load.warm(program, manifest, port=port, seconds=8.0)
                loads = [connections for of, connections in LOADS if of == profile]
                for number in range(options.rounds):
                    for connections in loads:
                        before = [_spent([java]), _spent(workers)]
                        found = load.ask(program, manifest, port=port, connections=connections, seconds=LONG)
                        after = [_spent([java]), _spent(workers)]
                        row = {"round": number, "profile": profile, "connections": connections}
                        row |= levers.figures(found)
                        for who, one, other in zip(("java", "workers"), before, after, strict=True):
                            spent = (other - one) * 1e6 / max(found["right"], 1)
                            row |= {f"{who}_user_us": round(spent[0], 1), f"{who}_system_us": round(spent[1], 1)}
                        rows.add(OUT, row)
                for connections in (one for of, one in SAMPLED if of == profile):
                    kept = RESULTS / f"profile-{profile}-{connections}.txt"
                    with files.replacing(kept) as temporary:
                        command = [sampler, "record", "--native", "--duration", f"{LONG:g}", "--rate", "500"]
                        command += ["--format", "raw", "--output", temporary, "--pid", str(workers[0].pid)]
                        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
                            load.ask(program, manifest, port=port, connections=connections, seconds=LONG + 2)
                            process.wait(timeout=60)
                        temporary.write_text(_shortened(temporary.read_text()), encoding="utf-8")


def _sampler() -> Path:
    folder = levers.WORK / "sampler"
    found = folder / "bin" / "py-spy"
    if not found.is_file():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--target", str(folder), SAMPLER], check=True)
    return found


def _processes(folder: Path) -> tuple[psutil.Process, list[psutil.Process]]:
    """The frontend of the server in `folder`, and its workers."""
    for one in psutil.process_iter(["name", "cmdline"]):
        if one.info["name"] == "java" and str(folder) in " ".join(one.info["cmdline"] or []):
            children = [child for child in one.children() if any("model_service_worker" in w for w in child.cmdline())]
            return one, children
    raise SystemExit(f"no server was found for {folder}")


def _spent(processes: list[psutil.Process]) -> np.ndarray:
    """Seconds in the program, seconds in the kernel."""
    return np.sum([one.cpu_times()[:2] for one in processes], axis=0)


def _shortened(folded: str) -> str:
    """Addresses without a name and where a library is say nothing; stacks that are then the same are one."""
    counts: collections.Counter[str] = collections.Counter()
    for line in folded.splitlines():
        stack, _, count = line.rpartition(" ")
        frames = [re.sub(r"\(/[^()]*/([^/()]+/[^/()]+)\)$", r"(\1)", one) for one in stack.split(";")]
        counts[";".join(one for one in frames if not one.startswith("0x"))] += int(count)
    return "".join(f"{stack} {count}\n" for stack, count in sorted(counts.items()))


def stage(stack: str) -> str:
    """What a sample was busy with; "other" where no frame is known."""
    for frame in reversed(stack.split(";")):
        place = FRAME.search(frame)
        for name, pattern in STAGES if place else ():
            if re.search(pattern, place["file"]):
                return name
    return "other"


def shares(folded: str) -> dict[str, float]:
    """Stage → share of the samples that do not wait, the largest first."""
    counts: collections.Counter[str] = collections.Counter()
    for line in folded.splitlines():
        stack, _, count = line.rpartition(" ")
        if not WAITING.search(stack):
            counts[stage(stack)] += int(count)
    return {name: count / counts.total() for name, count in counts.most_common()}


def section() -> str | None:
    """What was measured, as tables."""
    if not OUT.is_file():
        return None
    about, found = rows.read(OUT)
    table = []
    for profile, connections in LOADS:
        mine = [row for row in found if (row["profile"], row["connections"]) == (profile, str(connections))]
        names = ("java_user_us", "java_system_us", "workers_user_us", "workers_system_us", "per_second", "p50_ms")
        values = [float(np.median([float(row[name]) for row in mine])) for name in names]
        table.append([f"{profile}, {connections}", *(f"{v:.0f}" for v in values[:5]), f"{values[5]:.2f}"])
    titles = [
        "profile, connections",
        "java",
        "its system calls",
        "workers",
        "their system calls",
        "answers/s",
        "p50 ms",
    ]
    sampled = {
        f"{profile}, {connections}": shares(path.read_text(encoding="utf-8"))
        for profile, connections in SAMPLED
        if (path := RESULTS / f"profile-{profile}-{connections}.txt").is_file()
    }
    names = list(dict.fromkeys(name for one in sampled.values() for name in one))
    stages = [[name, *(f"{one.get(name, 0):.0%}" for one in sampled.values())] for name in names]
    return "\n".join(
        ["## Processor time of a request", "",
         f"Microseconds a request, medians of the rounds ({about}). `python benchmarks/profiles.py run`.", "",
         rows.markdown(titles, table), "",
         "What a worker is at when it does not wait for a frame, share of the samples. Sending wakes the "
         "frontend, which takes the core: that counts as sending. Folded: `benchmarks/results/profile-*.txt`.", "",
         rows.markdown(["stage", *sampled], stages),
         ""]
    )  # fmt: skip


if __name__ == "__main__":
    main()
