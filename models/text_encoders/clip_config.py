"""Settings of `qjax.models.text_encoders.clip`, under the names of transformers' config."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
from flax import linen as nn

from qjax.core.typing import Array
from qjax.models.config_values import value_problems


def quick_gelu(x: Array) -> Array:
    """`x * sigmoid(1.702 x)`, the approximation of GELU that OpenAI's CLIP was trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
}
"""The activations of published CLIP text towers, by their names in the configs."""

LEGACY_EOS_TOKEN_ID = 2
"""What configs from before the summer of 2023 say, wrongly; it means: the largest id."""

MODEL_TYPE = "clip_text_model"
_WITHOUT, _WITH = "CLIPTextModel", "CLIPTextModelWithProjection"

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
# What a config says for training, for generating text, and for the tokenizer.
_INERT_KEYS = """
    _class_name _name_or_path add_cross_attention architectures attention_dropout bad_words_ids
    begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dropout dtype early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label initializer_factor
    initializer_range is_decoder is_encoder_decoder label2id length_penalty max_length
    min_length model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_scores pad_token_id prefix problem_type
    pruned_heads remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p torch_dtype torchscript
    transformers_version typical_p use_bfloat16 use_cache
"""


class CLIPTowerConfig(Protocol):
    """What the layers of a text tower and of a vision tower read of its config."""

    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def hidden_act(self) -> str: ...
    @property
    def layer_norm_eps(self) -> float: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPTextConfig:
    """Sizes of a CLIP text tower; the defaults are those of transformers.

    Attributes:
      vocab_size: Rows of the table of tokens.
      hidden_size: Width of a token, `d`.
      intermediate_size: Width inside an MLP.
      projection_dim: Width of the projected text embedding; not used `with_projection=False`.
      num_hidden_layers: Layers.
      num_attention_heads: Attention heads; must divide `hidden_size`.
      max_position_embeddings: Rows of the table of positions: the longest text, in tokens.
      hidden_act: A key of `ACTIVATIONS`.
      layer_norm_eps: Epsilon of every normalisation.
      eos_token_id: Token whose first place is pooled; 2 pools at the largest id instead, as
        configs with this historical mistake need it.
      with_projection: Whether the model is a `CLIPTextModelWithProjection`.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int | None = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407
    with_projection: bool = False

    def __post_init__(self):
        _raise(_problems(vars(self)))

    @classmethod
    def from_transformers(cls, config: Mapping[str, Any]) -> "CLIPTextConfig":
        """The settings in the `config.json` of a transformers CLIP text model.

        `architectures` tells whether there is a projection. Missing keys take transformers'
        defaults; settings for training, generation and the tokenizer are not read.

        Raises:
          ValueError: Naming every key and every value that this port does not have.
        """
        fields = {field.name: field.default for field in dataclasses.fields(cls)}
        del fields["with_projection"]  # not a key of theirs
        problems = [
            f"{key}={value!r} (unknown key)"
            for key, value in config.items()
            if key not in fields and key not in _INERT_KEYS.split() and value is not None
        ]
        if config.get("model_type", MODEL_TYPE) != MODEL_TYPE:
            problems.append(f"model_type={config['model_type']!r} (only {MODEL_TYPE!r})")
        names = config.get("architectures") or [_WITHOUT]
        if names not in ([_WITHOUT], [_WITH]):
            problems.append(f"architectures={names!r} (only [{_WITHOUT!r}] or [{_WITH!r}])")
        values = {key: config.get(key, default) for key, default in fields.items()}
        values["with_projection"] = names == [_WITH]
        problems += _problems(values)
        said = {problem.partition("=")[0] for problem in problems}
        more = value_problems(cls, values)
        _raise(problems + [one for one in more if one.partition("=")[0] not in said])
        return cls(**values)

    def to_transformers(self) -> dict[str, Any]:
        """The `config.json` that transformers' CLIP text models read."""
        values = dataclasses.asdict(self)
        name = _WITH if values.pop("with_projection") else _WITHOUT
        return {"architectures": [name], "model_type": MODEL_TYPE} | values

    @classmethod
    def clip_l(cls) -> "CLIPTextConfig":
        """CLIP ViT-L/14 of Stable Diffusion 1 and, as its first tower, XL (123,060,480)."""
        return cls(
            hidden_size=768,
            intermediate_size=3072,
            projection_dim=768,
            num_attention_heads=12,
            eos_token_id=LEGACY_EOS_TOKEN_ID,
        )

    @classmethod
    def openclip_h(cls) -> "CLIPTextConfig":
        """OpenCLIP ViT-H/14 of Stable Diffusion 2, without its last layer (340,387,840)."""
        return cls(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=23,
            num_attention_heads=16,
            hidden_act="gelu",
            eos_token_id=LEGACY_EOS_TOKEN_ID,
        )

    @classmethod
    def openclip_bigg(cls) -> "CLIPTextConfig":
        """OpenCLIP ViT-bigG/14, the second tower of Stable Diffusion XL (694,659,840)."""
        return cls(
            hidden_size=1280,
            intermediate_size=5120,
            projection_dim=1280,
            num_hidden_layers=32,
            num_attention_heads=20,
            hidden_act="gelu",
            eos_token_id=LEGACY_EOS_TOKEN_ID,
            with_projection=True,
        )


def _problems(values: Mapping[str, Any]) -> list[str]:
    """Every setting that the port cannot follow, as `key=value (what it can)`."""
    sizes = _SIZES if values["projection_dim"] is None else (*_SIZES, "projection_dim")
    found = [
        f"{key}={values[key]!r} (a positive integer)"
        for key in sizes
        if not _is_integer(values[key], least=1)
    ]
    if values["with_projection"] and values["projection_dim"] is None:
        found.append("projection_dim=None (a model with a projection needs its width)")
    if not _is_integer(values["eos_token_id"], least=0):
        found.append(f"eos_token_id={values['eos_token_id']!r} (one token's id)")
    if not isinstance(values["layer_norm_eps"], int | float):
        found.append(f"layer_norm_eps={values['layer_norm_eps']!r} (a number)")
    if values["hidden_act"] not in tuple(ACTIVATIONS):
        names = ", ".join(map(repr, ACTIVATIONS))
        found.append(f"hidden_act={values['hidden_act']!r} (one of {names})")
    width, heads = values["hidden_size"], values["num_attention_heads"]
    if _is_integer(width, least=1) and _is_integer(heads, least=1) and width % heads:
        found.append(f"num_attention_heads={heads} with hidden_size={width} (must divide it)")
    return found


def _is_integer(value: Any, *, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _raise(problems: list[str]) -> None:
    if problems:
        raise ValueError(
            "The CLIP text model is not available with these settings: " + "; ".join(problems) + "."
        )
