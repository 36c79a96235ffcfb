"""A ModelSpec that exists is valid, and survives its own file."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers.spec import ImageInput, Limits, ModelSpec, SpecError, VectorInput
from tests.handlers import archives

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)


@given(
    st.lists(TEXT, min_size=2, max_size=6, unique=True), st.dictionaries(TEXT, NUMBERS, max_size=3), st.integers(1, 99)
)
def test_a_spec_survives_its_json(classes: list[str], metrics: dict[str, float], size: int) -> None:
    spec = ModelSpec(
        task="classification", net="lenet", net_args={"a": [1, 2.5, "x"]}, input=ImageInput(3, size, 7, "crop"),
        classes=tuple(classes), metrics=metrics, limits=Limits(max_bytes=size, explain_seconds=size / 8), top_k=size,
        twin="twin.pt",
    )  # fmt: skip
    assert ModelSpec.from_json(spec.to_json()) == spec
    assert ModelSpec.from_json(spec.to_json()).to_json() == spec.to_json()


def test_a_regressors_spec_survives_too() -> None:
    spec = archives.spec("diabetes", "onnx", "model.onnx")
    assert ModelSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"task": "ranking"}, "task"),
        ({"net": ""}, "net"),
        ({"classes": ("one",)}, "classes"),
        ({"classes": ("one", "one")}, "classes"),
        ({"classes": (1, 2)}, "classes"),
        ({"outputs": ("logits",)}, "outputs"),
        ({"outputs": ()}, "outputs"),
        ({"input": VectorInput(("a",))}, "input"),
        ({"top_k": 0}, "top_k"),
        ({"artifact": "../weights.pt"}, "artifact"),
        ({"twin": "/tmp/twin.pt"}, "twin"),
        ({"metrics": {"accuracy": float("nan")}}, "metrics.accuracy"),
    ],
)
def test_an_impossible_spec_names_its_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(SpecError, match=f"spec.json: {field} is"):
        replace(archives.spec("digits"), **changes)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: ImageInput(2, 8, 8), "input.channels"),
        (lambda: ImageInput(1, 0, 8), "input.height"),
        (lambda: ImageInput(1, 8, 5000), "input.width"),
        (lambda: ImageInput(1, 8, 8, "squash"), "input.resize"),  # type: ignore[arg-type]
        (lambda: VectorInput(()), "input.features"),
        (lambda: VectorInput(("a", "a")), "input.features"),
        (lambda: Limits(max_pixels=0), "limits.max_pixels"),
        (lambda: Limits(explain_seconds=0.0), "limits.explain_seconds"),
        (lambda: Limits(explain_seconds=float("inf")), "limits.explain_seconds"),
        (lambda: Limits(explain_seconds=True), "limits.explain_seconds"),
    ],
)
def test_an_impossible_input_names_its_field(make: Any, field: str) -> None:
    with pytest.raises(SpecError, match=field):
        make()


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda document: document.update(schema=99), "schema is 99"),
        (lambda document: document.pop("schema"), "schema is None"),
        (lambda document: document.pop("input"), "lacks a field"),
        (lambda document: document.update(input=5), "lacks a field"),
        (lambda document: document["input"].update(kind="sound"), "input.kind is 'sound'"),
        (lambda document: document.update(colour="blue"), "one too many"),
        (lambda document: document["limits"].update(max_bytes="1"), "limits.max_bytes"),
    ],
)
def test_a_file_that_is_not_a_spec_says_why(edit: Any, said: str) -> None:
    document = json.loads(archives.spec("digits").to_json())
    edit(document)
    with pytest.raises(SpecError, match=said):
        ModelSpec.from_json(json.dumps(document))


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_text_that_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(SpecError):
        ModelSpec.from_json(text)
