"""Settings of `qjax.models.unet2d`, under the names that diffusers' `UNet2DModel` uses."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from qjax.models.config_values import depth_problems, value_problems, with_defaults
from qjax.models.resnet import ACTIVATIONS

# Block type -> whether it has attention, and how it resamples: `conv`, `resnet`, or None
# for what `downsample_type` or `upsample_type` says.
DOWN_BLOCKS: dict[str, tuple[bool, str | None]] = {
    "DownBlock2D": (False, "conv"),
    "ResnetDownsampleBlock2D": (False, "resnet"),
    "AttnDownBlock2D": (True, None),
}
UP_BLOCKS: dict[str, tuple[bool, str | None]] = {
    "UpBlock2D": (False, "conv"),
    "ResnetUpsampleBlock2D": (False, "resnet"),
    "AttnUpBlock2D": (True, None),
}
_CHOICES: dict[str, tuple[Any, ...]] = {
    "time_embedding_type": ("positional", "fourier", "learned"),
    "mid_block_type": ("UNetMidBlock2D", None),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
    "act_fn": tuple(ACTIVATIONS),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None, "timestep", "identity"),
}
_TUPLES = ("sample_size", "down_block_types", "up_block_types", "block_out_channels")


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNet2DConfig:
    """Settings of a `UNet2DModel`; the defaults are those of diffusers.

    Attributes:
      sample_size: Height and width for which the model was trained; it runs at others too.
      in_channels: Channels of the input.
      out_channels: Channels of the output.
      center_input_sample: Whether the input is in [0, 1] and is mapped to [-1, 1] first.
      time_embedding_type: `TimeProjection` lists them.
      time_embedding_dim: Width of the time vector; None: `4 * block_out_channels[0]`.
      freq_shift: 1 as in DDPM, 0 as in latent diffusion; positional embedding only.
      flip_sin_to_cos: Whether cosines come first; positional embedding only.
      down_block_types: Keys of `DOWN_BLOCKS`, from the largest size to the smallest.
      mid_block_type: `"UNetMidBlock2D"`, or None for no mid block.
      up_block_types: Keys of `UP_BLOCKS`, from the smallest size to the largest.
      block_out_channels: Channels at each size; multiples of `norm_num_groups`.
      layers_per_block: ResNet blocks in a down block; an up block has one more.
      mid_block_scale_factor: Sums in the mid block are divided by it.
      downsample_padding: 1 pads every side before a halving convolution, 0 only the
        bottom and the right.
      downsample_type: How down blocks with attention halve: `"conv"` or `"resnet"`.
      upsample_type: How up blocks with attention double: `"conv"` or `"resnet"`.
      act_fn: A key of `qjax.models.resnet.ACTIVATIONS`.
      attention_head_dim: Width of a head; None: one head for all channels.
      norm_num_groups: Groups of every normalisation.
      attn_norm_num_groups: Groups of the normalisation in the mid block's attention; None:
        `norm_num_groups`, but no normalisation at all under `"scale_shift"`.
      norm_eps: Epsilon of every normalisation.
      resnet_time_scale_shift: How the time vector enters a ResNet block: `"default"` adds
        it, `"scale_shift"` also scales.
      add_attention: Whether the mid block has attention.
      class_embed_type: None: a table if `num_class_embeds` is set; `"timestep"`: labels go
        through the time projection and an MLP; `"identity"`: labels are the vectors.
      num_class_embeds: Rows of the table of class embeddings.
      num_train_timesteps: Rows of the table of a learned time embedding.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    time_embedding_type: Literal["positional", "fourier", "learned"] = "positional"
    time_embedding_dim: int | None = None
    freq_shift: float = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ("DownBlock2D",) + ("AttnDownBlock2D",) * 3
    mid_block_type: Literal["UNetMidBlock2D"] | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D",) * 3 + ("UpBlock2D",)
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1
    downsample_padding: int = 1
    downsample_type: Literal["conv", "resnet"] = "conv"
    upsample_type: Literal["conv", "resnet"] = "conv"
    act_fn: str = "silu"
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    add_attention: bool = True
    class_embed_type: Literal["timestep", "identity"] | None = None
    num_class_embeds: int | None = None
    num_train_timesteps: int | None = None

    def __post_init__(self):
        _raise(_problems(vars(self)))

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> "UNet2DConfig":
        """The settings in the `config.json` of a diffusers `UNet2DModel`.

        Missing keys take diffusers' defaults. `dropout` is not read, for it does nothing
        when sampling; keys that start with `_` are the library's own notes.

        Raises:
          ValueError: Naming every key and every value that this port does not have.
        """
        fields: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(cls)}
        given = {k: v for k, v in config.items() if not k.startswith("_") and k != "dropout"}
        unknown = [
            f"{key}={value!r} (unknown key)"
            for key, value in given.items()
            if key not in fields and value is not None
        ]
        values = fields | {key: value for key, value in given.items() if key in fields}
        values |= {k: tuple(values[k]) for k in _TUPLES if isinstance(values[k], list)}
        wrong = unknown + value_problems(cls, values)
        values = with_defaults(cls, values)
        for key in ("down_block_types", "up_block_types"):
            values[key] = tuple(name.removeprefix("UNetRes") for name in values[key])
        values["act_fn"] = values["act_fn"].lower()
        _raise(wrong + _problems(values))
        return cls(**values)

    def to_diffusers(self) -> dict[str, Any]:
        """The `config.json` that diffusers' `UNet2DModel` reads."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        listed = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return {"_class_name": "UNet2DModel"} | listed | {"dropout": 0.0}

    @classmethod
    def ddpm_cifar10(cls) -> "UNet2DConfig":
        """DDPM on 32x32 images of CIFAR-10 (google/ddpm-cifar10-32; 35.7 million parameters)."""
        return cls._ddpm(32, (128, 256, 256, 256), attention_at=1)

    @classmethod
    def ddpm_256(cls) -> "UNet2DConfig":
        """DDPM on 256x256 images (google/ddpm-celebahq-256 and others; 114 million)."""
        return cls._ddpm(256, (128, 128, 256, 256, 512, 512), attention_at=4)

    @classmethod
    def ldm_4(cls) -> "UNet2DConfig":
        """LDM-4 on the 64x64 latents of CelebA-HQ, FFHQ, LSUN bedrooms (274 million)."""
        return cls(sample_size=64, attention_head_dim=32)

    @classmethod
    def _ddpm(cls, size: int, channels: tuple[int, ...], *, attention_at: int) -> "UNet2DConfig":
        levels = range(len(channels))
        down = ["AttnDownBlock2D" if i == attention_at else "DownBlock2D" for i in levels]
        up = ["AttnUpBlock2D" if i == attention_at else "UpBlock2D" for i in reversed(levels)]
        return cls(
            sample_size=size,
            block_out_channels=channels,
            down_block_types=tuple(down),
            up_block_types=tuple(up),
            freq_shift=1,
            flip_sin_to_cos=False,
            downsample_padding=0,
            attention_head_dim=None,
            norm_eps=1e-6,
        )

    @property
    def time_dim(self) -> int:
        """Width of the time vector."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    @property
    def size_multiple(self) -> int:
        """What height and width must be multiples of."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def has_labels(self) -> bool:
        """Whether the model takes labels."""
        return self.class_embed_type is not None or self.num_class_embeds is not None

    @property
    def mid_attn_groups(self) -> int | None:
        """Groups of the normalisation in the mid block's attention; None: there is none."""
        if self.attn_norm_num_groups is None and self.resnet_time_scale_shift == "default":
            return self.norm_num_groups
        return self.attn_norm_num_groups

    @property
    def down_plan(self) -> tuple[tuple[bool, str | None], ...]:
        """For each down block whether it has attention, and how it halves; None: not at all."""
        return _plan(self.down_block_types, DOWN_BLOCKS, self.downsample_type)

    @property
    def up_plan(self) -> tuple[tuple[bool, str | None], ...]:
        """For each up block whether it has attention, and how it doubles; None: not at all."""
        return _plan(self.up_block_types, UP_BLOCKS, self.upsample_type)


def _plan(
    names: tuple[str, ...], table: Mapping[str, tuple[bool, str | None]], default: str
) -> tuple[tuple[bool, str | None], ...]:
    plan = [(table[name][0], table[name][1] or default) for name in names]
    return (*plan[:-1], (plan[-1][0], None))


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
    lengths = [
        len(values[key]) for key in ("block_out_channels", "down_block_types", "up_block_types")
    ]
    if len(set(lengths)) > 1:
        found.append(
            "block_out_channels, down_block_types and up_block_types of "
            f"{lengths[0]}, {lengths[1]} and {lengths[2]} entries (must be equally many)"
        )
    found += depth_problems(
        (2 * values["layers_per_block"] + 1) * len(values["block_out_channels"])
    )
    groups, channels = values["norm_num_groups"], values["block_out_channels"]
    if groups is None or any(c % groups for c in channels):
        found.append(
            f"norm_num_groups={groups} with block_out_channels={channels} (must divide them all)"
        )
    width, least = values["attention_head_dim"], min(_attended(values), default=None)
    if width is not None and least is not None and not 1 <= width <= least:
        found.append(
            f"attention_head_dim={width} with attention over {least} channels (must be at most "
            "these, and at least 1)"
        )
    if values["time_embedding_type"] == "learned" and values["num_train_timesteps"] is None:
        found.append("num_train_timesteps=None (a learned time embedding needs a number)")
    return found


def _attended(values: Mapping[str, Any]) -> list[int]:
    """Channels of every level that has attention."""
    channels = tuple(values["block_out_channels"])
    levels = [
        *zip(values["down_block_types"], channels, strict=False),
        *zip(values["up_block_types"], channels[::-1], strict=False),
    ]
    found = [count for name, count in levels if "Attn" in str(name)]
    if values["add_attention"] and values["mid_block_type"] is not None:
        found += channels[-1:]
    return found


def _raise(problems: list[str]) -> None:
    if problems:
        raise ValueError(
            "UNet2DModel is not available with these settings: " + "; ".join(problems) + "."
        )
