"""Labels that people made: a CSV file, a folder of pictures; and the command line around the store."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest

from marwright.errors import DataError
from marwright.feedback import importing
from marwright.feedback.store import Store
from scripts.__main__ import main
from tests import archives as built_archives
from tests.feedback import spools
from tests.feedback.spools import Asked, said


def labels(tmp_path: Path, text: str) -> list[importing.Label]:
    path = tmp_path / "labels.csv"
    path.write_text(text, encoding="utf-8")
    os.utime(path, (500.0, 500.0))
    return importing.labels(path, source=None)


def test_a_csv_file_says_who_said_what_and_when(tmp_path: Path) -> None:
    text = '\ufeffLabel, request,time,instance,source\none,a,1970-01-01T00:01:40,,\n"n,ll",b,100.5,2,"Ä, B"\n\n'
    first, second = labels(tmp_path, text)
    assert (first.request, first.instance, first.label, first.source, first.time) == ("a", 0, "one", "labels.csv", 100)
    assert (second.request, second.instance, second.label, second.source) == ("b", 2, "n,ll", "Ä, B")
    assert second.time == 100.5
    assert first.uid != second.uid


def test_lines_without_a_time_are_later_the_later_they_are(tmp_path: Path) -> None:
    found = labels(tmp_path, "request,label\na,one\na,two\na,one\n")
    assert [each.time for each in found] == sorted({each.time for each in found})
    assert all(499 < each.time <= 500 for each in found)
    assert len({each.uid for each in found}) == 3


def test_a_file_that_was_added_to_repeats_nothing(store: Store, tmp_path: Path) -> None:
    added = store.add_labels(labels(tmp_path, "request,label\na,one\na,two\na,one\n"))
    assert (added.labels, added.repeated) == (3, 0)
    added = store.add_labels(labels(tmp_path, "request,label\na,one\na,two\na,one\nb,one\n"))
    assert (added.labels, added.repeated) == (1, 3)


BAD = """request,label,instance,source,time
good,one,0,me,1
,one,0,me,1
ümlaut,one,0,me,1
a,,0,me,1
a,one,-1,me,1
a,one,x,me,1
a,one,0,me,yesterday
a,one,0,me,inf
a,one
a,one,0,me,1,more
"""


def test_every_bad_line_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing was imported") as caught:
        labels(tmp_path, BAD)
    for number in range(3, 12):
        assert f"line {number}: " in caught.value.message
    assert "line 2: " not in caught.value.message


def test_a_long_list_of_bad_lines_is_counted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="and 50 more"):
        labels(tmp_path, "request,label\n" + "a,\n" * (importing.NAMED + 49) + "a\n")


@pytest.mark.parametrize("head", ["", "request", "request,label,label", "request,label,colour", "a,b"])
def test_a_file_without_the_right_header_is_refused(tmp_path: Path, head: str) -> None:
    with pytest.raises(DataError, match="the first line is"):
        labels(tmp_path, f"{head}\na,one\n")


def test_what_is_no_csv_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        importing.labels(tmp_path / "binary.csv", source=None)
    with pytest.raises(DataError, match="bad lines"):
        labels(tmp_path, 'request,label\n"a"b,one\n')


def pictures(folder: Path) -> None:
    for label, count in (("zero", 3), ("nüll", 2)):
        (folder / label).mkdir(parents=True, exist_ok=True)
        for n in range(count):
            path = folder / label / f"{n}.png"
            path.write_bytes(spools.png(Asked(f"{label}{n}").instance(0)))
            os.utime(path, (100.0 + n, 100.0 + n))


def add(store: Store, folder: Path, source: str | None = None) -> importing.Pictured:
    given = importing.pictures(folder, spools.DIGITS.classes, source=source)
    return store.add_pictures("digits", given, spec=spools.DIGITS)


def test_a_folder_of_pictures_is_labelled_and_answers_nothing(store: Store, spool: Path, tmp_path: Path) -> None:
    pictures(tmp_path / "sorted")
    added = add(store, tmp_path / "sorted")
    assert (added.pictures, added.labels, added.unreadable) == (5, 5, ())
    found = store.labelled("digits")
    assert sorted(each.label for each in found) == ["nüll", "nüll", "zero", "zero", "zero"]
    for each in found:
        assert each.path is not None
        assert each.request == f"file:{each.digest}"
        assert (each.version, each.answer, each.source) == ("", "", "sorted")
        assert set(each.statistics) == {"brightness", "contrast", "sharpness"}
    assert store.answered("digits") == []
    (status,) = store.status()
    assert (status.live, status.lag_median, status.labelled) == ((), None, 5)
    again = add(store, tmp_path / "sorted")
    assert (again.pictures, again.labels, again.repeated) == (0, 0, 5)
    (tmp_path / "sorted" / "zero" / "2.png").rename(tmp_path / "sorted" / "nüll" / "2.png")
    moved = add(store, tmp_path / "sorted", source="second look")
    assert (moved.pictures, moved.labels) == (0, 5), "another source says it"
    assert sorted(each.label for each in store.labelled("digits")) == ["nüll"] * 3 + ["zero"] * 2
    forgotten = store.forget(found[0].request)
    assert (forgotten.known, forgotten.bodies) == (True, 1)
    assert add(store, tmp_path / "sorted").forgotten == 1


def test_a_file_that_is_no_picture_is_left_out_and_an_unknown_class_refused(store: Store, tmp_path: Path) -> None:
    pictures(tmp_path / "sorted")
    (tmp_path / "sorted" / "zero" / "x.png").write_bytes(b"no picture")
    added = add(store, tmp_path / "sorted")
    assert added.pictures == 5
    assert len(added.unreadable) == 1
    assert "zero/x.png" in added.unreadable[0]
    (tmp_path / "sorted" / "cat").mkdir()
    (tmp_path / "sorted" / "cat" / "x.png").write_bytes(spools.png(np.zeros((16, 16), np.uint8)))
    with pytest.raises(DataError, match="'cat'"):
        add(store, tmp_path / "sorted")


@pytest.fixture
def places(tmp_path: Path) -> list[str]:
    (tmp_path / "config.properties").write_text("inference_address=http://127.0.0.1:8080\n")
    options = {
        "feedback": tmp_path / "feedback", "config": tmp_path / "config.properties", "runs": tmp_path / "runs",
        "store": tmp_path / "model_store",
    }  # fmt: skip
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, Any]:
    code = main(["feedback", *words, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_the_commands_one_after_another(tmp_path: Path, places: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    spool = tmp_path / "feedback" / "spool"
    spools.requests(spool, [Asked(f"r{n}", time=1000 + n) for n in range(10)])
    spools.labels(spool, [said(f"r{n}", Asked(f"r{n}").answer(), uid=f"u{n}") for n in range(5)])
    code, taken = command(capsys, "ingest", *places)
    assert (code, taken["requests"], taken["labels"]) == (0, 10, 5)
    (tmp_path / "more.csv").write_text("request,label\nr5,zero\nr6,one\nnobody,one\n")
    code, added = command(capsys, "import", str(tmp_path / "more.csv"), *places)
    assert (code, added["labels"], added["unknown"]) == (0, 3, 1)
    code, status = command(capsys, "status", *places)
    assert code == 0
    (model,) = status["models"]
    assert (model["requests"], model["labelled"], status["unknown"]["some"]) == (10, 7, ["nobody"])
    assert model["live"][0]["labels"] == 7
    assert status["disk"]["bodies"] > 0
    assert main(["feedback", "status", *places]) == 0
    shown = capsys.readouterr().out
    assert "live accuracy" in shown
    assert "digits" in shown
    assert "nobody" in shown
    code, gone = command(capsys, "forget", "--request", "r0", *places)
    assert (code, gone["known"], gone["instances"]) == (0, True, 1)
    assert main(["feedback", "forget", "--request", "r0", *places]) == 0
    assert "was forgotten before" in capsys.readouterr().out
    assert main(["feedback", "forget", "--request", "r00", *places]) == 1
    assert "nothing is known of request r00" in capsys.readouterr().err
    assert main(["prune", "--days", "1", "--unlabelled-days", "1", *places]) == 0
    assert re.fullmatch(r"removed 9 requests, \d+ labels, 9 example files \(\d.\d MB\)\n", capsys.readouterr().out)
    assert main(["feedback", "status", *places]) == 0
    assert "1 labels are about 1 requests" in capsys.readouterr().out


def test_a_folder_is_imported_for_the_model_that_is_built(
    tmp_path: Path, places: list[str], capsys: pytest.CaptureFixture[str], digits: built_archives.Built
) -> None:
    (tmp_path / "model_store").symlink_to(digits.store)
    (tmp_path / "sorted" / "7").mkdir(parents=True)
    (tmp_path / "sorted" / "7" / "x.png").write_bytes(spools.png(Asked("seven").instance(0)))
    code, added = command(capsys, "import", str(tmp_path / "sorted"), *places)
    assert (code, added["pictures"], added["labels"]) == (0, 1, 1)
    code, refused = command(capsys, "import", str(tmp_path / "sorted"), "--model", "cats", *places)
    assert code == 1
    assert "no archive of cats" in refused["message"]
    code, refused = command(capsys, "import", str(tmp_path / "gone.csv"), *places)
    assert code == 1
    assert "there is no" in refused["message"]


def test_who_learned_from_what_is_forgotten_is_said(
    tmp_path: Path, places: list[str], capsys: pytest.CaptureFixture[str], digits: built_archives.Built
) -> None:
    (tmp_path / "model_store").symlink_to(digits.store)
    spools.requests(tmp_path / "feedback" / "spool", [Asked("one")])
    with Store.open(tmp_path / "feedback") as store:
        store.ingest(tmp_path / "feedback" / "spool")
        (answer,) = store.answered("digits")
    (tmp_path / "runs" / digits.record.run).mkdir(parents=True)
    split = {"new": {answer.digest: "7"}, "parts": {"train": [f"feedback/{answer.digest}"]}}
    (tmp_path / "runs" / digits.record.run / "split.json").write_text(json.dumps(split))
    assert main(["feedback", "forget", "--request", "one", *places]) == 0
    shown = capsys.readouterr().out
    assert f"learned from it: {digits.record.run} (in digits 1.0)" in shown
    assert "--method scratch" in shown


def test_a_picture_from_long_ago_is_kept_from_when_it_was_labelled(store: Store, tmp_path: Path) -> None:
    pictures(tmp_path / "sorted")
    for path in (tmp_path / "sorted").rglob("*.png"):
        os.utime(path, (1e9, 1e9))
    add(store, tmp_path / "sorted")
    assert store.prune(days=365, unlabelled_days=30).requests == 0
    assert {each.time for each in store.labelled("digits")} == {1e9}
    later = store.prune(days=365, unlabelled_days=30, now=time.time() + 366 * 86_400)
    assert (later.requests, later.labels, later.bodies) == (5, 5, 5)


def test_nothing_is_forgotten_while_a_turn_may_be_learning_from_it(
    tmp_path: Path, places: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    spools.requests(tmp_path / "feedback" / "spool", [Asked("one")])
    assert main(["feedback", "ingest", *places]) == 0
    (tmp_path / "model_store").mkdir(exist_ok=True)
    with filelock.FileLock(tmp_path / "model_store" / ".retrain-digits.lock"):
        capsys.readouterr()
        code, refused = command(capsys, "forget", "--request", "one", *places)
    assert code == 1
    assert "a retraining of digits is under way" in refused["message"]
    code, gone = command(capsys, "forget", "--request", "one", *places)
    assert (code, gone["known"]) == (0, True)


def test_each_model_keeps_its_requests_as_long_as_its_own_policy_says(
    tmp_path: Path, places: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = time.time() - 40 * 86_400
    for model in ("digits", "cats"):
        spools.requests(tmp_path / "feedback" / "spool", [Asked(f"of {model}", time=old)], model=model)
    assert main(["feedback", "ingest", *places]) == 0
    monkeypatch.chdir(tmp_path)
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "cats.toml").write_text("[keep]\nunlabelled_days = 100.0\n")
    capsys.readouterr()
    assert main(["prune", *places]) == 0
    assert capsys.readouterr().out.startswith("removed 1 requests, 0 labels, 1 example files")
    with Store.open(tmp_path / "feedback") as store:
        assert store.models() == ["cats"]
