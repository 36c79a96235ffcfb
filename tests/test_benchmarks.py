"""The benchmarks' own arithmetic: what a raw file says, which answers count as right, and that pages repeat."""

from __future__ import annotations

import csv
import shutil
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks import performance, profiles
from benchmarks.serving import load, names, report
from benchmarks.serving.load import Case

WANTED = load.pairs({"cat": 0.5, "dog": 0.25})
COLUMNS = (
    "round", "system", "mode", "kind", "connections", "rate", "share", "answered", "right", "bad_status", "wrong",
    "broken", "hung", "seconds", "p50_us", "p90_us", "p99_us", "p999_us", "max_us", "mean_us", "late", "cpu_us",
    "rss_mb", "pss_mb", "first_seconds", "load_cpu", "load_average", "complaint", "histogram",
)  # fmt: skip


def closed(number: int, system: str, connections: int, right: int, p50: float, p99: float, **more: object) -> dict:
    row = dict.fromkeys(COLUMNS, "") | {"round": number, "system": system, "mode": "closed", "kind": "png32"}
    row |= {"connections": connections, "rate": 0.0, "share": 0.0, "answered": right, "right": right, "seconds": 2.0}
    row |= dict.fromkeys(("bad_status", "wrong", "broken", "hung"), 0)
    return row | {"p50_us": p50, "p99_us": p99, "p999_us": p99, "cpu_us": 100, "rss_mb": 500} | more


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Two rounds; in the second the machine was half as fast for everyone."""
    rows = []
    for number, speed in ((0, 1.0), (1, 0.5)):
        for system, rate, p50, p99 in (
            ("stock", 2000, 24e3, 60e3),
            ("stock-tuned", 6000, 9e3, 20e3),
            ("echo", 16000, 3e3, 9e3),
            ("marwright-throughput", 24000, 2e3, 8e3),
            ("litserve", 30000 if number else 1000, 4e3, 9e3),
        ):
            rows.append(closed(number, system, 64, int(rate * 2 * speed), p50 / speed, p99 / speed))
    rows.append(closed(0, "stock", 128, 100, 1e3, 2e3, bad_status=7, complaint="status: 503"))
    rows.append(dict.fromkeys(COLUMNS, "") | {"round": 0, "system": "ray", "mode": "failed", "complaint": "no wheel"})
    path = tmp_path / "serving.csv"
    with path.open("w", newline="") as stream:
        stream.write("# a machine\n")
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_ratio_is_taken_within_each_round(raw: Path) -> None:
    figures = report.load(raw)
    found = report.ratio(figures.closed("marwright-throughput", 64), figures.closed("stock-tuned", 64))
    assert found == report.Ratio(4.0, 4.0, 4.0)  # though the medians' rounds were twice apart in speed
    found = report.ratio(figures.closed("marwright-throughput", 64), figures.closed("litserve", 64))
    assert found is not None
    assert (found.least, found.most) == (0.8, 24.0)
    assert report.middle(figures.closed("stock", 64), report.rate) == 1500


def test_goals_are_judged_by_the_raw_file_and_what_is_missing_is_not_measured(raw: Path) -> None:
    page = report.goals(report.load(raw))
    goals = {line.split(" | ")[0].strip("| "): line for line in page.splitlines() if line.startswith("| ")}
    assert "12.00 (12.00 to 12.00) | reached" in goals["64 connections, to stock at its defaults (the faster of two)"]
    assert "1.50" in goals["64 connections, to a stock server that does nothing"]
    assert "0.89" in goals["64 connections, p99 to stock tuned's p50"]
    assert "not measured" in goals["1 connection, latency profile, p50"]
    assert "not measured" in goals["JPEG 1920×1080, to stock tuned"]
    assert "1 comparisons | reached" in goals["more than every peer at every number of connections, with lower p99"]
    slower = [one | {"p99_us": "1"} if one["system"] == "litserve" else one for one in report.load(raw).rows]
    ahead = report.goals(report.Figures("", slower))
    assert "litserve at 64 has 0.00× our p99 | **not reached**" in ahead


def test_what_failed_is_on_the_page(raw: Path) -> None:
    page = "\n".join(report.failures(report.load(raw)))
    assert "`ray`, round 0: no wheel" in page
    assert "of 100 7 with another status; first: status: 503" in page


def test_the_same_raw_file_makes_the_same_page_and_the_same_plots(raw: Path, tmp_path: Path) -> None:
    first = report.section(raw, plots=tmp_path / "first")
    second = report.section(raw, plots=tmp_path / "second")
    assert first == second
    plots = sorted((tmp_path / "first").iterdir())
    assert [plot.name for plot in plots] == ["serving-p99.svg", "serving-throughput.svg"]
    assert all(plot.read_bytes() == (tmp_path / "second" / plot.name).read_bytes() for plot in plots)


def test_a_benchmark_without_raw_results_has_no_section(tmp_path: Path) -> None:
    assert report.section(tmp_path / "none.csv") is None
    assert performance.page(("benchmarks.there_is_none", "benchmarks.serving.names")) == performance.HEAD


def test_every_system_says_how_it_was_tuned_and_every_peer_is_pinned() -> None:
    from benchmarks.serving import peers, run

    assert list(run.ALL) == [*run.SYSTEMS, *peers.SYSTEMS]
    assert set(run.ALL) == set(names.TUNED)
    for name in names.PEERS:
        folder = peers.FOLDER / name.removesuffix("-batched")
        lines = (folder / "requirements.txt").read_text().splitlines()
        assert all("==" in line for line in lines if not line.startswith("#")), folder
        assert (folder / "server.py").read_text().startswith('"""'), folder


# ---------------------------------------------------------------- the load generator


@contextmanager
def answering(body: bytes, status: str = "200 OK", *, silent: bool = False) -> Iterator[int]:
    """A server that gives every request the same answer, in two pieces; its port."""

    class Handler(socketserver.StreamRequestHandler):
        disable_nagle_algorithm = True

        def handle(self) -> None:
            while line := self.rfile.readline():
                if line == b"\r\n":
                    if silent:
                        return
                    answer = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
                    self.wfile.write(answer[:20])
                    self.wfile.flush()
                    self.wfile.write(answer[20:])

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("no C compiler")
    return load.build(tmp_path_factory.mktemp("load"))


def asked(program: Path, folder: Path, port: int, kind: str = "labels", wanted: bytes = WANTED, **more: object) -> dict:
    case = Case(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", kind, wanted)  # type: ignore[arg-type]
    given = {"connections": 2, "seconds": 0.2, **more}
    return load.ask(program, load.write(folder, [case]), port=port, **given)  # type: ignore[arg-type]


RIGHT = (
    ("labels", b'{"cat":0.5,"dog":0.25}'),
    ("labels", b'{\n  "cat": 0.5004,\n  "dog": 2.495e-1\n}'),
    ("inside", b'{"outputs":[{"data":["{\\"cat\\":0.5,\\"dog\\":0.25}"]}]}'),
    ("inside", b'[{"cat": 0.5, "dog": 0.25}]'),
)
WRONG = (
    ("labels", b'{"dog":0.25,"cat":0.5}'),
    ("labels", b'{"cat":0.502,"dog":0.25}'),
    ("labels", b'{"cat":0.5}'),
    ("labels", b'{"cat":0.5,"dog":0.25,"bird":0.1}'),
    ("labels", b'{"cat":nan,"dog":0.25}'),
    ("labels", b'{"cats":0.5,"dog":0.25}'),
    ("labels", b'{"cat":0.5,"dog":0.25'),
    ("labels", b""),
    ("inside", b'["{\\"cat\\":0.5,\\"dog\\":0.3}"]'),
)


@pytest.mark.parametrize(("kind", "body"), RIGHT)
def test_a_right_answer_counts(program: Path, tmp_path: Path, kind: str, body: bytes) -> None:
    with answering(body) as port:
        found = asked(program, tmp_path, port, kind)
    assert found["right"] == found["answered"] > 2
    assert load.failures(found) == 0
    assert 0 < found["p50_us"] <= found["p99_us"] <= found["max_us"]
    assert sum(int(one.partition(":")[2]) for one in found["histogram"].split()) == found["right"]


@pytest.mark.parametrize(("kind", "body"), WRONG)
def test_a_wrong_answer_is_caught(program: Path, tmp_path: Path, kind: str, body: bytes) -> None:
    with answering(body) as port:
        found = asked(program, tmp_path, port, kind)
    assert found["wrong"] == found["answered"] > 2
    assert found["right"] == 0


def test_another_status_and_a_broken_connection_are_no_answers(program: Path, tmp_path: Path) -> None:
    with answering(b'{"cat":0.5,"dog":0.25}', "503 Busy") as port:
        found = asked(program, tmp_path, port)
    assert found["bad_status"] == found["answered"] > 2
    assert "503 Busy" in found["complaint"]
    with answering(b"", silent=True) as port:
        found = asked(program, tmp_path, port)
    assert found["broken"] == found["answered"] > 2


def test_an_open_loop_keeps_to_its_schedule_and_counts_waiting(program: Path, tmp_path: Path) -> None:
    with answering(b'{"cat":0.5,"dog":0.25}') as port:
        steady = asked(program, tmp_path, port, seconds=1.0, rate=200.0, arrivals="constant")
        random = asked(program, tmp_path, port, seconds=1.0, rate=200.0, arrivals="poisson", seed=3)
    assert steady["right"] == steady["scheduled"] == 200
    assert random["right"] == random["scheduled"]
    assert 130 < random["scheduled"] < 270  # five standard deviations


def test_a_sample_belongs_to_the_innermost_frame_that_is_known() -> None:
    way = "<module> (ts/model_service_worker.py:301);predict (handlers/wire.py:274);handle (handlers/base.py:109)"
    net = f"{way};run (handlers/runtime.py:96);run (onnxruntime/capi/x.py:3);MlasConv (onnxruntime/capi/x.so)"
    folded = f"{net} 6\n{way};parse (handlers/payloads.py:9) 2\n{way} 1\nstart_thread (libc.so.6) 1\n"
    folded += "retrieve (handlers/wire.py:120);_more (handlers/wire.py:158);recv (libc.so.6) 7\n"
    assert profiles.shares(folded) == {
        "forward pass": 0.6, "reading what is asked": 0.2, "the handler's own way": 0.1, "other": 0.1
    }  # fmt: skip
    assert profiles.stage("handle_connection (/x/site-packages/ts/model_service_worker.py:190)") == "`ts`, sending"


def test_stacks_that_differ_in_addresses_alone_are_one() -> None:
    folded = "0x7f57 (libc.so.6);run (handlers/runtime.py:96);0x1 (x.so) 2\nrun (handlers/runtime.py:96);0x2 (x.so) 3\n"
    assert profiles._shortened(folded) == "run (handlers/runtime.py:96) 5\n"


@pytest.mark.parametrize(
    ("rates", "pieces"), [((100, 200, 300, 310, 900), 4), ((100, 90, 400), 2), ((1, 2, 4, 8, 16, 32, 64), 5)]
)
def test_warming_ends_when_it_no_longer_gets_faster(
    rates: tuple[int, ...], pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [{"right": rate * load.PIECE, "seconds": load.PIECE} for rate in rates]
    left = iter(asked)
    monkeypatch.setattr(load, "ask", lambda *_, **__: next(left))
    load.warm(Path("load"), Path("manifest"), port=1, seconds=2 * load.PIECE, most=5 * load.PIECE)
    assert list(left) == asked[pieces:]


def test_the_page_says_who_was_not_there_in_every_round(raw: Path) -> None:
    assert "In fewer rounds" not in (report.section(raw, plots=raw.parent) or "")
    lines = raw.read_text().splitlines(keepends=True)
    raw.write_text("".join(line for line in lines if not line.startswith("1,litserve,")))
    assert "In fewer rounds, by themselves: litserve (1)." in (report.section(raw, plots=raw.parent) or "")
