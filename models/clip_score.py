"""CLIP score: how well pictures match their texts, `100 max(cos(image, text), 0)`.

Both embeddings come from one `CLIPModel` in a transformers folder: `config.json`, its weights, and
the files of its tokenizer. Pictures are resized as that model's image processor does: rounded to
8 bits, the shorter side by Pillow's bicubic filter to the model's size, the middle cut out,
scaled by the mean and deviation of CLIP's pictures. Scores of two models, ViT-B/32 and ViT-L/14
for example, cannot be compared: name it.

References:
  Hessel et al., CLIPScore, 2021, https://arxiv.org/abs/2104.08718, who weigh by 2.5; 100 is what
  the literature of diffusion models and torchmetrics have.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from qjax.core.places import local_path
from qjax.core.plain_json import read_json
from qjax.core.typing import Array, Float, Int, Params, UInt8
from qjax.models.clip_vision import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    checkpoint_keys,
)
from qjax.models.convert import convert, load_checkpoint
from qjax.models.text_encoders import clip_keys
from qjax.models.text_encoders.clip import CLIPTextModelWithProjection
from qjax.models.text_encoders.clip_config import CLIPTextConfig
from qjax.models.text_encoders.tokenizers import encode_prompts, load_tokenizer
from qjax.models.weight_files import file_sha256, read_weights

__all__ = ["CLIPScorer", "clip_scores", "load_clip", "prepared"]

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
BICUBIC = 3
STEM = "model"
PICKLE = "pytorch_model.bin"


@dataclass(frozen=True, kw_only=True, eq=False)
class CLIPScorer:
    """Both towers of a CLIP model with its tokenizer.

    Attributes:
      vision: Config of the vision tower.
      text: Config of the text tower.
      params: Of both, float32.
      tokenizer: As `tokenizers.load_tokenizer` gives it.
      sha256: Of the file of weights, or of several files' hashes in the order of their names.
    """

    vision: CLIPVisionConfig
    text: CLIPTextConfig
    params: Params = field(repr=False)
    tokenizer: Any = field(repr=False)
    sha256: str


def load_clip(folder: Path | str) -> CLIPScorer:
    """The CLIP model of a transformers folder; nothing is downloaded.

    Weights are read from `model.safetensors` (single or in shards) or, where that is missing,
    from `pytorch_model.bin` through the restricted reader of pickles.

    Raises:
      FileNotFoundError: If the folder, its config, weights or tokenizer are missing.
      ValueError: If it is another kind of model, or does not fit the port; all keys are named.
    """
    folder = local_path(folder)
    if (folder / PICKLE).is_file() and not list(folder.glob(f"{STEM}*.safetensors")):
        tensors: Mapping[str, Any] = read_weights(folder / PICKLE).tensors
        files: tuple[Path, ...] = (folder / PICKLE,)
        config: Mapping[str, Any] = read_json(folder / "config.json")
    else:
        checkpoint = load_checkpoint(folder, stem=STEM)
        tensors, files, config = checkpoint, checkpoint.files, checkpoint.config
    if config.get("model_type") != "clip":
        raise ValueError(
            f"{folder} must hold a CLIPModel, model_type 'clip'; got {config.get('model_type')!r}."
        )
    vision, text = _towers(config)
    _check_processor(folder, vision.image_size)
    params = convert(
        tensors,
        checkpoint_keys(vision) | clip_keys.checkpoint_keys(text),
        dtype=np.float32,
        require_finite=True,
        # The scale of the contrastive loss, and buffers that count from 0.
        allow_unexpected=("logit_scale", r".*\.position_ids"),
    )
    digests = [file_sha256(file) for file in sorted(files)]
    return CLIPScorer(
        vision=vision,
        text=text,
        params=params,
        tokenizer=load_tokenizer(folder),
        sha256=digests[0] if len(digests) == 1 else " ".join(digests),
    )


def _towers(config: Mapping[str, Any]) -> tuple[CLIPVisionConfig, CLIPTextConfig]:
    """The configs of both towers in that of a `CLIPModel`."""
    width, of_text = config.get("projection_dim", 512), config.get("text_config") or {}
    if not isinstance(of_text, Mapping):
        raise ValueError(f"text_config must be a mapping; got {of_text!r:.80}.")
    named = {"architectures": ["CLIPTextModelWithProjection"], "projection_dim": width}
    return (
        CLIPVisionConfig.from_transformers(config.get("vision_config") or {}, width),
        CLIPTextConfig.from_transformers({**of_text, **named}),
    )


def _check_processor(folder: Path, side: int) -> None:
    """That the folder's image processor, if it has one, does what `prepared` does."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return
    said = read_json(path)
    # Each has several spellings.
    ours: dict[str, tuple[Any, ...]] = {
        "image_mean": (list(MEAN),),
        "image_std": (list(STD),),
        "resample": (BICUBIC,),
        "size": (side, {"shortest_edge": side}),
        "crop_size": (side, {"height": side, "width": side}),
        **{f"do_{what}": (True,) for what in ("resize", "center_crop", "rescale", "normalize")},
    }
    wrong = [key for key in ours if said.get(key) is not None and said[key] not in ours[key]]
    if wrong:
        raise ValueError(
            f"{path} asks for {', '.join(f'{key}={said[key]!r}' for key in wrong)}; only CLIP's own "
            f"{', '.join(f'{key}={ours[key][0]!r}' for key in wrong)} is known. Take another CLIP "
            "model."
        )


def prepared(images: UInt8[np.ndarray, "b h w c"], side: int) -> Float[np.ndarray, "b s s 3"]:
    """Pictures as CLIP's vision tower wants them, `side` pixels a side; grey ones as colour.

    Raises:
      TypeError: If the pictures are not uint8.
    """
    if images.dtype != np.uint8:
        raise TypeError(f"images must be uint8; got {images.dtype}. Round 255 times the picture.")
    height, width = images.shape[1:3]
    short = min(height, width)
    size = int(side * width / short), int(side * height / short)
    left, top = ((length - side) // 2 for length in size)
    colour = np.broadcast_to(images, (*images.shape[:3], 3))
    resized = [
        np.asarray(
            Image.fromarray(np.ascontiguousarray(one)).resize(size, Image.Resampling.BICUBIC)
        )
        for one in colour
    ]
    cut = np.stack(resized)[:, top : top + side, left : left + side]
    mean, std = (np.asarray(values, np.float32) for values in (MEAN, STD))
    return (cut.astype(np.float32) / 255 - mean) / std


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scores(
    vision: CLIPVisionConfig,
    text: CLIPTextConfig,
    params: Params,
    images: Float[Array, "b s s 3"],
    ids: Int[Array, "b t"],
) -> Float[Array, " b"]:
    of_images: Any = CLIPVisionModelWithProjection(vision).apply({"params": params}, images)
    said: Any = CLIPTextModelWithProjection(text).apply({"params": params}, ids)
    cosine = jnp.sum(_unit(of_images) * _unit(said.text_embeds), axis=-1)
    return 100.0 * jnp.maximum(cosine, 0.0)


def _unit(x: Float[Array, "b p"]) -> Float[Array, "b p"]:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def clip_scores(
    scorer: CLIPScorer, images: UInt8[np.ndarray, "b h w c"], prompts: Sequence[str]
) -> Float[Array, " b"]:
    """CLIP score of each picture with its text, 0 to 100.

    Texts that are longer than the model's window are cut, with a warning. Computed in float32
    whatever the device's default precision.

    Raises:
      TypeError: If the pictures are not uint8.
      ValueError: If there are not as many texts as pictures.
    """
    if len(images) != len(prompts):
        raise ValueError(f"every picture needs a text; got {len(images)} and {len(prompts)}.")
    ids = jnp.asarray(encode_prompts(scorer.tokenizer, prompts))
    pixels = prepared(images, scorer.vision.image_size)
    with jax.default_matmul_precision("float32"):
        return _scores(scorer.vision, scorer.text, scorer.params, jnp.asarray(pixels), ids)
