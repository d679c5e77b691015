"""Whole pipelines of Stable Diffusion 1, 2 and XL against diffusers' on the same weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core.quantize import quantize
from qjax.models.loading import load_pipeline
from qjax.models.pipeline import Pipeline
from qjax.recipes import w8a8

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.torch_oracle,
    # diffusers and torch speak of their own future.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
]

START, END = "<|startoftext|>", "<|endoftext|>"
PROMPTS, NEGATIVE = ["a cat and a dog", "dog"], "cat"
STEPS, GUIDANCE = 10, 5.0
TOWER = {
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 600,
    "max_position_embeddings": 77,
}
UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (16,),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "norm_num_groups": 8,
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
}
UNET_XL = UNET | {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 32,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 12,
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2),
}
VAE = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "sample_size": 16,
}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS = {
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}),
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    "euler": ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
    "dpm": ("DPMSolverMultistepScheduler", {}),
    "dpm-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
}
FAMILIES = ("sd1", "sd2", "sdxl")

# What is the same for all families is shown on the one with two towers and with sizes.
only_sdxl = pytest.mark.parametrize("made", ["sdxl"], indirect=True)


def tokenizer(folder, pad):
    """A tokenizer that knows single bytes and two words."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    folder.mkdir()
    letters, merges = sorted(ByteLevel.alphabet()), ["c a", "ca t</w>", "d o", "do g</w>"]
    words = [merge.replace(" ", "") for merge in merges]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *words, START, END]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    settings = {"model_max_length": 77, "pad_token": pad, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return CLIPTokenizer.from_pretrained(str(folder))


def randomised(module, seed):
    """The module with weights that are nowhere zero, in float32 and for inference."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.05 * noise)
    return module.eval()


def scheduler(name, family):
    class_name, settings = SCHEDULERS[name]
    settings = settings | {"prediction_type": "v_prediction" if family == "sd2" else "epsilon"}
    return getattr(diffusers, class_name)(**BETAS, **settings)


def tower(seed, *, projection=False, **changes):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(**TOWER | changes)
    return randomised((CLIPTextModelWithProjection if projection else CLIPTextModel)(config), seed)


@pytest.fixture(scope="module", params=FAMILIES)
def made(request, tmp_path_factory):
    """diffusers' pipeline of a family, and the folder it was saved in."""
    family, root = request.param, tmp_path_factory.mktemp(request.param)
    vae = randomised(diffusers.AutoencoderKL(**VAE), 1)
    parts = {"vae": vae, "scheduler": scheduler("ddim", family)}
    parts["tokenizer"] = tokenizer(root / "words", "!" if family == "sd2" else END)
    if family == "sdxl":
        settings = UNET_XL
        parts |= {
            "text_encoder": tower(2),
            "text_encoder_2": tower(3, projection=True, projection_dim=12, hidden_act="gelu"),
            "tokenizer_2": tokenizer(root / "more words", "!"),
        }
        make = diffusers.StableDiffusionXLPipeline
    else:
        parts |= {"text_encoder": tower(2), "safety_checker": None, "feature_extractor": None}
        parts["requires_safety_checker"] = False
        settings = UNET | {"use_linear_projection": family == "sd2"}
        make = diffusers.StableDiffusionPipeline
    parts["unet"] = randomised(diffusers.UNet2DConditionModel(**settings), 4)
    theirs = make(**parts)
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(root / "pipeline")
    return family, theirs, root / "pipeline"


@pytest.fixture(scope="module")
def pipe(made) -> Pipeline:
    return load_pipeline(made[2])


LATENTS = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)


def draw(theirs, **settings):
    """diffusers' result, channels last."""
    latents = torch.from_numpy(LATENTS.transpose(0, 3, 1, 2).copy())
    output = theirs(PROMPTS, latents=latents, num_inference_steps=STEPS, **settings).images
    array = output.numpy() if isinstance(output, torch.Tensor) else np.asarray(output)
    return array.transpose(0, 2, 3, 1) if settings["output_type"] == "latent" else array


def close(ours, theirs, tolerance):
    return np.abs(np.asarray(ours) - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.quick_cases("sd1-pndm", "sd2-ddim", "sdxl-euler")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_guided_latents_are_those_of_diffusers(made, name, tmp_path):
    family, theirs, _ = made
    theirs.scheduler = scheduler(name, family)
    theirs.save_pretrained(tmp_path)
    pipe = load_pipeline(tmp_path)
    expected = draw(
        theirs, guidance_scale=GUIDANCE, negative_prompt=[NEGATIVE] * 2, output_type="latent"
    )
    found = pipe(
        prompts=PROMPTS,
        negative_prompts=NEGATIVE,
        steps=STEPS,
        guidance_scale=GUIDANCE,
        latents=LATENTS,
        output="latent",
    )
    assert np.isfinite(expected).all() and close(found, expected, 1e-3)


@pytest.mark.quick_cases("sd1", "sdxl")
def test_pictures_are_those_of_diffusers_without_negative_prompts(made, pipe):
    """SDXL is told zeros then, the others the empty text."""
    family, theirs, _ = made
    theirs.scheduler = scheduler("ddim", family)
    expected = draw(theirs, guidance_scale=GUIDANCE, output_type="np")
    found = pipe(prompts=PROMPTS, steps=STEPS, guidance_scale=GUIDANCE, latents=LATENTS)
    assert found.shape == (2, 16, 16, 3) and close(found, expected, 1e-3)


@pytest.mark.quick_cases("sdxl")
@pytest.mark.parametrize("made", ["sd2", "sdxl"], indirect=True)
def test_rescaled_guidance_is_that_of_diffusers(made, pipe):
    family, theirs, _ = made
    theirs.scheduler = scheduler("ddim", family)
    settings = {"guidance_scale": 15.0, "guidance_rescale": 0.7}
    expected = draw(theirs, output_type="latent", **settings)
    common = {"prompts": PROMPTS, "steps": STEPS, "latents": LATENTS, "output": "latent"}
    assert close(pipe(**common, **settings), expected, 1e-3)
    assert not close(pipe(**common, guidance_scale=15.0), expected, 1e-2)


@only_sdxl
def test_an_image_does_not_depend_on_its_neighbours(pipe, key):
    settings = {"steps": STEPS, "guidance_scale": GUIDANCE, "key": key, "output": "latent"}
    both = pipe(prompts=PROMPTS, **settings)
    second = pipe(prompts=PROMPTS[1], start_index=1, **settings)
    np.testing.assert_allclose(both[1], second[0], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@only_sdxl
def test_sizes_of_a_bucket_share_a_program(pipe, key):
    shapes = []

    def apply(variables, x_t, t, told):
        shapes.append(x_t.shape)
        return pipe.apply(variables, x_t, t, told)

    boxed = pipe.replace(apply=apply, buckets=((16, 16), (24, 16)))
    settings = {"prompts": "dog", "steps": 2, "key": key}
    for size in ((16, 16), (12, 16), (16, 9), (24, 16), (20, 14)):
        images = boxed(height=size[0], width=size[1], **settings)
        assert images.shape == (1, *size, 3)
    assert set(shapes) == {(1, 8, 8, 4), (1, 12, 8, 4)}
    assert len(shapes) == 2
    with pytest.raises(ValueError, match="one of the buckets must hold"):
        boxed(height=32, width=16, **settings)
    with pytest.raises(ValueError, match="must be multiples of 2"):
        pipe(height=15, **settings)


@only_sdxl
def test_prompts_and_labels_are_not_mixed_up(pipe, key):
    for wrong, message in (
        ({"labels": 3}, "reads prompts"),
        ({"prompts": ["a", "b"], "num_images": 3}, "must agree"),
        ({"prompts": ["a", "b"], "negative_prompts": ["a"], "guidance_scale": 2}, "one text"),
        ({"prompts": "a", "negative_prompts": "b"}, "need a guidance_scale"),
        ({"prompts": "a", "guidance_rescale": 0.5}, "needs a guidance_scale"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(**wrong, steps=2, key=key)


@only_sdxl
def test_prediction_of_one_step_is_the_guided_one(pipe):
    found = pipe.predict(
        jnp.asarray(LATENTS), 500, prompts=PROMPTS, negative_prompts=NEGATIVE, guidance_scale=3.0
    )
    told, null = pipe.condition(2, prompts=PROMPTS, negative_prompts=NEGATIVE, guided=True)
    one = lambda told: pipe.apply(
        {"params": pipe.params}, jnp.asarray(LATENTS), jnp.full((2,), 500, jnp.int32), told
    )
    conditional, unconditional = jax.jit(one)(told), jax.jit(one)(null)
    expected = unconditional + 3 * (conditional - unconditional)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


@only_sdxl
@pytest.mark.parametrize(
    "low_bit", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["low-bit", "float"]
)
def test_a_saved_pipeline_draws_the_same_pictures(low_bit, pipe, tmp_path):
    one = pipe.replace(params=quantize(pipe.params, w8a8().quant)) if low_bit else pipe
    one.save(tmp_path / "saved")
    back = load_pipeline(tmp_path / "saved")
    settings = {"prompts": PROMPTS, "steps": STEPS, "guidance_scale": 3.0, "latents": LATENTS}
    np.testing.assert_array_equal(back(**settings), one(**settings))
    words = next((tmp_path / "saved" / "tokenizer").iterdir())
    words.write_text(words.read_text() + " ")
    with pytest.raises(ValueError, match=f"files missing or changed: tokenizer/{words.name}"):
        load_pipeline(tmp_path / "saved")
