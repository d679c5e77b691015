"""Whether the values of a config are of the kinds and sizes that a network can have.

A `config.json` may come from anybody. Before a port reads one, every value is compared with the
type of its field: numbers where numbers belong, finite ones, and counts within what any
network has, so that a wrong one is an error with its name and not a table of 2**31 layers.
"""

import dataclasses
import functools
import math
import numbers
import types
import typing
from collections.abc import Mapping
from typing import Any

LARGEST = 2**24
"""Of any width, size or vocabulary."""

DEEPEST = 128
"""Of any number of layers or levels in a row."""

_DEPTHS = {
    "layers_per_block",
    "num_hidden_layers",
    "num_layers",
    "reverse_transformer_layers_per_block",
    "transformer_layers_per_block",
}
# A list of one entry a timestep is the largest thing that a config makes.
_MOST = dict.fromkeys(_DEPTHS, DEEPEST) | {"num_train_timesteps": 1_000_000}
_MAY_BE_INFINITE = {"lambda_min_clipped"}
_FROM_ZERO = {
    "downsample_padding",
    "eos_token_id",
    "freq_shift",
    "num_classes",
    "reverse_transformer_layers_per_block",
    "steps_offset",
    "transformer_layers_per_block",
}


def value_problems(config: type, values: Mapping[str, Any]) -> list[str]:
    """Every value that is not what its field may hold, as `key=value (what it may)`.

    Args:
      config: A dataclass whose fields are annotated with numbers, texts, None, literals, and
        tuples of them.
      values: Values by the names of fields; fields that it leaves out are not looked at.
    """
    hints = _hints(config)
    found = []
    for key, hint in hints.items():
        if key not in values:
            continue
        if key in _MAY_BE_INFINITE and values[key] in (math.inf, -math.inf):
            continue
        limits = (0 if key in _FROM_ZERO else 1, _MOST.get(key, LARGEST))
        if not _fits(values[key], hint, *limits):
            shown = repr(values[key])
            shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
            found.append(f"{key}={shown} ({_said(hint, *limits)})")
    return found


def with_defaults(config: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with the fields' defaults for those that `value_problems` names.

    With these the rules between values can be checked too, and all that is wrong be said at once.
    """
    wrong = {said.partition("=")[0] for said in value_problems(config, values)}
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    return {key: defaults[key] if key in wrong else value for key, value in values.items()}


@functools.cache
def _hints(config: type) -> dict[str, Any]:
    hints = typing.get_type_hints(config)
    return {field.name: hints[field.name] for field in dataclasses.fields(config)}


def _fits(value: Any, hint: Any, least: int, most: int) -> bool:
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one, least, most) for one in inside)
    if origin is typing.Literal:
        return any(type(value) is type(one) and value == one for one in inside)
    if origin is tuple:
        if not isinstance(value, tuple | list) or not 1 <= len(value) <= LARGEST:
            return False
        if inside[-1] is Ellipsis:
            return all(_fits(one, inside[0], least, most) for one in value)
        return len(value) == len(inside) and all(
            _fits(one, kind, least, most) for one, kind in zip(value, inside, strict=True)
        )
    if hint is int:
        return (
            isinstance(value, numbers.Integral)
            and type(value) is not bool
            and least <= int(value) <= most
        )
    if hint is float:
        return (
            isinstance(value, numbers.Real)
            and type(value) is not bool
            and (abs(value) < 2**31 and math.isfinite(value))  # type: ignore[operator]
        )
    return isinstance(value, hint)


def _said(hint: Any, least: int, most: int) -> str:
    """What a field may hold, in words."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_said(one, least, most) for one in inside)
    if origin is typing.Literal:
        return ("only " if len(inside) == 1 else "") + " or ".join(map(repr, inside))
    if origin is tuple:
        return f"a list, each {_said(inside[0], least, most)}"
    names = {int: f"a whole number from {least} to {most}", float: "a finite number"}
    return {**names, bool: "true or false", str: "text", types.NoneType: "null"}[hint]


def depth_problems(blocks: int, transformers: int = 0) -> list[str]:
    """Whether a UNet has more blocks than it could be traced with in reasonable time.

    Args:
      blocks: ResNet blocks in all; Stable Diffusion XL has 17.
      transformers: Transformer blocks in all; Stable Diffusion XL has 70.
    """
    return [
        f"{count} {kind} blocks in all (at most {most})"
        for count, kind, most in (
            (blocks, "ResNet", 2 * DEEPEST),
            (transformers, "transformer", 256),
        )
        if count > most
    ]
