"""The device that a program is traced for: what chooses an implementation looks at it.

It is the default device, unless a program is compiled for hardware that is not there:

    with target("tpu", "TPU v5 lite"):
        jax.jit(step).lower(*shapes).compile()

Tracing is what must happen inside; a function that jit has traced before keeps its choice.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax


class Target(NamedTuple):
    """A kind of device.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      kind: Its `device_kind`, as "TPU v5 lite" or "NVIDIA H200".
    """

    platform: str
    kind: str


_TARGET: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def target(platform: str, kind: str) -> Iterator[None]:
    """Programs traced within are for this kind of device, whatever the default device is."""
    token = _TARGET.set(Target(platform, kind))
    try:
        yield
    finally:
        _TARGET.reset(token)


def by_platform(*operands: Any, default: Callable[..., Any], **others: Callable[..., Any]) -> Any:
    """As `jax.lax.platform_dependent`; within a `target` that platform's function is traced alone.

    Args:
      *operands: Of the functions.
      default: Runs on platforms that are not named.
      **others: By the names of platforms: `cpu`, `tpu`, `cuda`.
    """
    told = _TARGET.get()
    if told is None:
        return jax.lax.platform_dependent(*operands, default=default, **others)
    return others.get({"gpu": "cuda"}.get(told.platform, told.platform), default)(*operands)


def current_target() -> Target:
    """What programs that are traced now are for."""
    chosen = _TARGET.get()
    if chosen is not None:
        return chosen
    device = jax.config.jax_default_device or jax.local_devices()[0]  # type: ignore[attr-defined]
    if isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    return Target(device.platform, device.device_kind)
