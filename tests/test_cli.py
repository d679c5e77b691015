"""The command line does what it says, says it in one line when it cannot, and writes nothing then.

Everything runs in this process, on one shipped model, with one or two steps and pictures.
"""

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.numpy import save_file

import qjax
from qjax import cli, cli_machine, demo, doctor, recipes, zoo
from qjax.bench import Benchmark, LayerCall, LayerTime, what_runs
from qjax.calibrate.data import CalibrationSet
from qjax.calibrate.noise_correction import NoiseCorrection
from qjax.cli_options import Command, Option, apply_quant, files_with_scales, resolve, whole
from qjax.core.quantize import quantize_leaf
from qjax.models.convert import to_checkpoint
from qjax.models.dit import DiT, DiTConfig
from qjax.models.dit_keys import original_keys
from qjax.models.lora_pipeline import lora_tables
from qjax.roofline import Peak

MODEL = "fashion-dit"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder that `qjax quantize` wrote."""
    folder = tmp_path_factory.mktemp("cli") / "w8a8"
    assert cli.main(["quantize", MODEL, "--recipe", "w8a8", "--out", str(folder)]) == 0
    return folder


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def pixels(path, scale=1):
    return np.asarray(Image.open(path))[::scale, ::scale]


def assert_one_line_error(result, *fragments):
    assert result.status == 2
    assert result.out == ""
    assert result.err.startswith("qjax: error: ")
    assert result.err.count("\n") == 1
    for fragment in fragments:
        assert fragment in result.err


# The words themselves.


def test_without_a_command_it_shows_the_commands(run):
    result = run()
    assert result.status == 0
    assert all(f"    {command.name}" in result.out for command in cli.COMMANDS)


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda command: command.name)
def test_every_command_explains_itself_and_its_example_is_one(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command.name, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"--{option.name}" in shown for option in command.options)
    program, *words = shlex.split(command.example)
    flags, rest = cli._parser().parse_known_args(words)
    assert (program, flags.command) == ("qjax", command.name)
    assert resolve(command, flags, rest, None)


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"qjax {qjax.__version__}\n"


TOY = Command(
    name="toy",
    help="a command to read options with",
    run=lambda settings, output: {},
    options=(
        Option(name="steps", read=whole(1), metavar="N", default=20, help="steps"),
        Option(name="num-images", read=whole(1), metavar="N", help="pictures"),
    ),
    takes_quant=True,
)


def toy(*rest, steps=None, num_images=None, config=None):
    flags = SimpleNamespace(steps=steps, num_images=num_images)
    return resolve(TOY, flags, rest, config)


def test_the_command_line_goes_before_the_file_and_the_file_before_the_default(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("steps: 3\nquant: {weight: {bits: 4, method: mse}}\n")
    assert toy().steps == 20
    assert toy(config=config).steps == 3
    assert toy("steps=5", config=config).steps == 5
    assert toy(steps="6", config=config).steps == 6
    assert toy("num_images=2").num_images == toy("num-images=2").num_images == 2
    quant = toy("quant.weight.bits=3", "quant.weight.group_size=[64,null]", config=config).quant
    assert quant == {"weight": {"bits": 3, "method": "mse", "group_size": [64, None]}}


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        (["stpes=3"], "no option 'stpes'.*Did you mean steps"),
        (["steps=three"], "steps must be a whole number; got 'three'"),
        (["steps=2.5"], "steps must be a whole number; got 2.5"),
        (["steps=true"], "steps must be a whole number; got True"),
        (["steps=0"], "steps must be at least 1; got 0"),
        (["steps=[1"], r"steps=\[1 is not understood"),
        (["steps=2", "steps=3"], "steps is given twice"),
        (["quant.weight.bits=2", "quant.weight.bits=3"], "quant.weight.bits is given twice"),
        (["quant..bits=2"], "names with dots between them"),
        (["quant=4"], "quant must hold fields"),
        (["--stepz", "3"], "no option 'stepz'.*Did you mean steps"),
        (["steps"], "'steps' is too many for toy; settings are key=value"),
    ],
)
def test_a_word_that_cannot_be_meant_is_an_error(rest, message):
    with pytest.raises(ValueError, match=message):
        toy(*rest)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: [", "is not YAML"),
        ("- steps", "must hold option names and values; got list"),
        ("step: 3", "no option 'step'; it has steps"),
        ("quant: 3", "quant in .* must hold fields of a QuantConfig"),
    ],
)
def test_a_file_that_cannot_be_meant_is_an_error(tmp_path, text, message):
    config = tmp_path / "c.yaml"
    config.write_text(text)
    with pytest.raises(ValueError, match=message):
        toy(config=config)


def test_changes_to_a_recipe_replace_fields_and_put_rules_first():
    base = {"rules": ["old"], "weight": {"bits": 8}, "act": {"bits": 8}}
    changes = {"rules": ["new"], "weight": {"bits": 4}, "act": None}
    assert apply_quant(base, changes) == {"rules": ["new", "old"], "weight": {"bits": 4}}
    assert base["weight"] == {"bits": 8}


def test_it_runs_as_a_module():
    words = [sys.executable, "-m", "qjax"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("usage: qjax"), done.stderr


# What goes wrong.

BAD = {
    "no such command": (["paint"], "there is no command 'paint'; there are demo, plan"),
    "a misspelt command": (["genrate", MODEL], "Did you mean generate?"),
    "a misspelt model": (
        ["plan", "fashion-dti", "--recipe", "w8a8"],
        "without. Did you mean fashion-dit?",
    ),
    "a misspelt recipe": (["plan", MODEL, "--recipe", "w4-a8"], "got 'w4-a8'. Did you mean w4a8?"),
    "no such model": (["plan", "nosuch", "--recipe", "w8a8"], "'nosuch' is no model of the zoo"),
    "no such recipe": (
        ["plan", MODEL, "--recipe", "w9"],
        "q_dit_w8a8, q_dit_w6a8, q_dit_w4a8, q_dit_s2p_ptqd_w4a8; got 'w9'",
    ),
    "no recipe": (["plan", MODEL], "--recipe is needed"),
    "no such option": (
        ["plan", MODEL, "--recipy", "w8a8"],
        "plan has no option 'recipy'; it has recipe",
    ),
    "no such key": (["plan", MODEL, "--recipe", "w8a8", "bits=3"], "no option 'bits'"),
    "no such field": (["plan", MODEL, "--recipe", "w8a8", "quant.bits=3"], "no field bits"),
    "bits outside the set": (
        ["quantize", MODEL, "--recipe", "w8a8", "--out", "out", "quant.weight.bits=7"],
        "weight bits must be one of 2, 3, 4, 5, 6, 8; got 7",
    ),
    "a group size that does not divide": (
        ["quantize", MODEL, "--recipe", "w4a8", "--out", "out", "quant.weight.group_size=96"],
        "group_size must divide",
    ),
    "no out": (["generate", MODEL, "--labels", "3"], "generate needs --out"),
    "label out of range": (
        ["generate", MODEL, "--labels", "3,77", "--out", "x.png"],
        "labels must lie between 0 and 9; got [77]",
    ),
    "no such label": (
        ["generate", MODEL, "--labels", "3,hat", "--out", "x.png"],
        "got hat",
    ),
    "guidance without labels": (
        ["generate", MODEL, "--guidance", "2", "--out", "x.png"],
        "guidance needs labels",
    ),
    "a picture that is none": (["generate", MODEL, "--out", "x.gif"], "must end in .png or .npy"),
    "eta out of range": (
        ["generate", MODEL, "--labels", "3", "--eta", "2", "--out", "x.png"],
        "eta must lie between 0 and 1",
    ),
    "no such LoRA": (
        ["generate", MODEL, "--labels", "3", "--lora", "a.safetensors:2", "--out", "x.png"],
        "There is no file a.safetensors.",
    ),
    "no such config": (["plan", MODEL, "--config", "c.yaml"], "no config file c.yaml"),
    "compare with nothing": (["compare", MODEL, "nosuch"], "'nosuch' is no model of the zoo"),
    "compare one": (["compare", MODEL], "the following arguments are required: MODEL_B"),
    "a pickle": (["convert", "m.ckpt", "--out", "out"], "There is no file m.ckpt"),
    "no checkpoint": (["convert", "nosuch", "--out", "out"], "'nosuch' is no model of the zoo"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_writes_nothing(run, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words, *fragments = BAD[name]
    assert_one_line_error(run(*words), *fragments)
    assert files(tmp_path) == []
    assert_one_line_error(run(*words, *(["--json"] if len(words) > 1 else [])), *fragments)


def test_a_rule_that_matches_nothing_is_an_error_though_the_recipe_serves_several(run, tmp_path):
    config = tmp_path / "c.yaml"
    rule = {"pattern": "blocks_77/.*kernel", "weight": {"bits": 8}}
    config.write_text(yaml.safe_dump({"recipe": "w4a8", "quant": {"rules": [rule]}}))
    out = tmp_path / "out"
    result = run("quantize", MODEL, "--config", config, "--out", out)
    assert_one_line_error(result, "'blocks_77/.*kernel' matches no leaf", "near misses: blocks_")
    assert not out.exists()


def test_a_folder_with_something_in_it_is_left_alone(run, saved, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    words = ("quantize", MODEL, "--recipe", "w8a8", "--out")
    assert_one_line_error(run(*words, tmp_path), "is not empty")
    assert_one_line_error(run(*words, tmp_path, "--overwrite"), "is not empty")
    assert_one_line_error(run(*words, tmp_path / "letter.txt"), "is a file")
    assert_one_line_error(run("demo", "--out", tmp_path), "is not empty")
    assert_one_line_error(run("convert", MODEL, "--out", tmp_path), "is not empty")
    assert_one_line_error(
        run("calibrate", MODEL, "--recipe", "w8a8", "--out", tmp_path), "is not empty"
    )
    assert files(tmp_path) == ["letter.txt"]
    assert_one_line_error(run(*words, saved), "--overwrite")


def test_what_is_quantized_is_not_quantized_again(run, saved, tmp_path):
    words = ("plan", saved, "--recipe", "w8a8")
    assert_one_line_error(run(*words), "is quantized already (31 layers: 8-bit weights")
    result = run("bench", saved, "--recipe", "w8a8")
    assert_one_line_error(result, "is quantized already")
    assert_one_line_error(run("convert", saved, "--out", tmp_path / "x"), "was saved by qjax")


def test_a_traceback_is_shown_where_asked_for(run):
    result = run("plan", "nosuch", "--recipe", "w8a8", "--traceback")
    assert result.status == 2
    assert "Traceback (most recent call last)" in result.err
    assert result.err.splitlines()[-1].startswith("qjax: error: 'nosuch'")


def _stopped_by(error, monkeypatch):
    def work(settings, output):
        raise error

    toy = Command(name="toy", help="a command that fails", run=work)
    monkeypatch.setattr(cli, "COMMANDS", (toy,))


def test_an_interrupt_is_130_and_no_traceback(run, monkeypatch):
    _stopped_by(KeyboardInterrupt(), monkeypatch)
    result = run("toy")
    assert (result.status, result.out, result.err) == (130, "", "qjax: interrupted\n")


def test_a_bug_is_not_dressed_up_as_bad_input(run, monkeypatch):
    _stopped_by(ZeroDivisionError("a bug"), monkeypatch)
    with pytest.raises(ZeroDivisionError):
        run("toy")


def test_remarks_of_the_library_are_lines_on_stderr(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / MODEL).mkdir()
    result = run("plan", MODEL, "--recipe", "w8a8", "--json")
    assert json.loads(result.out)
    assert result.err.startswith("qjax: fashion-dit is the model that ships with qjax")


# What goes right.


@pytest.mark.parametrize("side", [256, 512])
def test_published_models_are_planned_without_weights(run, side):
    result = run("plan", f"dit-xl-2-{side}", "--recipe", "q_dit_w4a8", "--json")
    planned = json.loads(result.out)
    assert planned["bytes_float16"] == pytest.approx(1349.7e6, rel=1e-4)
    assert planned["bytes_quantized"] < 0.27 * planned["bytes_float16"]
    assert sum(leaf["weight"] is not None for leaf in planned["leaves"]) == 28 * 5 + 1


def test_plan_lists_every_leaf_and_json_holds_the_same_totals(run):
    words = ("plan", MODEL, "--recipe", "w4a8")
    shown, document = run(*words), run(*words, "--json")
    assert (shown.status, shown.err, document.status, document.err) == (0, "", 0, "")
    data = json.loads(document.out)
    assert all(leaf["path"] in shown.out for leaf in data["leaves"])
    assert f"{data['bytes_quantized']:,} quantized" in shown.out
    assert data["bytes_quantized"] / data["bytes_float16"] < 0.33


def test_the_recipe_can_be_changed_and_a_config_can_do_without(run, tmp_path):
    rule = {"pattern": "blocks_0/.*/kernel", "weight": {"bits": 8}}
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump({"quant": {"rules": [rule], "weight": {"bits": 4}}}))
    result = run("plan", MODEL, "--config", config, "quant.weight.bits=3", "--json")
    data = json.loads(result.out)
    bits = {leaf["path"]: leaf["weight"] and leaf["weight"]["bits"] for leaf in data["leaves"]}
    assert bits["blocks_0/mlp/fc1/kernel"] == 8
    assert bits["blocks_1/mlp/fc1/kernel"] == 3
    assert bits["blocks_1/mlp/fc1/bias"] is None
    assert data["recipe"] == "custom"


def test_a_saved_folder_goes_round_through_the_command_line(run, saved, tmp_path):
    shown = run("inspect", saved)
    data = json.loads(run("inspect", saved, "--json").out)
    assert (shown.status, shown.err) == (0, "")
    assert "W8A8" in shown.out and "next to the pixels" in shown.out
    assert data["manifest"]["made_from"] == MODEL
    assert data["files"]["model.safetensors"] > data["bytes_stored"]
    assert data["parameters"] == sum(np.prod(leaf["shape"]) for leaf in data["layers"])
    assert data["bytes_stored"] / data["bytes_float16"] < 0.56

    picture = tmp_path / "new" / "x.png"
    words = ("--labels", "3,7", "--steps", "1", "--guidance", "2", "--seed", "5")
    assert run("generate", saved, *words, "--out", picture, "--scale", "1").status == 0
    images = qjax.load(saved)(labels=[3, 7], steps=1, guidance_scale=2.0, key=jax.random.key(5))
    expected = np.concatenate(list(np.round(np.asarray(images)[..., 0] * 255)), axis=1)
    np.testing.assert_array_equal(pixels(picture), expected)

    page = tmp_path / "page" / "report.html"
    words = ("compare", MODEL, saved, "--labels", "3,7", "--steps", "1", "--guidance", "2")
    result = run(*words, "--repeats", "1", "--out", page)
    assert (result.status, result.err) == (0, "")
    assert "dB PSNR" in result.out and str(page) in result.out
    assert files(page.parent) == ["report.html", "report.png"]
    document = json.loads(run(*words, "--repeats", "0", "--sensitivity", "--json").out)
    (variant,) = document["variants"]
    assert min(layer["output_sqnr"] for layer in variant["layers"] if layer["weight_bits"]) > 20
    assert ["Recipe", "the rules of w8a8"] in variant["settings"]
    assert variant["name"] == "w8a8" and variant["timing"] is None
    assert min(map(float, variant["psnr"])) > 20
    assert document["out"] is None


def test_an_older_save_is_replaced_where_asked_for(run, saved, tmp_path):
    out = tmp_path / "out"
    words = ("quantize", MODEL, "--out", out, "--json")
    first = json.loads(run(*words, "--recipe", "w8a8").out)
    second = json.loads(run(*words, "--recipe", "w8a8", "quant.act=null", "--overwrite").out)
    assert first["bytes_quantized"] == second["bytes_quantized"]
    assert json.loads(run("inspect", out, "--json").out)["how"].endswith("activations in float")
    saved = ["README.md", "model.safetensors", "qjax.json"]
    assert files(tmp_path) == ["out", *(f"out/{name}" for name in saved)]


def test_pictures_are_those_of_the_pipeline_whatever_the_batch_and_scale(run, tmp_path):
    words = ("generate", MODEL, "--labels", "sneaker,3,7", "--steps", "1")
    whole_, parts, array = (tmp_path / name for name in ("a.png", "b.png", "c.npy"))
    result = run(*words, "--out", whole_)
    assert (result.status, result.err) == (0, "")
    assert "3 pictures of 32 x 32" in result.out and "4 x 4" in result.out
    assert run(*words, "--out", parts, "batch_size=2", "scale=1").status == 0
    assert run(*words, "--out", array).status == 0
    images = qjax.load(MODEL)(labels=[7, 3, 7], steps=1, key=jax.random.key(0))
    expected = np.concatenate(list(np.round(np.asarray(images)[..., 0] * 255)), axis=1)
    np.testing.assert_array_equal(pixels(whole_, scale=4), expected)
    assert np.abs(pixels(parts).astype(int) - expected).max() <= 1  # another batch rounds otherwise
    stored = np.load(array)
    assert stored.shape == (3, 32, 32, 1) and stored.dtype == np.float32
    np.testing.assert_allclose(np.clip(stored, -1, 1) / 2 + 0.5, images, atol=1e-6)
    said = json.loads(Image.open(whole_).text["qjax"])
    assert (said["labels"], said["steps"], said["model"]) == ([7, 3, 7], 1, MODEL)


def test_labels_repeat_until_there_are_enough_pictures_and_seeds_differ(run, tmp_path):
    words = ("generate", MODEL, "--labels", "3,7", "--steps", "1", "--num-images", "3", "--json")
    one = json.loads(run(*words, "--out", tmp_path / "a.png").out)
    assert (one["labels"], one["num_images"], one["seed"]) == ([3, 7, 3], 3, 0)
    assert run(*words, "--out", tmp_path / "b.png", "seed=1").status == 0
    assert (pixels(tmp_path / "a.png") != pixels(tmp_path / "b.png")).any()


@pytest.mark.slow
def test_loras_change_the_pictures_by_their_scales(run, tmp_path):
    layer, rng = "proj_out_2", np.random.default_rng(0)
    o, i = lora_tables(qjax.load(MODEL))["transformer"][f"{layer}.weight"].shape
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32) / 4
    halves = {"A": draw(2, i), "B": draw(o, 2)}
    tensors = {f"transformer.{layer}.lora_{half}.weight": w for half, w in halves.items()}
    file = tmp_path / "a.safetensors"
    save_file(tensors, file)
    words = ("generate", MODEL, "--labels", "3", "--steps", "1", "--json", "--out")
    lora = lambda *scales: [word for s in scales for word in ("--lora", f"{file}{s}")]

    def drawn(*more):
        result = run(*words, tmp_path / "x.npy", *more)
        assert (result.status, result.err) == (0, "")
        return np.load(tmp_path / "x.npy"), json.loads(result.out)["lora"]

    (plain, none), (one, said) = drawn(), drawn(*lora(""))
    assert none == [] and said == [f"{file}:1"]
    assert np.abs(one - plain).max() > 1e-2
    np.testing.assert_allclose(drawn(*lora(":0"))[0], plain, atol=1e-5)
    # One beside the other, which undoes half of it.
    np.testing.assert_allclose(
        drawn(*lora(":1", ":-0.5"))[0], drawn(f"lora={file}:0.5")[0], rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("a.safetensors", [("a.safetensors", 1.0)]),
        (["a:b.safetensors:0.5", "b:-2"], [("a:b.safetensors", 0.5), ("b", -2.0)]),
        ("C:/a.safetensors", [("C:/a.safetensors", 1.0)]),
    ],
)
def test_a_scale_is_what_follows_the_last_colon_if_it_is_a_number(value, found):
    assert [(str(file), scale) for file, scale in files_with_scales(value)] == found


def test_many_pictures_fill_rows():
    from qjax.cli_pictures import tiled

    images = np.arange(11, dtype=np.float32)[:, None, None, None] / 255 * np.ones((1, 2, 2, 3))
    sheet = np.asarray(tiled(images, 2))
    assert sheet.shape == (3 * 4, 4 * 4, 3)
    assert sheet[::4, ::4, 0].ravel().tolist() == [*range(11), 0]


def test_calibrate_saves_resumes_and_keeps_to_its_run(run, tmp_path):
    out = tmp_path / "run"
    words = ("calibrate", MODEL, "--recipe", "w8a8", "--out", out, "--json")
    result = run(*words)
    assert "no stages that need data" in result.err
    assert json.loads(result.out)["stages"] == []
    assert "final/model.safetensors" in files(out)
    assert run(*words).status == 0
    assert_one_line_error(run(*words, "seed=1"), "belongs to another run: seed 0, now 1")


def test_bench_times_every_layer_and_calls_slower_what_is_slower(run, saved):
    result = run("bench", saved, "--batch", "1", "--rounds", "1", "--json")
    data = json.loads(result.out)
    assert (result.status, result.err) == (0, "")
    paths = [path for layer in data["layers"] for path in layer["paths"]]
    low_bit = [layer for layer in data["layers"] if layer["seconds_low_bit"] is not None]
    assert len(paths) == len(set(paths)) == 35
    assert sum(len(layer["paths"]) for layer in low_bit) == 31
    assert {layer["ran"] for layer in low_bit} == {"xla, int8 matmul"}
    assert all(layer["ran"] == "float" for layer in data["layers"] if layer not in low_bit)
    slower = {path for layer in low_bit if layer["ratio"] > 1.02 for path in layer["paths"]}
    assert set(data["slower"]) == slower
    assert data["step"]["ratio"] > 0
    assert data["peak"]["source"] == "measured"
    assert all(layer["of_peak"] > 0 and layer["of_bandwidth"] > 0 for layer in data["layers"])


def test_bench_says_slower_in_words():
    layer = LayerTime(
        paths=("a/kernel", "b/kernel"),
        kind="dense",
        shape=(8, 4),
        input_shape=(1, 8),
        ran="xla, int8 matmul",
        seconds_float=1e-3,
        seconds_low_bit=2e-3,
        operations=10**6,
        bytes_float=10**6,
        bytes_low_bit=10**5,
    )
    peak = Peak(float_operations=1e10, int8_operations=2e9, bytes=1e9, source="published")
    row = [str(cell) for cell in cli_machine._row(layer, peak)]
    # 1e6 operations in 2 ms are a quarter of 2e9 a second, 1e5 bytes a twentieth of 1e9.
    assert row == ["a and 1 alike", "8x4", *row[2:5], "2.0x", "slower", "25%", "5%"]
    kept = dataclasses.replace(layer, ran="float", seconds_low_bit=None)
    assert kept.shares(peak) == (0.1, 1.0)
    assert cli_machine._row(layer, None)[-2:] == ("", "")
    found = Benchmark(
        layers=(layer, kept), step_float=1.0, step_low_bit=1.5, batch=1, rounds=3, peak=peak
    )
    verdict = cli_machine._verdict(found)
    assert "1.50 times the float step: slower." in verdict
    assert "2 of 2 low-bit layers are slower" in verdict
    assert "(published): 0.01 TFLOP/s, 0.002 TOP/s of int8, 1 GB/s" in verdict


@pytest.mark.parametrize(
    ("recipe", "kernel", "ran"),
    [
        ("w8a8", (64, 32), "xla, int8 matmul"),
        ("w4a16", (64, 32), "xla, float matmul on unpacked weights"),
        # Which form a convolution takes is for ops to choose, and may change with tuning.
        ("w8a8", (3, 3, 16, 8), "xla, int8 matmul (of patches|per tap)"),
        ("w4a16", (3, 3, 16, 8), "xla, float (convolution|matmul) on unpacked weights"),
    ],
)
def test_bench_reads_off_the_program_what_runs(recipe, kernel, ran):
    x = jnp.ones((1, 8, 8, kernel[-2]))
    kind, padding = ("conv", "SAME") if len(kernel) == 4 else ("dense", None)
    call = LayerCall(
        path="layer/kernel", kind=kind, shape=kernel, input_shape=x.shape, dtype=x.dtype,
        padding=padding,
    )  # fmt: skip
    low_bit = quantize_leaf("layer/kernel", jnp.ones(kernel), recipes.by_name(recipe).quant)
    assert re.fullmatch(ran, what_runs(call, low_bit, x))
    assert what_runs(call, jnp.ones(kernel), x) == "float"


def test_doctor_says_a_sentence_about_each_thing(run):
    result = run("doctor", "--json")
    data = json.loads(result.out)
    assert (result.status, result.err, data["wrong"]) == (0, "", 0)
    about = {finding["about"]: finding for finding in data["findings"]}
    assert about["W4A8 matmul, xla"]["grade"] == "ok"
    assert "runs as xla, int8 matmul" in about["convolution"]["text"]
    assert MODEL in about["shipped models"]["text"]
    assert all(finding["text"].endswith(".") for finding in data["findings"])


def test_doctor_fails_where_something_is_wrong(run, monkeypatch):
    wrong = doctor.Finding(about="disk", grade="wrong", text="It is full.")
    monkeypatch.setattr(doctor, "findings", lambda: iter([wrong]))
    result = run("doctor")
    assert result.status == 1
    assert "It is full." in result.out and "1 thing is wrong." in result.out


def test_an_implementation_that_cannot_run_says_why_and_one_that_errs_is_wrong():
    def cannot():
        raise NotImplementedError("it needs a device that is not here.")

    exact = np.zeros((2, 2))
    assert doctor._try("x", cannot, exact).text == "Not here: it needs a device that is not here."
    assert doctor._try("x", lambda: np.ones((2, 2)), exact).grade == "wrong"


def test_convert_writes_what_it_has_read(run, tmp_path):
    out = tmp_path / "out"
    result = run("convert", MODEL, "--out", out)
    assert (result.status, result.err) == (0, "")
    assert "read back and equal, bit for bit" in result.out
    ours, theirs = qjax.load(out), qjax.load(MODEL)
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    assert (ours.sampler, ours.null_label) == (theirs.sampler, theirs.null_label)
    half = json.loads(
        run("convert", out, "--out", tmp_path / "half", "--dtype", "bfloat16", "--json").out
    )
    assert half["dtypes"] == {"bfloat16": 71}


def test_convert_reads_the_layout_of_dits_authors(run, tmp_path):
    config = DiTConfig(
        sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=2, num_heads=2,
        head_dim=8, num_classes=5, norm_eps=1e-6, freq_shift=0,
    )  # fmt: skip
    one, rng = np.zeros((1,), np.int32), np.random.default_rng(0)
    x, key = np.zeros((1, 8, 8, 4), np.float32), jax.random.key(0)
    shapes = jax.eval_shape(DiT(config).init, key, x, one, one)["params"]
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)
    tensors = to_checkpoint(params, original_keys(config))
    tensors["pos_embed"] = np.zeros((1, 16, 16), np.float32)
    source, out = tmp_path / "authors.safetensors", tmp_path / "out"
    save_file({name: np.ascontiguousarray(t) for name, t in tensors.items()}, source)
    assert_one_line_error(run("convert", source, "--out", out), "num_heads is needed")
    assert not out.exists()

    result = run("convert", source, "--out", out, "--heads", "2")
    assert (result.status, result.err) == (0, "")
    assert "recomputed: pos_embed" in result.out and "frequencies" in result.out
    pipe = qjax.load(out)
    jax.tree.map(np.testing.assert_array_equal, pipe.params, params)
    assert pipe.guidance_channels == 3 and pipe.source.config["norm_eps"] == 1e-6

    del tensors["blocks.1.attn.proj.bias"]
    tensors["stray"] = np.zeros((1,), np.float32)
    save_file({name: np.ascontiguousarray(t) for name, t in tensors.items()}, source)
    result = run("convert", source, "--out", tmp_path / "x", "--heads", "2")
    assert_one_line_error(result, "1 missing: blocks.1.attn.proj.bias", "1 unexpected: stray")
    result = run("generate", out, "--labels", "1", "--steps", "1", "--out", tmp_path / "x.png")
    assert_one_line_error(result, "samples of 4; --out FILE.npy")


def test_the_demo_quantizes_saves_compares_and_writes_pages(run, monkeypatch, tmp_path):
    monkeypatch.setattr(zoo, "names", lambda: [MODEL])
    monkeypatch.setattr(demo, "RECIPES", ("w8a8",))
    out = tmp_path / "demo"
    result = run("demo", "--out", out, "num_images=2", "steps=1")
    assert (result.status, result.err) == (0, "")
    for words in (
        "weights",
        "one step",
        "dB PSNR",
        "SSIM",
        "FD to the real test set",
        "files on disk",
    ):
        assert words in result.out
    assert "two halves of the real test set" in result.out
    names = ("demo.json", f"{MODEL}.html", f"{MODEL}.png", "index.html")
    assert set(names) | {f"{MODEL}-w8a8/qjax.json"} <= set(files(out))
    assert all(str(out / name) in result.out for name in names[1:])
    index = (out / "index.html").read_text()
    assert f'href="{MODEL}.html"' in index and f'href="{MODEL}.png"' in index

    document = json.loads((out / "demo.json").read_text())
    found = document["models"][MODEL]
    saved = out / f"{MODEL}-w8a8"
    assert found["bytes_on_disk"]["w8a8"] == sum(f.stat().st_size for f in saved.iterdir())
    assert found["bytes_on_disk"]["w8a8"] < 0.6 * found["bytes_on_disk"]["float"]
    (variant,) = found["variants"]
    assert variant["timing"]["seconds_quantized"] > 0 and variant["agreement"]["n"] == 2
    assert {"load", "quantize and save", "draw", "time", "judge", "pages"} == set(
        document["seconds"]
    )
    again = run("demo", "--out", out, "num_images=2", "steps=1", "--json")
    assert json.loads(again.out)["models"].keys() == {MODEL}


@pytest.mark.slow
def test_the_full_demo_calibrates_and_takes_over_what_an_earlier_one_has_done(
    run, monkeypatch, tmp_path
):
    monkeypatch.setattr(zoo, "names", lambda: [MODEL])
    monkeypatch.setattr(demo, "SYSTEMS_OF_DIT", ("w4a8", "corrected"))
    # The correction alone, so that nothing has to be fitted.
    corrected = dataclasses.replace(
        recipes.w4a8(), stages=(NoiseCorrection(data=CalibrationSet(items=2)),)
    )
    made = {"w4a8": recipes.w4a8(), "corrected": corrected}
    monkeypatch.setattr(recipes, "by_name", made.__getitem__)
    words = ("demo", "--full", "--out", tmp_path / "demo", "num_images=2", "steps=1")
    result = run(*words)
    assert (result.status, result.err) == (0, "")
    document = json.loads((tmp_path / "demo" / "demo.json").read_text())
    found = document["models"][MODEL]
    assert [variant["name"] for variant in found["variants"]] == ["w4a8", "corrected"]
    assert "calibrate and save" in document["seconds"]
    final = tmp_path / "demo" / f"{MODEL}-corrected" / "final"
    assert "noise_correction" in qjax.load(final).step_table.entries
    monkeypatch.setattr(NoiseCorrection, "run", None)
    assert run(*words).status == 0
