"""A recipe is one strict TOML file, and says all that is wrong with it at once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from handlers.spec import ImageInput
from marwright.errors import DataError, SettingsError
from marwright.learning import data, recipe
from marwright.learning.recipe import Recipe
from tests.learning.conftest import RECIPES, document, tiny

SHIPPED = (
    "cifar10",
    "cifar10-fast",
    "cifar10-resnet",
    "diabetes-linear",
    "diabetes-mlp",
    "digits",
    "images",
    "mnist",
    "mnist-28",
    "transfer",
)


def refused(**changes: object) -> str:
    with pytest.raises(SettingsError) as caught:
        tiny(**changes)
    return caught.value.message


def test_the_shipped_recipes_are_those_of_the_table() -> None:
    assert tuple(recipe.names(RECIPES)) == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_survives_its_own_dictionary(name: str) -> None:
    loaded = recipe.load(name, recipes_dir=RECIPES)
    assert loaded.name == name
    assert Recipe.from_dict(loaded.to_dict()) == loaded


def test_all_problems_are_said_at_once_with_key_value_and_what_is_allowed() -> None:
    wrong = document(
        task="classif",
        colour=1,
        data__source="digitz",
        data__hight=3,
        training__epochs="3",
        training__optimiser={"name": "adam", "lr": -1, "momentum": 0.9},
        training__schedule={"name": "cosin"},
        training__regularisation__dropout=1.5,
    )
    with pytest.raises(SettingsError) as caught:
        Recipe.from_dict(wrong)
    said = caught.value.message
    for part in (
        "9 things",
        "task is 'classif'; allowed: 'classification' or 'regression'",
        "colour is unknown",
        "data.source is 'digitz'",
        "data.hight is unknown (did you mean height?)",
        "training.epochs is '3'",
        "training.optimiser.lr is -1; allowed: greater than 0",
        "training.optimiser.momentum is unknown; allowed: beta1, beta2, lr, name",
        "training.schedule.name is 'cosin'; allowed: 'none', 'step'",
        "training.regularisation.dropout is 1.5",
    ):
        assert part.replace("9 things", "9 things") in said


@pytest.mark.parametrize("name", ["token", "Tokens", ".hidden", "a b", "ünïcode", ""])
def test_a_name_that_torchserve_cannot_have_is_refused(name: str) -> None:
    assert "name is" in refused(name=name)


def test_what_contradicts_itself_is_refused() -> None:
    assert "task is 'regression'" in refused(task="regression")
    assert "data.height is missing" in refused(data__height=None)
    assert "comes with scikit-learn" in refused(data__source="digits", data__path="x.zip")
    assert "data.validation_share" in refused(data__validation_share=0.5, data__test_share=0.5)
    assert "nesterov" in refused(training__optimiser={"name": "sgd", "lr": 0.1, "nesterov": True})
    assert "warmup is 2" in refused(training__schedule={"name": "cosine", "warmup": 2})
    assert "net.weights" in refused(net__weights="download")
    assert "at least 8×8" in refused(data__width=4)
    assert "no net named 'resnet'" in refused(net__name="resnet")
    assert "deep" in refused(net__args={"deep": 3})
    assert "net.args has classes" in refused(net__args={"classes": 3})


def test_dropout_where_a_net_has_none_is_refused() -> None:
    wrong = recipe.load("diabetes-linear", recipes_dir=RECIPES).to_dict()
    wrong["training"]["regularisation"]["dropout"] = 0.5
    with pytest.raises(SettingsError, match="dropout"):
        Recipe.from_dict(wrong)


def test_a_torchvision_net_cannot_be_served_eagerly() -> None:
    assert "a worker has no torchvision" in refused(net__name="torchvision:resnet18", serving__format="eager")
    assert "and one of alexnet" in refused(net__name="torchvision:resnet19")


def test_a_torchvision_net_has_no_twin_that_a_worker_could_load() -> None:
    with pytest.raises(SettingsError, match=r"serving\.explain is true; allowed with a torchvision net: false"):
        recipe.load("transfer", recipes_dir=RECIPES, overrides={"serving.explain": True})


def test_explanations_and_their_time_are_the_recipes_choice() -> None:
    given = {"serving.explain": False, "serving.limits.explain_seconds": 0.5}
    chosen = recipe.load("images", recipes_dir=RECIPES, overrides=given)
    assert (chosen.serving.explain, chosen.limits.explain_seconds) == (False, 0.5)
    for name in recipe.names(RECIPES):
        assert recipe.load(name, recipes_dir=RECIPES).serving.explain == (name != "transfer"), name
    with pytest.raises(SettingsError, match=r"serving\.limits\.explain_seconds is 0"):
        recipe.load("images", recipes_dir=RECIPES, overrides={"serving.limits.explain_seconds": 0})


def test_explanations_end_before_the_server_takes_the_worker_for_dead() -> None:
    said = refused(serving__explain=True, serving__response_timeout=4)
    assert "serving.limits.explain_seconds is 2; allowed: less than half of serving.response_timeout (4)" in said
    overrides = {"serving.explain": False, "serving.response_timeout": 4}
    assert recipe.load("digits", recipes_dir=RECIPES, overrides=overrides).serving.response_timeout == 4


def test_an_unknown_recipe_lists_those_there_are() -> None:
    with pytest.raises(SettingsError) as caught:
        recipe.load("digit", recipes_dir=RECIPES)
    assert "cifar10-resnet" in caught.value.message
    assert caught.value.hint == "did you mean 'digits'?"


def test_a_copied_file_names_its_model(tmp_path: Path) -> None:
    copy = Path(shutil.copy(RECIPES / "digits.toml", tmp_path / "my-digits.toml"))
    assert recipe.load(copy).name == "my-digits"
    assert recipe.load("my-digits", recipes_dir=tmp_path).name == "my-digits"
    copy.write_text('name = "digits"\n' + copy.read_text("utf-8"), encoding="utf-8")
    with pytest.raises(SettingsError, match="leave `name` out"):
        recipe.load(copy)


def test_broken_toml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text("task = ", encoding="utf-8")
    with pytest.raises(SettingsError, match="is not TOML"):
        recipe.load(path)


def test_overrides_go_over_the_file_and_are_checked_like_it() -> None:
    given = {"epochs": 3, "seed": 7, "lr": 0.5, "batch_size": None, "serving.workers": 2}
    loaded = recipe.load("digits", recipes_dir=RECIPES, overrides=given)
    assert (loaded.training.epochs, loaded.training.seed, loaded.training.optimiser.lr) == (3, 7, 0.5)
    assert loaded.training.batch_size == 64
    assert loaded.serving.workers == 2
    with pytest.raises(SettingsError, match=r"training\.epochs is 0"):
        recipe.load("digits", recipes_dir=RECIPES, overrides={"epochs": 0})
    with pytest.raises(SettingsError, match="cannot be set"):
        recipe.load("digits", recipes_dir=RECIPES, overrides={"task.name": 0})


def test_the_inputs_shape_is_said_once() -> None:
    assert recipe.load("digits", recipes_dir=RECIPES).data.image() == ImageInput(1, 16, 16)
    assert recipe.load("diabetes-mlp", recipes_dir=RECIPES).data.image() is None


@pytest.mark.parametrize("name", ["images", "transfer"])
def test_a_recipe_for_pictures_of_yours_asks_for_them(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--data PATH"):
        data.load(recipe.load(name, recipes_dir=RECIPES), cache=tmp_path)


def test_bundled_data_takes_no_path(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="takes no path"):
        data.load(recipe.load("digits", recipes_dir=RECIPES), path=tmp_path, cache=tmp_path)
