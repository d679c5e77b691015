"""The arguments of a pipeline's call, checked: how many images, of what, at which size."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.core.typing import Array, Int, PRNGKeyArray


def count_images(num_images: int | None, *, labels: Any, prompts: Any, latents: Any) -> int:
    """How many images the arguments agree on.

    Raises:
      ValueError: If they do not, or agree on none.
    """
    said = {
        "num_images": num_images,
        "labels": np.shape(labels)[0] if np.ndim(labels) else None,
        "prompts": None if prompts is None or isinstance(prompts, str) else len(prompts),
        "latents": np.shape(latents)[0] if latents is not None else None,
    }
    counts = {name: count for name, count in said.items() if count is not None}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        raise ValueError(
            "num_images, labels, prompts and latents must agree on at least one image; got "
            f"{counts}. One label for all images may be a plain int, one prompt a plain text."
        )
    return next(iter(counts.values()), 1)


def check_labels(
    labels: Any, count: int, num_labels: int | None, null_label: int | None, *, guided: bool
) -> Int[Array, " b"] | None:
    """Labels of `count` images, int32, checked against the classes there are.

    Raises:
      ValueError: If labels are needed and missing, or there is no such class.
      TypeError: If they are not integers.
    """
    if labels is None and guided:
        raise ValueError("guidance needs labels; got labels=None. Pass labels=[...].")
    if labels is None:
        if null_label is None and num_labels:
            raise ValueError(
                f"a model of {num_labels} classes without a null_label needs labels; "
                f"got labels=None. Pass labels=[...] from 0 to {num_labels - 1}."
            )
        labels = null_label
    if labels is None:
        return None
    values = np.asarray(labels)
    if not np.issubdtype(values.dtype, np.integer) or values.ndim > 1:
        raise TypeError(
            f"labels must be integers, one or one per image; got dtype {values.dtype} and "
            f"shape {values.shape}."
        )
    if num_labels is not None:
        wrong = (values < 0) | (values >= num_labels)
        if null_label is not None:
            wrong &= values != null_label
        if np.any(wrong):
            raise ValueError(
                f"labels must lie between 0 and {num_labels - 1}; got "
                f"{np.unique(values[wrong]).tolist()}."
            )
    return jnp.asarray(np.broadcast_to(values, (count,)), jnp.int32)


def broadcast_texts(name: str, texts: str | Sequence[str], count: int) -> list[str]:
    """One text for each image.

    Raises:
      ValueError: If there are neither one nor `count`.
    """
    texts = [texts] * count if isinstance(texts, str) else list(texts)
    if len(texts) != count:
        raise ValueError(
            f"{name} must be one text, or one for each of {count} images; got {len(texts)}."
        )
    return texts


def check_sizes(
    wanted: tuple[int, int], factor: int, buckets: Sequence[tuple[int, int]] | None
) -> None:
    """Raise unless images of that height and width can be drawn."""
    sizes = [wanted] if buckets is None else list(buckets)
    if any(n < 1 or n % factor for size in sizes for n in size):
        raise ValueError(
            f"height and width must be multiples of {factor}, the pixels that one pixel of the "
            f"latents stands for; got {sizes}."
        )
    if buckets is not None and not any(h >= wanted[0] and w >= wanted[1] for h, w in buckets):
        raise ValueError(f"one of the buckets must hold {wanted}; got {list(buckets)}.")


def check_key(key: PRNGKeyArray | None, *, needed: bool) -> PRNGKeyArray:
    """The key of a run; one that is never looked at where none is needed.

    Raises:
      ValueError: If there is none and noise is drawn.
      TypeError: If it is not a random key of JAX.
    """
    if key is None:
        if needed:
            raise ValueError(
                "noise needs a key; got key=None. Pass key=jax.random.key(seed), or latents "
                "and eta=0 with DDIM."
            )
        return jax.random.key(0)  # its noise is multiplied by 0
    if not isinstance(key, jax.Array):
        raise TypeError(
            f"key must be a jax random key; got {type(key).__name__}. Use jax.random.key(seed)."
        )
    return key
