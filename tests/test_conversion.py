"""What convert writes is, to diffusers, the pipeline that its parts make."""

import dataclasses
import json

import numpy as np
import pytest
from flax import traverse_util

from qjax.conversion import pipeline_class, write_folder
from qjax.models.autoencoder_config import AutoencoderKLConfig, VQModelConfig
from qjax.models.class_embedder import CLASS_NAME, ClassEmbedderConfig
from qjax.models.components import Component, build_component
from qjax.models.conditioners import ClassConditioner, TextConditioner, TextTower
from qjax.models.convert import convert
from qjax.models.decoders import LatentDecoder
from qjax.models.denoisers import build_denoiser
from qjax.models.dit import DiTConfig
from qjax.models.loading import load_pipeline
from qjax.models.lora import AttachedLoRA
from qjax.models.pipeline import Pipeline, Source
from qjax.models.samplers import DDIM, DDPM
from qjax.models.text_encoders.clip_config import CLIPTextConfig
from qjax.models.text_encoders.tokenizers import load_tokenizer
from qjax.models.unet2d_condition_config import UNet2DConditionConfig
from qjax.models.unet2d_config import UNet2DConfig

pytest.importorskip("transformers")

UNET = {"sample_size": 4, "block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4}
CROSS = UNET | {
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "attention_head_dim": 2,
}
SD = UNet2DConditionConfig(**CROSS, cross_attention_dim=8)
SDXL = UNet2DConditionConfig(
    **CROSS,
    cross_attention_dim=16,
    addition_embed_type="text_time",
    addition_time_embed_dim=2,
    projection_class_embeddings_input_dim=6 * 2 + 4,
)
PLAIN = UNet2DConfig(
    **UNET, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), attention_head_dim=4
)
DIT = DiTConfig(
    sample_size=4,
    patch_size=2,
    in_channels=4,
    out_channels=8,
    head_dim=4,
    num_layers=1,
    num_heads=2,
    num_classes=3,
)
VAE = {"block_out_channels": (4,), "norm_num_groups": 2, "sample_size": 4, "latent_channels": 3}


def filled(targets):
    rng = np.random.default_rng(0)
    tensors = {key: rng.standard_normal(t.shape).astype(np.float32) for key, t in targets.items()}
    return convert(tensors, targets)


def component(class_name, config):
    kind = build_component(class_name, config)
    return Component(
        class_name=class_name, config=config, model=kind.model, params=filled(kind.targets)
    )


def texts(words, *, towers=1):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    config = CLIPTextConfig(
        vocab_size=54,
        num_hidden_layers=2,
        max_position_embeddings=8,
        projection_dim=4,
        eos_token_id=1,
        **sizes,
    )
    configs = [dataclasses.replace(config, with_projection=i == 1) for i in range(towers)]
    return TextConditioner(
        towers=tuple(
            TextTower(
                component=component(one["architectures"][0], one),
                tokenizer=load_tokenizer(words),
                files=words,
            )
            for one in (config.to_transformers() for config in configs)
        )
    )


def pipeline(config, *, sampler=None, decoder=None, **fields):
    data = config.to_diffusers()
    denoiser = build_denoiser(data["_class_name"], data)
    if decoder is not None:
        parts = decoder.to_diffusers()
        decoder = LatentDecoder(component=component(parts["_class_name"], parts))
    return Pipeline.from_apply(
        denoiser.model.apply,
        filled(denoiser.targets),
        sampler or DDIM(clip_sample=False),
        source=Source(model=data["_class_name"], config=data),
        decoder=decoder,
        **denoiser.fields | fields,
    )


def classes():
    config = ClassEmbedderConfig(num_classes=3, embed_dim=8).to_diffusers()
    return ClassConditioner(component=component(CLASS_NAME, config))


def kl():
    return AutoencoderKLConfig(**VAE | {"latent_channels": 4})


KINDS = {
    "StableDiffusionPipeline": lambda words: pipeline(SD, decoder=kl(), conditioner=texts(words)),
    "StableDiffusionXLPipeline": lambda words: pipeline(
        SDXL, decoder=kl(), conditioner=texts(words, towers=2)
    ),
    "LatentConsistencyModelPipeline": lambda words: pipeline(
        dataclasses.replace(SD, time_cond_proj_dim=6), decoder=kl(), conditioner=texts(words)
    ),
    "LDMPipeline": lambda words: pipeline(PLAIN, decoder=VQModelConfig(**VAE, num_vq_embeddings=4)),
    "DDIMPipeline": lambda words: pipeline(PLAIN),
    "DDPMPipeline": lambda words: pipeline(PLAIN, sampler=DDPM()),
    "DiTPipeline": lambda words: pipeline(DIT, decoder=kl()),
    "Pipeline": lambda words: pipeline(SD, decoder=kl(), conditioner=classes()),
}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [
        "<|startoftext|>",
        "<|endoftext|>",
        *letters,
        *(letter + "</w>" for letter in letters),
    ]
    settings = {"model_max_length": 8, "pad_token": "<|endoftext|>"}
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    settings |= {"tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module", params=KINDS)
def written(request, words, tmp_path_factory):
    """Name, pipeline and folder of a kind."""
    pipe, folder = KINDS[request.param](words), tmp_path_factory.mktemp("converted")
    write_folder(pipe, folder)
    return request.param, pipe, folder


@pytest.mark.quick_cases("StableDiffusionXLPipeline", "LDMPipeline", "DiTPipeline", "Pipeline")
def test_the_index_names_the_class_of_diffusers_that_runs_it(written):
    name, pipe, folder = written
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == pipeline_class(pipe) == name


@pytest.mark.quick_cases("StableDiffusionXLPipeline", "LDMPipeline", "DiTPipeline")
@pytest.mark.torch_oracle
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:torch.*")
def test_diffusers_loads_it_as_that_class_with_the_same_weights(written, tmp_path):
    """What diffusers has no class for is not its own, and comes back from the folder itself."""
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    name, pipe, folder = written
    if name != "Pipeline":
        theirs = diffusers.DiffusionPipeline.from_pretrained(folder)
        assert type(theirs).__name__ == name
        theirs.save_pretrained(folder := tmp_path / "again")
    back = load_pipeline(folder)
    assert pipeline_class(back) == name
    for ours, mine in zip(parts_of(pipe), parts_of(back), strict=True):
        assert ours.keys() == mine.keys()
        for path, leaf in ours.items():
            np.testing.assert_array_equal(mine[path], leaf, err_msg="/".join(path))


def parts_of(pipe):
    trees = [pipe.params]
    if pipe.decoder is not None:
        trees.append(pipe.decoder.component.params)
    if isinstance(pipe.conditioner, ClassConditioner):
        trees.append(pipe.conditioner.component.params)
    elif pipe.conditioner is not None:
        trees += [tower.component.params for tower in pipe.conditioner.towers]
    return [traverse_util.flatten_dict(tree) for tree in trees]


def test_a_lora_beside_the_weights_is_not_lost_but_refused(tmp_path):
    lora = AttachedLoRA(name="style.safetensors", scale=1.0, ranks={})
    with pytest.raises(ValueError, match=r"no place for a LoRA .* got style\.safetensors"):
        write_folder(pipeline(PLAIN, loras=(lora,)), tmp_path)
    assert list(tmp_path.iterdir()) == []
