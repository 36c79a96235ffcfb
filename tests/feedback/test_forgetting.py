"""A request that is forgotten leaves no byte of itself, whatever was being done with it; what is old goes by itself."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

import handlers.spool as segments
from marwright.errors import DataError, SettingsError
from marwright.feedback.pruning import DAY
from marwright.feedback.store import Store
from tests.feedback import spools
from tests.feedback.spools import Asked, said

SECRET = Asked("5ecret-0f-somebody", time=1000)
SEVERAL = Asked("5ecret-of-several", time=1000, rows=3)
OTHERS = [Asked(f"other-{n}", time=1000 + n) for n in range(40)]


def traces(folder: Path, needles: Iterable[bytes]) -> list[Path]:
    """Files below a folder that have any of those bytes in them, or in their names."""
    wanted = list(needles)
    return [
        path
        for path in folder.rglob("*")
        if any(needle in str(path).encode() or (path.is_file() and needle in path.read_bytes()) for needle in wanted)
    ]


def needles(asked: Asked) -> list[bytes]:
    """Its id, its body and pieces of that, its pixels, its answer."""
    body = asked.sent[1]
    pixels = [asked.instance(number).tobytes() for number in range(asked.rows)]
    answers = [asked.output(number).tobytes() for number in range(asked.rows)]
    return [asked.id.encode(), body[-60:-20], body[60:100], *pixels, *answers]


def left_in(where: Path, asked: Asked) -> list[Path]:
    return traces(where, needles(asked))


@pytest.mark.parametrize("asked", [SECRET, SEVERAL], ids=["alone", "several"])
def test_not_one_byte_is_left(tmp_path: Path, asked: Asked) -> None:
    feedback, runs = tmp_path / "feedback", tmp_path / "runs"
    spool = feedback / "spool"
    with Store.open(feedback) as store:
        spools.requests(spool, OTHERS[:20], [OTHERS[20], asked, OTHERS[21]], OTHERS[22:])
        spools.labels(spool, [said(each.id, "one", uid=f"u{each.id[-5:]}") for each in (*OTHERS, asked)])
        store.ingest(spool)
        before = {each.request: each for each in store.labelled("digits")}
        digests = [each.digest for each in store.answered("digits") if each.request == asked.id]
        spools.requests(spool, [OTHERS[0], asked, OTHERS[1]])  # not taken yet
        spools.requests(spool, [asked])
        spools.labels(spool, [said(asked.id, "two", uid="later"), said("other-1", "two", uid="kept")])
        (spool / "damaged").mkdir()
        (spool / "damaged" / "x.seg").write_bytes(segments.encode(*spools.frame([asked]))[:-1])
        _training(runs, digests)
        assert left_in(tmp_path, asked), "the test can see"
        gone = store.forget(asked.id, runs=runs)
        assert (gone.known, gone.before, gone.instances, gone.labels) == (True, False, asked.rows, 1)
        assert gone.bodies == asked.rows
        assert gone.runs == ("digits-aaaaaaaaaaaa",)
        assert left_in(tmp_path, asked) == []
        assert not any(traces(tmp_path, [digest.encode() for digest in digests]))
        # Everything else is as it was.
        assert {each.request for each in store.answered("digits")} == {each.id for each in OTHERS}
        after = {each.request: each for each in store.labelled("digits")}
        assert after.keys() == before.keys() - {asked.id}
        assert all(after[name].label == before[name].label for name in after)
        taken = store.ingest(spool)
        assert (taken.requests, taken.labels, taken.damaged, taken.again) == (0, 1, 0, 2)
        again = store.forget(asked.id, runs=runs)
        assert (again.known, again.before) == (False, True)
    assert left_in(tmp_path, asked) == []


def _training(runs: Path, digests: list[str]) -> None:
    """What training leaves behind, the secret in it."""
    (runs / "cache" / "new" / "digits" / "decoded").mkdir(parents=True)
    np.save(runs / "cache" / "new" / "digits" / "decoded" / "x.npy", SECRET.instance(0))
    (runs / "cache" / "decoded").mkdir()
    (runs / "cache" / "decoded" / "own.npy").write_bytes(b"the recipe's own")
    (runs / "feedback").mkdir()
    np.savez(runs / "feedback" / "holdout.npz", inputs=SEVERAL.instance(1))
    for name, some in (("digits-aaaaaaaaaaaa", digests), ("digits-bbbbbbbbbbbb", [])):
        (runs / name).mkdir()
        new = dict.fromkeys([*some, "f" * 64], "one")
        split = {
            "seed": 1, "own": "abc", "new": new,
            "parts": {"train": ["own-1", *(f"feedback/{digest}" for digest in new)], "test": ["own-2"]},
        }  # fmt: skip
        (runs / name / "split.json").write_text(json.dumps(split))


def test_training_keeps_what_is_not_of_that_request(tmp_path: Path) -> None:
    feedback, runs = tmp_path / "feedback", tmp_path / "runs"
    with Store.open(feedback) as store:
        spools.requests(feedback / "spool", [SECRET])
        store.ingest(feedback / "spool")
        (answer,) = store.answered("digits")
        _training(runs, [answer.digest])
        untouched = (runs / "digits-bbbbbbbbbbbb" / "split.json").read_bytes()
        store.forget(SECRET.id, runs=runs)
    split = json.loads((runs / "digits-aaaaaaaaaaaa" / "split.json").read_bytes())
    assert split["new"] == {"f" * 64: "one"}
    assert split["parts"] == {"train": ["own-1", f"feedback/{'f' * 64}"], "test": ["own-2"]}
    assert (split["seed"], split["own"]) == (1, "abc")
    assert (runs / "digits-bbbbbbbbbbbb" / "split.json").read_bytes() == untouched
    assert (runs / "cache" / "decoded" / "own.npy").exists()
    assert not (runs / "cache" / "new").exists()
    assert not (runs / "feedback").exists()


def test_what_another_request_sent_too_stays_for_that(store: Store, spool: Path, tmp_path: Path) -> None:
    header, payload = spools.frame([SECRET])
    writer = spools.requests(spool, [OTHERS[0]], finish=False)
    for name in (SECRET.id, "twin"):
        header["requests"][0]["id"] = name
        writer.append(header, payload)
    writer.close()
    store.ingest(spool)
    _training(tmp_path / "runs", [answer.digest for answer in store.answered("digits") if answer.request == "twin"])
    gone = store.forget(SECRET.id, runs=tmp_path / "runs")
    assert (gone.bodies, gone.runs) == (0, ())
    (twin,) = [answer for answer in store.answered("digits") if answer.request == "twin"]
    assert twin.path is not None
    assert twin.path.read_bytes() == SECRET.sent[1]
    assert store.forget("twin", runs=tmp_path / "runs").runs == ("digits-aaaaaaaaaaaa",)
    assert not twin.path.exists()


def test_whatever_comes_after_it_was_forgotten_is_refused(store: Store, spool: Path) -> None:
    gone = store.forget(SECRET.id)
    assert (gone.known, gone.before) == (False, False)
    spools.labels(spool, [said(SECRET.id, "one", uid="a")])
    spools.requests(spool, [SECRET, OTHERS[0]])
    taken = store.ingest(spool)
    assert (taken.requests, taken.labels, taken.forgotten) == (1, 0, 2)
    assert [each.request for each in store.answered("digits")] == ["other-0"]
    assert left_in(store.folder / "bodies", SECRET) == []
    assert (store.forget(SECRET.id).before) is False, "there never was anything of it"


def test_a_segment_that_grows_is_waited_for(store: Store, spool: Path) -> None:
    writer = spools.requests(spool, [SECRET, OTHERS[0]], finish=False)
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(store.forget(SECRET.id).frames))
    thread.start()
    time.sleep(0.5)
    assert done == []
    writer.close()
    thread.join(timeout=60)
    assert done == [1]
    assert left_in(spool, SECRET) == []
    assert store.ingest(spool).requests == 1


def test_a_segment_that_does_not_stop_growing_is_an_error_and_nothing_of_it_gets_in(store: Store, spool: Path) -> None:
    writer = spools.requests(spool, [SECRET, OTHERS[0]], finish=False)
    with pytest.raises(DataError, match="still writes to") as caught:
        store.forget(SECRET.id, patience=0.3)
    assert "again" in caught.value.hint
    writer.close()
    taken = store.ingest(spool)
    assert (taken.requests, taken.forgotten) == (1, 1)


def test_what_a_killed_worker_left_is_cleaned_at_once(store: Store, spool: Path) -> None:
    writer = spools.requests(spool, [SECRET], [OTHERS[0]], finish=False)
    assert writer._file is not None
    writer._file.close()  # which lets go of the lock, as the end of its process would
    assert store.forget(SECRET.id, patience=0.1).frames == 1
    assert left_in(spool, SECRET) == []
    assert store.ingest(spool).requests == 1


def test_old_requests_go_with_all_they_had(store: Store, spool: Path) -> None:
    now = 1000 * DAY
    old, young = Asked("old", time=now - 40 * DAY), Asked("young", time=now - 2 * DAY)
    plain, recent = Asked("plain", time=now - 20 * DAY), Asked("recent", time=now - 3 * DAY)
    for one in (old, young, plain, recent):
        spools.requests(spool, [one])
    about = [said("old", "one", uid="a"), said("young", "one", uid="b"), said("never", "one", uid="c")]
    spools.labels(spool, about, received=now - 39 * DAY)
    store.ingest(spool)
    (store.folder / "bodies" / "ab").mkdir(exist_ok=True)
    (store.folder / "bodies" / "ab" / f"{'ab' * 32}.png").write_bytes(b"nobody's")
    other = store.prune(days=30, unlabelled_days=10, model="another", now=now)
    assert (other.requests, other.labels) == (0, 1), "the policy of one model says nothing of the others' requests"
    (store.folder / "bodies" / "ab").mkdir(exist_ok=True)
    (store.folder / "bodies" / "ab" / f"{'ab' * 32}.png").write_bytes(b"nobody's")
    gone = store.prune(days=30, unlabelled_days=10, model="digits", now=now)
    assert (gone.requests, gone.labels, gone.bodies) == (2, 1, 3)
    assert [each.request for each in store.answered("digits")] == ["recent", "young"]
    assert [each.request for each in store.labelled("digits")] == ["young"]
    assert store.unknown().labels == 0
    assert len(list((store.folder / "bodies").rglob("*.png"))) == 2
    assert all(each.path is not None for each in store.answered("digits"))
    assert store.prune(days=30, unlabelled_days=10, now=now) == type(gone)()


def test_an_age_is_a_positive_number(store: Store) -> None:
    with pytest.raises(SettingsError, match="--days is 0"):
        store.prune(days=0)
    with pytest.raises(SettingsError, match="--unlabelled-days is -1"):
        store.prune(days=1, unlabelled_days=-1)


def test_the_database_stays_as_small_as_what_it_keeps(tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    sizes = []
    with Store.open(tmp_path / "feedback") as store:
        for turn in range(6):
            at = 1000 * DAY + turn * DAY
            spools.requests(spool, *([Asked(f"{turn}-{n}-{k}", time=at) for k in range(50)] for n in range(6)))
            store.ingest(spool)
            store.prune(days=0.5, now=at + 0.1 * DAY)
            sizes.append(sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()))
            assert len(store.answered("digits")) == 300
    assert max(sizes[1:]) < 1.3 * sizes[0], sizes


def test_what_a_killed_ingest_had_written_is_forgotten_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are there, one of them half, and no row names them."""
    spool = tmp_path / "feedback" / "spool"
    with Store.open(tmp_path / "feedback") as store:
        spools.requests(spool, [SECRET, OTHERS[0]])

        def killed(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(store.database, "insert", killed)
            patched.setattr("marwright.feedback.ingesting.register", lambda *_: "somebody")
            with pytest.raises(KeyboardInterrupt):
                store.ingest(spool)
        (whole,) = [path for path in (tmp_path / "feedback" / "bodies").rglob("*.png") if left_in(path.parent, SECRET)]
        whole.with_name(f".{whole.name}.1.part").write_bytes(SECRET.sent[1])
        assert store.forget(SECRET.id).known
        assert left_in(tmp_path, SECRET) == []
        assert store.ingest(spool).requests == 1
        (other,) = store.answered("digits")
        assert other.path is not None


def test_an_id_within_another_is_not_waited_for(store: Store, spool: Path) -> None:
    spools.requests(spool, [Asked("a-b")])
    store.ingest(spool)
    growing = spools.requests(spool, [Asked("a-b-c")], finish=False)
    assert store.forget("a-b", patience=0.0).known
    with pytest.raises(DataError, match="still writes to"):
        store.forget("a-b-c", patience=0.0)
    growing.close()
