"""quantize, dequantize and plan: a params tree, and rules for its leaves.

The tree's structure never changes. Leaves named `kernel` that look like a layer's (two to
four axes) become QTensors, other leaves stay as they are, and every decision is recorded, so
that nothing is left in float without a reason.

The axes of a kernel, as Flax stores them:

| axes | read as | input channels |
|---|---|---|
| 2 | `[i, o]` | -2 |
| 3 | `[i, n, k]`, a projection to heads; `[n, k, o]` where the layer is named `out` | -3; -2 |
| 4 | `[h, w, i, o]` | -2 |
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.core.config import ActSpec, QuantConfig, WeightSpec
from qjax.core.linen import BoxedQTensor
from qjax.core.ops import choose_group_size
from qjax.core.qtensor import QTensor, from_codes, is_qtensor
from qjax.core.quantizers import quantize_weight
from qjax.core.typing import Array, Params


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
      group_size: Input channels that share a scale; None for all of them.
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
        rows = [("path", "kind", "shape", "weight", "act", "group", "bytes fp16", "bytes", "note")]
        for entry in self.entries:
            weight = f"W{entry.weight.bits}" if entry.weight else "float"
            act = f"A{entry.act.bits} {entry.act.mode}" if entry.act else "float"
            rows.append(
                (
                    entry.path,
                    entry.kind,
                    "x".join(map(str, entry.shape)),
                    weight,
                    act if entry.weight else "",
                    str(entry.group_size or "all") if entry.weight else "",
                    f"{entry.bytes_before:,}",
                    f"{entry.bytes_after:,}",
                    entry.reason,
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
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


def kernel_axes(path: str, ndim: int) -> Axes | None:
    """The axes of the leaf at `path`, or None if no layer multiplies with such a leaf."""
    if ndim == 2:
        return Axes(-2, (-1,))
    if ndim == 3:
        layer = path.split("/")[-2] if "/" in path else ""
        return Axes(-2, (-1,)) if layer in ("out", "o_proj") else Axes(-3, (-2, -1))
    if ndim == 4:
        return Axes(-2, (-1,))
    return None


def plan(params: Any, config: QuantConfig) -> Plan:
    """What `quantize(params, config)` would do, without computing anything.

    Args:
      params: A params tree, `nnx.State` or `nnx.Module`; arrays or `jax.ShapeDtypeStruct`s,
        so that a model needs no weights to be planned.
      config: Rules and default.

    Raises:
      ValueError: If a rule matches nothing, a group size does not divide, or a leaf is of an
        integer dtype or already quantized; all leaves concerned are named.
    """
    return _plan(_leaves(params), config)


def quantize(params: Any, config: QuantConfig, *, box: bool = True) -> Any:
    """The same tree with QTensors for the kernels that `config` chooses; data-free.

    Leaf by leaf: no second float copy of the tree is ever held. The input is not changed.

    Args:
      params: A Flax params tree (nested mappings), an `nnx.State` or an `nnx.Module`.
      config: Rules and default.
      box: Whether QTensors are boxes that an unmodified Linen model unboxes, dequantizing,
        when it reads its params. False for code that calls `nn.unbox` on whole trees.

    Returns:
      For a tree, nested dicts; for a State or Module, a new one of its kind.

    Raises:
      ValueError: As `plan`; or if a weight to be quantized is NaN or infinite.
      TypeError: If a leaf is not an array.
    """
    if _is_nnx(params):
        from qjax.core import nnx

        leaves = list(_leaves(params))
        entries = {entry.path: entry for entry in _plan(leaves, config).entries}
        return nnx.quantize_leaves(
            params, lambda path, leaf: _quantize_leaf(entries[path], leaf, config, box=False)
        )
    decisions = {entry.path: entry for entry in plan(params, config).entries}

    def rebuild(node: Any, path: tuple[str, ...]) -> Any:
        if isinstance(node, Mapping):
            return {key: rebuild(value, (*path, str(key))) for key, value in node.items()}
        return _quantize_leaf(decisions["/".join(path)], node, config, box=box)

    return rebuild(params, ())


def dequantize(params: Any, *, dtype: Any = None) -> Any:
    """The same tree with float arrays for QTensors, in `dtype` or that of the originals."""
    if _is_nnx(params):
        from qjax.core import nnx

        return nnx.dequantize(params, dtype=dtype)
    return jax.tree.map(
        lambda leaf: leaf.dequantize(dtype) if is_qtensor(leaf) else leaf,
        params,
        is_leaf=is_qtensor,
    )


def quantize_leaf(
    path: str, array: Array | np.ndarray, config: QuantConfig, *, box: bool = True
) -> Any:
    """One leaf as `quantize` would make it: for loaders that see one tensor at a time.

    Rules that match nothing are not looked for, since only one leaf is seen.
    """
    lenient = dataclasses.replace(config, allow_unmatched=True)
    (entry,) = _plan([(path, array)], lenient).entries
    return _quantize_leaf(entry, array, config, box=box)


def _is_nnx(params: Any) -> bool:
    from flax import nnx

    return isinstance(params, nnx.State | nnx.Module)


def _leaves(params: Any) -> Iterator[tuple[str, Any]]:
    """Paths joined with `/` and leaves, QTensors whole."""
    if _is_nnx(params):
        from qjax.core import nnx

        yield from nnx.leaves(params)
        return
    if not isinstance(params, Mapping):
        raise TypeError(
            "params must be nested mappings as Flax makes them, an nnx.State or an nnx.Module; "
            f"got {type(params).__name__}."
        )

    def walk(node: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        for key, value in node.items():
            if isinstance(value, Mapping):
                yield from walk(value, (*path, str(key)))
            else:
                yield "/".join((*path, str(key))), value

    yield from walk(params, ())


def _plan(leaves: Any, config: QuantConfig) -> Plan:
    used: set[int] = set()
    problems: list[str] = []
    entries: list[PlanEntry] = []
    names: list[str] = []
    for path, leaf in leaves:
        names.append(path)
        try:
            entries.append(_decide(path, leaf, config, used))
        except ValueError as error:
            problems.append(f"{path}: {error}")
    unused = [rule for i, rule in enumerate(config.rules) if i not in used]
    if unused and not config.allow_unmatched:
        problems += [_unmatched(rule.pattern, names) for rule in unused]
    if problems:
        raise ValueError("; ".join(problems[:20]) + _more(len(problems) - 20))
    return Plan(tuple(entries))


def _more(count: int) -> str:
    return f"; and {count} more." if count > 0 else ""


def _unmatched(pattern: str, names: list[str]) -> str:
    """The error for a rule without a leaf, with the paths that come nearest."""
    import difflib

    plain = re.sub(r"[\\^$.*+?{}()|\[\]]+", "", pattern)
    inside = [name for name in names if re.search(pattern, name)]
    near = inside[:3] or difflib.get_close_matches(plain, names, n=3, cutoff=0.3)
    hint = f"; near misses: {', '.join(near)}" if near else ""
    return (
        f"The rule {pattern!r} matches no leaf; patterns must match the whole path{hint}. "
        "Correct it, or set allow_unmatched=True"
    )


def _decide(path: str, leaf: Any, config: QuantConfig, used: set[int]) -> PlanEntry:
    """What happens to a leaf; marks the rule that decided as used."""
    if is_qtensor(leaf):
        raise ValueError("is quantized already; quantize the float params, or dequantize first.")
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise TypeError(f"{path}: leaves must be arrays; got {type(leaf).__name__}.")
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(
            f"leaves must be of a float dtype; got {leaf.dtype}. Keep integer state in another "
            "collection than the params"
        )
    shape, ndim = tuple(leaf.shape), len(leaf.shape)
    axes = kernel_axes(path, ndim)
    is_kernel = path.rsplit("/", 1)[-1] == "kernel" and axes is not None
    kind = ("conv" if ndim == 4 else "dense") if is_kernel else "other"

    weight, act, reason = None, None, "no rule and no default"
    for i, rule in enumerate(config.rules):
        if re.fullmatch(rule.pattern, path) and rule.kind in (None, kind):
            used.add(i)
            weight, act = rule.weight, rule.act
            reason = rule.reason or ("" if weight else f"rule {rule.pattern!r}")
            if weight is not None and axes is None:
                raise ValueError(
                    f"the rule {rule.pattern!r} quantizes leaves with two to four axes; this one "
                    f"has shape {shape}"
                )
            break
    else:
        if is_kernel and config.weight is not None:
            weight, act, reason = config.weight, config.act, ""
        elif not is_kernel:
            reason = "not a layer's kernel"

    size = int(np.prod(shape, dtype=np.int64))
    entry = PlanEntry(path, kind, shape, weight, act, None, 2 * size, 2 * size, reason)
    if weight is None or size == 0:
        return entry
    assert axes is not None
    group_size = None
    if weight.granularity == "per_group":
        group_size = choose_group_size(weight.group_size, shape[axes.group])
    if act is not None and act.granularity == "per_group":
        _check_act_groups(act, group_size, shape[axes.group], kind)
    entry = dataclasses.replace(entry, group_size=group_size)
    abstract = jax.eval_shape(
        lambda w: _to_qtensor(w, entry, axes, config, box=False),
        jax.ShapeDtypeStruct(shape, jnp.float32),
    )
    return dataclasses.replace(entry, bytes_after=abstract.nbytes_packed)


def _check_act_groups(act: ActSpec, group_size: int | None, size: int, kind: str) -> None:
    if kind == "conv":
        raise ValueError(
            "act granularity 'per_group' is for matmuls; give convolutions a rule of their own "
            "with 'per_token' (one scale per image)"
        )
    act_group = choose_group_size(act.group_size, size)
    if None not in (group_size, act_group) and group_size != act_group:
        raise ValueError(
            f"weights and activations must share their groups; got {group_size} and {act_group}"
        )


def _to_qtensor(
    w: Array, entry: PlanEntry, axes: Axes, config: QuantConfig, *, box: bool
) -> QTensor:
    spec = entry.weight
    assert spec is not None
    if spec.granularity == "per_group" and entry.group_size is None:
        spec = dataclasses.replace(spec, granularity="per_channel", group_size=None)
    codes = quantize_weight(
        w,
        spec,
        group_size=entry.group_size,
        channel_axes=axes.channels,
        group_axis=axes.group,
        scale_dtype=jnp.dtype(config.scale_dtype),
    )
    q = from_codes(
        codes.codes,
        codes.scale,
        codes.zero_point,
        bits=spec.bits,
        axis=axes.group,
        layout="native" if spec.bits == 8 else "packed",
        dtype_name=jnp.dtype(w.dtype).name,
        act=entry.act,
    )
    if not box:
        return q
    fields = {field.name: getattr(q, field.name) for field in dataclasses.fields(QTensor)}
    return BoxedQTensor(**fields)


_jitted: Callable[..., QTensor] = jax.jit(
    _to_qtensor, static_argnames=("entry", "axes", "config", "box")
)


def _quantize_leaf(entry: PlanEntry, leaf: Any, config: QuantConfig, *, box: bool) -> Any:
    if entry.weight is None:
        return _cast_float(entry.path, leaf, config)
    if not isinstance(leaf, jax.core.Tracer):
        finite = np.isfinite(leaf).all() if isinstance(leaf, np.ndarray) else _all_finite(leaf)
        if not bool(finite):
            raise ValueError(
                f"{entry.path} must be finite to be quantized; it holds NaN or infinity. Repair "
                "the checkpoint, or leave the layer in float with a rule."
            )
    axes = kernel_axes(entry.path, len(entry.shape))
    assert axes is not None
    # The path is not part of what is compiled: leaves of one shape share a program.
    anonymous = dataclasses.replace(entry, path="", reason="")
    return _jitted(leaf, anonymous, axes, config, box=box)


def _cast_float(path: str, leaf: Any, config: QuantConfig) -> Any:
    """A leaf left in float, in the dtype the config stores such leaves in."""
    if config.float_dtype is None or leaf.dtype == jnp.dtype(config.float_dtype):
        return leaf
    cast = jnp.asarray(leaf).astype(config.float_dtype)
    if not isinstance(cast, jax.core.Tracer) and not bool(_all_finite(cast)):
        raise ValueError(
            f"{path} must stay finite in float_dtype={config.float_dtype!r}; its largest "
            f"magnitude is {float(jnp.max(jnp.abs(leaf)))}. Use bfloat16, or None to leave it."
        )
    return cast


@jax.jit
def _all_finite(leaf: Array) -> Array:
    return jnp.isfinite(leaf).all()


def tree_bytes(params: Params) -> int:
    """Stored bytes of a tree: QTensors at their true width, floats at 16 bits a value."""
    total = 0
    for leaf in jax.tree.leaves(dict(params), is_leaf=is_qtensor):
        total += leaf.nbytes_packed if is_qtensor(leaf) else 2 * leaf.size
    return total
