"""The model card of a save: what it says is so, and what was not measured it does not say."""

import dataclasses
import json
import re

import numpy as np
import pytest

import qjax
from qjax import recipes
from qjax.core.plain_yaml import read_yaml
from qjax.core.quantize import tree_bytes
from qjax.core.steps import StepTable, TableKey
from qjax.models.licenses import front_matter, license_of
from qjax.models.model_card import model_card
from qjax.report_data import ComparisonReport, FeatureDistance, VariantResult

MODEL = "fashion-dit"


@pytest.fixture(scope="module")
def pipe():
    return qjax.load(MODEL)


@pytest.fixture(scope="module")
def qpipe(pipe):
    return qjax.quantize(pipe, recipes.w4a8())


def with_source(pipe, **changes):
    return pipe.replace(source=dataclasses.replace(pipe.source, **changes))


def head(card: str) -> dict:
    return read_yaml("card", card.split("---")[1])


def result(name="quantized", **changes):
    fields = {"psnr": np.array([30.0, 31.0]), "ssim": np.array([0.9, 0.92])} | changes
    return VariantResult(
        name=name,
        how="4-bit weights",
        images=np.zeros((2, 4, 4, 1)),
        bytes_quantized=10,
        error_per_step=np.array([0.01, 0.05]),
        **fields,
    )


def report(*variants):
    return ComparisonReport(
        title="A comparison",
        model="a model",
        device="a processor",
        sampler="ddim, 2 steps",
        versions=(("jax", "0"),),
        seeds=(0, 1),
        float_images=np.zeros((2, 4, 4, 1)),
        bytes_float=20,
        variants=variants,
    )


def test_equal_pipelines_have_equal_saves(qpipe, tmp_path):
    qpipe.save(tmp_path / "a")
    qjax.load(tmp_path / "a").save(tmp_path / "b")
    first, second = (
        {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("a", "b")
    )
    assert first.keys() == {"README.md", "model.safetensors", "qjax.json"}
    assert first == second


def test_loading_ignores_the_card(qpipe, tmp_path):
    qpipe.save(tmp_path / "a")
    (tmp_path / "a" / "README.md").write_bytes(b"\xff---\nlicense: [\n---")
    assert qjax.load(tmp_path / "a").recipe == "w4a8"
    (tmp_path / "a" / "README.md").unlink()
    assert qjax.load(tmp_path / "a").recipe == "w4a8"


def test_the_head_is_what_the_hub_reads(qpipe):
    found = head(model_card(with_source(qpipe, name="somebody/base", license="mit")))
    assert found["library_name"] == "qjax"
    assert (found["license"], found["base_model"]) == ("mit", "somebody/base")
    assert found["base_model_relation"] == "quantized"
    assert {"jax", "diffusion", "quantized", "w4a8"} <= set(found["tags"])


def test_what_is_not_known_is_not_in_the_head(qpipe):
    card = model_card(with_source(qpipe, license=None))
    assert head(card).keys().isdisjoint({"license", "base_model"})  # the name is no hub id
    assert "unknown: its files do not say" in card


def test_bytes_and_layers_are_those_of_the_tree(pipe, qpipe):
    card = model_card(qpipe)
    assert f"{tree_bytes(qpipe.params):,} bytes instead of {tree_bytes(pipe.params):,}" in card
    rows = re.findall(r"^\| 4 bits, symmetric .*\| (\d+) \| [\d,]+ \|$", card, flags=re.MULTILINE)
    planned = qjax.plan(pipe, recipes.w4a8())
    assert sum(map(int, rows)) == sum(entry.weight is not None for entry in planned.entries)
    assert "Recipe: w4a8." in card


def test_every_kernel_that_is_left_in_float_has_its_reason(pipe, qpipe):
    card = model_card(qpipe)
    left = [
        e
        for e in qjax.plan(pipe, recipes.w4a8()).entries
        if e.weight is None and e.path.endswith("/kernel")
    ]
    assert left
    for entry in left:
        layer = entry.path.removesuffix("/kernel")
        assert re.search(rf"^- {re.escape(entry.reason)}: .*`{layer}`", card, flags=re.MULTILINE)


def test_a_float_model_says_that_nothing_was_quantized(pipe):
    card = model_card(pipe)
    assert "not quantized" in card and "quantized" not in head(card)["tags"]


def test_the_data_free_part_of_a_recipe_does_not_pass_for_the_whole(pipe):
    with pytest.warns(UserWarning, match="leaves out the stages"):
        left_out = qjax.quantize(pipe, recipes.q_dit_w8a8(steps=2))
    assert "Recipe: q\\_dit\\_w8a8, without its stages." in model_card(left_out)


def test_the_run_that_a_table_suits_is_in_table_and_example(qpipe):
    key = TableKey(timesteps=(9.0, 5.0, 1.0), eta=0.5, guidance_scale=2.0)
    table = StepTable().with_entry("time", {"row": np.zeros((3, 2), np.float32)}, key=key)
    card = model_card(qpipe.replace(step_table=table))
    assert "| `time` | 3 | 0.5 | 2.0 |" in card
    assert "steps=3, guidance_scale=2.0, eta=0.5" in card


def test_the_example_is_three_lines_of_python(qpipe):
    (code,) = re.findall(r"```python\n(.*?)```", model_card(qpipe, place="a/b"), flags=re.DOTALL)
    compile(code, "card", "exec")
    assert len(code.splitlines()) == 3 and 'qjax.load("a/b")' in code


@pytest.mark.slow
def test_the_example_runs(qpipe, tmp_path):
    qpipe.save(tmp_path / "saved")
    card = model_card(qpipe, place=str(tmp_path / "saved"))
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    file = tmp_path / "example.py"
    file.write_text(code)
    import runpy

    assert runpy.run_path(str(file))["images"].shape == (2, 32, 32, 1)


def test_without_a_comparison_what_gets_worse_is_unknown(qpipe):
    assert "Unknown: no comparison" in model_card(qpipe)


def test_a_comparison_gives_its_own_numbers(qpipe, tmp_path):
    distance = FeatureDistance(name="FD", value=1.25, value_float=1.0, net="a net", n=2)
    qpipe.save(tmp_path / "a", report=report(result(distances=(distance,))))
    card = (tmp_path / "a" / "README.md").read_text()
    assert "Unknown" not in card
    for shown in ("30.50 dB", "0.9100", "0.0500", "1.250, float model's 1.000", "2 pictures"):
        assert shown in card, shown


def test_pictures_that_are_equal_or_broken_are_counted_and_not_averaged(qpipe):
    some = result(psnr=np.array([30.0, np.inf, np.nan]), ssim=np.array([0.9, 1.0, np.nan]))
    card = model_card(qpipe, report=report(some))
    assert "PSNR, mean | 30.00 dB; 1 of 3 pictures equal to the last bit; 1 of 3 pictures" in card
    assert "SSIM, mean | 0.9500; 1 of 3 pictures broken" in card
    assert not re.search(r"\b(nan|inf)\b", card)
    equal = result(psnr=np.full(2, np.inf), ssim=np.ones(2))
    assert "PSNR, mean | 2 of 2 pictures equal" in model_card(qpipe, report=report(equal))


def test_a_comparison_of_several_is_refused_and_nothing_is_written(qpipe, tmp_path):
    with pytest.raises(ValueError, match="this pipeline alone.*got one of 2: one, two"):
        qpipe.save(tmp_path / "a", report=report(result("one"), result("two")))
    assert not list(tmp_path.iterdir())


def test_names_from_outside_cannot_become_markup(qpipe):
    evil = "x`\n---\n# <script>alert(1)</script> | [a](javascript:b)"
    card = model_card(with_source(qpipe, name=evil, license=None))
    assert head(card)["library_name"] == "qjax"
    assert "base_model" not in head(card)
    assert (
        "\n# <script>" not in card
        and "<script>" not in card.replace("\\<script\\>", "").split("\n# ", 1)[0]
    )
    assert "[a](" not in re.sub(r"`[^`\n]*`", "", card)


@pytest.mark.parametrize(
    ("text", "license"),
    [
        ("---\nlicense: MIT\n---\n", "mit"),
        ("---\nlicense: creativeml-openrail-m\ntags:\n- a\n---\nwords", "creativeml-openrail-m"),
        ("---\nlicense: [mit]\n---\n", None),
        ("---\nlicense: 'mit\\nbase_model: x'\n---\n", None),
        ("---\nlicense: &a mit\nb: *a\n---\n", None),
        ("no head", None),
        ("---\nlicense: mit", None),
    ],
)
def test_a_licence_is_read_from_the_head_of_a_readme(tmp_path, text, license):
    (tmp_path / "README.md").write_text(text)
    assert license_of(tmp_path) == license


def test_a_licence_of_a_shipped_model_is_that_of_its_record(pipe):
    assert pipe.source.license == "apache-2.0"


def test_saves_from_before_there_were_cards_still_load(qpipe, tmp_path):
    """Their records know neither licence nor recipe."""
    from qjax.core import serialize

    qpipe.save(tmp_path / "a")
    tree, record = serialize.load(tmp_path / "a")
    del record["source"]["license"], record["fields"]["recipe"]
    serialize.save(tmp_path / "old", tree, json.loads(json.dumps(record)))
    old = qjax.load(tmp_path / "old")
    assert (old.recipe, old.source.license) == (None, None)


def test_front_matter_of_something_else_is_empty():
    assert front_matter("---\n- a\n- b\n---\n") == {}
