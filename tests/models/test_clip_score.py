"""The CLIP score against transformers' `CLIPModel` with random weights, and Pillow's resizing."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.models.clip_score import clip_scores, load_clip, prepared
from qjax.models.clip_vision import CLIPVisionConfig, CLIPVisionModelWithProjection
from qjax.models.clip_vision import checkpoint_keys as vision_keys

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

START, END = "<|startoftext|>", "<|endoftext|>"
LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
TOKENS = [START, END, *LETTERS, *(letter + "</w>" for letter in LETTERS)]
SIDE = 12
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 4,
}
TEXT = {
    "vocab_size": len(TOKENS),
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 9,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


@pytest.fixture(scope="module")
def theirs():
    """Transformers' model, every parameter drawn."""
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=10)
    model = transformers.CLIPModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 0.3 * noise + (1.0 if parameter.ndim == 1 else 0.0)
    return model


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    """Its folder, as transformers writes it, with a tokenizer of letters."""
    folder = tmp_path_factory.mktemp("clip")
    theirs.save_pretrained(folder)
    vocabulary = {token: i for i, token in enumerate(TOKENS)}
    settings = {"model_max_length": 9, "pad_token": END, "tokenizer_class": "CLIPTokenizer"}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def pictures(b=3, h=SIDE, w=SIDE, c=3):
    return np.random.default_rng(0).integers(0, 256, (b, h, w, c), np.uint8)


def test_image_embeddings_are_those_of_transformers(theirs, folder):
    scorer = load_clip(folder)
    x = np.random.default_rng(1).standard_normal((3, SIDE, SIDE, 3)).astype(np.float32)
    with torch.no_grad():
        pooled = theirs.vision_model(torch.from_numpy(x.transpose(0, 3, 1, 2))).pooler_output
        expected = theirs.visual_projection(pooled).numpy()
    model = CLIPVisionModelWithProjection(scorer.vision)
    found = jax.jit(model.apply)({"params": scorer.params}, x)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_scores_are_those_of_transformers_model_and_image_processor(theirs, folder):
    pil = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    processor = pil.CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    scorer, images, texts = load_clip(folder), pictures(4, 31, 23), ["a cat", "dog", "", "b o x"]
    ids = scorer.tokenizer(texts, padding="max_length", max_length=9, return_tensors="pt")
    pixels = processor(list(images), return_tensors="pt", input_data_format="channels_last")
    with torch.no_grad():
        out = theirs(input_ids=ids["input_ids"], pixel_values=pixels["pixel_values"])
        cosine = (out.image_embeds * out.text_embeds).sum(-1).numpy()
    assert (cosine > 0).all()
    np.testing.assert_allclose(clip_scores(scorer, images, texts), 100 * cosine, atol=0.01)
    away = jax.tree.map(np.negative, scorer.params["visual_projection"])
    opposite = dataclasses.replace(scorer, params={**scorer.params, "visual_projection": away})
    np.testing.assert_array_equal(clip_scores(opposite, images, texts), 0)


def test_grey_pictures_count_as_colour(folder):
    grey = pictures(2, 20, 20, 1)
    np.testing.assert_array_equal(prepared(grey, 8), prepared(np.repeat(grey, 3, axis=-1), 8))


@pytest.mark.slow
def test_a_pickle_of_the_weights_is_read_where_there_is_nothing_else(theirs, folder, tmp_path):
    for name in ("config.json", "vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    buffers = {"text_model.embeddings.position_ids": torch.arange(9)[None]}
    torch.save({**theirs.state_dict(), **buffers}, tmp_path / "pytorch_model.bin")
    ours, same = load_clip(tmp_path), load_clip(folder)
    equal = jax.tree.map(np.array_equal, ours.params, same.params)
    assert all(jax.tree.leaves(equal)) and ours.sha256 != same.sha256


def test_every_key_is_used_and_strange_ones_are_named(folder, tmp_path):
    from qjax.core.safetensors_io import open_tensors, write_tensors

    for name in ("config.json", "vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    tensors = {key: t.read() for key, t in open_tensors(folder / "model.safetensors").items()}
    tensors["vision_model.extra.weight"] = tensors.pop("visual_projection.weight")
    write_tensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ValueError, match=r"visual_projection\.weight.*vision_model\.extra"):
        load_clip(tmp_path)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("config.json", {"model_type": "siglip"}, "must hold a CLIPModel.*'siglip'"),
        ("preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5]}, "image_mean"),
        ("preprocessor_config.json", {"do_center_crop": False}, "do_center_crop=False"),
        ("preprocessor_config.json", {"size": {"height": 8, "width": 8}}, "size=.*another CLIP"),
        ("preprocessor_config.json", {"crop_size": SIDE + 1}, "crop_size"),
    ],
)
def test_other_models_and_other_preprocessing_are_refused(folder, tmp_path, name, changes, message):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / name
    said = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(said | changes))
    with pytest.raises(ValueError, match=message):
        load_clip(tmp_path)


def test_the_processor_that_transformers_writes_is_accepted(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    transformers.CLIPImageProcessor(**size).save_pretrained(tmp_path)
    assert load_clip(tmp_path).sha256 == load_clip(folder).sha256


def test_broken_json_is_named(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"preprocessor_config\.json is not valid JSON"):
        load_clip(tmp_path)


def test_as_many_texts_as_pictures_are_needed_and_uint8(folder):
    scorer = load_clip(folder)
    with pytest.raises(ValueError, match="every picture needs a text"):
        clip_scores(scorer, pictures(2), ["one"])
    with pytest.raises(TypeError, match="must be uint8"):
        clip_scores(scorer, pictures(1).astype(np.float32), ["one"])


def test_the_published_towers_have_their_published_size():
    """OpenAI's ViT-B/32 and ViT-L/14, with their projections."""
    size = lambda config: sum(np.prod(t.shape) for t in vision_keys(config).values())
    assert size(CLIPVisionConfig()) == 87_849_216
    large = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        patch_size=14,
        projection_dim=768,
    )
    assert size(large) == 303_966_208


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"hidden_size": 0}, "hidden_size=0"),
        ({"num_attention_heads": 5}, "must divide"),
        ({"hidden_act": "relu"}, "'relu'"),
        ({"num_hidden_layers": 2**31}, "num_hidden_layers=2147483648"),
        ({"hidden_size": True}, "hidden_size=True"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps='small'"),
        ({"image_size": 2**20, "patch_size": 1}, "65,536 patches"),
    ],
)
def test_configs_that_make_no_sense_are_refused(changes, word):
    with pytest.raises(ValueError, match=word):
        CLIPVisionConfig(**changes)


def test_pictures_of_another_size_are_refused():
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION))
    with pytest.raises(ValueError, match=r"\[b, 12, 12, 3\]"):
        model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
