"""Explanations are right, belong to who asked for them, and cost their neighbours no more than the limit."""

from __future__ import annotations

import base64
import io
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import spearmanr

from handlers import answers, base, explanations, nets, overlay, payloads
from handlers.errors import BadRequest, LoadError
from handlers.explanations import METHODS, Ask, Explainer
from handlers.nets import ServingGraph
from handlers.payloads import Headers
from handlers.spec import ImageInput, ModelSpec, VectorInput
from marwright.release.properties import ServerConfig
from tests import zoo
from tests.archives import ROOT
from tests.handlers import archives
from tests.handlers.conftest import begin
from tests.handlers.context import Answer, FakeContext, Sent

HTTP = {"Host": "localhost:8080"}
EXPLAIN = {**HTTP, "explain": "True"}
GRPC = {"data": {"content-type": ""}}
ROW_METHODS = tuple(method for method in METHODS if method != "grad-cam")
PNG = zoo.encoded(zoo.picture("L", (16, 16)))
TWINNED = replace(archives.spec("digits"), twin="twin.pt")


@pytest.fixture(scope="module")
def explaining(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Any, FakeContext]]:
    """A started handler whose archive has a twin; made once, and each test gets the limits and the pace back."""
    begun: dict[tuple[str, str], tuple[Any, FakeContext]] = {}

    def get(model: str, format: str = "onnx") -> tuple[Any, FakeContext]:
        if (model, format) not in begun:
            root = archives.write(tmp_path_factory.mktemp(f"{model}-{format}"), model, format, explain=True)
            begun[model, format] = begin(root)
        handler, context = begun[model, format]
        handler.explainer.limit, handler.explainer.correction = 60.0, 1.0
        return handler, context

    return get


@pytest.fixture(params=["eager", "onnx"])
def digits(request: pytest.FixtureRequest, threads: None, explaining: Any) -> Any:
    return explaining("digits", request.param)


@pytest.fixture
def diabetes(threads: None, explaining: Any) -> Any:
    return explaining("diabetes")


def ask(handler: Any, context: FakeContext, sent: Sent) -> Answer:
    return context.ask(handler, [sent])[0]


# ---------------------------------------------------------------- what a request says


def read(spec: ModelSpec = TWINNED, **given: Any) -> Ask:
    return Ask.read(given, spec)


def test_nothing_said_means_the_defaults() -> None:
    assert read() == Ask("integrated-gradients", None, "black", 50, "json")
    assert read(method="", target="", baseline=None, steps="", format=b"") == read()
    rows = archives.spec("diabetes")
    assert read(rows) == Ask("integrated-gradients", None, "mean", 50, "json")
    assert read(rows, method="occlusion").steps is None, "a feature is left out or it is not"


def test_values_come_as_text_bytes_or_numbers_and_in_any_case() -> None:
    wanted = Ask("smooth-grad", 2, "", 7, "npy")
    assert read(method=b"Smooth_Grad", target=b"two", steps=b" 7 ", format=b"NPY", baseline="white") == wanted
    assert read(method="smooth-grad", target=2, steps=7, format="npy") == wanted


def test_a_label_wins_over_an_index() -> None:
    spec = replace(archives.spec("digits"), classes=("3", "1", "0", "5", "6", "7", "8", "9", "2", "4"))
    assert read(spec, target="3").target == 0
    assert read(spec, target=3).target == 0
    assert read(TWINNED, target="3").target == 3
    assert read(TWINNED, target="nüll").target == 9
    assert read(TWINNED, target="n%C3%BCll").target == 9, "a header holds no ü"
    assert read(TWINNED, target="nüll".encode()).target == 9


@pytest.mark.parametrize(
    ("given", "status", "said"),
    [
        ({"method": "lime"}, 400, "integrated-gradients, saliency, occlusion, grad-cam, smooth-grad"),
        ({"method": 5}, 400, "method must be one of"),
        ({"baseline": "zero"}, 400, "black, mean, blur, white"),
        ({"method": "saliency", "baseline": "noise"}, 400, "black, mean, blur, white"),
        ({"format": "gif"}, 400, "json, png, npy"),
        ({"steps": "0"}, 400, "from 1 to 1000"),
        ({"steps": "1001"}, 400, "from 1 to 1000"),
        ({"steps": 2.5}, 400, "from 1 to 1000"),
        ({"steps": True}, 400, "from 1 to 1000"),
        ({"steps": "9" * 5000}, 400, "from 1 to 1000"),
        ({"target": "eleven"}, 422, "zero, one, two"),
        ({"target": "10"}, 422, "an index from 0 to 9"),
        ({"target": -1}, 422, "an index from 0 to 9"),
        ({"target": ["one"]}, 400, "a label or an index"),
        ({"target": True}, 400, "a label or an index"),
    ],
)
def test_an_unknown_wish_is_refused_naming_what_there_is(given: dict[str, Any], status: int, said: str) -> None:
    with pytest.raises(BadRequest) as refused:
        read(**given)
    assert refused.value.status == status
    assert said in refused.value.reason


def test_rows_have_their_own_targets_baselines_and_formats() -> None:
    spec = archives.spec("diabetes")
    assert read(spec, target="progression", baseline="zero").target == 0
    for odd, status in (({"target": "1"}, 422), ({"baseline": "black"}, 400), ({"format": "png"}, 400)):
        with pytest.raises(BadRequest) as refused:
            read(spec, **odd)
        assert refused.value.status == status


def parsed(fields: dict[str, Any], spec: ModelSpec = TWINNED, headers: dict[str, Any] | None = None) -> Any:
    return payloads.parse(fields, Headers.read(headers or HTTP), spec)


def test_a_header_beats_a_field_and_a_field_beats_a_key() -> None:
    body = {"data": zoo.b64(PNG), "explain": True, "method": "occlusion", "steps": 5, "target": "one"}
    assert parsed({"body": body}).ask == Ask("occlusion", 1, "black", 5, "json")
    fields = {"body": body, "target": b"two", "steps": b"6"}
    headers = {**HTTP, "X-EXPLAIN-steps": "7", "x-explain-format": "png"}
    assert parsed(fields, headers=headers).ask == Ask("occlusion", 2, "black", 7, "png")


def test_kserve_says_it_in_its_parameters() -> None:
    parameters = {"explain": 1, "method": "saliency", "target": 4}
    tensor = {"shape": [1], "datatype": "BYTES", "data": [zoo.b64(PNG)]}
    for body in ({"instances": [{"b64": zoo.b64(PNG)}]}, {"inputs": [tensor]}):
        assert parsed({"body": {**body, "parameters": parameters}}).ask == Ask("saliency", 4, "", None, "json")
        assert parsed({"body": body}).ask is None


def test_a_feature_is_a_feature_whatever_its_name() -> None:
    spec = replace(
        archives.spec("diabetes"), twin="twin.pt", input=VectorInput(("explain", "method", "steps")),
        net_args={"features": 3},
    )  # fmt: skip
    row = {"explain": 1.0, "method": 2.0, "steps": 3.0}
    assert parsed({"body": row}, spec).ask is None
    found = parsed({"body": {**row, "baseline": "zero"}}, spec, EXPLAIN)
    assert found.instances == [row]
    assert found.ask == Ask("integrated-gradients", None, "zero", 50, "json")


def test_a_prediction_ignores_what_is_for_explanations() -> None:
    for fields in (
        {"target": PNG},
        {"data": PNG, "method": b"nonsense"},
        {"data": PNG, "explain": b"0", "steps": b"x"},
    ):
        found = parsed(fields)
        assert (found.instances, found.ask) == ([PNG], None)
    assert parsed({"data": PNG}, headers={**HTTP, "X-Explain-Method": "nonsense"}).ask is None


# ---------------------------------------------------------------- what it is answered


@pytest.mark.parametrize("method", METHODS)
def test_each_method_answers_rest_and_grpc_alike(digits: Any, method: str) -> None:
    rest = Sent({"body": PNG}, {**EXPLAIN, "X-Explain-Method": method, "X-Explain-Target": "four"})
    grpc = Sent({"data": bytearray(PNG), "explain": b"1", "method": method.encode(), "target": b"four"}, GRPC)
    plain, first, second = digits[1].ask(digits[0], [Sent({"body": PNG}, HTTP), rest, grpc])
    assert (first.status, first.headers["content-type"]) == (200, "application/json")
    assert first.json == second.json
    said = first.json
    assert said["method"] == method
    assert said["target"] == {"label": "four", "index": 4}
    assert said["output"] == "logit"
    assert said["prediction"] == plain.json
    assert said["shape"] == [16, 16]
    assert np.array(said["attributions"]).shape == (16, 16)
    assert np.abs(said["attributions"]).max() > 0
    wanted = {"integrated-gradients": {"baseline", "steps", "completeness_delta"}, "occlusion": {"baseline", "steps"},
              "smooth-grad": {"steps"}}  # fmt: skip
    always = {"method", "target", "output", "prediction", "shape", "attributions"}
    assert said.keys() == always | wanted.get(method, set())


def test_the_predicted_class_is_explained_when_none_is_named(digits: Any) -> None:
    said = ask(*digits, Sent({"body": PNG}, {**EXPLAIN, "X-Explain-Method": "saliency", "X-Top-K": "2"})).json
    assert said["target"]["label"] == next(iter(said["prediction"]))
    assert said["target"]["index"] == archives.LABELS.index(said["target"]["label"])
    assert len(said["prediction"]) == 2


def test_in_a_batch_of_everything_each_gets_its_own(digits: Any) -> None:
    other = zoo.encoded(zoo.picture("L", (16, 16)).point(lambda value: 255 - value))
    sent = [
        Sent({"body": PNG}, HTTP),
        Sent({"body": other}, {**EXPLAIN, "X-Explain-Method": "occlusion"}),
        Sent({"data": PNG, "explain": b"1", "format": b"npy"}, GRPC),
        Sent({"body": b"no picture"}, EXPLAIN),
        Sent({"body": PNG}, {**EXPLAIN, "X-Explain-Method": "lime"}),
        Sent({"body": PNG}, {**EXPLAIN, "X-Explain-Format": "png"}),
        Sent({"body": [np.asarray(zoo.picture("L", (16, 16))).tolist()] * 2}, EXPLAIN),
        Sent({"body": {"instances": [{"b64": zoo.b64(other)}], "parameters": {"method": "saliency"}}}, EXPLAIN),
        Sent({}, {"describe": "True"}),
        Sent({"body": other}, HTTP),
    ]
    together = digits[1].ask(digits[0], sent)
    assert [answer.status for answer in together] == [200, 200, 200, 415, 400, 200, 422, 200, 200, 200]
    for mine, one in zip(together, sent, strict=True):
        alone = ask(*digits, one)
        assert mine.headers == alone.headers
        if mine.headers.get("content-type") == "application/json":
            assert _near(mine.json, alone.json)
    assert together[2].body[:6] == b"\x93NUMPY"
    assert together[8].json["explanations"] == list(METHODS)


def _near(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_near(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_near, one, other))
    return bool(one == (pytest.approx(other, abs=1e-4, rel=1e-4) if isinstance(one, float) else other))


def test_npy_and_png_come_as_bytes_and_with_meta_as_base64(digits: Any) -> None:
    rest = [Sent({"body": PNG}, {**EXPLAIN, "X-Explain-Format": format}) for format in ("npy", "png", "json")]
    npy, png, plain = digits[1].ask(digits[0], rest)
    assert (npy.headers["content-type"], png.headers["content-type"]) == ("application/octet-stream", "image/png")
    values = np.load(io.BytesIO(npy.body))
    assert (values.dtype, values.shape) == (np.float32, (1, 16, 16))
    np.testing.assert_allclose(values.sum(axis=0), plain.json["attributions"], atol=1e-6)
    with Image.open(io.BytesIO(png.body)) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (224, 224))
    fields = {"data": PNG, "explain": b"1", "meta": b"1"}
    for format, body in ((b"npy", npy.body), (b"png", png.body)):
        said = ask(*digits, Sent({**fields, "format": format}, GRPC)).json
        assert (said["status"], base64.b64decode(said["prediction"])) == (200, body)
        assert said["content_type"] == ("image/png" if format == b"png" else "application/octet-stream")
    assert _near(ask(*digits, Sent(fields, GRPC)).json["prediction"], plain.json)


def test_kserve_gets_its_one_explanation_in_a_list(digits: Any) -> None:
    stock = ask(*digits, Sent({"body": PNG}, EXPLAIN)).json
    v1 = ask(*digits, Sent({"body": {"instances": [{"b64": zoo.b64(PNG)}]}}, EXPLAIN)).json
    assert v1 == {"model_name": "digits", "model_version": "1.0", "explanations": [stock]}
    two = ask(*digits, Sent({"body": {"instances": [{"b64": zoo.b64(PNG)}] * 2}}, EXPLAIN))
    assert (two.status, two.json["reason"]) == (422, "one instance is explained at a time; this request holds 2")


def test_kserve_v2_gets_its_id_back(digits: Any) -> None:
    tensor = {"name": "input", "shape": [1], "datatype": "BYTES", "data": [zoo.b64(PNG)]}
    said = ask(*digits, Sent({"body": {"id": "abc", "inputs": [tensor], "parameters": {"explain": True}}}, HTTP)).json
    assert said.keys() == {"model_name", "model_version", "id", "explanations"}
    assert said["id"] == "abc"


def test_a_regressors_shares_add_up_in_its_own_units(diabetes: Any) -> None:
    said = ask(*diabetes, Sent({"body": zoo.ROW}, {**EXPLAIN, "X-Explain-Steps": "500"})).json
    assert (said["target"], said["output"], said["baseline"]) == ({"label": "progression"}, "value", "mean")
    assert list(said["attributions"]) == list(zoo.FEATURES)
    change = said["prediction"] - said["baseline_prediction"]
    assert abs(change) > 0.1
    assert sum(said["attributions"].values()) == pytest.approx(change, abs=abs(said["completeness_delta"]) + 1e-3)
    assert abs(said["completeness_delta"]) < 0.05 * abs(change)


def test_grad_cam_of_rows_is_refused_naming_what_there_is(diabetes: Any) -> None:
    answer = ask(*diabetes, Sent({"body": zoo.ROW}, {**EXPLAIN, "X-Explain-Method": "grad-cam"}))
    assert answer.status == 422
    assert answer.json["reason"].endswith(f"there are: {', '.join(ROW_METHODS)}")


# ---------------------------------------------------------------- what the numbers mean


def explainer(net: str, args: dict[str, Any], *, seed: int = 3, **scale: Any) -> Explainer:
    """A random net that may take its time, of classes or of one value."""
    torch.manual_seed(seed)
    task = "classification" if "channels" in args else "regression"
    graph = ServingGraph(nets.build(net, **args), task=task, **scale)
    if task == "classification":
        shape = ImageInput(args["channels"], args["height"], args["width"])
        classes = tuple(f"class {index}" for index in range(args["classes"]))
        spec = ModelSpec(task=task, net=net, net_args=args, input=shape, classes=classes, twin="twin.pt")
    else:
        names = VectorInput(tuple(f"x{index}" for index in range(args["features"])))
        spec = ModelSpec(task=task, net=net, net_args=args, input=names, target="y", outputs=("value",), twin="twin.pt")
    made = Explainer(graph, spec, "cpu")
    made.limit = 60.0
    return made


@pytest.mark.parametrize("baseline", ["mean", "zero"])
def test_of_a_linear_model_the_shares_are_weight_times_distance(threads: None, baseline: str) -> None:
    mean, std = [1.0, -2.0, 3.0, 100.0], [1.0, 2.0, 0.5, 10.0]
    made = explainer("linear", {"features": 4}, mean=mean, std=std, target_mean=150.0, target_std=70.0)
    slopes = made.graph.net.fc.weight[0].numpy() / np.array(std) * 70.0  # type: ignore[union-attr,operator,index]
    row = np.array([2.0, 5.0, -1.0, 90.0], np.float32)
    exact = slopes * (row - (np.array(mean) if baseline == "mean" else 0))
    for method in ("integrated-gradients", "occlusion"):
        found = made.explain(row, Ask.read({"method": method, "baseline": baseline}, made.spec), 0)
        np.testing.assert_allclose(found.attributions, exact, rtol=1e-4)
    for method in ("saliency", "smooth-grad"):
        found = made.explain(row, Ask.read({"method": method}, made.spec), 0)
        np.testing.assert_allclose(found.attributions, slopes * np.array(std), rtol=1e-4)


def pictures(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Noise with one 4×4 patch of stripes, upright for class 0 and lying for class 1; and where it is."""
    random = np.random.default_rng(seed)
    images = random.integers(112, 144, (count, 1, 16, 16)).astype(np.uint8)
    classes, places = random.integers(0, 2, count), random.integers(0, 13, (count, 2))
    lying = np.tile(np.array([[0], [255], [0], [255]], np.uint8), (1, 4))
    for image, label, (row, column) in zip(images, classes, places, strict=True):
        image[0, row : row + 4, column : column + 4] = lying if label else lying.T
    return images, classes, places


@pytest.fixture(scope="module")
def planted() -> Explainer:
    """A net made by hand, so that nothing but the patch decides: one filter for each kind of stripes, and a threshold
    that noise does not reach; each class gets the one's responses minus the other's."""
    made = explainer("small_cnn", {"channels": 1, "height": 16, "width": 16, "classes": 2}, mean=[0.5], std=[0.25])
    net: Any = made.graph.net
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        upright = torch.tensor([-1.0, 2.0, -1.0]).expand(3, 3)
        net.conv1.weight[0, 0], net.conv1.weight[1, 0] = upright, upright.T
        net.conv1.bias[:2] = -6.0
        for kind in (0, 1):
            net.conv2.weight[kind, kind] = 1 / 9
            net.fc1.weight[kind].view(64, 6, 6)[kind] = 0.1
            net.fc2.weight[kind, kind], net.fc2.weight[kind, 1 - kind] = 1.0, -1.0
    images, classes, _ = pictures(200, 2)
    assert (made.graph(torch.from_numpy(images))[0].argmax(1).numpy() == classes).all()
    return made


@pytest.mark.parametrize("method", METHODS)
def test_the_patch_that_decides_is_where_the_attribution_is(threads: None, planted: Explainer, method: str) -> None:
    images, classes, places = pictures(40, 3)
    wanted = Ask.read({"method": method, "baseline": "mean"}, planted.spec)
    peaks, shares = [], []
    for image, label, (row, column) in zip(images, classes.tolist(), places.tolist(), strict=True):
        found = np.abs(planted.explain(image, wanted, label).attributions.sum(axis=0))
        assert found.max() > 0
        near = np.zeros((16, 16), bool)  # a 3×3 filter sees one pixel further
        near[max(0, row - 1) : row + 5, max(0, column - 1) : column + 5] = True
        peaks.append(near.ravel()[found.argmax()])
        shares.append(found[near].sum() / found.sum())
    assert np.mean(peaks) >= 0.9
    assert np.mean(shares) > 0.6


@pytest.mark.parametrize("method", METHODS)
def test_other_weights_give_another_map(threads: None, planted: Explainer, method: str) -> None:
    """Adebayo et al. 2018: a method whose maps survive random weights shows the picture and not the model."""
    images, classes, _ = pictures(12, 4)
    wanted = Ask.read({"method": method, "baseline": "mean"}, planted.spec)
    alike = []
    for seed in (1, 2, 3):
        other = explainer("small_cnn", dict(planted.spec.net_args), seed=seed, mean=[0.5], std=[0.25])
        for image, label in zip(images, classes.tolist(), strict=True):
            maps = [each.explain(image, wanted, label).attributions.sum(axis=0).ravel() for each in (planted, other)]
            alike += [spearmanr(*maps).statistic] if np.ptp(maps[1]) > 0 else []
    assert len(alike) > 20
    assert abs(np.mean(alike)) < 0.6


def test_more_steps_bring_integrated_gradients_closer_to_complete(threads: None, planted: Explainer) -> None:
    images, classes, _ = pictures(10, 5)
    sizes = {}
    for steps in (3, 30, 300):
        wanted = Ask.read({"steps": steps}, planted.spec)
        found = [planted.explain(*pair) for pair in zip(images, [wanted] * 10, classes.tolist(), strict=True)]
        sizes[steps] = np.mean([abs(one.delta) for one in found])  # type: ignore[arg-type]
        for image, one in zip(images, found, strict=True):
            with torch.no_grad():
                here, base_output = planted.graph.net(
                    planted.graph.normalise(torch.from_numpy(np.stack([image, np.zeros_like(image)])))
                )[:, one.target].tolist()
            assert one.delta == pytest.approx(float(one.attributions.sum()) - (here - base_output), abs=1e-3)
            assert one.baseline_output == pytest.approx(base_output, abs=1e-4)
    assert sizes[3] > 3 * sizes[30] > 6 * sizes[300]


@pytest.mark.parametrize("method", METHODS)
def test_the_same_request_gets_the_same_answer_and_nothing_is_disturbed(
    threads: None, planted: Explainer, method: str
) -> None:
    images, _, _ = pictures(1, 6)
    kept, wanted = images.copy(), Ask.read({"method": method, "baseline": "blur"}, planted.spec)
    state = torch.random.get_rng_state()
    first, second = (planted.explain(images[0], wanted, 1).attributions for _ in range(2))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(images, kept)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in planted.graph.parameters())


def test_occlusion_looks_at_every_pixel_in_overlapping_windows() -> None:
    for height, width, steps in ((16, 16, 7), (32, 20, 7), (9, 31, 3), (8, 8, 1000), (1, 5, 7), (224, 224, 7)):
        sizes = explanations._windows((3, height, width), steps)
        for side, (window, stride), count in zip(
            (height, width), sizes, explanations._positions((3, height, width), steps), strict=True
        ):
            assert 1 <= stride <= window <= side
            assert (count - 1) * stride + window >= side
            assert count <= max(steps, 1)


@pytest.mark.parametrize(
    ("net", "more", "layer"),
    [
        ("small_cnn", {}, "conv2"),
        ("lenet", {}, "conv2"),  # its pool is used twice
        ("cifar_resnet", {"blocks": 1, "filters": 4}, "stages"),  # and not the projection in the last shortcut
    ],
)
def test_grad_cam_looks_at_the_last_feature_map(threads: None, net: str, more: dict[str, Any], layer: str) -> None:
    args = {"channels": 3, "height": 20, "width": 28, "classes": 4, **more}
    made = explainer(net, args, mean=[0.5] * 3, std=[0.2] * 3)
    assert made._layer is getattr(made.graph.net, layer)
    image = np.random.default_rng(0).integers(0, 256, (3, 20, 28)).astype(np.uint8)
    found = made.explain(image, Ask.read({"method": "grad-cam"}, made.spec), 2).attributions
    assert found.shape == (1, 20, 28)
    assert found.min() >= 0


def test_red_speaks_for_the_class_and_blue_against_it() -> None:
    image = np.full((3, 4, 8), 120, np.uint8)
    values = np.zeros((1, 4, 8), np.float32)
    values[0, 0, 0], values[0, 3, 7] = 2.0, -1.0
    with Image.open(io.BytesIO(overlay.png(image, values))) as opened:
        pixels = np.asarray(opened).astype(int)
    assert pixels.shape == (112, 224, 3)
    red, blue, grey = pixels[0, 0], pixels[-1, -1], pixels[50, 100]
    assert red[0] > 2 * red[2]
    assert blue[2] > blue[0]
    assert grey[0] == grey[1] == grey[2]
    assert len(np.unique(np.asarray(Image.open(io.BytesIO(overlay.png(image, values * 0)))))) == 1


# ---------------------------------------------------------------- what it may cost


@pytest.mark.parametrize("model", ["digits", "diabetes"])
def test_the_estimate_counts_the_passes_that_are_made(threads: None, explaining: Any, model: str) -> None:
    handler, _ = explaining(model)
    made, copies = handler.explainer, []
    row = np.zeros(made.spec.input.shape, np.uint8 if model == "digits" else np.float32)
    hook = made.graph.net.register_forward_hook(lambda _, __, out: copies.append(len(out)))
    graph_calls = made.graph.net.embed
    made.graph.net.embed = lambda x: copies.append(len(x)) or graph_calls(x)
    try:
        for method in made.methods:
            for steps in (3, 40):
                wanted = Ask.read({"method": method, "steps": steps}, made.spec)
                copies.clear()
                made.explain(row, wanted, 0)
                assert sum(copies) / 2 == sum(made._passes(wanted)), (method, steps)
                assert max(copies) <= made.chunk
    finally:
        hook.remove()
        made.graph.net.embed = graph_calls


def test_what_would_take_too_long_is_refused_with_advice(digits: Any) -> None:
    handler, context = digits
    body = {**EXPLAIN, "X-Explain-Steps": "1000"}
    handler.explainer.limit = handler.explainer.seconds(Ask.read({"steps": 500}, handler.spec))
    handler.explainer._next_look = math.inf  # the pace as it is
    slow, plain = context.ask(handler, [Sent({"body": PNG}, body), Sent({"body": PNG}, HTTP)])
    assert (slow.status, plain.status) == (413, 200)
    reason = slow.json["reason"]
    assert reason.startswith("integrated-gradients would take about ")
    assert reason.endswith("; ask for at most 500 steps or method saliency")
    handler.explainer.limit = 1e-9
    refused = ask(handler, context, Sent({"body": PNG}, EXPLAIN))
    assert refused.status == 413
    assert "ask for" not in refused.json["reason"], "nothing fits"


def test_explanations_beyond_the_batchs_time_are_told_to_come_again(
    digits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler, context = digits
    monkeypatch.setattr(handler.explainer, "seconds", lambda ask: 60.0 if ask.method == "saliency" else 1e-9)
    saliency = {**EXPLAIN, "X-Explain-Method": "saliency"}
    sent = [Sent({"body": PNG}, headers) for headers in (saliency, saliency, EXPLAIN, HTTP, saliency)]
    answers = context.ask(handler, sent)
    assert [answer.status for answer in answers] == [200, 429, 200, 200, 429]
    assert answers[1].json["reason"].endswith("try again")
    assert answers[3].json == pytest.approx(ask(handler, context, sent[3]).json, abs=1e-6)
    assert _near(answers[0].json, ask(handler, context, sent[0]).json)


def test_a_worker_that_became_slow_gives_up(digits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    handler, context = digits
    now = iter(range(0, 10**6, 50))
    monkeypatch.setattr(explanations.time, "monotonic", lambda: float(next(now)))
    late, plain = context.ask(handler, [Sent({"body": PNG}, EXPLAIN), Sent({"body": PNG}, HTTP)])
    assert (late.status, plain.status) == (429, 200)
    monkeypatch.undo()
    assert ask(handler, context, Sent({"body": PNG}, EXPLAIN)).status == 200


def test_the_pace_follows_what_it_took_and_refusals_do_not_freeze_it(digits: Any) -> None:
    made = digits[0].explainer
    wanted = Ask.read({}, made.spec)
    for _ in range(20):
        made._learn(60.0, 20.0)
    assert made.correction == pytest.approx(3.0, rel=0.01)
    made._learn(1e-6, 1e-3)
    assert made.correction == pytest.approx(3.0, rel=0.01), "a short one says little"
    made.limit, made._next_look = made.seconds(wanted) / 2, math.inf
    refusals = 0
    while made.seconds(wanted) > made.limit:
        with pytest.raises(BadRequest, match="would take about"):
            made.admit(wanted)
        refusals += 1
        assert refusals < 50, "one slow moment refuses for ever"
    made.admit(wanted)
    made.correction = 0.5
    with pytest.raises(BadRequest, match="would take about"):
        made.admit(Ask.read({"steps": 1000}, made.spec))
    assert made.correction == 0.5, "it had learned to be faster than at the start"


def test_a_pace_that_was_measured_on_a_busy_machine_does_not_refuse_for_ever(digits: Any) -> None:
    made = digits[0].explainer
    wanted = Ask.read({}, made.spec)
    made._gradient = replace(made._gradient, call=made._gradient.call + 0.5)
    made._overhead = dict.fromkeys(made._overhead, 0.0)
    made.limit, made._next_look = 1.5, math.inf
    with pytest.raises(BadRequest, match="would take about"):
        made.admit(wanted)
    made._next_look = 0.0
    made.admit(wanted)
    assert made.correction < 0.5


def test_an_answer_that_would_kill_the_worker_is_refused_alone(digits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """TorchServe takes a worker for broken whose answer is longer than the server's limit."""
    assert ServerConfig.from_file(ROOT / "config.properties").max_response_size > answers.LARGEST
    handler, context = digits
    image = Sent({"body": PNG}, HTTP)
    long, short = Sent({"body": PNG}, EXPLAIN), Sent({"body": PNG}, {**EXPLAIN, "X-Explain-Format": "npy"})
    many = Sent({"body": {"instances": [{"b64": zoo.b64(PNG)}] * 40}}, HTTP)
    monkeypatch.setattr(answers, "LARGEST", 1500)
    map_, file, plain, batch = context.ask(handler, [long, short, image, many])
    assert [each.status for each in (map_, file, plain, batch)] == [413, 200, 200, 413]
    assert map_.json["reason"].endswith(" MB; at most 0.0015 MB: ask for format png")
    assert map_.headers["content-type"] == "application/json"
    assert "fewer instances" in batch.json["reason"]


def test_a_slow_net_is_measured_less_often_when_it_starts(threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    args = {"channels": 1, "height": 16, "width": 16, "classes": 2}
    passes: list[int] = []
    forward = Explainer._f
    monkeypatch.setattr(Explainer, "_f", lambda made, x: passes.append(len(x)) or forward(made, x))
    explainer("small_cnn", args, mean=[0.5], std=[0.25])
    usual = len(passes)
    passes.clear()
    now = iter(range(10**6))
    monkeypatch.setattr(explanations.time, "perf_counter", lambda: float(next(now)))
    explainer("small_cnn", args, mean=[0.5], std=[0.25])
    assert len(passes) < 0.6 * usual


def test_an_explanation_that_fails_harms_nobody_else(
    digits: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    handler, context = digits

    def broken(*_: object) -> Any:
        raise RuntimeError("boom")

    monkeypatch.setitem(explanations._HOW, "occlusion", broken)
    monkeypatch.setitem(explanations._HOW, "saliency", lambda made, x, *_: x * float("nan"))
    methods = ("occlusion", "saliency", "grad-cam")
    sent = [Sent({"body": PNG}, {**EXPLAIN, "X-Explain-Method": method}) for method in methods]
    first, second, third, plain = context.ask(handler, [*sent, Sent({"body": PNG}, HTTP)])
    assert [first.status, second.status, third.status, plain.status] == [500, 500, 200, 200]
    assert "boom" in caplog.text
    assert "boom" not in first.body.decode()
    assert "no finite explanation" in second.json["reason"]


def test_what_has_no_answer_has_no_explanation(diabetes: Any) -> None:
    handler, context = diabetes

    class Broken:
        device = "cpu"

        def run(self, batch: np.ndarray) -> dict[str, np.ndarray]:
            return {"value": np.full((len(batch), 1), np.nan, np.float32), "embedding": batch}

    inner, handler.runtime = handler.runtime, Broken()
    try:
        assert ask(handler, context, Sent({"body": zoo.ROW}, EXPLAIN)).status == 500
    finally:
        handler.runtime = inner


VALUES = st.none() | st.text(max_size=6) | st.binary(max_size=6) | st.sampled_from([*METHODS, "mean", "png", "3"])
TEXTS = st.text(max_size=6) | st.sampled_from([*METHODS, "blur", "npy", "0", "nüll"])
KNOBS = st.sampled_from([*sorted(explanations.CONTROLS), "top_k", "meta"])


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(KNOBS, VALUES, max_size=4),
    st.dictionaries(KNOBS.map(lambda knob: f"X-Explain-{knob}"), TEXTS, max_size=4),
    st.dictionaries(KNOBS, VALUES.filter(lambda value: not isinstance(value, bytes)) | st.integers(), max_size=4),
    st.booleans(),
)
def test_no_odd_wish_is_our_fault(
    explaining: Any, fields: dict[str, Any], headers: dict[str, Any], keys: dict[str, Any], http: bool
) -> None:
    handler, context = explaining("digits")
    pixels = zoo.b64(PNG)
    body: Any = {"data": pixels, **keys} if keys else PNG
    where = EXPLAIN if http else {**GRPC, "explain": "True"}
    good, odd = context.ask(handler, [Sent({"body": PNG}, HTTP), Sent({"body": body, **fields}, {**where, **headers})])
    assert good.status == 200
    assert odd.status in (200, 400, 413, 422)
    assert odd.body


# ---------------------------------------------------------------- starting


def edit(root: Path, **changes: Any) -> None:
    document = json.loads((root / "spec.json").read_text())
    (root / "spec.json").write_text(json.dumps({**document, **changes}))


@pytest.mark.parametrize(
    ("harm", "cause"),
    [
        (lambda root: torch.save({}, root / "twin.pt"), "twin.pt does not fit net 'small_cnn'"),
        (lambda root: (root / "twin.pt").unlink(), "does not list 'twin.pt'"),
        (lambda root: edit(root, twin="model.onnx"), "model.onnx does not fit net 'small_cnn'"),
    ],
)
def test_a_twin_that_is_no_twin_is_not_loaded(
    threads: None, tmp_path: Path, harm: Callable[[Path], None], cause: str, caplog: pytest.LogCaptureFixture
) -> None:
    root = archives.write(tmp_path / "archive", "digits", "onnx", explain=True)
    harm(root)
    archives.seal(root)
    with pytest.raises(RuntimeError) as refused:
        begin(root)
    assert cause in str(refused.value)
    assert base.FAILED in caplog.text


def test_captum_is_needed_by_who_explains_alone(threads: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = archives.write(tmp_path / "archive", "diabetes", "eager", explain=True)
    monkeypatch.setitem(sys.modules, "captum", None)
    with pytest.raises(RuntimeError, match="explanations need captum"):
        begin(root)
    edit(root, twin="")
    archives.seal(root)
    handler, context = begin(root)
    assert ask(handler, context, Sent({"body": zoo.ROW}, HTTP)).status == 200
    assert ask(handler, context, Sent({"body": zoo.ROW}, EXPLAIN)).status == 501


def test_a_missing_captum_is_a_load_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "captum", None)
    with pytest.raises(LoadError, match="captum"):
        explanations._captum()
