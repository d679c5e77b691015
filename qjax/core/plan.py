"""plan: what quantize does to a tree, leaf by leaf, decided from paths and shapes alone.

The axes of a kernel, as Flax stores them:

| axes | read as | input channels |
|---|---|---|
| 2 | `[i, o]` | -2 |
| 3 | `[i, n, k]`, a projection to heads | -3 |
| 3 | `[n, k, o]`, a projection from heads, where the layer is named `out` or `o_proj` | -2 |
| 3 | `[w, i, o]`, a 1-D convolution, where the layer's name has `conv` in it | -2 |
| 4 | `[h, w, i, o]` | -2 |

Flax tells a projection to heads from a 1-D convolution by the layer's class, which params do
not have; but unnamed convolutions are called `Conv_0` and so on.
"""

import dataclasses
import difflib
import functools
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.core.config import ActSpec, QuantConfig, Rule, WeightSpec
from qjax.core.ops import choose_group_size
from qjax.core.qtensor import QTensor, from_codes, is_qtensor
from qjax.core.quantizers import quantize_weight
from qjax.core.typing import Array, Float

_NAMED = 10  # leaves, and distinct problems, that an error names


class Axes(NamedTuple):
    """Which axes of a kernel are what, as negative indices."""

    group: int
    channels: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class PlanEntry:
    """What happens to one leaf.

    Attributes:
      path: Keys joined with `/`.
      kind: `"dense"`, `"conv"`, or `"other"` for leaves that no layer multiplies with.
      shape: Logical shape.
      weight: How it is quantized; None if it stays in float.
      act: How the layer's input is quantized; None: not at all.
      group_size: Input channels (of one tap, or one head) that share a scale; None for all
        inputs of an output channel, or for the whole kernel.
      bytes_before: Bytes at 16 bits a value, as a float16 checkpoint has them.
      bytes_after: Bytes of integers, scales and zero points, or of the 16-bit floats.
      reason: Why it stays in float, or the rule's own words.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    weight: WeightSpec | None
    act: ActSpec | None
    group_size: int | None
    bytes_before: int
    bytes_after: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `quantize` does to a tree, leaf by leaf; `print` shows it as a table."""

    entries: tuple[PlanEntry, ...]

    @property
    def bytes_before(self) -> int:
        """Bytes of all leaves at 16 bits a value."""
        return sum(entry.bytes_before for entry in self.entries)

    @property
    def bytes_after(self) -> int:
        """Bytes of all leaves once quantized, those left in float at 16 bits."""
        return sum(entry.bytes_after for entry in self.entries)

    @property
    def mean_bits(self) -> float:
        """Stored bits a value, scales included, over all leaves."""
        values = sum(entry.bytes_before // 2 for entry in self.entries)
        return 8 * self.bytes_after / max(values, 1)

    def __str__(self) -> str:
        head = ("path", "kind", "shape", "weight", "act", "group", "bytes fp16", "bytes", "note")
        rows = [head, *map(_row, self.entries)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        right = {6, 7}
        lines = [
            "  ".join(
                cell.rjust(width) if i in right else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        ratio = self.bytes_after / max(self.bytes_before, 1)
        lines.append(
            f"total: {self.bytes_before:,} bytes in float16, {self.bytes_after:,} quantized "
            f"({ratio:.3f}x, {self.mean_bits:.2f} bits a value)"
        )
        return "\n".join(lines)


def _row(entry: PlanEntry) -> tuple[str, ...]:
    weight, act, group = "float", "", ""
    if entry.weight is not None:
        weight, group = f"W{entry.weight.bits}", str(entry.group_size or "all")
        act = f"A{entry.act.bits} {entry.act.mode}" if entry.act else "float"
    sizes = (f"{entry.bytes_before:,}", f"{entry.bytes_after:,}")
    shape = "x".join(map(str, entry.shape))
    return (entry.path, entry.kind, shape, weight, act, group, *sizes, entry.reason)


def kernel_axes(path: str, ndim: int) -> Axes | None:
    """The axes of the leaf at `path`, or None if no layer multiplies with such a leaf."""
    if ndim in (2, 4):
        return Axes(-2, (-1,))
    if ndim == 3:
        from_heads = _layer(path) in ("out", "o_proj")
        return Axes(-2, (-1,)) if from_heads or _is_conv(path, ndim) else Axes(-3, (-2, -1))
    return None


def _layer(path: str) -> str:
    return path.split("/")[-2] if "/" in path else ""


def _is_conv(path: str, ndim: int) -> bool:
    return ndim == 4 or ndim == 3 and "conv" in _layer(path).lower()


def decide(leaves: Iterable[tuple[str, Any]], config: QuantConfig) -> list[PlanEntry]:
    """One entry for each leaf, in their order.

    Args:
      leaves: Paths, and arrays or `jax.ShapeDtypeStruct`s: only shape and dtype are read.
      config: Rules and default.

    Raises:
      ValueError: If a rule decides nothing, a group size does not divide, or a leaf is of an
        integer dtype or quantized already: one error for all of them.
      TypeError: If a leaf is not an array.
    """
    used: set[int] = set()
    problems: dict[str, list[str]] = {}
    entries: list[PlanEntry] = []
    kinds: dict[str, str] = {}
    for path, leaf in leaves:
        kinds[path] = _kind(path, leaf)
        try:
            entries.append(_decide(path, leaf, kinds[path], config, used))
        except ValueError as error:
            problems.setdefault(str(error), []).append(path)
    said = [f"{name_some(paths)}: {message}" for message, paths in problems.items()]
    if not config.allow_unmatched:
        unused = [rule for i, rule in enumerate(config.rules) if i not in used]
        said += [_unused(rule, kinds) for rule in unused]
    if said:
        more = len(said) - _NAMED
        said = said[:_NAMED] + ([f"There are {more} more such problems."] if more > 0 else [])
        raise ValueError(" ".join(said))
    return entries


def name_some(names: list[str]) -> str:
    """The first names and the number of the others; "none" for none."""
    more = len(names) - _NAMED
    return (", ".join(names[:_NAMED]) or "none") + (f" and {more} more" if more > 0 else "")


def natural_order(entry: PlanEntry) -> list[Any]:
    """Sorts `blocks_2` before `blocks_10`."""
    return [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", entry.path)]


def _kind(path: str, leaf: Any) -> str:
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise TypeError(f"{path}: leaves must be arrays; got {type(leaf).__name__}.")
    if path.rsplit("/", 1)[-1] != "kernel" or kernel_axes(path, len(leaf.shape)) is None:
        return "other"
    return "conv" if _is_conv(path, len(leaf.shape)) else "dense"


def _unused(rule: Rule, kinds: dict[str, str]) -> str:
    """The error for a rule that decides no leaf: why, and the paths that come nearest."""
    matched = [path for path in kinds if re.fullmatch(rule.pattern, path)]
    if of_kind := [path for path in matched if rule.kind in (None, kinds[path])]:
        return (
            f"The rule {rule.pattern!r} decides nothing: an earlier rule takes "
            f"{name_some(of_kind)}. Put it first, or remove it."
        )
    if matched:
        return (
            f"The rule {rule.pattern!r} is for kind={rule.kind!r} and matches only leaves of "
            f"another kind ({name_some(matched)}). Correct it, or remove its kind."
        )
    plain = re.sub(r"[\\^$.*+?{}()|\[\]]+", "", rule.pattern)
    near = [path for path in kinds if re.search(rule.pattern, path)][:3]
    near = near or difflib.get_close_matches(plain, kinds, n=3, cutoff=0.3)
    hint = f"; near misses: {', '.join(near)}" if near else ""
    return (
        f"The rule {rule.pattern!r} matches no leaf; patterns must match the whole path{hint}. "
        "Correct it, or set allow_unmatched=True."
    )


def _decide(path: str, leaf: Any, kind: str, config: QuantConfig, used: set[int]) -> PlanEntry:
    """What happens to a leaf; adds the index of the rule that decides to `used`."""
    if is_qtensor(leaf):
        raise ValueError(
            "leaves must not be quantized already; quantize the float params, or dequantize first."
        )
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(
            f"leaves must be of a float dtype; got {leaf.dtype}. Keep integer state in another "
            "collection than the params."
        )
    shape = tuple(leaf.shape)
    axes = kernel_axes(path, len(shape))
    weight, act, reason = None, None, "no rule and no default"
    for i, rule in enumerate(config.rules):
        if re.fullmatch(rule.pattern, path) and rule.kind in (None, kind):
            used.add(i)
            weight, act = rule.weight, rule.act
            reason = rule.reason or ("" if weight else f"rule {rule.pattern!r}")
            if weight is not None and axes is None:
                raise ValueError(
                    f"a leaf to be quantized must have two to four axes; the rule "
                    f"{rule.pattern!r} takes one of shape {shape}. Narrow the pattern."
                )
            break
    else:
        if kind == "other":
            reason = "not a layer's kernel"
        elif config.weight is not None:
            weight, act, reason = config.weight, config.act, ""

    size = int(np.prod(shape, dtype=np.int64))
    if weight is not None and size == 0:
        weight, act, reason = None, None, "empty"
    if weight is None:
        return PlanEntry(path, kind, shape, None, None, None, 2 * size, 2 * size, reason)
    assert axes is not None
    channels = shape[axes.group]
    group_size = _group_size(weight, channels, len(shape))
    if act is not None and act.granularity == "per_group":
        _check_act_groups(act, group_size, channels)
    after = _stored_bytes(shape, weight, group_size, axes, config.scale_dtype)
    return PlanEntry(path, kind, shape, weight, act, group_size, 2 * size, after, reason)


def _group_size(weight: WeightSpec, channels: int, ndim: int) -> int | None:
    """Input channels that share a scale; None for all inputs of an output channel."""
    if weight.granularity != "per_group":
        return None
    chosen = choose_group_size(weight.group_size, channels)
    sizes = weight.group_size if isinstance(weight.group_size, tuple) else (weight.group_size,)
    divides = next(size for size in sizes if size is None or channels % size == 0)
    # A group as long as the axis is no more than one tap or one head, not the whole column.
    return channels if chosen is None and divides == channels and ndim > 2 else chosen


def _check_act_groups(act: ActSpec, group_size: int | None, channels: int) -> None:
    act_group = choose_group_size(act.group_size, channels)
    if None not in (group_size, act_group) and group_size != act_group:
        raise ValueError(
            f"weights and activations must share their groups; got {group_size} and {act_group}. "
            "Give both the same group_size."
        )


@functools.lru_cache(maxsize=4096)
def _stored_bytes(
    shape: tuple[int, ...], spec: WeightSpec, group_size: int | None, axes: Axes, scale_dtype: str
) -> int:
    """Bytes of the QTensor that a leaf of `shape` becomes, without making it."""
    make = lambda w: to_qtensor(
        w, spec, act=None, group_size=group_size, axes=axes, scale_dtype=scale_dtype
    )
    return jax.eval_shape(make, jax.ShapeDtypeStruct(shape, jnp.float32)).nbytes_packed


def to_qtensor(
    w: Float[Array, "..."],
    spec: WeightSpec,
    *,
    act: ActSpec | None,
    group_size: int | None,
    axes: Axes,
    scale_dtype: str,
) -> QTensor:
    """The QTensor of one kernel; pure, its settings static.

    Args:
      w: Kernel of two to four axes.
      spec: Bits, symmetry, granularity, method.
      act: What the QTensor says of its layer's input.
      group_size: Input channels that share a scale, already chosen to divide; None for all.
      axes: Which axes of `w` are what.
      scale_dtype: Dtype in which scales are stored.
    """
    if spec.granularity == "per_group" and group_size is None:
        spec = dataclasses.replace(spec, granularity="per_channel", group_size=None)
    codes = quantize_weight(
        w,
        spec,
        group_size=group_size,
        channel_axes=axes.channels,
        group_axis=axes.group,
        scale_dtype=jnp.dtype(scale_dtype),
    )
    return from_codes(
        codes.codes,
        codes.scale,
        codes.zero_point,
        bits=spec.bits,
        axis=axes.group,
        layout="native" if spec.bits == 8 else "packed",
        dtype_name=jnp.dtype(w.dtype).name,
        act=act,
    )
