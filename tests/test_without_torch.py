"""Where PyTorch is absent everything works but reading pickles, in processes that cannot find it.

What such a process does is a function of this file, called by its name; nothing on its path,
nor on that of processes it starts, is PyTorch.
"""

import json
import os
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

TORCH = ("torch", "diffusers")
HUGGING_FACE = (*TORCH, "transformers", "tokenizers")

# Python runs it at every start.
SITECUSTOMIZE = """
    import sys
    from importlib.machinery import PathFinder


    class Finder(PathFinder):
        @classmethod
        def find_spec(cls, name, path=None, target=None):
            absent = name.partition(".")[0] in {names}
            return None if absent else super().find_spec(name, path, target)


    sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""
# Where PyTorch really is absent, as on the oldest and the newest JAX in CI, it always runs.
slow_with_torch = pytest.mark.slow if find_spec("torch") else lambda test: test
START, END = "<|startoftext|>", "<|endoftext|>"


def run_without(names, function, folder):
    """Call a function of this file in a process that finds none of the packages `names`."""
    site = folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(textwrap.dedent(SITECUSTOMIZE).format(names=names))
    lines = [
        "import importlib.util, runpy, sys",
        f"assert not any(map(importlib.util.find_spec, {names!r}))",
        f"runpy.run_path({__file__!r})[{function.__name__!r}]({str(folder)!r})",
        f"assert not set({names!r}) & sys.modules.keys()",
    ]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "JAX_PLATFORMS": "cpu",
        # Compiled in half the time: the models are tiny and run once or twice.
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@slow_with_torch
def test_import_conversion_and_class_to_image_need_no_torch_and_no_transformers(tmp_path):
    run_without(HUGGING_FACE, convert_and_draw_from_labels, tmp_path)


def test_text_to_image_quantization_and_lora_need_no_torch(tmp_path):
    pytest.importorskip("transformers")  # reads the tokenizer's files
    run_without(TORCH, draw_from_prompts, tmp_path)


def assert_saved_draws_the_same(pipe, folder, **settings):
    """The pipeline quantized, saved and loaded again: equal latents, unlike the float ones."""
    import qjax

    quantized = qjax.quantize(pipe, qjax.recipes.w8a8())
    quantized.save(folder)
    latents = quantized(output="latent", **settings)
    np.testing.assert_array_equal(qjax.load(folder)(output="latent", **settings), latents)
    exact = pipe(output="latent", **settings)
    assert np.isfinite(exact).all() and 0 < np.abs(latents - exact).max()


def filled(targets, rng):
    """Random tensors for a key table, in the layout of its checkpoint."""
    return {
        key: (rng.standard_normal(target.shape) / 8).astype(np.float32)
        for key, target in targets.items()
    }


def convert_and_draw_from_labels(folder):
    """Latent diffusion from its authors' safetensors; the pickle of the same is refused."""
    import qjax
    from qjax.conversion import convert_checkpoint
    from qjax.core.safetensors_io import write_tensors
    from qjax.models import original_checkpoints
    from qjax.models.autoencoder_config import VQModelConfig
    from qjax.models.unet2d_condition_config import UNet2DConditionConfig

    unet = UNet2DConditionConfig(
        sample_size=4,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=6,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    autoencoder = VQModelConfig(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(8,),
        norm_num_groups=4,
        num_vq_embeddings=8,
    )
    model = original_checkpoints.Published(unet=unet, autoencoder=autoencoder)
    original_checkpoints.published = lambda: {"tiny": model}
    rng, tensors = np.random.default_rng(0), {}
    targets = original_checkpoints._targets(model)
    for part, keys in original_checkpoints._layout(model).items():
        values = filled(targets[part], rng)
        tensors |= {source: values[key] for key, (source, *_) in keys.items()}
    tensors[original_checkpoints.CLASS_TABLE] = rng.standard_normal((4, 6)).astype(np.float32)
    file = Path(folder, "model.safetensors")
    write_tensors(file, tensors)

    assert convert_checkpoint(file, Path(folder, "converted")).layout.endswith("tiny")
    pipe = qjax.load(Path(folder, "converted"))
    settings = {"labels": [0, 2], "guidance_scale": 2.0, "steps": 2}
    latents = rng.standard_normal((2, 4, 4, 3)).astype(np.float32)
    assert pipe(latents=latents, **settings).shape == (2, 4, 4, 3)
    assert_saved_draws_the_same(pipe, Path(folder, "saved"), latents=latents, **settings)
    file.rename(file.with_suffix(".ckpt"))
    with pytest.raises(ModuleNotFoundError, match=r"is a pickle, and only PyTorch reads those"):
        convert_checkpoint(file.with_suffix(".ckpt"), Path(folder, "never"))


def write_tokenizer(folder):
    """The files of a tokenizer that knows single letters."""
    folder.mkdir()
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [START, END, *letters, *(letter + "</w>" for letter in letters)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    settings = {"model_max_length": 8, "pad_token": END, "tokenizer_class": "CLIPTokenizer"}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def stable_diffusion(words):
    """A tiny Stable Diffusion 1 with random weights, its tokenizer's files in `words`."""
    from qjax.models.autoencoder_config import AutoencoderKLConfig
    from qjax.models.components import Component, build_component
    from qjax.models.conditioners import TextConditioner, TextTower
    from qjax.models.convert import convert
    from qjax.models.decoders import LatentDecoder
    from qjax.models.denoisers import build_denoiser
    from qjax.models.pipeline import Pipeline, Source
    from qjax.models.samplers import DDIM
    from qjax.models.text_encoders.clip_config import CLIPTextConfig
    from qjax.models.text_encoders.tokenizers import load_tokenizer
    from qjax.models.unet2d_condition_config import UNet2DConditionConfig

    rng = np.random.default_rng(0)

    def component(class_name, config):
        kind = build_component(class_name, config)
        params = convert(filled(kind.targets, rng), kind.targets)
        return Component(class_name=class_name, config=config, model=kind.model, params=params)

    text = CLIPTextConfig(
        vocab_size=54,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        eos_token_id=1,
    )
    autoencoder = AutoencoderKLConfig(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=8,
    )
    unet = UNet2DConditionConfig(
        sample_size=4,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    ).to_diffusers()
    denoiser = build_denoiser(unet["_class_name"], unet)
    tower = TextTower(
        component=component("CLIPTextModel", text.to_transformers()),
        tokenizer=load_tokenizer(words),
        files=words,
    )
    return Pipeline.from_apply(
        denoiser.model.apply,
        convert(filled(denoiser.targets, rng), denoiser.targets),
        DDIM(clip_sample=False, steps_offset=1),
        source=Source(model=unet["_class_name"], config=unet),
        conditioner=TextConditioner(towers=(tower,)),
        decoder=LatentDecoder(component=component("AutoencoderKL", autoencoder.to_diffusers())),
        **denoiser.fields,
    )


def draw_from_prompts(folder):
    """A folder in diffusers' layout, loaded, drawn from, quantized, saved, with a LoRA."""
    import qjax
    from qjax.conversion import write_folder
    from qjax.core.safetensors_io import write_tensors
    from qjax.models.denoisers import build_denoiser
    from qjax.models.lora import attach, load_lora

    write_folder(stable_diffusion(write_tokenizer(Path(folder, "words"))), Path(folder, "tiny"))
    pipe = qjax.load(Path(folder, "tiny"))
    rng = np.random.default_rng(1)
    settings = {
        "prompts": ["a cat", "a dog"],
        "negative_prompts": "dogs",
        "guidance_scale": 3.0,
        "steps": 2,
        "latents": rng.standard_normal((2, 4, 4, 4)).astype(np.float32),
    }
    assert pipe(**settings).shape == (2, 8, 8, 3)
    assert_saved_draws_the_same(pipe, Path(folder, "saved"), **settings)

    layer = "down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    halves = {"down": rng.standard_normal((2, 8)), "up": rng.standard_normal((8, 2))}
    write_tensors(
        Path(folder, "lora.safetensors"),
        {f"lora_unet_{layer}.lora_{k}.weight": w.astype(np.float32) for k, w in halves.items()},
    )
    denoiser = build_denoiser(pipe.source.model, pipe.source.config)
    lora = load_lora(Path(folder, "lora.safetensors"), {"unet": denoiser.targets})["unet"]
    params = qjax.quantize(pipe.params, qjax.recipes.w8a8())
    off, on = (
        pipe.replace(params=attach(params, lora, scale=scale))(output="latent", **settings)
        for scale in (0.0, 1.0)
    )
    assert np.isfinite(on).all() and 0 < np.abs(on - off).max()
