"""Errors become words and exit codes in one place."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from marwright import cli, errors
from marwright.errors import MarwrightError
from marwright.settings import Places


@dataclass(frozen=True, kw_only=True)
class Settings(Places):
    """A command for these tests."""

    number: int = 1


CODES = [
    (errors.DataError("no data", hint="bring some"), 1),
    (errors.SettingsError("bad option"), 2),
    (errors.RolledBack("1.1 was rolled back", reason="wrong answers"), 3),
    (errors.ServerRefused("predict", status=503, reason="queue full"), 1),
]


@pytest.mark.parametrize(("error", "code"), CODES, ids=lambda value: getattr(value, "message", None))
def test_each_kind_of_error_has_its_exit_code(
    error: MarwrightError, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(settings: Settings) -> int:
        raise error

    assert cli.run(fails, Settings, [], prog="marwright test") == code
    told = capsys.readouterr().err
    assert told == f"error: {error}\n"
    assert "Traceback" not in told
    assert cli.run(fails, Settings, ["--json"], prog="marwright test") == code
    document = json.loads(capsys.readouterr().out)
    assert document == {"error": type(error).__name__, "message": error.message, "hint": error.hint}


def test_the_hint_is_on_a_line_of_its_own() -> None:
    assert str(errors.DataError("no data", hint="bring some")) == "no data\n  → bring some"
    assert str(errors.NotReady("not ready", last_words="ImportError: x")) == "not ready\nImportError: x"


def test_ctrl_c_is_130_and_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(settings: Settings) -> int:
        raise KeyboardInterrupt

    assert cli.run(interrupted, Settings, [], prog="marwright test") == 130
    assert "interrupted" in capsys.readouterr().err


def test_our_own_faults_are_not_hidden() -> None:
    def broken(settings: Settings) -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.run(broken, Settings, [], prog="marwright test")


@pytest.mark.parametrize("words", [["--number", "one"], ["--no-such-option"], ["stray"]])
def test_usage_is_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(lambda settings: 0, Settings, words, prog="marwright test") == 2
    assert "marwright test" in capsys.readouterr().err


def test_a_table_is_never_cut(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    cli.print_table(("model", "digest"), [("digits", "0123456789abcdef" * 3)])
    assert "0123456789abcdef" * 3 in capsys.readouterr().out


def test_labels_are_not_taken_for_markup(capsys: pytest.CaptureFixture[str]) -> None:
    cli.print_table(("answer",), [("[red] cat",), ("[/foo]",)])
    assert capsys.readouterr().out.split("\n")[1:3] == ["[red] cat", "[/foo]   "]
