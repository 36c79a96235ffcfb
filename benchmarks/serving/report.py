from pathlib import Path

RAW = Path(__file__).parent.parent / "results" / "serving.csv"


def section(raw: Path = RAW) -> str | None:
    return None
