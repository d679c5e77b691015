"""Settings of `qjax.models.unet2d_condition`, named as diffusers' `UNet2DConditionModel` names them.

Many settings are one value for all levels or a list with one for each, from the largest size
to the smallest; `qjax.models.unet2d_condition_plan` spells them out block by block.

**`attention_head_dim` is the number of heads** of the transformers, and not their width: the
name is diffusers' historical mistake, kept for the sake of the files that carry it. Only the
blocks of plain self-attention (`AttnDownBlock2D`, `AttnUpBlock2D`) read it as a width.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from qjax.models.config_values import depth_problems, value_problems, with_defaults
from qjax.models.resnet import ACTIVATIONS

# Block type -> its attention, and how it halves or doubles.
BlockKind = tuple[Literal["cross", "self"] | None, Literal["conv", "resnet"]]
DOWN_BLOCKS: dict[str, BlockKind] = {
    "CrossAttnDownBlock2D": ("cross", "conv"),
    "DownBlock2D": (None, "conv"),
    "AttnDownBlock2D": ("self", "conv"),
    "ResnetDownsampleBlock2D": (None, "resnet"),
}
UP_BLOCKS: dict[str, BlockKind] = {
    "CrossAttnUpBlock2D": ("cross", "conv"),
    "UpBlock2D": (None, "conv"),
    "AttnUpBlock2D": ("self", "conv"),
    "ResnetUpsampleBlock2D": (None, "resnet"),
}
_CHOICES: dict[str, tuple[Any, ...]] = {
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
    "downsample_padding": (0, 1),
    "act_fn": tuple(ACTIVATIONS),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None, "timestep", "identity", "projection"),
    "addition_embed_type": (None, "text_time"),
}
# Settings with one value that there is a port of; null says the same.
_FIXED: dict[str, Any] = {
    "attention_type": "default",
    "class_embeddings_concat": False,
    "cross_attention_norm": None,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "num_attention_heads": None,
    "resnet_skip_time_act": False,
    "time_embedding_act_fn": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}
# Settings that have no effect when sampling, or only beside values that are refused.
_IDLE: dict[str, Any] = {
    "addition_embed_type_num_heads": 64,
    "dropout": 0.0,
    "mid_block_only_cross_attention": None,
}
_PER_LEVEL = (
    "layers_per_block",
    "attention_head_dim",
    "transformer_layers_per_block",
    "reverse_transformer_layers_per_block",
    "only_cross_attention",
)
_FLAGS = (
    "center_input_sample",
    "flip_sin_to_cos",
    "upcast_attention",
    "use_linear_projection",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNet2DConditionConfig:
    """Settings of a `UNet2DConditionModel`; the defaults are those of diffusers.

    "Per level": one value for all, or a tuple with one for each entry of `block_out_channels`.

    Attributes:
      sample_size: Height and width for which the model was trained; it runs at others too.
      in_channels: Channels of the input.
      out_channels: Channels of the output.
      center_input_sample: Whether the input is in [0, 1] and is mapped to [-1, 1] first.
      flip_sin_to_cos: Whether cosines come first in the embedding of t.
      freq_shift: 1 as in DDPM, 0 as in latent diffusion.
      down_block_types: Keys of `DOWN_BLOCKS`, from the largest size to the smallest.
      mid_block_type: `"UNetMidBlock2DCrossAttn"`; `"UNetMidBlock2D"`, here one ResNet block;
        or None for no mid block.
      up_block_types: Keys of `UP_BLOCKS`, from the smallest size to the largest.
      only_cross_attention: Per level, whether self-attention looks at the text too (not in the
        mid block).
      block_out_channels: Channels at each size; multiples of `norm_num_groups`.
      layers_per_block: Per level, ResNet blocks in a down block; an up block has one more.
      downsample_padding: 1 pads every side before a halving convolution, 0 only the
        bottom and the right.
      mid_block_scale_factor: Sums in the mid block's ResNet blocks are divided by it.
      act_fn: A key of `qjax.models.resnet.ACTIVATIONS`.
      norm_num_groups: Groups of every group normalisation.
      norm_eps: Epsilon of those in ResNet blocks and of the last one.
      cross_attention_dim: Width of a text token.
      transformer_layers_per_block: Per level, transformer blocks after each ResNet block; an
        entry may be a tuple with one number for each ResNet block.
      reverse_transformer_layers_per_block: The same for the up blocks, from the smallest size
        to the largest; None mirrors the down blocks.
      attention_head_dim: Per level, the number of heads; see the head of this file.
      use_linear_projection: Whether transformers begin and end with a linear map rather than
        with a 1x1 convolution; the function is the same, the checkpoint is not.
      class_embed_type: None: a table if `num_class_embeds` is set; `"timestep"`: labels go
        through the embedding of t and an MLP; `"projection"`: vectors through an MLP;
        `"identity"`: labels are the vectors.
      addition_embed_type: `"text_time"` adds an MLP of the pooled text and of six sizes, as in
        SDXL, to the time vector.
      addition_time_embed_dim: Width of the embedding of one of those sizes.
      num_class_embeds: Rows of the table of class embeddings.
      upcast_attention: Whether queries and keys are multiplied in float32 too.
      resnet_time_scale_shift: How the time vector enters a ResNet block: `"default"` adds
        it, `"scale_shift"` also scales.
      resnet_out_scale_factor: Divides the sums in blocks that resample by ResNet blocks.
      time_embedding_dim: Width of the time vector; None: `4 * block_out_channels[0]`.
      time_cond_proj_dim: Width of an embedding of the guidance scale that is added to that of
        t, as latent consistency models do; None for none.
      conv_in_kernel: Height and width of the first convolution, odd.
      conv_out_kernel: Height and width of the last convolution, odd.
      projection_class_embeddings_input_dim: Width of what goes into the MLP of
        `class_embed_type="projection"`, or of `addition_embed_type="text_time"`.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int | tuple[int | tuple[int, ...], ...] = 1
    reverse_transformer_layers_per_block: tuple[int | tuple[int, ...], ...] | None = None
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    class_embed_type: str | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    num_class_embeds: int | None = None
    upcast_attention: bool = False
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    resnet_out_scale_factor: float = 1.0
    time_embedding_dim: int | None = None
    time_cond_proj_dim: int | None = None
    conv_in_kernel: int = 3
    conv_out_kernel: int = 3
    projection_class_embeddings_input_dim: int | None = None

    def __post_init__(self):
        _raise(_problems(vars(self)))

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> "UNet2DConditionConfig":
        """The settings in the `config.json` of a diffusers `UNet2DConditionModel`.

        Missing keys take diffusers' defaults. What does nothing when sampling is not read;
        keys that start with `_` are the library's own notes.

        Raises:
          ValueError: Naming every key and every value that this port does not have.
        """
        fields: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(cls)}
        given = {k: _frozen(v) for k, v in config.items() if not k.startswith("_")}
        refused = [
            f"{key}={value!r} (only {_FIXED[key]!r})"
            if key in _FIXED
            else f"{key}={value!r} (unknown key)"
            for key, value in given.items()
            if key not in fields and key not in _IDLE and value not in (None, _FIXED.get(key))
        ]
        values = fields | {key: value for key, value in given.items() if key in fields}
        values |= {key: bool(values[key]) for key in _FLAGS}  # published files have null for no
        width = values["cross_attention_dim"]
        if isinstance(width, tuple) and width and all(one == width[0] for one in width):
            values["cross_attention_dim"] = width[0]
        wrong = refused + value_problems(cls, values)
        values = with_defaults(cls, values)
        for key in ("down_block_types", "up_block_types"):
            values[key] = tuple(name.removeprefix("UNetRes") for name in values[key])
        values["act_fn"] = values["act_fn"].lower()
        _raise(wrong + _problems(values))
        return cls(**values)

    def to_diffusers(self) -> dict[str, Any]:
        """The `config.json` that diffusers' `UNet2DConditionModel` reads."""
        values = {f.name: _listed(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {"_class_name": "UNet2DConditionModel"} | _FIXED | _IDLE | values

    @classmethod
    def sd_v1_4(cls) -> "UNet2DConditionConfig":
        """Stable Diffusion v1.1 to v1.5 (CompVis/stable-diffusion-v1-4; 859,520,964 parameters)."""
        return cls(sample_size=64, cross_attention_dim=768)

    @classmethod
    def sd_v2_1(cls) -> "UNet2DConditionConfig":
        """Stable Diffusion v2.1 at 768 (stabilityai/stable-diffusion-2-1; 865,910,724)."""
        return cls(
            sample_size=96,
            cross_attention_dim=1024,
            attention_head_dim=(5, 10, 20, 20),
            use_linear_projection=True,
            upcast_attention=True,
        )

    @classmethod
    def sdxl(cls) -> "UNet2DConditionConfig":
        """Stable Diffusion XL 1.0 (stabilityai/stable-diffusion-xl-base-1.0; 2,567,463,684)."""
        return cls(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
            cross_attention_dim=2048,
            attention_head_dim=(5, 10, 20),
            transformer_layers_per_block=(1, 2, 10),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )

    @classmethod
    def ldm4_imagenet(cls) -> "UNet2DConditionConfig":
        """LDM-4 on the 64x64 latents of ImageNet (LDM, table 13; 400,920,579 parameters).

        One head everywhere; the text is one token, the 512-wide embedding of the class.
        """
        return cls(
            sample_size=64,
            in_channels=3,
            out_channels=3,
            block_out_channels=(192, 384, 576, 960),
            down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 3,
            up_block_types=("CrossAttnUpBlock2D",) * 3 + ("UpBlock2D",),
            cross_attention_dim=512,
            attention_head_dim=1,
        )

    @property
    def time_dim(self) -> int:
        """Width of the time vector."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    @property
    def size_multiple(self) -> int:
        """Height and width that are multiples of it are halved without a remainder."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def conditioning(self) -> tuple[str, ...]:
        """The fields of `Conditioning` that the model needs; `mask` may come with `text`."""
        blocks = (*self.down_block_types, self.mid_block_type, *self.up_block_types)
        needs = {
            "text": any("CrossAttn" in (name or "") for name in blocks),
            "pooled": self.addition_embed_type is not None,
            "time_ids": self.addition_embed_type is not None,
            "labels": self.class_embed_type is not None or self.num_class_embeds is not None,
            "guidance": self.time_cond_proj_dim is not None,
        }
        return tuple(name for name, needed in needs.items() if needed)

    @property
    def time_vector_is_of_t_alone(self) -> bool:
        """Whether the time vector depends on t and on nothing else, as in SD 1 and 2 and LDM."""
        return set(self.conditioning) <= {"text"}


def _frozen(value: Any) -> Any:
    """`value` with tuples for lists, at every depth."""
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _listed(value: Any) -> Any:
    """`value` with lists for tuples, at every depth."""
    return list(map(_listed, value)) if isinstance(value, tuple) else value


def per_level(value: Any, n: int) -> tuple[Any, ...]:
    """The entries of a setting for `n` levels: those of a tuple, or one value for all."""
    return value if isinstance(value, tuple) else (value,) * n


def _problems(values: Mapping[str, Any]) -> list[str]:
    """Every setting that the port cannot follow, as `key=value (what it can)`."""
    found = [
        f"{key}={values[key]!r} (one of {', '.join(map(repr, choices))})"
        for key, choices in _CHOICES.items()
        if values[key] not in choices
    ]
    for key, table in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
        wrong = sorted(set(values[key]) - table.keys())
        found += [f"{key} has {name!r} (one of {', '.join(table)})" for name in wrong]
    groups, channels = values["norm_num_groups"], values["block_out_channels"]
    if groups is None or any(c % groups for c in channels):
        found.append(
            f"norm_num_groups={groups} with block_out_channels={channels} (must divide them all)"
        )
    if not isinstance(values["cross_attention_dim"], int):
        width = values["cross_attention_dim"]
        found.append(f"cross_attention_dim={width!r} (one number, for there is one text)")
    if any(values[key] % 2 == 0 for key in ("conv_in_kernel", "conv_out_kernel")):
        kernels = values["conv_in_kernel"], values["conv_out_kernel"]
        found.append(f"conv_in_kernel, conv_out_kernel={kernels} (odd numbers)")
    return found + _length_problems(values) + _vector_problems(values)


def _length_problems(values: Mapping[str, Any]) -> list[str]:
    """Lists of the wrong length, and heads that are no numbers."""
    n, found = len(values["block_out_channels"]), []
    for key in ("down_block_types", "up_block_types", *_PER_LEVEL):
        value = values[key]
        if isinstance(value, tuple) and len(value) != n:
            found.append(f"{key} of {len(value)} entries (as many as block_out_channels, {n})")
    if found:
        return found
    heads = per_level(values["attention_head_dim"], n)
    if not all(isinstance(h, int) and 1 <= h <= min(values["block_out_channels"]) for h in heads):
        found.append(
            f"attention_head_dim={values['attention_head_dim']!r} (numbers of heads, at least 1)"
        )
    layers = per_level(values["layers_per_block"], n)
    found += depth_problems(2 * sum(layers) + n)
    down = per_level(values["transformer_layers_per_block"], n)
    up = values["reverse_transformer_layers_per_block"]
    if up is None and any(isinstance(depth, tuple) for depth in down):
        why = f"a list, for there are lists in transformer_layers_per_block={down}"
        return [*found, f"reverse_transformer_layers_per_block=None ({why})"]
    if not isinstance(up, tuple | None):
        return [*found, f"reverse_transformer_layers_per_block={up!r} (a list, or null)"]
    for key, depths, counts in (
        ("transformer_layers_per_block", down, layers),
        ("reverse_transformer_layers_per_block", up or (), [n + 1 for n in layers[::-1]]),
    ):
        found += [
            f"{key} has {depth!r} (one number for each of {count} ResNet blocks)"
            for depth, count in zip(depths, counts, strict=bool(depths))
            if isinstance(depth, tuple) and len(depth) != count
        ]
    counts = [
        sum(depth) if isinstance(depth, tuple) else depth * (count + 1)
        for depths in (down, up or down)
        for depth, count in zip(depths, layers, strict=True)
    ]
    return found + depth_problems(0, sum(counts))


def _vector_problems(values: Mapping[str, Any]) -> list[str]:
    """Widths that are missing for what is added to the time vector."""
    needs = []
    if values["class_embed_type"] == "projection" or values["addition_embed_type"] is not None:
        needs.append("projection_class_embeddings_input_dim")
    if values["addition_embed_type"] is not None:
        needs.append("addition_time_embed_dim")
    return [
        f"{key}=None (a number, for class_embed_type={values['class_embed_type']!r} and "
        f"addition_embed_type={values['addition_embed_type']!r})"
        for key in needs
        if values[key] is None
    ]


def _raise(problems: list[str]) -> None:
    if problems:
        raise ValueError(
            "UNet2DConditionModel is not available with these settings: "
            + "; ".join(problems)
            + "."
        )
