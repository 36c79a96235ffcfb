"""docs/performance.md, made from the raw files in benchmarks/results/: the same files, the same page.

    python benchmarks/performance.py

Each benchmark that has something to say there has a function `section() -> str | None`: markdown with a `## title` of
its own, None where nothing was measured yet. It writes its plots to docs/performance/.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

PAGE = ROOT / "docs" / "performance.md"
SECTIONS = (
    "benchmarks.serving",
    "benchmarks.stages",
    "benchmarks.settings_grid",
    "benchmarks.decoders",
    "benchmarks.startup",
    "benchmarks.rollouts",
    "benchmarks.time_to_accuracy",
    "benchmarks.archives",
    "benchmarks.growth",
)
HEAD = """# Performance

Made by `python benchmarks/performance.py` from the raw files in `benchmarks/results/`; not edited by hand.
[benchmarks/README.md](../benchmarks/README.md) says which command measures what. Ratios within one run travel to other
machines, absolute figures do not.
"""


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE.relative_to(ROOT))


def page(modules: tuple[str, ...] = SECTIONS) -> str:
    """The page of those that are there and have measured something."""
    parts = [HEAD]
    for name in modules:
        if importlib.util.find_spec(name) is None:
            continue
        section = getattr(importlib.import_module(name), "section", None)
        text = section() if section else None
        if text:
            parts.append(text.strip() + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    main()
