"""Split shortcuts: ranges of their own for the two parts of a joined input.

On the way up a UNet joins what comes from below with what was kept on the way down,
`[hidden, skip]`, hidden first. The two differ much in size, and what reads both through one
scale spends its levels on the larger. The 1x1 convolution of the shortcut is where it matters:
what the 3x3 convolution reads has been normalised.

The split is written as rules for the config and needs nothing else: weights and activations of
the shortcut in groups of channels whose size divides both parts, their greatest common divisor,
so that no group lies across the border. (In Stable Diffusion these are 320, 640 or 1280
channels, two to four groups.)

    config = with_split_shortcuts(pipe, config)

References:
  Li et al., Q-Diffusion, 2023, https://arxiv.org/abs/2302.04304, section 3.4.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from qjax.core.config import QuantConfig, Rule
from qjax.core.plan import decide
from qjax.core.serialize import flatten
from qjax.models import unet2d, unet2d_condition_blocks
from qjax.models.pipeline import Pipeline
from qjax.models.resnet import ResnetBlock
from qjax.models.retargeting import network_of
from qjax.models.unet2d import UNet2DModel
from qjax.models.unet2d_condition import UNet2DConditionModel
from qjax.models.unet2d_condition_inputs import abstract_inputs

__all__ = ["Join", "skip_joins", "split_rules", "with_split_shortcuts"]

_UP = (unet2d.UpBlock, unet2d_condition_blocks.UpBlock)


@dataclasses.dataclass(frozen=True)
class Join:
    """A ResNet block that reads a joined input.

    Attributes:
      block: Its path.
      hidden: Channels from below, the first ones.
      skip: Channels from the way down.
    """

    block: str
    hidden: int
    skip: int


def skip_joins(forward: Callable[[], Any]) -> tuple[Join, ...]:
    """The joins of a network, in the order in which it runs.

    Args:
      forward: Runs the network; called within `jax.eval_shape`, so nothing is computed.
    """
    ups: list[tuple[str, int, list[int]]] = []
    features: dict[str, int] = {}

    def watch(next_fun: Callable[..., Any], args: tuple, kwargs: dict, context: Any) -> Any:
        module, path = context.module, "/".join(context.module.path)
        if isinstance(module, _UP) and context.method_name == "__call__":
            h, skips, *_ = args
            ups.append((path, h.shape[-1], [skip.shape[-1] for skip in skips]))
        if isinstance(module, ResnetBlock):
            features[path] = module.features
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(watch):
        jax.eval_shape(forward)
    joins = []
    for path, hidden, skips in ups:
        for i, skip in enumerate(skips):
            block = f"{path}/resnets_{i}"
            joins.append(Join(block, hidden, skip))
            hidden = features[block]
    return tuple(joins)


def split_rules(pipe: Pipeline, config: QuantConfig, *, conv1: bool = False) -> tuple[Rule, ...]:
    """Rules that split what `config` quantizes of the joined inputs; put them first.

    They keep bits, symmetry and mode of the rules that decide there now. Groups that are given
    already are kept where they divide both parts, and become narrower where they do not.

    Args:
      pipe: The pipeline; its network and the shapes of its params are looked at.
      config: The rules so far.
      conv1: Whether the first 3x3 convolution is split as well, its groups in every tap; with
        static ranges, for dynamic ones would be a pixel's.

    Raises:
      ValueError: If the network joins nothing.
    """
    shapes = dict(flatten(pipe.params))
    joins = skip_joins(_forward(pipe))
    if not joins:
        raise ValueError(
            f"split shortcuts are for UNets, whose ResNet blocks read joined inputs; "
            f"{type(network_of(pipe)).__name__} has none. Leave the split out."
        )
    lone = dataclasses.replace(config, allow_unmatched=True)
    rules = []
    for join in joins:
        for layer in ("conv_shortcut", "conv1") if conv1 else ("conv_shortcut",):
            path = f"{join.block}/{layer}/kernel"
            if path not in shapes:
                continue
            leaf = jax.ShapeDtypeStruct(shapes[path].shape, jnp.float32)
            (entry,) = decide([(path, leaf)], lone)
            if entry.weight is None:
                continue
            size = math.gcd(join.hidden, join.skip, entry.group_size or 0)
            groups: Any = {"granularity": "per_group", "group_size": size}
            act = entry.act
            if act is not None and not (layer == "conv1" and act.mode == "dynamic"):
                act = dataclasses.replace(act, **groups)
            rules.append(
                Rule(
                    pattern=re.escape(path),
                    weight=dataclasses.replace(entry.weight, **groups),
                    act=act,
                    reason=f"split at channel {join.hidden} of {join.hidden + join.skip}",
                )
            )
    return tuple(rules)


def with_split_shortcuts(
    pipe: Pipeline, config: QuantConfig, *, conv1: bool = False
) -> QuantConfig:
    """The config with `split_rules` before its own.

    A rule that decides nothing else then would be an error, and is left out.

    Raises:
      ValueError: As `split_rules`.
    """
    rules = split_rules(pipe, config, conv1=conv1)
    paths = [path for path, _ in flatten(pipe.params)]
    matched = lambda rule: {path for path in paths if re.fullmatch(rule.pattern, path)}
    taken = set().union(*map(matched, rules))
    others = [rule for rule in config.rules if not matched(rule) or matched(rule) - taken]
    return dataclasses.replace(config, rules=(*rules, *others))


def _forward(pipe: Pipeline) -> Callable[[], Any]:
    """Runs the network on one sample of any values."""
    model = network_of(pipe)
    t = jnp.zeros((1,), jnp.int32)
    x_t, told = jnp.zeros((1, *pipe.shape), jnp.float32), None
    if isinstance(model, UNet2DConditionModel):
        zeros = lambda leaf: jnp.zeros(leaf.shape, leaf.dtype)
        told = jax.tree.map(zeros, abstract_inputs(model.config)[2])
    elif isinstance(model, UNet2DModel):
        config = model.config
        if config.class_embed_type == "identity":
            told = jnp.zeros((1, config.time_dim), jnp.float32)
        elif config.has_labels:
            told = jnp.zeros((1,), jnp.int32)
    else:
        told = jnp.zeros((1,), jnp.int32)
    return lambda: model.apply({"params": pipe.params}, x_t, t, told)
