"""`python -m benchmarks.serving run|show`; see the package's own words."""

from __future__ import annotations

import argparse
from pathlib import Path

import benchmarks.serving
from benchmarks import rows
from benchmarks.serving import report

ROOT = Path(__file__).parent.parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving",
        description=benchmarks.serving.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("run", help="measure, and keep every row")
    verb.add_argument("--data", type=Path, help="cifar10 as ImageFolder zip; needed the first time")
    verb.add_argument("--systems", nargs="+", metavar="NAME", help="some of them; all when left out")
    verb.add_argument("--rounds", type=int, default=3)
    verb.add_argument("--seconds", type=float, default=3.0, help="of each row")
    verb.add_argument("--warm", type=float, default=5.0, help="seconds of load, at least, before the first row")
    verb.add_argument("--quick", action="store_true", help="1 and 64 connections, small PNGs alone")
    verb.add_argument("--resume", action="store_true", help="keep the raw file's finished systems, do the rest")
    verb.add_argument("--no-install", action="store_true", help="do not install peers that are missing")
    verb.add_argument("--work", type=Path, default=ROOT / "runs" / "serving", help="nets, pictures, peers")
    verb.add_argument("--out", type=Path, default=report.RAW)
    shown = verbs.add_parser("show", help="print the tables, write the plots")
    shown.add_argument("--out", type=Path, default=report.RAW)
    options = parser.parse_args()
    if options.verb == "run":
        from benchmarks.serving import run

        run.main(options)
    plots = rows.PLOTS if options.out == report.RAW else options.out.parent
    print(report.section(options.out, plots=plots) or f"there is no {options.out} yet")


if __name__ == "__main__":
    main()
