"""Files that are not what they should be: one row a rule, refused with words that name it."""

import ast
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.core import serialize
from qjax.core.config import QuantConfig, WeightSpec
from qjax.core.locks import LOCK, locked
from qjax.core.manifest import MANIFEST, _manifest_digest
from qjax.core.plain_json import read_json
from qjax.core.plain_yaml import read_yaml
from qjax.core.safetensors_io import atomic_write, open_tensors, write_tensors
from qjax.models.autoencoder_config import AutoencoderKLConfig
from qjax.models.checkpoints import load_checkpoint
from qjax.models.dit import DiTConfig
from qjax.models.loading import load_pipeline
from qjax.models.samplers import sampler_from_diffusers
from qjax.models.unet2d_condition_config import UNet2DConditionConfig
from qjax.models.unet2d_config import UNet2DConfig

ROOT = Path(qjax.__file__).parents[1]
ZOO = Path(qjax.__file__).parent / "zoo"


def entry(dtype="F32", shape=(4,), offsets=(0, 16)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"x": entry()}, 12, "must end inside the file"),
        ({"x": entry()}, 20, "must fill the file"),
        ({"x": entry(offsets=(4, 20))}, 20, "without overlap or hole"),
        ({"x": entry(), "y": entry(offsets=(8, 24))}, 24, "without overlap or hole"),
        ({"x": entry(offsets=(16, 0))}, 16, "data_offsets"),
        ({"x": entry(shape=(-4,))}, 16, "integers from 0"),
        ({"x": entry(shape=(2**62, 2**62))}, 16, "larger than any array"),
        ({"x": entry(shape=(0, 2**62), offsets=(0, 0))}, 0, "larger than any array"),
        ({"x": entry(shape=(10**30,))}, 16, "integers from 0"),
        ({"x": entry(shape=(4.0,))}, 16, "integers from 0"),
        ({"x": entry(shape=[1] * 65, offsets=(0, 4))}, 4, "at most 64"),
        ({"x": entry(dtype="I4")}, 16, "dtype this reader does not know"),
        ({"x": entry(shape=(5,))}, 16, "as many bytes as"),
        ('{"x":1,"x":1}', 0, "twice"),
        ('{"x":NaN}', 0, "JSON does not have"),
        ("[" * 100_000, 0, "must begin with"),
        ('{"x":' * 100_000, 0, "one JSON object"),
        ('{"\\ud800": 1}', 0, "one JSON object"),
        (b"\xff{}", 0, "must begin with"),
    ],
)
def test_a_safetensors_file_that_breaks_a_rule_is_refused(tmp_path, header, data, message):
    text = header if isinstance(header, str | bytes) else json.dumps(header)
    text = text if isinstance(text, bytes) else text.encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    with pytest.raises(ValueError, match=message):
        open_tensors(path)


@pytest.mark.parametrize("length", [10, 100_000_001, 2**63, 2**64 - 1])
def test_a_header_beyond_the_file_or_the_limit_is_refused_before_it_is_read(tmp_path, length):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    os.truncate(path, min(8 + length, 2**40) if length > 10 else 10)  # sparse
    with pytest.raises(ValueError, match="at most 100000000 bytes"):
        open_tensors(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
def test_pipes_and_folders_in_place_of_files_are_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.safetensors")
    os.mkfifo(tmp_path / "x.json")
    for path in (tmp_path / "x.safetensors", tmp_path):
        with pytest.raises(ValueError, match="plain file"):
            open_tensors(path)
    with pytest.raises(ValueError, match="plain file"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "'a' twice"),
        ("[]", "must hold a JSON object"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
        ("\ufeff{}", "not valid JSON"),
        (b"\xff", "not valid JSON"),
    ],
)
def test_json_that_breaks_a_rule_is_refused(tmp_path, text, message):
    path = tmp_path / "x.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        read_json(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "'a' twice"),
        ("a: &x [1]\nb: *x", "has references"),
        ("a: " + "1:" * 500 + "1", "more than 400 digits"),
        ("a: " + "9" * 500, "more than 400 digits"),
        ("[" * 5000, "is not YAML"),
        ("!!python/object:os.system x", "is not YAML"),
        (" " * 4_000_001, "larger"),
    ],
)
def test_yaml_that_breaks_a_rule_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        read_yaml("x.yaml", text)


DDPM = UNet2DConfig().to_diffusers()
SDXL = UNet2DConditionConfig.sdxl().to_diffusers()
DIT = DiTConfig().to_diffusers()
KL = AutoencoderKLConfig().to_diffusers()
DDIM = {"_class_name": "DDIMScheduler"}


@pytest.mark.parametrize(
    ("read", "good", "key", "value"),
    [
        (DiTConfig.from_diffusers, DIT, "num_layers", 2**31),
        (DiTConfig.from_diffusers, DIT, "patch_size", 0),
        (DiTConfig.from_diffusers, DIT, "sample_size", "32"),
        (DiTConfig.from_diffusers, DIT, "in_channels", -1),
        (DiTConfig.from_diffusers, DIT, "norm_eps", float("nan")),
        (DiTConfig.from_diffusers, DIT, "in_channels", True),
        (UNet2DConfig.from_diffusers, DDPM, "attention_head_dim", 32768),
        (UNet2DConfig.from_diffusers, DDPM, "attention_head_dim", 0),
        (UNet2DConditionConfig.from_diffusers, SDXL, "block_out_channels", []),
        (UNet2DConditionConfig.from_diffusers, SDXL, "block_out_channels", [320, 640, 1e9]),
        (UNet2DConditionConfig.from_diffusers, SDXL, "down_block_types", [None] * 3),
        (UNet2DConditionConfig.from_diffusers, SDXL, "layers_per_block", 1000),
        (UNet2DConditionConfig.from_diffusers, SDXL, "transformer_layers_per_block", [1, 2, 99]),
        (UNet2DConditionConfig.from_diffusers, SDXL, "act_fn", {}),
        (UNet2DConditionConfig.from_diffusers, SDXL, "cross_attention_dim", [{"a": 1}, 2]),
        (UNet2DConditionConfig.from_diffusers, SDXL, "freq_shift", 2**32),
        (AutoencoderKLConfig.from_diffusers, KL, "norm_num_groups", 0),
        (AutoencoderKLConfig.from_diffusers, KL, "scaling_factor", float("inf")),
        (AutoencoderKLConfig.from_diffusers, KL, "latent_channels", 10**12),
        (sampler_from_diffusers, DDIM, "num_train_timesteps", 2**40),
        (sampler_from_diffusers, DDIM, "beta_start", -0.5),
        (sampler_from_diffusers, DDIM, "beta_end", 10**30),
        (sampler_from_diffusers, DDIM, "beta_end", float("nan")),
        (sampler_from_diffusers, DDIM, "trained_betas", [1, "x"]),
        (sampler_from_diffusers, DDIM, "_class_name", {"a": 1}),
    ],
)
def test_a_config_with_a_value_that_no_network_has_is_refused(read, good, key, value):
    read(good)
    with pytest.raises(ValueError, match="transformer" if key.startswith("transformer") else key):
        read(good | {key: value})


@pytest.mark.parametrize(
    "name", ["../x", "/etc/x", "c:x", "a\\b", "a\0b", ".hidden", "", "..", "a/b"]
)
def test_names_that_leave_their_folder_are_refused(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    stem = folder / "diffusion_pytorch_model.safetensors.index.json"
    stem.write_text(json.dumps({"weight_map": {"a": f"{name}.safetensors" if name else ""}}))
    if not name.startswith(".hidden"):
        write_tensors(tmp_path / "x.safetensors", {"a": np.ones(1, np.float32)})
    with pytest.raises(ValueError, match="in its own folder"):
        load_checkpoint(folder)
    index = json.loads((ZOO / "fashion-dit/model_index.json").read_text())
    index[name] = ["transformers", "CLIPTextModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="plain names"):
        load_pipeline(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    out = tmp_path_factory.mktemp("saved") / "model"
    params = {"a": {"kernel": jnp.linspace(-1, 2, 64 * 8).reshape(64, 8)}}
    config = QuantConfig(weight=WeightSpec(bits=4, symmetric=False), scale_dtype="float32")
    serialize.save(out, qjax.quantize(params, config), {"name": "x"})
    return out


def forge(folder, name, change):
    """Change an array, or a field of the manifest, and make every hash right again."""
    from qjax.core.manifest import array_digest

    tensors = {
        key: tensor.read() for key, tensor in open_tensors(folder / serialize.WEIGHTS).items()
    }
    data = json.loads((folder / MANIFEST).read_text())
    if name in tensors:
        tensors[name] = change(tensors[name])
        data["tensors"][name] = {"sha256": array_digest(tensors[name])}
        write_tensors(folder / serialize.WEIGHTS, tensors, {"format": "qjax"})
    else:
        data["leaves"]["a/kernel"][name] = change
    data["sha256"] = _manifest_digest(data)
    (folder / MANIFEST).write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("a/kernel#scale", lambda a: a * np.float32("nan"), "finite and above 0"),
        ("a/kernel#scale", lambda a: a * np.float32("inf"), "finite and above 0"),
        ("a/kernel#scale", lambda a: a * 0, "finite and above 0"),
        ("a/kernel#scale", lambda a: -a, "finite and above 0"),
        ("a/kernel#scale", lambda a: a.astype(np.int32) + 1, "must be floats"),
        ("a/kernel#scale", lambda a: a[:, :5], "do not fit"),
        ("a/kernel#zero_point", lambda a: a + 100, "codes of 4 bits"),
        ("a/kernel#zero_point", lambda a: a.astype(np.int32), "must be int8"),
        ("a/kernel#qvalue", lambda a: a[:-1], "do not fit its description"),
        ("a/kernel#qvalue", lambda a: a.view(np.int8), "do not fit its description"),
        ("bits", 7, "bits=7"),
        ("bits", 4.0, "bits=4.0"),
        ("size", -64, "size=-64"),
        ("size", 2**70, "do not fit"),
        ("axis", 0, "axis=0"),
        ("layout", "tiled", "layout='tiled'"),
        ("kind", "pickle", "does not describe the leaf"),
        ("dtype", "object", "dtype='object'"),
        ("act", {"bits": 99}, "act of a/kernel"),
        ("act", [1], "act of a/kernel"),
    ],
)
def test_a_save_whose_hashes_are_right_and_values_are_not_is_refused(
    saved, tmp_path, name, change, message
):
    folder = shutil.copytree(saved, tmp_path / "model")
    forge(folder, name, change)
    with pytest.raises(ValueError, match=message):
        serialize.load(folder)


# Links: the hub's cache is made of them, so they are followed when read, and never written through.


def test_a_save_whose_files_are_links_as_in_the_cache_of_the_hub_is_read(saved, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    shutil.copytree(saved, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert serialize.load(snapshot)[1] == {"name": "x"}


def test_writing_replaces_a_link_and_leaves_what_it_points_to(tmp_path):
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"mine")
    link = tmp_path / "x.safetensors"
    link.symlink_to(other)
    write_tensors(link, {"a": np.ones(1, np.float32)})
    assert other.read_bytes() == b"mine" and not link.is_symlink()


def test_a_save_to_a_link_of_a_folder_lies_where_the_link_points(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "disk")
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    serialize.save(tmp_path / "link", {"w": np.ones(2, np.float32)}, {"new": 1})
    assert (tmp_path / "link").is_symlink()
    assert serialize.load(tmp_path / "disk")[1] == {"new": 1}


# Who writes, and what the dead leave.


def test_a_second_job_on_a_folder_is_told_whose_it_is(tmp_path):
    words = rf"process {os.getpid()} on "
    with locked(tmp_path), pytest.raises(BlockingIOError, match=words), locked(tmp_path):
        pass
    assert not (tmp_path / LOCK).exists()
    (tmp_path / LOCK).write_text('{"pid": 1, "host": "gone"}')  # of a process that was killed
    with locked(tmp_path):
        pass


def test_writing_clears_what_the_dead_left_and_nothing_of_the_living(tmp_path):
    path = tmp_path / "x.bin"
    dead = tmp_path / f".x.bin.{'0' * 16}.tmp"
    dead.write_bytes(b"half")
    others = [tmp_path / ".x.bin.backup.tmp", tmp_path / f".y.bin.{'0' * 16}.tmp"]
    for other in others:
        other.write_bytes(b"")
    with atomic_write(path) as living:
        living.write(b"1")
        with atomic_write(path) as file:
            file.write(b"2")
        assert not dead.exists()
    assert path.read_bytes() == b"1"
    assert sorted(tmp_path.iterdir()) == sorted([path, *others])


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full and renameat2 are Linux's")
def test_a_full_disk_names_the_file_and_the_bytes_and_leaves_the_old_one(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "model")
    code = """if True:
        import resource, signal, sys
        import numpy as np
        from qjax.core import serialize
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        serialize.save(sys.argv[1], {"w": np.ones(100_000, np.float32)}, {})
    """
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "model.safetensors needs 400," in done.stderr and "bytes free" in done.stderr
    assert serialize.load(folder)[1] == {"name": "x"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# No pickle.


def test_no_pickle_is_read_on_the_way_of_loading(tmp_path, monkeypatch):
    """Pickles beside the weights, in every spelling, stay unread."""
    torch = pytest.importorskip("torch")

    model = shutil.copytree(ZOO / "fashion-dit", tmp_path / "model")
    for name in ("diffusion_pytorch_model.bin", "x.ckpt", "y.pt", "z.pth", "a.pkl"):
        (model / "transformer" / name).write_bytes(pickle.dumps(print))

    def refuse(*_, **__):
        raise AssertionError("a pickle was read")

    for module, name in (
        (pickle, "Unpickler"),
        (pickle, "load"),
        (pickle, "loads"),
        (torch, "load"),
    ):
        monkeypatch.setattr(module, name, refuse)
    load_pipeline(model)
    (model / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds pickles"):
        load_pipeline(model)


def test_nothing_in_the_package_can_read_a_pickle_but_the_restricted_reader():
    """By the syntax: no import of pickle or its like, `allow_pickle`, or torch.load elsewhere."""
    found = []
    for folder in ("qjax", "models", "calibrate", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                words = ast.unparse(node) if isinstance(node, ast.Call) else ""
                names = [
                    alias.name for alias in getattr(node, "names", []) if hasattr(alias, "name")
                ]
                module = getattr(node, "module", None)
                bad = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
                if isinstance(node, ast.Import | ast.ImportFrom) and bad & {*names, module}:
                    found.append(f"{path.name}: imports {names}")
                # NumPy's `load` reads no pickles unless it is told to, which the next rule finds.
                if words.startswith(("torch.load(", "eval(", "exec(")):
                    found.append(f"{path.name}: {words}")
                if "allow_pickle" in words:
                    found.append(f"{path.name}: {words}")
    assert len(found) == 1 and found[0].startswith("pickles.py: torch.load("), found
    assert "weights_only=True" in found[0]
