"""Checkpoints in the layout of latent diffusion's authors, pickles among them."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from qjax.conversion import convert_checkpoint
from qjax.core.safetensors_io import open_tensors, write_tensors
from qjax.models import original_checkpoints, pickles
from qjax.models.autoencoder_config import AutoencoderKLConfig, VQModelConfig
from qjax.models.loading import load_pipeline
from qjax.models.original_checkpoints import Published, read
from qjax.models.unet2d_condition_config import UNet2DConditionConfig
from qjax.models.unet2d_config import UNet2DConfig

VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "latent_channels": 3,
    "sample_size": 16,
}
CONDITIONAL = Published(
    unet=UNet2DConditionConfig(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=6,
        attention_head_dim=1,
        norm_num_groups=4,
    ),
    autoencoder=VQModelConfig(**VAE, num_vq_embeddings=32),
)
PLAIN = Published(
    unet=UNet2DConfig(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
    ),
    autoencoder=AutoencoderKLConfig(**VAE),
)
MODELS = {"conditional": CONDITIONAL, "plain": PLAIN}


def authors_file(model, *, classes=None):
    """A checkpoint as its authors would have it, and the diffusers tensors it was made of."""
    rng = np.random.default_rng(0)
    original, theirs = {}, {}
    layout = original_checkpoints._layout(model)
    targets = original_checkpoints._targets(model)
    for part, keys in layout.items():
        for key, (source, place, heads) in keys.items():
            shape = targets[part][key].shape
            tensor = rng.standard_normal(shape).astype(np.float32) / 8
            theirs[f"{part}/{key}"] = tensor
            attention = ".attn_1." in source or ".proj_out." in source and heads == 1
            if place is not None:
                whole = original.setdefault(
                    source, np.zeros((3 * shape[0], *shape[1:]), np.float32)
                )
                whole.reshape(heads, 3, -1)[:, place] = tensor.reshape(heads, -1)
            else:
                conv = attention and tensor.ndim == 2 and part == "autoencoder"
                original[source] = tensor[:, :, None, None] if conv else tensor
    if classes is not None:
        table = rng.standard_normal((classes + 1, 6)).astype(np.float32)
        original[original_checkpoints.CLASS_TABLE] = table
    original["model_ema.decay"] = np.float32(0.5)
    return original, theirs


def test_the_names_are_those_of_the_authors():
    """Spot checks against keys of the published files."""
    models = original_checkpoints.published()
    imagenet = original_checkpoints._layout(models["LDM-4 on ImageNet"])
    unet = {key: source for key, (source, *_) in imagenet["unet"].items()}
    start = "model.diffusion_model."
    assert unet["down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"] == (
        f"{start}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
    )
    assert unet["up_blocks.2.upsamplers.0.conv.bias"] == f"{start}output_blocks.8.2.conv.bias"
    assert unet["down_blocks.2.downsamplers.0.conv.weight"] == (
        f"{start}input_blocks.9.0.op.weight"
    )
    assert unet["mid_block.resnets.1.time_emb_proj.bias"] == (
        f"{start}middle_block.2.emb_layers.1.bias"
    )
    assert len(set(unet.values())) == len(unet)
    stage = {key: source for key, (source, *_) in imagenet["autoencoder"].items()}
    assert stage["decoder.up_blocks.0.resnets.2.conv1.weight"] == (
        "first_stage_model.decoder.up.2.block.2.conv1.weight"
    )
    assert stage["encoder.mid_block.attentions.0.to_q.weight"] == (
        "first_stage_model.encoder.mid.attn_1.q.weight"
    )
    assert stage["quantize.embedding.weight"] == "first_stage_model.quantize.embedding.weight"


@pytest.mark.parametrize("kind", MODELS)
def test_every_tensor_finds_its_place(kind):
    classes = 3 if kind == "conditional" else None
    original, theirs = authors_file(MODELS[kind], classes=classes)
    pipe, found, left = read(original, name="mine", models=MODELS)
    assert found == kind and left == ("model_ema.decay",)
    targets = original_checkpoints._targets(MODELS[kind])
    params = {"unet": pipe.params, "autoencoder": pipe.decoder.component.params}
    for part, table in targets.items():
        for key, target in table.items():
            leaf = params[part]
            for name in target.path:
                leaf = leaf[name]
            np.testing.assert_array_equal(leaf, target.transform(theirs[f"{part}/{key}"]))
    if classes:
        assert (pipe.null_label, pipe.num_labels) == (3, 3)
        images = pipe(labels=[0, 2], guidance_scale=2.0, steps=2, latents=np.ones((2, 8, 8, 3)))
        assert images.shape == (2, 16, 16, 3)


def test_a_scale_factor_in_the_file_is_that_of_the_latents():
    original, _ = authors_file(PLAIN)
    original["scale_factor"] = np.float32(0.25)
    pipe, _, left = read(original, name="mine", models=MODELS)
    assert pipe.decoder.component.model.config.scaling_factor == 0.25
    assert "scale_factor" not in left


def test_what_is_of_no_published_model_is_refused_with_the_nearest():
    original, _ = authors_file(PLAIN)
    original.pop("model.diffusion_model.out.0.weight")
    with pytest.raises(ValueError, match=r"nearest to plain, but 1 tensors.*out\.0\.weight"):
        read(original, name="mine", models=MODELS)


@pytest.mark.parametrize("suffix", (pytest.param(".ckpt", marks=pytest.mark.slow), ".safetensors"))
def test_conversion_gives_a_folder_that_loads(suffix, tmp_path, monkeypatch):
    models = {"conditional": CONDITIONAL}
    monkeypatch.setattr(original_checkpoints, "published", lambda: models)
    original, _ = authors_file(CONDITIONAL, classes=3)
    source = tmp_path / f"model{suffix}"
    if suffix == ".ckpt":
        torch = pytest.importorskip("torch")
        state = {key: torch.from_numpy(np.asarray(value)) for key, value in original.items()}
        torch.save({"state_dict": state, "global_step": 3}, source)
    else:
        write_tensors(source, original)
    account = convert_checkpoint(source, tmp_path / "out")
    assert "conditional" in account.layout and account.left_out == ("model_ema.decay",)
    pipe = load_pipeline(tmp_path / "out")
    wanted, _, _ = read(original, name="mine", models=models)
    for part in (
        lambda pipe: pipe.params,
        lambda pipe: pipe.decoder.component.params,
        lambda pipe: pipe.conditioner.component.params,
    ):
        jax.tree.map(np.testing.assert_array_equal, part(pipe), part(wanted))
    for field in ("apply", "sampler", "shape", "null_label", "num_labels"):
        assert getattr(pipe, field) == getattr(wanted, field), field


class Payload:
    """What a pickle could do."""

    def __reduce__(self):
        return print, ("code ran",)


@pytest.mark.quick_cases("code")
@pytest.mark.parametrize(
    "content, message",
    [
        (lambda torch: {"w": torch.zeros(2), "x": Payload()}, "UnpicklingError|Unsupported|global"),
        (lambda torch: [1, 2], "holds no state dict but a list"),
        (lambda torch: {"step": 3}, "holds no state dict"),
    ],
    ids=("code", "a list", "no tensors"),
)
def test_pickles_of_anything_but_tensors_are_refused(content, message, tmp_path, capfd):
    torch = pytest.importorskip("torch")
    torch.save(content(torch), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=message):
        pickles.to_safetensors(tmp_path / "model.pt", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    assert "code ran" not in capfd.readouterr().out


def test_a_pickle_of_tensors_is_read_with_its_dtypes(tmp_path):
    torch = pytest.importorskip("torch")
    weights = {
        "a": torch.arange(6.0).reshape(2, 3).T,
        "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    }
    torch.save({"ema": weights, "opt": {"lr": 1.0}}, tmp_path / "model.pt")
    notes = pickles.to_safetensors(tmp_path / "model.pt", tmp_path / "out.safetensors")
    assert "'ema'" in notes[0] and "opt" in notes[0]
    read_back = {k: np.asarray(v) for k, v in open_tensors(tmp_path / "out.safetensors").items()}
    np.testing.assert_array_equal(read_back["a"], weights["a"].numpy())
    assert read_back["b"].dtype.name == "bfloat16"
    assert read_back["b"].astype(np.float32).tolist() == [1.5, -2.0]


def test_a_missing_pickle_and_a_broken_one_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file"):
        pickles.to_safetensors(tmp_path / "a.pt", tmp_path / "b")
    pytest.importorskip("torch")
    (tmp_path / "a.pt").write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(ValueError, match="cannot be read as tensors alone"):
        pickles.to_safetensors(tmp_path / "a.pt", tmp_path / "b")


def test_configs_of_the_recognised_models_are_json():
    for model in original_checkpoints.published().values():
        json.dumps(model.unet.to_diffusers()), json.dumps(model.autoencoder.to_diffusers())
        assert dataclasses.is_dataclass(model)
