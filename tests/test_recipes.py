"""The named recipes: what they quantize, what they leave, and the bytes that makes."""

import dataclasses
import inspect

import pytest

from qjax import recipes
from qjax.core.quantize import plan
from qjax.models.denoisers import abstract_params, build_denoiser
from qjax.models.dit import DiTConfig
from qjax.zoo.models import FASHION_DIT, FASHION_UNET

# One block of DiT-XL/2 plans like 28.
CONFIGS = {
    "dit": dataclasses.replace(DiTConfig.dit_xl_2(), num_layers=1).to_diffusers(),
    "fashion-dit": FASHION_DIT.to_diffusers(),
    "fashion-unet": FASHION_UNET.to_diffusers(),
}


@pytest.fixture(scope="module")
def shapes():
    return {
        name: abstract_params(build_denoiser(config["_class_name"], config))
        for name, config in CONFIGS.items()
    }


def entries(shapes, name, recipe):
    return plan(shapes[name], recipes.by_name(recipe).quant).entries


def test_a_name_gives_the_recipe_of_that_name():
    for name, make in recipes.RECIPES.items():
        assert recipes.by_name(name) == make() and make().name == name
        assert make is getattr(recipes, name)


def test_an_unknown_name_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="must be one of w8a8, w4a16, w4a8; got 'w3a8'"):
        recipes.by_name("w3a8")


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_names_its_paper(name):
    assert "https://arxiv.org/abs/" in inspect.getdoc(recipes.RECIPES[name])


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_a_recipe_is_as_its_name_says(shapes, name):
    weight, act = (int(bits) for bits in name.removeprefix("w").split("a"))
    for entry in entries(shapes, "dit", name):
        if entry.weight is not None:
            assert entry.weight.bits == weight
            assert (16 if entry.act is None else entry.act.bits) == act


@pytest.mark.parametrize("name", recipes.RECIPES)
@pytest.mark.parametrize("model", CONFIGS)
def test_only_edges_and_embedders_stay_in_float(shapes, model, name):
    left = {
        entry.path: entry.reason
        for entry in entries(shapes, model, name)
        if entry.kind != "other" and entry.weight is None
    }
    if model == "fashion-unet":
        layers = {"conv_in", "conv_out", "time_embedding/linear_1", "time_embedding/linear_2"}
    else:
        embedders = {"conditioning/time_in", "conditioning/time_out"}
        layers = {"patch_embed", "final_linear"} | embedders
    assert set(left) == {f"{layer}/kernel" for layer in layers}
    assert all("few weights" in reason for reason in left.values())


def test_dit_xl_takes_groups_of_128_throughout(shapes):
    groups = {e.group_size for e in entries(shapes, "dit", "w4a8") if e.weight is not None}
    assert groups == {128}


def test_the_adaln_weights_of_dit_are_quantized_the_last_one_included(shapes):
    quantized = {e.path for e in entries(shapes, "dit", "w4a8") if e.weight is not None}
    assert {"blocks_0/modulation/kernel", "final_modulation/kernel"} <= quantized


@pytest.mark.parametrize("model", ["fashion-dit", "fashion-unet"])
@pytest.mark.parametrize(("name", "most"), [("w8a8", 0.56), ("w4a8", 0.33), ("w4a16", 0.33)])
def test_the_zoo_shrinks_as_promised(shapes, model, name, most):
    planned = plan(shapes[model], recipes.by_name(name).quant)
    assert planned.bytes_after <= most * planned.bytes_before
