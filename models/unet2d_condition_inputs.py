"""What a `UNet2DConditionModel` is told besides the image: its fields, shapes and checks.

Latent consistency models were distilled with guidance, and are told its scale `s` in place of
evaluating an unconditional half: they see sines, then cosines, of `1000 (s - 1)`, where `s - 1`
is the weight that their paper writes as w.

References:
  Luo et al., Latent Consistency Models, 2023, https://arxiv.org/abs/2310.04378, section 4.2.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qjax.core.typing import Array, Float, Shaped
from qjax.models.embeddings import timestep_embedding
from qjax.models.unet2d_condition_config import UNet2DConditionConfig


class Conditioning(NamedTuple):
    """What the model is told besides t; a pytree whose leaves all have the batch first.

    `config.conditioning` lists the fields that a model needs; the others stay None.
    """

    text: Float[Array, "b t d"] | None = None
    """Tokens of a text, or the embedding of a class as a text of one token."""
    pooled: Float[Array, "b d"] | None = None
    """One vector for the whole text (SDXL)."""
    time_ids: Shaped[Array, "b i"] | None = None
    """Original size, crop and target size, in pixels (SDXL); i = 6, or 5 in its refiner."""
    mask: Shaped[Array, "b t"] | None = None
    """False or 0 for tokens of the text that are not looked at; None looks at all."""
    labels: Array | None = None
    """Classes `[b]` or vectors `[b, d]`, as `class_embed_type` has it."""
    guidance: Float[Array, "b d"] | None = None
    """Embedding of the guidance scale (LCM), as `guidance_embedding` gives it."""


OF_TIME = ("pooled", "time_ids", "labels", "guidance")
"""The fields that go into the time vector."""
OF_TEXT = ("text", "mask")
"""The fields that transformers look at."""


def guidance_embedding(
    guidance_scale: float | None, width: int, *, batch: int
) -> Float[Array, "b d"]:
    """The guidance scale as a latent consistency model is told it, the same for all images.

    Args:
      guidance_scale: As in classifier-free guidance, so 1 is none; None too.
      width: `config.time_cond_proj_dim`.
      batch: Images.
    """
    weight = 0.0 if guidance_scale is None else guidance_scale - 1.0
    return timestep_embedding(
        jnp.full((batch,), 1000 * weight, jnp.float32),
        width,
        flip_sin_to_cos=False,
        downscale_freq_shift=1,
    )


def abstract_inputs(
    config: UNet2DConditionConfig,
    *,
    batch: int = 1,
    size: tuple[int, int] | None = None,
    tokens: int = 77,
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, Conditioning]:
    """Shapes of `x_t`, `t` and `conditioning`, for `jax.eval_shape`, `lower` or a test.

    Args:
      config: Settings.
      batch: Images.
      size: Height and width; None for the smallest that is halved without a remainder.
      tokens: Tokens of the text.
    """
    shape = lambda *axes, dtype=jnp.float32: jax.ShapeDtypeStruct((batch, *axes), dtype)
    x_t = shape(*(size or (config.size_multiple,) * 2), config.in_channels)
    widths = {
        "text": (tokens, config.cross_attention_dim),
        "labels": _label_shape(config),
        "guidance": (config.time_cond_proj_dim,),
    }
    fields: dict[str, Any] = {
        name: shape(*widths[name]) for name in config.conditioning if name in widths
    }
    if fields.get("labels") == shape():
        fields["labels"] = shape(dtype=jnp.int32)
    if "time_ids" in config.conditioning:
        fields["time_ids"] = shape(6)
        fields["pooled"] = shape(_pooled_width(config, 6))
    return x_t, shape(dtype=jnp.int32), Conditioning(**fields)


def check_conditioning(
    config: UNet2DConditionConfig,
    conditioning: Conditioning | None,
    names: tuple[str, ...],
    *,
    batch: int | None = None,
) -> None:
    """Raise if the fields `names` of the conditioning are not those that the model needs.

    Args:
      config: Settings of the model.
      conditioning: What it was given.
      names: Fields to look at, `OF_TIME` or `OF_TEXT` or both.
      batch: Length of the first axis; None for any.

    Raises:
      TypeError: If it is no `Conditioning`.
      ValueError: Naming every field that is missing, not expected or of another shape.
    """
    if not isinstance(conditioning, Conditioning | None):
        raise TypeError(
            "conditioning must be a Conditioning or None; got "
            f"{type(conditioning).__name__}. Pass Conditioning(text=...)."
        )
    fields = (conditioning or Conditioning())._asdict()
    shapes = {name: tuple(field.shape) for name, field in fields.items() if field is not None}
    needed = config.conditioning
    allowed = {*needed, "mask"} if "text" in needed else {*needed}
    problems = [f"{name} is missing" for name in names if name in needed and name not in shapes]
    problems += [
        f"{name} is not expected" for name in names if name in shapes and name not in allowed
    ]
    for name, axes in _expected_axes(config, shapes).items():
        expected = (batch, *axes)
        if name in names and name in shapes and not _fits(shapes[name], expected):
            rule = ", ".join("any" if n is None else str(n) for n in expected)
            problems.append(f"{name} must be [{rule}], not {list(shapes[name])}")
    if problems:
        raise ValueError(
            f"this UNet needs Conditioning({', '.join(needed)}); {'; '.join(problems)}."
        )


def _expected_axes(
    config: UNet2DConditionConfig, shapes: dict[str, tuple[int, ...]]
) -> dict[str, tuple[int | None, ...]]:
    """What follows the batch axis of each field that the model may have; None for any number."""
    text, time_ids = shapes.get("text", ()), shapes.get("time_ids", ())
    expected: dict[str, tuple[int | None, ...]] = {
        "text": (None, config.cross_attention_dim),
        "mask": (text[1] if len(text) == 3 else None,),
        "time_ids": (None,),
        "labels": _label_shape(config),
        "guidance": (config.time_cond_proj_dim,),
    }
    if "pooled" in config.conditioning and len(time_ids) == 2:
        expected["pooled"] = (_pooled_width(config, time_ids[1]),)
    return {name: axes for name, axes in expected.items() if name in (*config.conditioning, "mask")}


def _fits(shape: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    return len(shape) == len(expected) and all(
        e in (None, n) for n, e in zip(shape, expected, strict=True)
    )


def _label_shape(config: UNet2DConditionConfig) -> tuple[int | None, ...]:
    if config.class_embed_type == "identity":
        return (config.time_dim,)
    if config.class_embed_type == "projection":
        return (config.projection_class_embeddings_input_dim,)
    return ()


def _pooled_width(config: UNet2DConditionConfig, time_ids: int) -> int:
    total, each = config.projection_class_embeddings_input_dim, config.addition_time_embed_dim
    assert total is not None and each is not None  # the config saw to it
    return total - time_ids * each
