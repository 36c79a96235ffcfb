"""The cause in a log: the exception that began it, whoever else spoke at the same time."""

from __future__ import annotations

from pathlib import Path

from marwright.release import lastwords
from marwright.release.lastwords import Mark, WorkerWords

IMPORT_CHAIN = """\
Backend worker process died.
Traceback (most recent call last):
  File "handler.py", line 1, in <module>
    import no_such_library
ModuleNotFoundError: No module named 'no_such_library'

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "model_loader.py", line 159, in _load_default_handler
ModuleNotFoundError: No module named 'ts.torch_handler.handler'
""".splitlines()
RAISED_FROM = """\
Traceback (most recent call last):
  File "handler.py", line 9, in initialize
KeyError: 'conv1.weight'

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "handler.py", line 11, in initialize
ValueError: weights.pt is not of this net
""".splitlines()
CAUGHT_AND_SUMMARISED = """\
Failed to load model digits, exception digests differ
Traceback (most recent call last):
  File "handler.py", line 9, in initialize
RuntimeError: digests differ
Backend worker process died.
Traceback (most recent call last):
  File "model_service_worker.py", line 209, in handle_connection
RuntimeError: 500 - Unknown exception
""".splitlines()


def said(thread: str, lines: list[str]) -> list[str]:
    return [f"2026-01-02T03:04:05,678 [INFO ] {thread} MODEL_LOG - {line}" for line in lines]


def test_an_exception_while_another_is_handled_is_not_the_cause() -> None:
    assert lastwords.cause(IMPORT_CHAIN) == "ModuleNotFoundError: No module named 'no_such_library'"


def test_an_exception_raised_from_another_explains_it() -> None:
    assert lastwords.cause(RAISED_FROM) == "ValueError: weights.pt is not of this net"


def test_torchserves_summary_of_an_exception_is_not_its_cause() -> None:
    assert lastwords.cause(CAUGHT_AND_SUMMARISED) == "RuntimeError: digests differ"


def test_no_traceback_no_cause() -> None:
    assert lastwords.cause(["Torch worker started.", "Listening"]) == ""


def test_workers_that_speak_at_the_same_time_are_heard_apart() -> None:
    first = said("W-9000-a_b-c_1.0-stdout", IMPORT_CHAIN)
    second = said("W-9001-a_b-c_1.0-stdout", IMPORT_CHAIN)
    other = said("W-9002-a_b-c_1.1-stdout", RAISED_FROM)
    mixed = [line for lines in zip(first, second, strict=True) for line in lines] + other
    words = WorkerWords.of(mixed, "a_b-c", "1.0")
    assert words.cause == "ModuleNotFoundError: No module named 'no_such_library'"
    assert words.gave_up
    assert WorkerWords.of(mixed, "a_b-c", "1.1").cause == "ValueError: weights.pt is not of this net"
    assert not WorkerWords.of(mixed, "a_b", "1.0").out


def test_a_worker_that_died_before_it_said_its_name_has_given_up() -> None:
    words = WorkerWords.of(said("W-9000-m_1-stderr", RAISED_FROM), "m", "1")
    assert words.gave_up
    assert words.last == "ValueError: weights.pt is not of this net"


def test_a_long_name_is_cut_as_torchserve_cuts_it() -> None:
    name = "a-model-with-a-name-that-is-very-long"
    assert WorkerWords.of(said(f"W-9000-{name[:25]}_1.0-stdout", ["x"]), name, "1.0").out == (("x",),)


def test_only_what_was_written_since_the_mark_counts(tmp_path: Path) -> None:
    log = tmp_path / "model_log.log"
    assert Mark.end_of(log).lines() == []
    log.write_text("old\n")
    mark = Mark.end_of(log)
    with log.open("a") as stream:
        stream.write("new\n")
    assert mark.lines() == ["new"]
    log.rename(tmp_path / "model_log.1.log")
    log.write_text("rotated\n")
    assert mark.lines() == ["rotated"]


def test_a_running_servers_words_begin_when_it_began(tmp_path: Path) -> None:
    log = tmp_path / "ts_log.log"
    log.write_text(
        "2026-01-01T00:00:00,000 [WARN ] main a.B - before\n\tat a.frame\n"
        "2026-01-02T00:00:00,500 [WARN ] main a.B - after\n"
    )
    assert Mark(log, since="2026-01-02T00:00:00,499").lines()[0].endswith("after")


def test_the_servers_words_leave_out_frames_and_chatter() -> None:
    output = ["WARNING: sun.reflect.Reflection", "java.io.IOException: Failed to bind", "\tat a.b.C", ""]
    log = ["2026-01-01T00:00:00,000 [ERROR] main a.B - Invalid configuration"]
    assert lastwords.of_server(log, output) == "Invalid configuration\njava.io.IOException: Failed to bind"
