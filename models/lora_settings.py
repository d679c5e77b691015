"""The factor `alpha / r` of a LoRA, which files tell in several places.

kohya and diffusers before PEFT keep alpha as a tensor of each layer; PEFT has one for all layers
and a pattern for exceptions, in `adapter_config.json`, which diffusers puts into the metadata of
the file.

References:
  Kalajdzievski, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA, 2023,
  https://arxiv.org/abs/2312.03732, for `alpha / sqrt(r)`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qjax.core.plain_json import parse_json, read_json
from qjax.core.safetensors_io import metadata

METADATA = "lora_adapter_metadata"
"""Where diffusers keeps PEFT's settings."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a file's writer said of alpha, beside the keys for it.

    Attributes:
      parts: PEFT's settings by component, `""` for a file of one network.
    """

    parts: Mapping[str, Mapping[str, Any]]

    def gain(self, component: str, layer: str, rank: int, alpha: float | None) -> float:
        """`alpha / r`, `alpha / sqrt(r)` for rank-stabilised LoRA, 1 if nothing says alpha."""
        part = self.parts.get(component, self.parts.get("", {}))
        if alpha is None:
            patterns = part.get("alpha_pattern") or {}
            own = [value for name, value in patterns.items() if _ends(layer, name)]
            alpha = own[0] if own else part.get("lora_alpha")
        if alpha is None:
            return 1.0
        return float(alpha) / (math.sqrt(rank) if part.get("use_rslora") else rank)


def _check(part: Mapping[str, Any]) -> None:
    """That the settings that are read hold numbers."""
    patterns = part.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"alpha_pattern={patterns!r:.80}, which is no mapping")
    alphas = {"lora_alpha": part.get("lora_alpha")} | patterns
    for name, value in alphas.items():
        if value is not None and not (type(value) in (int, float) and abs(value) <= 1e30):
            raise ValueError(f"{name}={value!r:.80}, which is no finite number")
    if type(part.get("use_rslora")) not in (bool, type(None)):
        raise ValueError(f"use_rslora={part['use_rslora']!r:.80}, which is neither true nor false")


def _ends(layer: str, name: str) -> bool:
    return layer == name or layer.endswith("." + name)


def settings_of(path: Path) -> Settings:
    """The settings in a safetensors file's metadata, and in `adapter_config.json` beside it.

    Raises:
      ValueError: If they are not JSON, or alphas are no numbers.
    """
    beside = path.parent / "adapter_config.json"
    parts: dict[str, dict[str, Any]] = {}
    try:
        if beside.is_file():
            parts[""] = read_json(beside)
        for name, value in parse_json(path, metadata(path).get(METADATA, "{}")).items():
            component, _, setting = name.partition(".")
            parts.setdefault(component, {})[setting] = value
        for part in parts.values():
            _check(part)
    except (AttributeError, ValueError) as error:
        raise ValueError(
            f"{path.name}: the settings of the adapter must be JSON, and its alphas numbers; got {error}."
        ) from None
    return Settings(parts=parts)
