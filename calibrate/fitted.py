"""What calibration fits: a rounding for every weight, a range for every input and step.

A layer is described by its format, which is static, and by arrays:

- fixed: the float kernel `w`, and `scale` and `zero_point` of its QTensor;
- fitted, of its weights, one of the profiles

      adaround   v, of the kernel's shape: round up or down (Nagel et al., 2020)
      lora       down, up: a change of rank r before rounding to nearest (He et al., 2024)
      latent     w itself, rounded to nearest in every iteration (Jacob et al., 2018)
      nearest    nothing

- fitted, of its input: `log_scale` and `zero_point` with the groups of steps as first axis
  (Esser et al., LSQ, 2020; Bhalgat et al., LSQ+, 2020).

References:
  Nagel et al., https://arxiv.org/abs/2004.10568; He et al., EfficientDM,
  https://arxiv.org/abs/2310.03270; Jacob et al., https://arxiv.org/abs/1712.05877;
  Esser et al., https://arxiv.org/abs/1902.08153; Bhalgat et al.,
  https://arxiv.org/abs/2004.09576.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from qjax.calibrate import rounding, step_size
from qjax.calibrate.simulate import fake_quantize_dynamic
from qjax.core.config import ActSpec
from qjax.core.qtensor import QTensor, from_codes, is_qtensor, spread
from qjax.core.quantizers import fake_quantize, integer_range, round_to_codes
from qjax.core.typing import Array, Float, Int, Params, PRNGKeyArray

Profile = Literal["adaround", "lora", "latent", "nearest"]

KERNEL = "kernel"

_SURE = 10.0  # a `v` whose rounding is 0 or 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerFormat:
    """How a layer is quantized; equal for layers that run the same program.

    Attributes:
      shape: Of the kernel.
      scale_shape: Of its scales.
      bits: Of a weight.
      symmetric: Whether weights have no zero point.
      act: How the input is quantized; None: not at all.
    """

    shape: tuple[int, ...]
    scale_shape: tuple[int, ...]
    bits: int
    symmetric: bool
    act: ActSpec | None

    @property
    def ends(self) -> tuple[int, int]:
        """`qmin` and `qmax` of the weights."""
        return integer_range(self.bits, symmetric=self.symmetric)

    @property
    def reads_rows(self) -> bool:
        """Whether the range of the input is a row's, and fitted."""
        return self.act is not None and self.act.mode != "dynamic"


def quantized_kernels(params: Params) -> dict[str, QTensor]:
    """The QTensors of a params tree by layer, `/`-joined paths without `/kernel`.

    Raises:
      ValueError: If another leaf than a `kernel` is quantized.
    """
    flat = traverse_util.flatten_dict(dict(params), is_leaf=lambda _, leaf: is_qtensor(leaf))
    found = {path: leaf for path, leaf in flat.items() if is_qtensor(leaf)}
    if other := ["/".join(path) for path in found if path[-1] != KERNEL]:
        raise ValueError(
            f"only kernels of layers can be calibrated; {', '.join(other[:5])} are quantized too. "
            "Leave them in float with a rule."
        )
    return {"/".join(path[:-1]): leaf for path, leaf in found.items()}


def format_of(q: QTensor) -> LayerFormat:
    """The format of a layer whose kernel is `q`."""
    return LayerFormat(
        shape=q.shape,
        scale_shape=q.scale.shape,
        bits=q.bits,
        symmetric=q.zero_point is None,
        act=q.act,
    )


def fixed_of(w: Float[Array, "..."], q: QTensor) -> dict[str, Array]:
    """The arrays of a layer that are not fitted, in float32."""
    fixed = {"w": jnp.asarray(w, jnp.float32), "scale": q.scale.astype(jnp.float32)}
    if q.zero_point is not None:
        fixed["zero_point"] = q.zero_point.astype(jnp.float32)
    return fixed


def start(
    profile: Profile, fmt: LayerFormat, fixed: Mapping[str, Array], key: PRNGKeyArray, *, rank: int
) -> dict[str, Array]:
    """The fitted arrays of a layer's weights, where they begin: at the float kernel."""
    w = fixed["w"]
    if profile == "adaround":
        return {"v": rounding.rounding_start(w, spread(fixed["scale"], w.shape))}
    if profile == "latent":
        return {"w": w}
    if profile == "lora":
        inputs, o = w.shape[:-1], w.shape[-1]
        rank = min(rank, o, w.size // o)
        down = jax.random.normal(key, (*inputs, rank), jnp.float32) * (w.size // o) ** -0.5
        return {"down": down, "up": jnp.zeros((rank, o), jnp.float32)}
    return {}


def soft_kernel(
    fmt: LayerFormat, fixed: Mapping[str, Array], fitted: Mapping[str, Array]
) -> Float[Array, "..."]:
    """The float kernel that a layer computes with while it is being fitted."""
    scale, zero_point = _spread(fixed)
    qmin, qmax = fmt.ends
    if "v" in fitted:
        return rounding.soft_round(fixed["w"], fitted["v"], scale, zero_point, qmin=qmin, qmax=qmax)
    if not fitted:
        return fake_quantize(fixed["w"], scale, zero_point, qmin=qmin, qmax=qmax)
    return rounding.fake_quantize_ste(
        _before_rounding(fixed, fitted), scale, zero_point, qmin=qmin, qmax=qmax
    )


def hard_codes(
    fmt: LayerFormat, fixed: Mapping[str, Array], fitted: Mapping[str, Array]
) -> Int[Array, "..."]:
    """The integers that the fitted arrays end in, int8, in the kernel's shape."""
    scale, zero_point = _spread(fixed)
    qmin, qmax = fmt.ends
    if "v" in fitted:
        return rounding.hard_codes(fixed["w"], fitted["v"], scale, zero_point, qmin=qmin, qmax=qmax)
    w = _before_rounding(fixed, fitted)
    return round_to_codes(w, scale, zero_point, qmin=qmin, qmax=qmax)


def hard_kernel(
    fmt: LayerFormat, fixed: Mapping[str, Array], fitted: Mapping[str, Array], like: QTensor
) -> QTensor:
    """The QTensor that the fitted arrays end in, stored as `like` is."""
    codes = hard_codes(fmt, fixed, fitted)
    return from_codes(codes, like.scale, like.zero_point, like=like, layout=like.layout)


def nearest_weights(fixed: Mapping[str, Array], begin: Mapping[str, Array]) -> dict[str, Array]:
    """Fitted arrays of a layer that stand for rounding to nearest, of the structure of `begin`."""
    if "v" in begin:
        v = rounding.rounding_start(fixed["w"], _spread(fixed)[0])
        return {"v": jnp.where(v >= 0, _SURE, -_SURE)}
    return {"w": fixed["w"]} if "w" in begin else jax.tree.map(jnp.zeros_like, dict(begin))


def hardened_weights(fitted: Mapping[str, Array]) -> dict[str, Array]:
    """Fitted arrays of a layer with every rounding up or down, as the integers have it."""
    return {"v": jnp.where(fitted["v"] >= 0, _SURE, -_SURE)} if "v" in fitted else dict(fitted)


def _before_rounding(fixed: Mapping[str, Array], fitted: Mapping[str, Array]) -> Array:
    if "down" in fitted:
        return fixed["w"] + jnp.tensordot(fitted["down"], fitted["up"], axes=1)
    return fitted.get("w", fixed["w"])


def _spread(fixed: Mapping[str, Array]) -> tuple[Array, Array | None]:
    shape, zero_point = fixed["w"].shape, fixed.get("zero_point")
    return spread(fixed["scale"], shape), None if zero_point is None else spread(zero_point, shape)


def quantize_input(
    x: Float[Array, "b *s i"],
    act: ActSpec,
    module: nn.Module,
    rows: Mapping[str, Array] | None,
) -> Float[Array, "b *s i"]:
    """The input as the integers have it, with gradients to it and to its ranges.

    Args:
      x: Input; its first axis is the batch.
      act: How it is quantized.
      module: The layer.
      rows: `log_scale` and perhaps `zero_point` for every item, `[b]`, or `[b, g]` for groups
        of channels; or of one item, `[1]`, for all. Not read with dynamic ranges.

    Raises:
      ValueError: If the layer folds other axes into its batch.
    """
    if act.mode == "dynamic":
        return fake_quantize_dynamic(x, act, module)
    assert rows is not None
    items = rows["log_scale"].shape[0]
    if items not in (1, x.shape[0]):
        raise ValueError(
            f"per-step ranges need a layer whose input has the batch of {items} items first; "
            f"{'/'.join(module.path) or type(module).__name__} was given {x.shape}. Use "
            "mode='static' or 'dynamic' for it."
        )

    def over(row: Array) -> Array:
        row = row[:, None] if row.ndim == 1 else row
        wide = spread(row, (items, x.shape[-1])) if row.shape[-1] > 1 else row
        return wide.reshape(items, *(1,) * (x.ndim - 2), wide.shape[-1])

    zero_point = rows.get("zero_point")
    qmin, qmax = integer_range(act.bits, symmetric=act.symmetric)
    return step_size.fake_quantize_lsq(
        x,
        over(rows["log_scale"]),
        None if zero_point is None else over(zero_point),
        qmin=qmin,
        qmax=qmax,
    )


def with_kernels(params: Params, kernels: Mapping[str, Any]) -> dict[str, Any]:
    """The params with other kernels; a tree is copied only along the way to them."""
    tree = dict(params)
    for path, kernel in kernels.items():
        node = tree
        for name in path.split("/") if path else ():
            node[name] = dict(node[name])
            node = node[name]
        node[KERNEL] = kernel
    return tree
