"""`marwright explain` on a real server: what the page shows is what the server answers; and pages without one.

One server for all: digits 1.1 and diabetes-mlp 1.1 with twins, digits 1.0 without.
"""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from marwright import cli
from marwright.release import explained
from marwright.release.explained import Explained, Explanation, Refused
from marwright.release.server import Expected
from marwright.settings import ExplainSettings
from scripts import explain
from tests import archives, torchserve
from tests.archives import Built

ALL = ["integrated-gradients", "saliency", "occlusion", "grad-cam", "smooth-grad"]
Run = Callable[..., tuple[int, str, str]]


class Page(HTMLParser):
    """What a browser would show and load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[tuple[str, bytes]] = []
        self.cells: list[str] = []
        self.words = ""
        self._cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        assert not {"href", "onload", "action"} & found.keys(), f"<{tag}> leads elsewhere"
        assert tag not in ("script", "link", "iframe")
        if tag == "img":
            kind, data = re.fullmatch(r"data:([a-z/+]+);base64,(.+)", found["src"] or "").groups()  # type: ignore[union-attr]
            assert found["alt"], "a picture says in words what it shows"
            self.sources.append((kind, base64.b64decode(data, validate=True)))
        self._cell = tag in ("td", "th")
        if self._cell:
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        self._cell = False

    def handle_data(self, data: str) -> None:
        self.words += f"{data}\n"
        if self._cell:
            self.cells[-1] += data

    @property
    def pictures(self) -> list[Image.Image]:
        found: list[Image.Image] = [Image.open(io.BytesIO(data)) for kind, data in self.sources if kind == "image/png"]
        for each in found:
            each.load()
        return found


def a_page(**changed: Any) -> str:
    map_ = np.zeros((16, 12))
    map_[2, 3], map_[9, 9] = 1.5, -1.2
    one = Explanation("integrated-gradients", "<b>", "logit", "black", None, 50, 0.01, map_, 12.0)
    same = {
        "model": "digits",
        "version": "1.0",
        "bundle": "0123456789abcdef",
        "prediction": {"<b>": 0.75, "$x": 0.25},
        "input": np.full((3, 16, 12), 90, np.uint8),
        "features": (),
        "explanations": (one,),
        "refused": (Refused("grad-cam", "needs <convolutions>"),),
    }
    return explained.page(Explained(**{**same, **changed}), title="a<b.png")


def test_a_page_is_the_same_for_the_same_answers_and_escapes_what_it_is_told() -> None:
    assert a_page() == a_page()
    page = Page(a_page())
    assert "a<b.png" in page.words
    assert "needs <convolutions>" in page.cells
    assert {"<b>", "black", "50", "0.3", "0.01"} <= set(page.cells)


def test_the_maps_colours_are_where_and_of_the_sign_that_the_attributions_say() -> None:
    shown, map_ = Page(a_page()).pictures
    assert min(shown.size) >= explained.LEAST_PIXELS
    assert shown.size[0] * 16 == shown.size[1] * 12
    pixels = np.asarray(map_.convert("RGB")).astype(int)
    left = pixels[:, : pixels.shape[1] * 45 // 100]
    red, blue = (left[..., one] - left[..., other] > 60 for one, other in ((0, 2), (2, 0)))
    (top, across), (low, right) = (np.argwhere(where).mean(axis=0) for where in (red, blue))
    assert top < low, "the one that speaks for the target is in row 2, the other in row 9"
    assert across < right


def test_a_map_of_nothing_is_drawn() -> None:
    nothing = Explanation("grad-cam", "7", "logit", None, None, None, None, np.zeros((16, 12)), 1.0)
    assert len(Page(a_page(explanations=(nothing,))).pictures) == 2


@pytest.fixture(scope="module")
def home(digits: Built, regressor: Built, tmp_path_factory: pytest.TempPathFactory) -> Iterator[torchserve.Home]:
    folder = tmp_path_factory.mktemp("explained")
    store = folder / "store"
    files = [archives.build(built.run, store, version="1.1", explain=True).record.file for built in (digits, regressor)]
    for path in (digits.path, digits.path.with_suffix(".json")):
        shutil.copy2(path, store / path.name)
    expected = {"digits": Expected("1.1"), "diabetes-mlp": Expected("1.1")}
    with torchserve.home(folder, expected, archives=files, store=store) as home:
        home.bring_up(timeout=180.0)
        with home.client() as client:
            client.register("digits-1.0.mar", initial_workers=1, synchronous=True, timeout=120)
        yield home


@pytest.fixture
def run(home: torchserve.Home, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run("digits", Path("7.png"), "--grpc")`: exit code, standard output, standard error."""

    def call(model: str, path: Path, *words: str) -> tuple[int, str, str]:
        places = ["--store", str(home.store), "--config", str(home.config_path), "--model", model]
        capsys.readouterr()
        code = cli.run(explain.main, ExplainSettings, ["--image", str(path), *places, *words], prog="marwright explain")
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def picture(digits: Built, tmp_path: Path) -> Path:
    path = tmp_path / "seven.png"
    path.write_bytes(digits.golden[0].body)
    return path


@pytest.mark.server
def test_a_pictures_page_shows_what_the_server_answers(
    run: Run, home: torchserve.Home, picture: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "seven.html"
    code, said, _ = run("digits", picture, "--json", "--out", str(out))
    assert code == 0
    found = json.loads(said)
    assert [each["method"] for each in found["explanations"]] == ALL
    assert (found["model"], found["version"], found["refused"]) == ("digits", "1.1", [])
    with home.client() as client:
        assert found["prediction"] == pytest.approx(client.predict("digits", picture.read_bytes()).json(), abs=1e-6)
        for each in found["explanations"]:
            again = client.ask("digits", picture.read_bytes(), explain=True, controls={"method": each["method"]}).json()
            assert np.allclose(each["attributions"], again["attributions"], atol=1e-4)
            assert each["sum"] == pytest.approx(np.sum(again["attributions"]), abs=1e-3)
            assert each["target"] == again["target"]["label"]
    page = Page(out.read_text(encoding="utf-8"))
    assert len(page.pictures) == 1 + len(ALL)
    assert str(tmp_path) not in out.read_text(encoding="utf-8")
    assert found["bundle"] in page.cells
    assert f"{found['explanations'][0]['sum']:.4g}" in page.cells
    for each in found["explanations"]:
        assert f"{round(each['milliseconds'], 1):.4g}" in page.cells
    assert f"{found['explanations'][0]['delta']:.4g}" in page.cells


@pytest.mark.server
def test_over_grpc_the_numbers_are_the_same(run: Run, picture: Path, tmp_path: Path) -> None:
    words = ["--json", "--out", str(tmp_path / "page.html"), "--method", "occlusion", "integrated-gradients"]
    both = [json.loads(run("digits", picture, *words, *more)[1]) for more in ([], ["--grpc"])]
    for rest, grpc in zip(*(each["explanations"] for each in both), strict=True):
        assert rest["method"] == grpc["method"]
        assert np.allclose(rest["attributions"], grpc["attributions"], atol=1e-4)


@pytest.mark.server
def test_target_and_baseline_are_the_callers_choice(run: Run, picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    words = ["--method", "integrated-gradients", "--target", "3", "--baseline", "white", "--out", str(out)]
    code, said, _ = run("digits", picture, *words)
    assert code == 0
    assert re.search(r"integrated-gradients +3 +white", said)
    assert {"3", "white"} <= set(Page(out.read_text(encoding="utf-8")).cells)


@pytest.mark.server
def test_a_regressors_page_adds_up_and_lists_what_is_not_offered(run: Run, regressor: Built, tmp_path: Path) -> None:
    row = tmp_path / "row.json"
    row.write_bytes(regressor.golden[0].body)
    out = tmp_path / "row.html"
    code, said, _ = run("diabetes-mlp", row, "--json", "--out", str(out))
    assert code == 0
    found = json.loads(said)
    value = found["prediction"]["progression"]
    first = found["explanations"][0]
    assert list(first["attributions"]) == ["age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6"]
    assert first["baseline_prediction"] + sum(first["attributions"].values()) == pytest.approx(
        value, abs=abs(first["delta"]) + 1e-2
    )
    assert [each["method"] for each in found["refused"]] == ["grad-cam"]
    page = Page(out.read_text(encoding="utf-8"))
    assert found["refused"][0]["reason"] in page.cells
    for number in (first["baseline_prediction"], value, first["delta"], *first["attributions"].values()):
        assert f"{number:.4g}" in page.cells
    code, said, _ = run("diabetes-mlp", row, "--out", str(out))
    assert "refused: grad-cam" in said


@pytest.mark.server
@pytest.mark.parametrize("transport", [[], ["--grpc"]], ids=["rest", "grpc"])
def test_where_nothing_is_explained_the_servers_reason_is_told_and_no_page_is_written(
    run: Run, picture: Path, tmp_path: Path, transport: list[str]
) -> None:
    out = ["--out", str(tmp_path / "page.html"), *transport]
    code, _, said = run("digits", picture, "--version", "1.0", *out)
    assert code == 1
    assert "offers no explanations" in said
    assert "explain = true" in said
    code, _, said = run("digits", picture, "--method", "guessing", *out)
    assert code == 1
    assert all(method in said for method in ALL)
    code, _, said = run("digits", picture, "--target", "längs", *out)
    assert code == 1
    assert "no such target" in said
    assert not (tmp_path / "page.html").exists()


@pytest.mark.server
def test_an_input_that_cannot_be_read_is_told_before_anything_is_asked(run: Run, tmp_path: Path) -> None:
    code, _, said = run("digits", tmp_path / "missing.png")
    assert code == 1
    assert "missing.png cannot be read" in said


@pytest.mark.server
def test_a_batch_has_no_page(run: Run, regressor: Built, tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([json.loads(regressor.golden[0].body)] * 2), encoding="utf-8")
    code, _, said = run("diabetes-mlp", rows, "--out", str(tmp_path / "page.html"))
    assert code == 1
    assert "one row" in said
    assert not (tmp_path / "page.html").exists()
