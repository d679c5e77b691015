"""Which scalings of channels can be moved from a layer's input into what makes that input.

A layer multiplies channels c of its input with rows c of its kernel, so that

    x W = (x / s) (s W)        s[c] > 0

and where a linear map, or the gain of a normalisation, makes `x`, the division can be done there
once and for all: the function of the network stays what it is. Between the two may be only what
works on every channel alone and in proportion, as the weighted sum over tokens of an attention
does; an activation (SiLU, GELU) may not.

| network | made by | read by |
|---|---|---|
| DiT block | `modulation`, shift and scale of the first half | `attn/qkv` |
| | values of `attn/qkv` | `attn/proj` |
| | `modulation`, shift and scale of the second half | `mlp/fc1` |
| DiT | `final_modulation` | `final_linear` |
| `BasicTransformerBlock` | `norm1` | queries of `attn1`, its keys and values where they see no text |
| | `norm2` | queries of `attn2` |
| | `norm3` | `ff/net_0/proj` |
| | values of an attention | its `to_out_0` |
| | the half of `ff/net_0/proj` that is not gated | `ff/net_2` |
| `Transformer2DModel` | `norm` | `proj_in` |
| `AttentionBlock` | `group_norm` | `to_q`, `to_k`, `to_v` |
| | `to_v` | `to_out_0` |

Convolutions of ResNet blocks come after an activation and are not in the table, nor is a DiT's
`mlp/fc2`, nor what reads a text.

References:
  Xiao et al., SmoothQuant, 2023, https://arxiv.org/abs/2211.10438, section 4.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from qjax.core.typing import Array, Float
from qjax.models.attention import AttentionBlock
from qjax.models.dit import DiT, DiTBlock
from qjax.models.transformer_2d import BasicTransformerBlock, Transformer2DModel

__all__ = ["Fold", "Pair", "divided", "foldable_pairs", "folded", "multiplied"]


@dataclasses.dataclass(frozen=True)
class Fold:
    """A part of a leaf that is divided by the scales.

    Attributes:
      leaf: Path.
      start: First entry of the last axis.
      center: What the entries are counted from: -1 where the network adds 1 to what they make,
        so that `1 + v` is divided; otherwise 0.
    """

    leaf: str
    start: int = 0
    center: float = 0.0


@dataclasses.dataclass(frozen=True)
class Pair:
    """What makes an input, and the layers that read it.

    Attributes:
      producer: Parts of leaves; those of a bias need not exist.
      consumers: Paths of layers; all that read the input.
    """

    producer: tuple[Fold, ...]
    consumers: tuple[str, ...]

    @property
    def name(self) -> str:
        """What to call it."""
        made = self.producer[0].leaf.rpartition("/")[0]
        return f"{made} -> {', '.join(self.consumers)}"


def divided(leaf: Float[Array, "*a o"], s: Float[Array, " c"], fold: Fold) -> Float[Array, "*a o"]:
    """The leaf of a producer with its part divided by `s`; the same dtype."""
    stop = fold.start + len(s)
    part = leaf[..., fold.start : stop].astype(jnp.float32)
    # Kernels make the varying part alone: the 1 that is added is the bias's.
    part = (part - fold.center) / s + fold.center
    return jnp.asarray(leaf).at[..., fold.start : stop].set(part.astype(leaf.dtype))


def multiplied(kernel: Float[Array, "*taps c o"], s: Float[Array, " c"]) -> Float[Array, "..."]:
    """The kernel of a consumer with its rows multiplied by `s`; the same dtype."""
    return (kernel.astype(jnp.float32) * s[:, None]).astype(kernel.dtype)


def folded(
    leaves: Mapping[str, Any], pair: Pair, s: Float[Array, " c"]
) -> dict[str, Float[Array, "..."]]:
    """The leaves of a pair after the scales have moved from the input into what makes it.

    Args:
      leaves: Of the network, by path; a bias need not exist.
      pair: What makes the input, and what reads it.
      s: The scales.
    """
    paths = [f"{layer}/kernel" for layer in pair.consumers]
    found = {path: multiplied(leaves[path], s) for path in paths}
    for fold in pair.producer:
        if fold.leaf in leaves:
            found[fold.leaf] = divided(found.get(fold.leaf, leaves[fold.leaf]), s, fold)
    return found


def foldable_pairs(forward: Callable[[], Any]) -> tuple[Pair, ...]:
    """The pairs of a network, in the order in which it runs.

    Args:
      forward: Runs the network; called within `jax.eval_shape`, so nothing is computed.
    """
    found: dict[str, tuple[Pair, ...]] = {}

    def watch(next_fun: Callable[..., Any], args: tuple, kwargs: dict, context: Any) -> Any:
        module = context.module
        pairs_of = _TABLE.get(type(module))
        if pairs_of is not None and context.method_name == "__call__":
            path = "/".join(module.path)
            inside = pairs_of(module, args[0].shape[-1])
            found[path] = tuple(_within(path, pair) for pair in inside)
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(watch):
        jax.eval_shape(forward)
    return tuple(pair for pairs in found.values() for pair in pairs)


def _within(path: str, pair: Pair) -> Pair:
    at = lambda name: f"{path}/{name}" if path else name
    producer = tuple(dataclasses.replace(fold, leaf=at(fold.leaf)) for fold in pair.producer)
    return Pair(producer, tuple(map(at, pair.consumers)))


def _norm(name: str, *consumers: str) -> Pair:
    return Pair((Fold(f"{name}/scale"), Fold(f"{name}/bias")), consumers)


def _linear(name: str, *consumers: str, start: int = 0) -> Pair:
    return Pair((Fold(f"{name}/kernel", start), Fold(f"{name}/bias", start)), consumers)


def _modulation(name: str, shift: int, scale: int, consumer: str) -> Pair:
    """Of `x (1 + scale) + shift`, both made by the layer `name`, from these entries on."""
    folds = (
        Fold(f"{name}/kernel", shift),
        Fold(f"{name}/kernel", scale),
        Fold(f"{name}/bias", shift),
        Fold(f"{name}/bias", scale, center=-1.0),
    )
    return Pair(folds, (consumer,))


def _dit_block(module: DiTBlock, d: int) -> Iterable[Pair]:
    del module
    return (
        _modulation("modulation", 0, d, "attn/qkv"),
        _linear("attn/qkv", "attn/proj", start=2 * d),
        _modulation("modulation", 3 * d, 4 * d, "mlp/fc1"),
    )


def _dit(module: DiT, channels: int) -> Iterable[Pair]:
    del channels
    return (_modulation("final_modulation", 0, module.config.width, "final_linear"),)


def _transformer_block(module: BasicTransformerBlock, d: int) -> Iterable[Pair]:
    names = ("to_q",) if module.only_cross_attention else ("to_q", "to_k", "to_v")
    return (
        _norm("norm1", *(f"attn1/{name}" for name in names)),
        _linear("attn1/to_v", "attn1/to_out_0"),
        _norm("norm2", "attn2/to_q"),
        _linear("attn2/to_v", "attn2/to_out_0"),
        _norm("norm3", "ff/net_0/proj"),
        _linear("ff/net_0/proj", "ff/net_2"),
    )


def _spatial_transformer(module: Transformer2DModel, channels: int) -> Iterable[Pair]:
    del module, channels
    return (_norm("norm", "proj_in"),)


def _attention_block(module: AttentionBlock, channels: int) -> Iterable[Pair]:
    del channels
    values = _linear("to_v", "to_out_0")
    if module.groups is None:  # then the input is the sum that is passed on
        return (values,)
    return (_norm("group_norm", "to_q", "to_k", "to_v"), values)


_TABLE: Mapping[type[nn.Module], Callable[[Any, int], Iterable[Pair]]] = {
    AttentionBlock: _attention_block,
    BasicTransformerBlock: _transformer_block,
    DiT: _dit,
    DiTBlock: _dit_block,
    Transformer2DModel: _spatial_transformer,
}
