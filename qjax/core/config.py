"""What to quantize and how: frozen, hashable settings and ordered rules.

A leaf's path is its keys joined with `/` (`blocks_3/attn/qkv/kernel`). Rules are tried in
order, the first whose pattern matches the whole path decides; leaves that no rule matches
and that look like a layer's kernel take the default.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from qjax.core.places import local_path
from qjax.core.plain_yaml import read_yaml

BITS = (2, 3, 4, 5, 6, 8)

WeightGranularity = Literal["per_tensor", "per_channel", "per_group"]
ActGranularity = Literal["per_tensor", "per_token", "per_group"]


def _require(value: Any, allowed: tuple, name: str) -> None:
    # By type as well: 8.0 == 8, but a width of 8.0 would make ranges of floats.
    if not any(value == choice and type(value) is type(choice) for choice in allowed):
        choices = ", ".join(map(str, allowed))
        raise ValueError(f"{name} must be one of {choices}; got {value!r}.")


def _require_spec(value: Any, cls: type, name: str) -> None:
    if value is not None and not isinstance(value, cls):
        raise TypeError(f"{name} must be of type {cls.__name__}, or None; got {value!r}.")


def _require_group_size(group_size: int | tuple[int | None, ...] | None, granularity: str) -> None:
    sizes: tuple[int | None, ...]
    if isinstance(group_size, tuple):  # None in a tuple: the whole axis
        sizes = tuple(1 if size is None else size for size in group_size)
    else:
        sizes = (group_size,)
    if granularity != "per_group":
        if group_size is not None:
            raise ValueError(
                f"group_size goes with granularity='per_group'; got {group_size=}, {granularity=}."
            )
    elif not sizes or any(not _is_count(size) for size in sizes):
        raise ValueError(
            "granularity='per_group' needs a positive group_size, or a tuple of them of which "
            f"the first that divides is taken; got {group_size=}."
        )


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightSpec:
    """How a kernel is quantized.

    Attributes:
      bits: Width of a stored value: 2, 3, 4, 5, 6 or 8.
      symmetric: Whether the range is mirrored at 0; otherwise a zero point is stored.
      granularity: Who shares a scale: the whole kernel, an output channel, or `group_size`
        consecutive input channels of one output channel (and, in a convolution, one tap).
      group_size: Input channels that share a scale. Of a tuple the first that divides the
        layer's input channels is taken, and `plan` shows which; None in a tuple stands for
        all of them and always divides.
      method: `"minmax"` covers the whole range; `"mse"` searches the range with the least
        error among 80 shrunken ones.
    """

    bits: int
    symmetric: bool = True
    granularity: WeightGranularity = "per_channel"
    group_size: int | tuple[int | None, ...] | None = None
    method: Literal["minmax", "mse"] = "minmax"

    def __post_init__(self):
        if isinstance(self.group_size, list):
            object.__setattr__(self, "group_size", tuple(self.group_size))
        _require(self.bits, BITS, "weight bits")
        _require(self.granularity, ("per_tensor", "per_channel", "per_group"), "granularity")
        _require(self.method, ("minmax", "mse"), "method")
        _require(self.symmetric, (True, False), "symmetric")
        _require_group_size(self.group_size, self.granularity)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActSpec:
    """How the input of a layer is quantized before its matmul or convolution.

    Attributes:
      bits: Width of the integers, 2 to 8 of the same set as for weights; the arithmetic is
        int8 in any case.
      mode: `"dynamic"` takes the range from the input itself; `"static"` and `"per_step"`
        read `act_scale` (and `act_zero_point`) from the step's row.
      granularity: Who shares a scale: the whole tensor, a token (the last axis of one
        position; for a convolution one image), or `group_size` channels of a token (for a
        convolution of a pixel; with the static modes, of all of them).
      group_size: Channels that share a scale; of a tuple the first that divides. Must equal
        the weight's group size where the weight has groups too.
      symmetric: Whether the range is mirrored at 0.
    """

    bits: int = 8
    mode: Literal["dynamic", "static", "per_step"] = "dynamic"
    granularity: ActGranularity = "per_token"
    group_size: int | tuple[int | None, ...] | None = None
    symmetric: bool = True

    def __post_init__(self):
        if isinstance(self.group_size, list):
            object.__setattr__(self, "group_size", tuple(self.group_size))
        _require(self.bits, BITS, "act bits")
        _require(self.mode, ("dynamic", "static", "per_step"), "mode")
        _require(self.granularity, ("per_tensor", "per_token", "per_group"), "granularity")
        _require(self.symmetric, (True, False), "symmetric")
        _require_group_size(self.group_size, self.granularity)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """What happens to the leaves whose path matches.

    Attributes:
      pattern: Regular expression that must match the whole path.
      weight: How the leaf is quantized; None leaves it in float.
      act: How the layer's input is quantized; None computes in float with dequantized
        weights.
      kind: Only for kernels of matmuls (`"dense"`) or of convolutions (`"conv"`).
      reason: Why, shown by `plan`; worth a word where `weight` is None.
    """

    pattern: str
    weight: WeightSpec | None = None
    act: ActSpec | None = None
    kind: Literal["dense", "conv"] | None = None
    reason: str = ""

    def __post_init__(self):
        if not isinstance(self.pattern, str):
            raise TypeError(f"pattern must be text, a regular expression; got {self.pattern!r}.")
        _require_spec(self.weight, WeightSpec, "weight")
        _require_spec(self.act, ActSpec, "act")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(
                f"pattern must be a regular expression; got {self.pattern!r}: {error}."
            ) from None
        _require(self.kind, ("dense", "conv", None), "kind")
        if self.weight is None and self.act is not None:
            raise ValueError(
                f"Rule {self.pattern!r} has act but no weight; activations are quantized only "
                "where the layer's kernel is."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """Ordered rules and a default for the kernels that none of them matches.

    Attributes:
      rules: First match wins; a rule that matches nothing is an error.
      weight: Default for leaves named `kernel` with two to four axes; None leaves them.
      act: Default of the same layers' inputs.
      scale_dtype: Dtype in which scales are stored. The integers are computed with the
        scale as stored, so rounding it costs next to nothing (`quantize_weight` says how
        much). Steps below 6.1e-5, the least normal float16, become 6.1e-5 in float16: too
        coarse for 8-bit weights below 0.008.
      float_dtype: Dtype in which the leaves left in float are stored; None leaves theirs.
      allow_unmatched: Accept rules that match nothing (recipes that serve several models).
    """

    rules: tuple[Rule, ...] = ()
    weight: WeightSpec | None = None
    act: ActSpec | None = None
    scale_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    float_dtype: Literal["bfloat16", "float16", "float32"] | None = None
    allow_unmatched: bool = False

    def __post_init__(self):
        object.__setattr__(self, "rules", tuple(self.rules))
        for rule in self.rules:
            _require_spec(rule, Rule, "a rule")
        _require_spec(self.weight, WeightSpec, "weight")
        _require_spec(self.act, ActSpec, "act")
        _require(self.allow_unmatched, (True, False), "allow_unmatched")
        _require(self.scale_dtype, ("bfloat16", "float16", "float32"), "scale_dtype")
        _require(self.float_dtype, ("bfloat16", "float16", "float32", None), "float_dtype")
        if self.weight is None and self.act is not None:
            raise ValueError("QuantConfig has a default act but no default weight.")

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars, without the fields left at their defaults."""
        return _to_dict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "QuantConfig":
        """The inverse of `to_dict`.

        Raises:
          ValueError: If a field is unknown or its value is not allowed.
        """
        return _from_dict(cls, data)

    def to_yaml(self, path: Path | str) -> None:
        """Write `to_dict` as YAML."""
        import yaml

        local_path(path).write_text(
            yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8"
        )

    @classmethod
    def from_yaml(cls, path: Path | str) -> "QuantConfig":
        """Read what `to_yaml` wrote, or a file written by hand.

        Raises:
          FileNotFoundError: If there is none.
          ValueError: If it is no YAML, or says what `from_dict` refuses.
        """
        data = read_yaml(path, local_path(path).read_bytes())
        if not isinstance(data, dict):
            raise ValueError(f"{path} must hold a mapping; got {type(data).__name__}.")
        return cls.from_dict(data)


_NESTED = {"weight": WeightSpec, "act": ActSpec, "rules": Rule}


def _to_dict(spec: Any) -> dict[str, Any]:
    def plain(value):
        if dataclasses.is_dataclass(value):
            return _to_dict(value)
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return value

    return {
        field.name: plain(getattr(spec, field.name))
        for field in dataclasses.fields(spec)
        if getattr(spec, field.name) != field.default
    }


def _from_dict(cls: type, data: Mapping[str, Any]) -> Any:
    if not isinstance(data, Mapping):
        raise ValueError(f"{cls.__name__} needs a mapping of fields; got {data!r}.")
    names = {field.name for field in dataclasses.fields(cls)}
    required = {
        field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING
    }
    if unknown := sorted(map(str, data.keys() - names)):
        raise ValueError(
            f"{cls.__name__} has no field {', '.join(unknown)}; it has {', '.join(sorted(names))}."
        )
    if missing := sorted(required - data.keys()):
        raise ValueError(f"{cls.__name__} needs the field {', '.join(missing)}.")
    for name in ("pattern", "reason"):
        if name in data and not isinstance(data[name], str):
            raise ValueError(f"{name} must be text; got {data[name]!r:.80}.")

    def build(name, value):
        nested = _NESTED.get(name)
        if nested is None or (value is None and name != "rules"):
            return tuple(value) if isinstance(value, list) else value
        if name == "rules":
            if not isinstance(value, list | tuple):
                raise ValueError(f"rules must be a list of mappings; got {value!r}.")
            return tuple(_from_dict(nested, item) for item in value)
        return _from_dict(nested, value)

    return cls(**{name: build(name, value) for name, value in data.items()})
