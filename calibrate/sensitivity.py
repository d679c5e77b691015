"""What it costs to quantize the weights of one layer alone, everything else in float.

The cost is taken from the answers y of the float network, at noisy samples of its own roll-out
or of a quantized one, and from the answers y' with one kernel replaced by what its integers
stand for:

    SQNR = 10 log10( sum y**2 / sum (y - y')**2 )        in decibels,
    noise to signal = 10**(-SQNR / 10).

Both sums run over all samples, all steps of the sampler alike among them, and over the channels
of the sample (not those of a learned variance). The noises of several layers are nearly
independent, so their ratios of noise to signal add up, which is what makes an allocation of
bits an integer programme (`allocation.py`).

The kernel is an argument of the one program that answers: no layer and no width compiles it
again.

References:
  Zhao et al., MixDQ, 2024, https://arxiv.org/abs/2405.17873 (SQNR of the network's
  output, one layer at a time); Pandey et al., A Practical Mixed Precision Algorithm for
  Post-Training Quantization, 2023, https://arxiv.org/abs/2302.05397 (SQNR as the measure).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.calibrate.blocks import subtree
from qjax.calibrate.collect import Samples
from qjax.calibrate.fitted import KERNEL, with_kernels
from qjax.calibrate.layer_widths import LayerWeights
from qjax.calibrate.similarity import Score
from qjax.core.qtensor import QTensor
from qjax.core.typing import Apply, Array, Float, Params

__all__ = [
    "Probe",
    "most_sensitive",
    "noise_to_signal",
    "picture_distances",
    "sqnr_of_layers",
]


@functools.partial(jax.jit, static_argnames=("apply",))
def _answer(apply: Apply, params: Params, batch: Samples) -> Array:
    answer = apply({"params": params}, batch.x_t, batch.t, batch.told)
    return answer[..., : batch.x_t.shape[-1]].astype(jnp.float32)


@jax.jit
def _power(x: Array) -> Array:
    return jnp.sum(jnp.square(x))


@functools.partial(jax.jit, static_argnames=("dtype",))
def _dequantize(q: QTensor, dtype: Any) -> Array:
    return q.dequantize(dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class Probe:
    """A float network and its answers at some samples, to hold other kernels against.

    Attributes:
      apply: The network's function.
      params: Its float params.
      samples: Where it is asked, in batches of one size.
      answers: What it answers there.
      signal: Sum of the squared answers.
    """

    apply: Apply
    params: Params
    samples: tuple[Samples, ...]
    answers: tuple[Array, ...]
    signal: float

    @classmethod
    def of(cls, apply: Apply, params: Params, samples: Sequence[Samples]) -> "Probe":
        """The probe of a network at samples.

        Raises:
          ValueError: If its answers are not finite, or nothing but zeros.
        """
        answers = tuple(_answer(apply, params, batch) for batch in samples)
        signal = sum(float(_power(answer)) for answer in answers)
        if not (np.isfinite(signal) and signal > 0):
            raise ValueError(
                "the float network must answer finite numbers, and not zeros alone; the sum of "
                f"their squares is {signal}. Use trained weights."
            )
        return cls(apply, params, tuple(samples), answers, signal)

    def kernel(self, path: str) -> Array:
        """The float kernel of a layer."""
        return subtree(self.params, path)[KERNEL]

    def params_with(self, kernels: Mapping[str, QTensor]) -> Params:
        """The float params with these layers' kernels as their integers have them."""
        floats = {
            path: _dequantize(q, jnp.dtype(self.kernel(path).dtype)) for path, q in kernels.items()
        }
        return with_kernels(self.params, floats)

    def sqnr(self, kernels: Mapping[str, QTensor]) -> float:
        """SQNR in dB with these layers' kernels as their integers have them.

        Infinite where the answers stay the same; minus infinity where they are no more finite.
        """
        return self.sqnr_of_params(self.params_with(kernels))

    def sqnr_of_params(self, params: Params) -> float:
        """SQNR in dB of what the network answers with other float params, as `sqnr`."""
        noise = 0.0
        for batch, answer in zip(self.samples, self.answers, strict=True):
            noise += float(_power(_answer(self.apply, params, batch) - answer))
        if not np.isfinite(noise):
            return -np.inf
        return float(10 * np.log10(self.signal / noise)) if noise else np.inf

    def sqnr_of(self, layer: LayerWeights, bits: Sequence[int]) -> Float[np.ndarray, " k"]:
        """SQNR in dB of one layer alone, at every width."""
        w = self.kernel(layer.path)
        return np.array([self.sqnr({layer.path: layer.quantized(w, b)}) for b in bits])


def sqnr_of_layers(
    apply: Apply,
    params: Params,
    layers: Mapping[str, LayerWeights],
    bits: Sequence[int],
    samples: Sequence[Samples],
    *,
    on_layer: Callable[[str, np.ndarray], None] | None = None,
) -> dict[str, Float[np.ndarray, " k"]]:
    """The SQNR of the network's output, in dB, for every layer quantized alone at every width.

    Args:
      apply: The network's function.
      params: Its float params.
      layers: How layers are quantized, by path (`quantized_layers`).
      bits: The widths.
      samples: Where the network is asked, in batches of one size (`collect.samples_at`).
      on_layer: Progress: called with a layer's path and what was found.

    Raises:
      ValueError: As `Probe.of`.
    """
    probe, found = Probe.of(apply, params, samples), {}
    for path, layer in layers.items():
        found[path] = probe.sqnr_of(layer, bits)
        if on_layer is not None:
            on_layer(path, found[path])
    return found


def picture_distances(
    probe: Probe,
    layer: LayerWeights,
    bits: Sequence[int],
    draw: Callable[[Params], np.ndarray],
    reference: Float[np.ndarray, "b h w c"],
    scores: Sequence[Score],
) -> Float[np.ndarray, "m k"]:
    """How far pictures are from the float ones with one layer quantized alone, at every width.

    Args:
      probe: The float network.
      layer: The layer.
      bits: The widths.
      draw: Pictures that the whole sampler makes with such params, always of the same noise.
      reference: Its pictures with the float params.
      scores: What they are judged by.
    """
    columns = []
    for b in bits:
        kernel = layer.quantized(probe.kernel(layer.path), b)
        images = draw(probe.params_with({layer.path: kernel}))
        columns.append([score(images, reference) for score in scores])
    return np.array(columns).T


def noise_to_signal(sqnr: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Power of the noise over that of the signal, of decibels; 0 for an infinite SQNR."""
    return 10.0 ** (-np.asarray(sqnr, np.float64) / 10)


def most_sensitive(sqnr: Float[np.ndarray, "l k"], share: float) -> list[int]:
    """Numbers of the layers with the least SQNR at their worst width, the worst first.

    Args:
      sqnr: In dB, of every layer at every width.
      share: How many of the layers, 0 to 1, rounded up.
    """
    worst = np.min(sqnr, axis=1)
    return np.argsort(worst, kind="stable")[: int(np.ceil(share * len(worst)))].tolist()
