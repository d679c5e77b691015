"""LoRA on a whole pipeline of the layout of Stable Diffusion XL: UNet and both text towers."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core.quantize import quantize
from qjax.core.safetensors_io import write_tensors
from qjax.core.steps import StepTable, TableKey
from qjax.models.components import Component, build_component
from qjax.models.conditioners import TextConditioner, TextTower
from qjax.models.denoisers import build_denoiser
from qjax.models.loading import load_pipeline
from qjax.models.lora_keys import places
from qjax.models.lora_pipeline import authors_names, lora_tables
from qjax.models.pipeline import Pipeline, Source
from qjax.models.samplers import DDIM
from qjax.models.text_encoders.tokenizers import load_tokenizer
from qjax.models.unet2d_condition_config import UNet2DConditionConfig
from qjax.models.unet2d_condition_keys import checkpoint_keys
from qjax.recipes import w8a8

pytest.importorskip("transformers")

TRANSFORMER = "down_blocks.0.attentions.0.transformer_blocks.0"
UNET = {  # what the authors of Stable Diffusion call them, in kohya's spelling
    f"{TRANSFORMER}.attn1.to_q": "input_blocks_1_1_transformer_blocks_0_attn1_to_q",
    f"{TRANSFORMER}.attn2.to_out.0": "input_blocks_1_1_transformer_blocks_0_attn2_to_out_0",
    "mid_block.attentions.0.proj_in": "middle_block_1_proj_in",
    "up_blocks.0.resnets.1.conv1": "output_blocks_1_0_in_layers_2",
    "up_blocks.0.resnets.1.conv_shortcut": "output_blocks_1_0_skip_connection",
    "add_embedding.linear_1": "label_emb_0_0",
    "conv_out": "out_2",
}
TEXT = ("encoder.layers.0.self_attn.out_proj", "encoder.layers.0.mlp.fc1")
TOWERS = ("text_encoder", "text_encoder_2")
LATENTS = np.random.default_rng(0).standard_normal((1, 4, 4, 4)).astype(np.float32)
CONFIG = UNet2DConditionConfig(
    sample_size=4,
    block_out_channels=(8,),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",),
    norm_num_groups=4,
    attention_head_dim=2,
    cross_attention_dim=16,
    addition_embed_type="text_time",
    addition_time_embed_dim=2,
    projection_class_embeddings_input_dim=6 * 2 + 4,
)


def random_params(targets, seed):
    rng = np.random.default_rng(seed)
    leaves = {}
    for target in targets.values():
        w = rng.standard_normal(target.shape).astype(np.float32) / 4
        leaves[target.path] = jnp.asarray(target.transform(w))
    tree = {}
    for (*parents, name), leaf in leaves.items():
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


TRACES = []


class Counting:
    """A network that notes when it is traced."""

    def __init__(self, model):
        self.model = model

    def apply(self, *args, **settings):
        TRACES.append(type(self.model).__name__)
        return self.model.apply(*args, **settings)


def text_tower(files, class_name, seed):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    config = {
        "architectures": [class_name],
        "num_hidden_layers": 2,
        "vocab_size": 600,
        "max_position_embeddings": 8,
        "projection_dim": 4,
        "eos_token_id": 2,
        **sizes,
    }
    kind = build_component(class_name, config)
    component = Component(
        class_name=class_name,
        config=config,
        model=Counting(kind.model),
        params=random_params(kind.targets, seed),
    )
    return TextTower(component=component, tokenizer=load_tokenizer(files), files=files)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    from tokenizers.pre_tokenizers import ByteLevel

    files, end = tmp_path_factory.mktemp("words"), "<|endoftext|>"
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", end]
    (files / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (files / "merges.txt").write_text("#version: 0.2\n")
    settings = {"model_max_length": 8, "pad_token": end, "tokenizer_class": "CLIPTokenizer"}
    (files / "tokenizer_config.json").write_text(json.dumps(settings))
    towers = (
        text_tower(files, "CLIPTextModel", 1),
        text_tower(files, "CLIPTextModelWithProjection", 2),
    )
    config = CONFIG.to_diffusers()
    unet = build_denoiser("UNet2DConditionModel", config)
    return Pipeline.from_apply(
        Counting(unet.model).apply,
        random_params(unet.targets, 3),
        DDIM(clip_sample=False),
        conditioner=TextConditioner(towers=towers),
        source=Source(model="UNet2DConditionModel", config=config),
        **unet.fields,
    )


def peft(component, layer, half):
    layer = layer if component == "unet" else f"text_model.{layer}"
    return f"{component}.{layer}.{'lora_A' if half == 'down' else 'lora_B'}.weight"


def before_peft(component, layer, half):
    module, _, name = layer.removesuffix(".0").rpartition(".")
    if component == "unet" and name.startswith("to_"):
        return f"unet.{module}.processor.{name}_lora.{half}.weight"
    if name == "out_proj":
        return f"{component}.text_model.{module}.to_out_lora.{half}.weight"
    if name == "fc1":
        return f"{component}.text_model.{layer}.lora_linear_layer.{half}.weight"
    return f"{component}.{layer}.lora.{half}.weight"


def kohya(component, layer, half):
    start = {"unet": "lora_unet_", TOWERS[0]: "lora_te1_text_model_"}
    start = start.get(component, "lora_te2_text_model_")
    return f"{start}{layer.replace('.', '_')}.lora_{half}.weight"


def authors(component, layer, half):
    if component == TOWERS[0]:
        return f"lora_te_text_model_{layer.replace('.', '_')}.lora_{half}.weight"
    named = f"lora_unet_{UNET[layer]}.lora_{half}.weight" if component == "unet" else ""
    return named or kohya(component, layer, half)


@pytest.fixture(scope="module")
def tables(pipe):
    return lora_tables(pipe)


def lora_file(tables, path, spell=peft, *, rank=2, parts=("unet", *TOWERS), **extra):
    rng = np.random.default_rng(rank)
    tensors = dict(extra)
    for part in parts:
        for layer in UNET if part == "unet" else TEXT:
            key = f"{'' if part == 'unet' else 'text_model.'}{layer}.weight"
            o, i, *taps = tables[part][key].shape
            draw = lambda *shape: rng.standard_normal(shape).astype(np.float32) / 2
            tensors[spell(part, layer, "down")] = draw(rank, i, *taps)
            tensors[spell(part, layer, "up")] = draw(o, rank, *[1 for _ in taps])
    write_tensors(path, tensors)
    return path


def draw(pipe, **settings):
    settings = {"guidance_scale": 3.0} | settings
    return pipe(prompts="a", steps=2, latents=LATENTS, output="latent", **settings)


def all_params(pipe):
    return [pipe.params, *(tower.component.params for tower in pipe.conditioner.towers)]


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, all_params(a), all_params(b))


def relative(a, b):
    return float(jnp.abs(a - b).max() / jnp.abs(b).max())


@pytest.fixture(scope="module")
def with_lora(pipe, tables, tmp_path_factory):
    path = lora_file(tables, tmp_path_factory.mktemp("lora") / "style.safetensors")
    return pipe.with_lora(path, scale=0.7)


@pytest.mark.quick_cases("kohya")
@pytest.mark.parametrize("spell", [before_peft, kohya, authors])
def test_all_spellings_draw_the_same_images(pipe, tables, with_lora, tmp_path, spell):
    found = pipe.with_lora(lora_file(tables, tmp_path / "style.safetensors", spell), scale=0.7)
    assert found.loras == with_lora.loras
    assert_equal(found, with_lora)
    np.testing.assert_array_equal(draw(found), draw(with_lora))


def test_beside_the_weights_it_draws_what_it_draws_fused(pipe, tables, with_lora, tmp_path):
    fused = pipe.with_lora(lora_file(tables, tmp_path / "a.safetensors"), scale=0.7, fuse=True)
    assert jax.tree.structure(all_params(fused)) == jax.tree.structure(all_params(pipe))
    assert fused.loras == () and fused.source.sha256 is None
    assert relative(draw(with_lora), draw(fused)) <= 1e-4
    assert relative(draw(pipe), draw(fused)) > 1e-2
    assert_equal(with_lora.without_lora(), pipe)
    assert with_lora.without_lora().loras == ()


def test_a_file_for_the_text_towers_changes_what_the_unet_is_told(pipe, tables, tmp_path):
    path = lora_file(tables, tmp_path / "a.safetensors", kohya, parts=TOWERS)
    told, _ = pipe.with_lora(path).condition(1, prompts="a")
    plain, _ = pipe.condition(1, prompts="a")
    for part in (slice(0, 8), slice(8, 16)):  # of the first tower, and of the second
        assert relative(told.text[..., part], plain.text[..., part]) > 1e-2
    assert relative(told.pooled, plain.pooled) > 1e-2
    assert pipe.with_lora(path).params is pipe.params


def test_another_scale_retraces_neither_unet_nor_towers(pipe, with_lora):
    first, plain = draw(with_lora), draw(pipe)
    known = list(TRACES)
    assert len(set(known)) == 3
    half = with_lora.with_lora_scale(0.35)
    assert [lora.scale for lora in half.loras] == [0.35]
    assert relative(draw(half), first) > 1e-3
    np.testing.assert_array_equal(draw(half.with_lora_scale([0.7])), first)
    off = draw(with_lora.with_lora_scale(0))
    assert known == TRACES
    assert relative(off, plain) <= 1e-5


def test_guidance_below_1_is_not_mistaken_for_none(pipe):
    """In diffusers 0 is no guidance, as the cards of distilled models have it."""
    with pytest.warns(UserWarning, match="guidance_scale=0.0 draws less of the prompts"):
        pipe.condition(1, prompts="a", guided=True, guidance_scale=0.0)


def test_several_have_their_own_scales(pipe, tables, with_lora, tmp_path):
    path = lora_file(tables, tmp_path / "b.safetensors", rank=3, parts=("unet", TOWERS[1]))
    both = with_lora.with_lora(path, scale=-1)
    assert [(lora.name, lora.scale) for lora in both.loras] == [
        ("style.safetensors", 0.7),
        ("b.safetensors", -1.0),
    ]
    other = both.with_lora_scale([0.1, 2])
    again = with_lora.with_lora_scale(0.1).with_lora(path, scale=2.0)
    assert other.loras == again.loras
    assert_equal(other, again)
    assert_equal(both.with_lora_scale(3), other.with_lora_scale([3, 3]))
    with pytest.raises(ValueError, match="one number for each LoRA; got 3 for 2"):
        both.with_lora_scale([1, 2, 3])


def test_a_saved_pipeline_comes_back_with_its_lora(with_lora, tmp_path):
    with_lora.save(tmp_path / "saved")
    back = load_pipeline(tmp_path / "saved")
    assert back.loras == with_lora.loras
    assert_equal(back, with_lora)
    np.testing.assert_array_equal(draw(back.replace(apply=with_lora.apply)), draw(with_lora))
    assert_equal(back.with_lora_scale(0.2), with_lora.with_lora_scale(0.2))


def test_beside_quantized_weights_it_is_saved_too(pipe, tables, tmp_path):
    path = lora_file(tables, tmp_path / "style.safetensors")
    quantized = pipe.replace(params=quantize(pipe.params, w8a8().quant))
    with pytest.raises(ValueError, match="float kernels only"):
        quantized.with_lora(path, fuse=True)
    beside = quantized.with_lora(path, scale=0.7)
    beside.save(tmp_path / "saved")
    back = load_pipeline(tmp_path / "saved")
    assert_equal(back, beside)
    assert_equal(back.without_lora(), quantized)


def test_keys_of_no_layer_are_named_in_one_error(pipe, tables, tmp_path):
    strange = (
        "lora_unet_input_blocks_9_1_proj_in.lora_down.weight",
        "lora_te3_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
        "text_encoder.text_model.encoder.layers.7.mlp.fc1.lora_A.weight",
    )
    extra = {key: np.zeros((2, 8), np.float32) for key in strange}
    path = lora_file(tables, tmp_path / "a.safetensors", **extra)
    with pytest.raises(ValueError, match="3 of no layer") as error:
        pipe.with_lora(path)
    assert all(key in str(error.value) for key in strange)


def test_what_a_lora_does_not_suit_is_said(pipe, tables, tmp_path):
    path = lora_file(tables, tmp_path / "a.safetensors", parts=(TOWERS[0],))
    with pytest.raises(ValueError, match="must have LoRAs; got none"):
        pipe.with_lora_scale(1.0)
    with pytest.raises(ValueError, match="whose source says which network"):
        pipe.replace(source=None).with_lora(path)
    table = StepTable().with_entry("quant", {"a": jnp.zeros(2)}, key=TableKey(timesteps=(2, 1)))
    with pytest.warns(UserWarning, match=r"step table \(quant\) was fitted without a\.safet"):
        pipe.replace(step_table=table).with_lora(path)


def full_depth(family):
    """The UNet of a family in all its blocks and none of its width."""
    config = UNet2DConditionConfig.from_diffusers(
        getattr(UNet2DConditionConfig, family)().to_diffusers()
        | {"norm_num_groups": 1, "attention_head_dim": 1, "cross_attention_dim": 3}
        | ({"addition_time_embed_dim": 2, "projection_class_embeddings_input_dim": 16})
    )
    narrow = [2 * (i + 1) for i in range(len(config.block_out_channels))]
    return UNet2DConditionConfig.from_diffusers(
        config.to_diffusers() | {"block_out_channels": narrow}
    )


@pytest.mark.quick_cases("sd_v1_4")
@pytest.mark.torch_oracle
@pytest.mark.parametrize("family", ["sd_v1_4", "sdxl"])
def test_the_authors_names_mean_what_they_mean_to_diffusers(family):
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers.loaders import lora_conversion_utils as theirs
    config = full_depth(family)
    tables = {"unet": checkpoint_keys(config)}
    layers = [
        key.removesuffix(".weight")
        for key, target in tables["unet"].items()
        if key.endswith(".weight") and len(target.shape) > 1
    ]
    named = {layer: name for name, layer in authors_names(config, tables["unet"]).items()}
    kohya = {
        f"lora_unet_{named[layer].replace('.', '_')}.lora_{half}.weight": torch.tensor(float(i))
        for i, layer in enumerate(layers)
        for half in ("down", "up")
    }
    ours, unmatched = places(kohya, tables, renames={"unet": {n: l for l, n in named.items()}})
    assert not unmatched
    assert all(layers[int(kohya[key])] == place.layer for key, place in ours.items())
    converted = {}
    for i, layer in enumerate(layers):  # all at once it takes input_blocks_10 for input_blocks_1
        pair = {key: tensor for key, tensor in kohya.items() if int(tensor) == i}
        assert len(pair) == 2, layer
        state = theirs._maybe_map_sgm_blocks_to_diffusers(pair, config)
        converted |= theirs._convert_non_diffusers_lora_to_diffusers(state)[0]
    found, lost = places(converted, tables)
    # diffusers takes the up-sampler of a block without transformers for one.
    assert {
        key.removesuffix("lora.down.weight").removesuffix("lora.up.weight") for key in lost
    } == ({"unet.up_blocks.0.attentions.2.conv."} if family == "sd_v1_4" else set())
    assert all(layers[int(converted[key])] == place.layer for key, place in found.items())
    assert len(found) + len(lost) == 2 * len(layers)
