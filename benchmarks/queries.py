"""Every query of the dashboard and of the rules, asked of a real Prometheus beside a real server: what it gives.

    python benchmarks/queries.py        # → benchmarks/results/dashboard-queries.md

The scene is the test's own (`tests/monitoring.py`): two versions of digits under traffic, one call in seven for an
explanation, one in seven not an image.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests import archives, monitoring  # noqa: E402
from tests.prometheus import Sample  # noqa: E402

FILE = ROOT / "benchmarks" / "results" / "dashboard-queries.md"
SECONDS = 40
"""Of traffic, before the queries are asked."""


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="mw", dir="/tmp") as name:
        folder = Path(name)
        digits = archives.build(archives.train("digits", folder / "digits"), folder / "digits" / "store")
        with monitoring.watched(digits, folder / "scene") as scene:
            time.sleep(SECONDS)
            found = monitoring.results(scene.prometheus, seconds=60)
    lines = [
        "# What the dashboard's queries and the rules give",
        "",
        "`python benchmarks/queries.py`: two versions of digits under traffic, a scrape a second. `bool` in an alert: 0"
        " is quiet, 1 would fire.",
        "",
        "| where | query | series | for example |",
        "|---|---|---|---|",
    ]
    for query, samples in found.items():
        text = query.asked.replace("|", "\\|")
        lines.append(f"| {query.where} | `{text}` | {len(samples)} | {_example(samples)} |")
    FILE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{sum(map(bool, found.values()))} of {len(found)} queries have an answer: {FILE.relative_to(ROOT)}")
    return 0


def _example(samples: list[Sample]) -> str:
    """The first series, without what every series has."""
    if not samples:
        return "none"
    labels, value = max(samples, key=lambda sample: sample[1])
    told = " ".join(each for name, each in labels.items() if name not in {"__name__", "instance", "job", "Hostname"})
    return f"{told}: {value:.4g}" if told else f"{value:.4g}"


if __name__ == "__main__":
    sys.exit(main())
