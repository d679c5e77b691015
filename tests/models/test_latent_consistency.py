"""Whole latent consistency models, which are told the guidance scale, against diffusers'."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.models.loading import load_pipeline
from qjax.models.sampling import draw_noise, image_keys
from qjax.models.unet2d_condition_inputs import guidance_embedding

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.torch_oracle,
    # diffusers and torch speak of their own future.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
]

PROMPTS, STEPS, WIDTH = ["a", "b c"], 3, 6
LATENTS = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)
KEY = jax.random.key(7)


def tokenizer(folder):
    """A tokenizer of single bytes."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    folder.mkdir()
    letters, end = sorted(ByteLevel.alphabet()), "<|endoftext|>"
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", end]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    settings = {"model_max_length": 8, "pad_token": end, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return CLIPTokenizer.from_pretrained(str(folder))


def randomised(module, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    from transformers import CLIPTextConfig, CLIPTextModel

    text = CLIPTextConfig(
        eos_token_id=2,
        hidden_size=8,
        intermediate_size=8,
        num_attention_heads=2,
        num_hidden_layers=1,
        vocab_size=600,
        max_position_embeddings=8,
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=8,
        time_cond_proj_dim=WIDTH,
    )
    randomised(unet, 3).time_embedding.cond_proj.weight.data *= 10  # so that the scale matters
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, sample_size=8)
    pipe = diffusers.LatentConsistencyModelPipeline(
        vae=randomised(vae, 1),
        text_encoder=randomised(CLIPTextModel(text), 2),
        tokenizer=tokenizer(tmp_path_factory.mktemp("words") / "tokenizer"),
        unet=unet,
        scheduler=diffusers.LCMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lcm")
    theirs.save_pretrained(folder)
    return load_pipeline(folder)


def draw(pipe, guidance_scale):
    return pipe(
        prompts=PROMPTS,
        steps=STEPS,
        guidance_scale=guidance_scale,
        latents=LATENTS,
        key=KEY,
        output="latent",
    )


def relative(a, b):
    return np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max()


@pytest.mark.parametrize("width", [6, 7, 256])
def test_the_embedding_of_the_scale_is_that_of_diffusers(theirs, width):
    scales = torch.tensor([0.0, 7.5])
    expected = theirs.get_guidance_scale_embedding(scales, embedding_dim=width).numpy()
    for scale, row in zip((None, 8.5), expected, strict=True):
        found = guidance_embedding(scale, width, batch=2)
        assert found.shape == (2, width)
        # At an angle of 7,500 float32 has steps of 5e-4.
        np.testing.assert_allclose(found[1], row, atol=2e-3)


@pytest.mark.quick_cases("8.5")
@pytest.mark.parametrize("scale", [1.0, 8.5])
def test_latents_are_those_of_diffusers_after_steps_with_the_same_noise(
    theirs, pipe, scale, monkeypatch
):
    keys = image_keys(KEY, jnp.arange(2, dtype=jnp.uint32))
    noises = iter(range(1, STEPS))

    def randn_tensor(shape, **_):
        noise = np.asarray(draw_noise(keys, (8, 8, 4), draw=next(noises)))
        return torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())

    monkeypatch.setattr(diffusers.schedulers.scheduling_lcm, "randn_tensor", randn_tensor)
    expected = theirs(
        PROMPTS,
        latents=torch.from_numpy(LATENTS.transpose(0, 3, 1, 2).copy()),
        num_inference_steps=STEPS,
        guidance_scale=scale,
        output_type="latent",
    ).images.numpy()
    assert next(noises, None) is None
    assert relative(draw(pipe, scale), expected.transpose(0, 2, 3, 1)) <= 1e-3


def test_another_scale_is_another_picture_of_the_same_program(pipe):
    traces = []

    def apply(variables, x_t, t, told):
        traces.append(x_t.shape)
        return pipe.apply(variables, x_t, t, told)

    counted = pipe.replace(apply=apply)
    none, one, high = (draw(counted, scale) for scale in (None, 1.0, 8.5))
    assert traces == [(2, 8, 8, 4)]  # and there is no second half
    np.testing.assert_array_equal(none, one)
    assert relative(high, one) > 1e-2


def test_one_prediction_and_the_saved_pipeline_are_told_the_scale_too(pipe, tmp_path):
    x_t = jnp.asarray(LATENTS)
    low, high = (pipe.predict(x_t, 500, None, s, prompts=PROMPTS) for s in (2.0, 8.5))
    assert relative(low, high) > 1e-3
    pipe.save(tmp_path / "saved")
    back = load_pipeline(tmp_path / "saved")
    np.testing.assert_array_equal(draw(back, 8.5), draw(pipe, 8.5))


def test_what_needs_an_unconditional_half_is_refused(pipe):
    settings = {"prompts": "a", "steps": 1, "key": KEY, "guidance_scale": 8.5}
    with pytest.raises(ValueError, match="is told the scale of the guidance"):
        pipe(**settings, negative_prompts="b")
    with pytest.raises(ValueError, match="guidance_rescale must"):
        pipe(**settings, guidance_rescale=0.5)
