"""Recipe files: what was searched once is made again of another checkpoint, and of it alone."""

import json

import jax
import numpy as np
import pytest

from qjax.calibrate.genome_space import entries_of, grouped_config
from qjax.calibrate.recipe import quantize_pipeline
from qjax.calibrate.recipe_file import (
    MAX_BYTES,
    SearchRecipe,
    fingerprint,
    kernel_shapes,
    load_search,
    save_search,
)
from qjax.core.config import ActSpec, QuantConfig, Rule, WeightSpec
from qjax.core.qtensor import is_qtensor
from qjax.core.serialize import flatten

MODULATION = Rule(pattern=r"blocks_\d/modulation/kernel", weight=WeightSpec(bits=4))
BLOCKS = Rule(pattern=r"blocks_\d/.*kernel", weight=WeightSpec(bits=3), act=ActSpec(bits=8))
QUANT = QuantConfig(rules=(MODULATION, BLOCKS))


@pytest.fixture(scope="module")
def groups(dit):
    layers = [e.path.removesuffix("/kernel") for e in entries_of(dit.params, QUANT) if e.weight]
    return {path: (2, 4, 8, 16)[i % 4] for i, path in enumerate(layers)}


@pytest.fixture(scope="module")
def recipe(dit, groups):
    return SearchRecipe(
        architecture=kernel_shapes(dit.params),
        quant=QUANT,
        groups=groups,
        settings={"steps": 3, "choices": (2, 4, 8, 16), "features": None},
        result={"fitness": 1e-05, "optimal": True},
    )


@pytest.fixture(params=["yaml", "json"])
def file(request, recipe, tmp_path):
    path = tmp_path / f"found.{request.param}"
    save_search(path, recipe)
    return path


@pytest.mark.quick_cases("yaml")
def test_it_makes_the_same_of_another_checkpoint_of_the_architecture(dit, groups, file):
    config = load_search(file).config_for(dit.params)
    assert config == grouped_config(QUANT, entries_of(dit.params, QUANT), groups)
    other = dit.replace(params=jax.tree.map(lambda a: 2 * a, dit.params))
    made = quantize_pipeline(other, load_search(file).config_for(other.params))
    found = {p: q for p, q in flatten(made.params) if is_qtensor(q)}
    assert {p.removesuffix("/kernel"): q.group_size or 16 for p, q in found.items()} == groups
    assert all(q.act is None or q.act.group_size == groups[p[:-7]] for p, q in found.items())
    assert {q.bits for q in found.values()} == {3, 4}
    # Of quantized params it tells the architecture as well.
    assert kernel_shapes(made.params) == kernel_shapes(dit.params)


def test_everything_comes_back(recipe, file):
    found = load_search(file)
    assert (found.architecture, found.groups) == (recipe.architecture, recipe.groups)
    assert found.quant == recipe.quant and found.result == recipe.result
    assert found.settings == recipe.settings | {"choices": [2, 4, 8, 16]}


def test_another_architecture_is_refused_with_what_differs(dit, unet, recipe, file):
    found = load_search(file)
    with pytest.raises(ValueError, match="it lacks blocks_0/attn/proj.*it also has conv_in/kernel"):
        found.config_for(unet.params)
    params = jax.tree.map(lambda a: a, dict(dit.params))
    fc1 = params["blocks_1"]["mlp"]["fc1"]
    fc1["kernel"] = fc1["kernel"][:, :32]
    said = r"it has blocks_1/mlp/fc1/kernel \(16, 32\) instead of \(16, 64\)"
    with pytest.raises(ValueError, match=said):
        found.config_for(params)


def test_the_fingerprint_is_of_paths_and_shapes_and_not_of_their_order():
    one = fingerprint({"a/kernel": (2, 3), "b/kernel": (4, 5)})
    assert one == fingerprint({"b/kernel": (4, 5), "a/kernel": (2, 3)})
    assert one != fingerprint({"a/kernel": (2, 3), "b/kernel": (5, 4)})
    assert one != fingerprint({"a/kernel": (2, 3), "c/kernel": (4, 5)})


def test_a_changed_file_is_refused(file):
    text = file.read_text()
    changed = text.replace("blocks_0/mlp/fc1: 8", "blocks_0/mlp/fc1: 4").replace(
        '"blocks_0/mlp/fc1": 8', '"blocks_0/mlp/fc1": 4'
    )
    assert changed != text
    file.write_text(changed)
    with pytest.raises(ValueError, match="changed after it was written"):
        load_search(file)


def rewritten(path, recipe, **changes):
    """A file with other content and the hash of it."""
    from qjax.calibrate import recipe_file

    save_search(path, recipe)
    data = json.loads(path.read_text()) | changes
    data = {name: value for name, value in data.items() if value is not None}
    data.pop("sha256")
    data["sha256"] = recipe_file._digest(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "other"}, "format: qjax-granularity; got 'other'"),
        ({"version": 2}, "of version 2, and this library reads version 1"),
        ({"groups": {"a": 0}}, "groups paths to group sizes"),
        ({"groups": {"a": True}}, "groups paths to group sizes"),
        ({"groups": {}}, "groups paths to group sizes"),
        ({"architecture": {"a/kernel": ["x"]}}, "paths to shapes"),
        ({"settings": None}, "'settings'. differ"),
        ({"more": 1}, "'more'. differ"),
        ({"fingerprint": "0"}, "not that of its architecture"),
        ({"quant": {"rules": [], "colour": 1}}, "no field colour"),
    ],
)
def test_what_is_no_recipe_is_refused(recipe, tmp_path, changes, said):
    path = tmp_path / "a.json"
    rewritten(path, recipe, **changes)
    with pytest.raises(ValueError, match=said):
        load_search(path)


def test_groups_of_a_layer_left_in_float_are_refused(dit, recipe, tmp_path):
    path = tmp_path / "a.json"
    rewritten(path, recipe, groups={"final_linear": 4})
    with pytest.raises(ValueError, match="gives groups to final_linear"):
        load_search(path).config_for(dit.params)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.json", "{", "not valid JSON"),
        ("a.json", "[" * 100_000, "not valid JSON"),
        ("a.json", "[]", "must hold a mapping"),
        ("a.yaml", "a: [1", "not YAML"),
        ("a.yaml", "a: &x [1]\nb: [*x, *x]", "references"),
        ("a.yaml", "!!python/object/apply:os.system [ls]", "not YAML"),
        ("a.json", " " * (MAX_BYTES + 1), "larger than such a file may be"),
    ],
)
def test_files_that_are_something_else_are_refused(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said):
        load_search(tmp_path / name)


def test_what_cannot_be_written_leaves_no_file(recipe, tmp_path):
    import dataclasses

    with pytest.raises(TypeError):
        save_search(tmp_path / "a.yaml", dataclasses.replace(recipe, result={"x": np.zeros(2)}))
    assert not list(tmp_path.iterdir())
