"""A policy is one strict TOML file; the shipped ones say what they mean, and the documentation says the same."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from marwright.errors import SettingsError
from marwright.release import paired, policy
from marwright.release.policy import Policy
from tests.checkout import ROOT

FOLDER = ROOT / "policies"
PAGE = ROOT / "docs" / "policy.md"


def refused(document: dict[str, object]) -> str:
    with pytest.raises(SettingsError) as caught:
        Policy.from_dict(document)
    return caught.value.message


def keys() -> Iterator[tuple[str, str, object]]:
    """Every table, key and default."""
    for table, values in Policy().to_dict().items():
        for key, value in values.items():
            yield table, key, value


def test_the_default_file_holds_every_key_with_its_default() -> None:
    document = tomllib.loads((FOLDER / "default.toml").read_text("utf-8"))
    assert document == Policy().to_dict()
    assert {(table, key): type(value) for table, values in document.items() for key, value in values.items()} == {
        (table, key): type(value) for table, key, value in keys()
    }


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_policy_loads(path: Path) -> None:
    assert policy.load(path, "any") == policy.load(None, path.stem, folder=FOLDER)


def test_digits_differ_from_the_default_only_in_what_their_few_examples_force() -> None:
    default, digits = Policy().to_dict(), policy.load(None, "digits", folder=FOLDER).to_dict()
    differing = {
        (table, key) for table, values in default.items() for key in values if digits[table][key] != values[key]
    }
    assert differing == {("gate", "margin"), ("gate", "looks")}


def test_a_policy_survives_its_own_dictionary() -> None:
    changed = Policy.from_dict({"gate": {"margin": 0.1}, "watch": {"seconds": 3}})
    assert Policy.from_dict(changed.to_dict()) == changed
    assert changed.watch.seconds == 3.0
    assert changed.shadow == Policy().shadow


def test_the_file_given_beats_the_models_own_beats_the_default_beats_nothing(tmp_path: Path) -> None:
    assert policy.load(None, "cats", folder=tmp_path / "none") == Policy()
    (tmp_path / "default.toml").write_text("[gate]\nmargin = 0.1\nlooks = 1\n", encoding="utf-8")
    assert policy.load(None, "cats", folder=tmp_path).gate.margin == 0.1
    (tmp_path / "cats.toml").write_text("[gate]\nmargin = 0.2\n", encoding="utf-8")
    own = policy.load(None, "cats", folder=tmp_path)
    assert (own.gate.margin, own.gate.looks) == (0.2, Policy().gate.looks), "files do not stack"
    (tmp_path / "third.toml").write_text("[gate]\nmargin = 0.3\n", encoding="utf-8")
    assert policy.load(tmp_path / "third.toml", "cats", folder=tmp_path).gate.margin == 0.3


def test_all_problems_are_said_at_once_with_key_value_and_what_is_allowed() -> None:
    said = refused(
        {
            "gate": {"margn": 0.1, "margin": -1, "looks": 1.5, "confidence": 1},
            "ready": {"seconds": True},
            "settle": {"drain_seconds": float("inf")},
            "watch": 3,
            "gates": {},
        }
    )
    for part in (
        "8 things",
        "gate.margn is unknown (did you mean margin?); allowed: class_confidence,",
        "gate.margin is -1; allowed: greater than or equal to 0",
        "gate.looks is 1.5; allowed: a valid integer",
        "gate.confidence is 1; allowed: less than 1",
        "ready.seconds is True",
        "settle.drain_seconds is inf; allowed: a finite number",
        "watch is 3; allowed: a table, [watch]",
        "gates is unknown (did you mean gate?); allowed: gate, judge, keep, learn, ready,",
    ):
        assert part in said


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"gone\.toml cannot be read"):
        policy.load(tmp_path / "gone.toml", "any")
    broken = tmp_path / "broken.toml"
    broken.write_text("[gate", encoding="utf-8")
    with pytest.raises(SettingsError, match=r"broken\.toml is not TOML"):
        policy.load(broken, "any")
    broken.write_text("[gate]\nmargin = 2", encoding="utf-8")
    with pytest.raises(SettingsError, match=r"broken\.toml: one thing not allowed\n  - gate\.margin is 2"):
        policy.load(broken, "any")


def test_a_policy_cannot_be_changed() -> None:
    one: BaseModel
    for one in (Policy(), Policy().gate):
        with pytest.raises(ValueError, match="frozen"):
            setattr(one, next(iter(type(one).model_fields)), None)


@pytest.mark.parametrize(("table", "key", "default"), list(keys()), ids=lambda value: str(value))
def test_the_page_has_every_key_with_its_default(table: str, key: str, default: object) -> None:
    section = re.split(r"^## ", PAGE.read_text("utf-8"), flags=re.MULTILINE)
    found = [part for part in section if part.startswith(f"`[{table}]`")]
    assert len(found) == 1
    shown = default if isinstance(default, str) else f"{default:g}"
    assert re.search(rf"^\| `{key}` \| {re.escape(shown)} \| \S", found[0], flags=re.MULTILINE)


def test_the_page_says_how_many_examples_a_margin_needs() -> None:
    assert "\n".join(needed()) in PAGE.read_text("utf-8")


def needed() -> Iterator[str]:
    """The table of examples that a margin needs, in rows of Markdown."""
    margins = (0.005, 0.01, 0.02, 0.05)
    yield "| right by one of the two alone | " + " | ".join(f"margin {margin:g}" for margin in margins) + " |"
    yield "|---|" + "---|" * len(margins)
    for disagreement in (0.0, 0.01, 0.02, 0.05, 0.1, 0.2):
        cells = []
        for margin in margins:
            counts = [
                paired.examples_needed(disagreement, margin, 1 - (1 - 0.95) / looks)
                for looks in (1, Policy().gate.looks)
            ]
            cells.append(" / ".join(f"{count:,}".replace(",", " ") for count in counts))
        yield f"| {disagreement:.0%} of the examples | " + " | ".join(cells) + " |"
