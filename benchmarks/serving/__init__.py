"""Serving, side by side: the stock TorchServe handler, ours, one that does nothing, and other servers.

    python -m benchmarks.serving run --data cifar10.zip        # 3 rounds, about 45 minutes on two cores
    python -m benchmarks.serving run --data cifar10.zip --quick --systems stock-tuned marwright-throughput
    python -m benchmarks.serving show

Everything serves the same weights and gives the same answer, the top five as `{label: probability}`; every answer is
checked. `material` makes archives, pictures and the answers that are right, `systems` and `peers` say how each server
is started and tuned, `load` (and load.c) asks, `run` goes through the rounds, `report` makes the page's section.
"""

from __future__ import annotations


def section() -> str | None:
    """This benchmark's part of docs/performance.md; None before there is a raw file."""
    from benchmarks.serving import report

    return report.section()
