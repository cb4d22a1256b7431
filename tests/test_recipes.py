"""Recipes by spec."""

from dataclasses import replace

import pytest

from arena.core import models, training
from arena.core.recipes import recipe_for
from arena.core.registry import BadInput


@pytest.mark.parametrize("name", ["smoke", "fast", "paper"])
@pytest.mark.parametrize("model", ["fastnet", "resnet20"])
def test_a_bare_name_is_the_networks_recipe(name: str, model: str) -> None:
    assert recipe_for(name, model) == training.recipe(name, models.info(model).overrides.get(name))


def test_fields_replace_the_networks_own() -> None:
    usual = recipe_for("fast", "fastnet")
    assert usual.epochs != 20
    assert usual.average, "the spec turns it off"
    changed = recipe_for("fast:epochs=20,lr=0.3,average=false,border=zero", "fastnet")
    assert changed == replace(usual, epochs=20, lr=0.3, average=False, border="zero")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("fst", "There is no recipe 'fst'; did you mean 'fast'"),
        ("fast:epoch=3", "recipe 'fast' has no field 'epoch'; did you mean 'epochs'"),
        ("fast:epochs=3.5", "epochs must be a whole number, got '3.5'"),
        ("fast:epochs=0", "epochs must be at least 1, got 0"),
        ("fast:batch=1", "batch must be at least 2, got 1"),
        ("fast:lr=much", "lr must be a number, got 'much'"),
        ("fast:lr=-1", "lr must be at least 0, got -1"),
        ("fast:lr=nan", "lr must be at least 0, got nan"),
        ("fast:flip=yes", "flip must be true or false, got 'yes'"),
        ("fast:border=blue", "border cannot be 'blue'"),
        ("fast:drop_at=1", "no field 'drop_at'"),
        ("fast:epochs", "not field=value"),
    ],
)
def test_what_is_no_recipe_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        recipe_for(text, "fastnet")
