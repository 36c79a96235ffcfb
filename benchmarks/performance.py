"""The benchmarks behind docs/performance.md: run them, and make the page of what they left in benchmarks/results/.

    python benchmarks/performance.py                                        # the page: the same files, the same page
    python benchmarks/performance.py run serving levers --data cifar10.zip  # some of them, then the page
    python benchmarks/performance.py run --data cifar10.zip                 # all of them: some hours

Each benchmark that has something to say on the page has a function `section() -> str | None`: markdown with a `##
title` of its own, None where nothing was measured yet. It writes its plots to docs/performance/.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

PAGE = ROOT / "docs" / "performance.md"
SECTIONS = (
    "benchmarks.serving",
    "benchmarks.stages",
    "benchmarks.profiles",
    "benchmarks.decoders",
    "benchmarks.levers",
    "benchmarks.startup",
    "benchmarks.rollouts",
    "benchmarks.time_to_accuracy",
    "benchmarks.archives",
    "benchmarks.growth",
)
DATA = "--data"
"""In a command: the pictures go here."""
COMMANDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "serving": (("-m", "benchmarks.serving", "run", DATA),),
    "stages": (("benchmarks/stages.py", "run"),),
    "profiles": (("benchmarks/profiles.py", "run", DATA),),
    "decoders": (("benchmarks/decoders.py", "run", DATA),),
    "levers": (
        ("benchmarks/levers.py", "grid", DATA),
        ("benchmarks/levers.py", "server", DATA),
        ("benchmarks/levers.py", "asynchronous"),
    ),
    "startup": (("benchmarks/startup.py", "run"),),
    "rollouts": (("benchmarks/rollouts.py", "cost"),),
    "training": (
        ("benchmarks/time_to_accuracy.py", "run", DATA),
        ("benchmarks/time_to_accuracy.py", "budget", DATA),
        ("benchmarks/time_to_accuracy.py", "streaming", DATA),
    ),
    "archives": (("benchmarks/archives.py", "run"),),
    "growth": (("benchmarks/growth.py", "run"),),
}
HEAD = """# Performance

Made by `python benchmarks/performance.py` from the raw files in `benchmarks/results/`; not edited by hand.
[benchmarks/README.md](../benchmarks/README.md) says which command measures what. Ratios within one run travel to other
machines, absolute figures do not.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verb = parser.add_subparsers(dest="verb").add_parser("run", help="measure, then make the page")
    verb.add_argument("names", nargs="*", metavar="NAME", help=f"all, or some of: {', '.join(COMMANDS)}")
    verb.add_argument("--data", type=Path, help="cifar10 as ImageFolder zip; needed by " + ", ".join(_needs_data()))
    options = parser.parse_args()
    if options.verb == "run":
        names = options.names or list(COMMANDS)
        unknown = [name for name in names if name not in COMMANDS]
        if unknown:
            parser.error(f"no benchmark {', '.join(unknown)}; there are: {', '.join(COMMANDS)}")
        if options.data is None and set(names) & set(_needs_data()):
            parser.error("which pictures? --data cifar10.zip (ImageFolder layout: cifar10/train/cat/0001.jpg)")
        for name in names:
            for command in COMMANDS[name]:
                words = [word for one in command for word in ((one, str(options.data)) if one == DATA else (one,))]
                print(f"\n{name}: {' '.join(words)}", flush=True)
                done = subprocess.run([sys.executable, *words], cwd=ROOT, check=False).returncode
                if done:
                    print(f"{name} ended with {done}; the page is made of what there is", file=sys.stderr)
                    PAGE.write_text(page(), encoding="utf-8")
                    return 1
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE.relative_to(ROOT))
    return 0


def _needs_data() -> list[str]:
    return [name for name, commands in COMMANDS.items() if any(DATA in command for command in commands)]


def page(modules: tuple[str, ...] = SECTIONS) -> str:
    """The page of those that are there and have measured something."""
    there = [importlib.import_module(name) for name in modules if importlib.util.find_spec(name)]
    sections = [module.section() for module in there if hasattr(module, "section")]
    return "\n".join([HEAD, *(text.strip() + "\n" for text in sections if text)])


if __name__ == "__main__":
    sys.exit(main())
