"""What a network is told, made of what people say: labels or prompts.

A pipeline asks a conditioner for two trees of arrays with the batch first, one for the
conditional and one for the unconditional half of guidance:

    labels -> class tokens                                    latent diffusion on ImageNet
    prompts, negative prompts -> token ids -> text towers     Stable Diffusion

| model | what the UNet attends to | what joins its time vector |
|---|---|---|
| Stable Diffusion 1, 2 | the last, normalised states | |
| Stable Diffusion XL | both towers' states before the last layer, side by side | the projected text and six sizes |

Both run the network once for every different text or label, whatever the number of images.

References:
  Podell et al., SDXL, 2023, https://arxiv.org/abs/2307.01952, sections 2.1 and 2.2.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from qjax.core.typing import Array, Int
from qjax.models.components import Component
from qjax.models.text_encoders.tokenizers import encode_prompts
from qjax.models.unet2d_condition_inputs import Conditioning

PENULTIMATE = -2


@runtime_checkable
class PromptConditioner(Protocol):
    """What a pipeline asks of whatever reads prompts."""

    def encode(
        self,
        prompts: Sequence[str],
        negative_prompts: Sequence[str] | None,
        *,
        size: tuple[int, int],
    ) -> tuple[Any, Any]:
        """The conditional and the unconditional tree for prompts, one image each."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassConditioner:
    """Labels as texts of one token, through a class embedder."""

    component: Component

    def encode(self, labels: Int[Array, " b"]) -> Conditioning:
        """The tokens of `labels`, the null label among them."""
        model, params = self.component.model, self.component.params
        return Conditioning(text=_class_tokens(model, params, labels))


def tower_name(i: int) -> str:
    """What diffusers calls the text tower `i`, counted from 0, among the components."""
    return "text_encoder" + ("" if i == 0 else f"_{i + 1}")


@dataclass(frozen=True, kw_only=True, eq=False)
class TextTower:
    """A text encoder and the tokenizer that goes before it.

    Attributes:
      component: The encoder.
      tokenizer: As `tokenizers.load_tokenizer` gives it.
      files: Folder of the tokenizer's files, which are saved with a pipeline.
    """

    component: Component
    tokenizer: Any
    files: Path


@dataclass(frozen=True, kw_only=True, eq=False)
class TextConditioner:
    """Prompts through one text tower, or through the two of Stable Diffusion XL.

    Attributes:
      towers: One or two.
      zero_without_negative: Whether, without negative prompts, the unconditional half is told
        zeros in place of the empty text (`force_zeros_for_empty_prompt` of diffusers).
    """

    towers: tuple[TextTower, ...]
    zero_without_negative: bool = False

    def encode(
        self,
        prompts: Sequence[str],
        negative_prompts: Sequence[str] | None,
        *,
        size: tuple[int, int],
    ) -> tuple[Conditioning, Conditioning]:
        """What the UNet is told in both halves.

        Args:
          prompts: One for each image.
          negative_prompts: One for each image; None for none.
          size: Height and width of the images in pixels: with two towers the UNet is told that
            the picture was of this size and not cropped.

        Raises:
          TypeError: If a prompt is not a text.
          ValueError: If there is no prompt.
        """
        negatives = [""] * len(prompts) if negative_prompts is None else list(negative_prompts)
        texts = list(dict.fromkeys([*prompts, *negatives]))
        told = self._read(texts, size)
        place = {text: i for i, text in enumerate(texts)}
        pick = lambda names: jax.tree.map(lambda a: a[np.asarray([place[n] for n in names])], told)
        conditional, unconditional = pick(prompts), pick(negatives)
        if negative_prompts is None and self.zero_without_negative:
            zero = lambda a: None if a is None else jnp.zeros_like(a)
            unconditional = unconditional._replace(
                text=zero(unconditional.text), pooled=zero(unconditional.pooled)
            )
        return conditional, unconditional

    def _read(self, texts: Sequence[str], size: tuple[int, int]) -> Conditioning:
        """The conditioning of every text."""
        wide = len(self.towers) > 1
        states, pooled = [], None
        for tower in self.towers:
            ids = jnp.asarray(encode_prompts(tower.tokenizer, texts))
            state, pooled = _read_texts(
                tower.component.model, tower.component.params, ids, penultimate=wide
            )
            states.append(state)
        if not wide:
            return Conditioning(text=states[0])
        sizes = jnp.tile(jnp.asarray([[*size, 0, 0, *size]], jnp.float32), (len(texts), 1))
        return Conditioning(text=jnp.concatenate(states, axis=-1), pooled=pooled, time_ids=sizes)


@functools.partial(jax.jit, static_argnums=0)
def _class_tokens(model, params, labels):
    return model.apply({"params": params}, labels)


@functools.partial(jax.jit, static_argnums=0, static_argnames="penultimate")
def _read_texts(model, params, ids, *, penultimate: bool):
    layers = (PENULTIMATE,) if penultimate else ()
    output = model.apply({"params": params}, ids, hidden_layers=layers)
    return (
        output.hidden_states[0] if penultimate else output.last_hidden_state
    ), output.text_embeds
