"""A sampler whose layers' group sizes are data: one program for all genomes.

Shapes are static under jit, and an array of scales has another shape at every group size. So
scales never appear in a shape of the program:

- a kernel is quantized by a program whose branches are the layer's group sizes, the number of
  the choice being an argument, and what comes out is a float kernel;
- an input's ranges are taken once over the finest groups, which divide all others: the ranges of
  a coarser size are extremes of theirs, repeated over them, and the choice is an index.

Values are those of real quantization, code for code (`quantizers`): what differs from the
low-bit arithmetic is the order in which float sums run. Params stay per layer, since genomes
differ from block to block.

Inputs are grouped by token, as the authors' code and our low-bit layers have it, or by sample,
as the paper's text says: one range for a group of channels of all tokens (pixels) of an item.
The second is for comparisons, in this simulation alone.

Where there are several devices each draws another candidate, and the program of each is that
of one device, so that the winner does not depend on how many there are.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qjax.calibrate.blocks import subtree
from qjax.calibrate.collect import Samples
from qjax.calibrate.fitted import KERNEL, with_kernels
from qjax.calibrate.genome import Space
from qjax.calibrate.rollout import Items
from qjax.calibrate.simulate import Hook, fake_quantize_dynamic, simulated
from qjax.core.config import ActSpec, WeightSpec
from qjax.core.plan import Axes, PlanEntry, kernel_axes
from qjax.core.qtensor import spread
from qjax.core.quantizers import (
    Codes,
    integer_range,
    quantize_weight,
    round_to_codes,
    to_floats,
)
from qjax.core.typing import Apply, Array, Float, Int, Params
from qjax.models.samplers import Sampler
from qjax.models.sampling import sample

__all__ = ["Candidates", "GenomeNetwork", "Ranges", "chosen_kernel", "fake_quantize_grouped"]

Ranges = Literal["token", "sample"]

_AXIS = "candidate"


@dataclasses.dataclass(frozen=True)
class KernelFormat:
    """How a kernel is quantized, but for the number of its choice.

    Attributes:
      choices: Group sizes.
      weight: Bits, symmetry and range search.
      axes: Of the kernel.
      scale_dtype: Name of the dtype in which scales are stored.
    """

    choices: tuple[int, ...]
    weight: WeightSpec
    axes: Axes
    scale_dtype: str


class GenomeNetwork(NamedTuple):
    """A network whose layers are given genes: hashable, arrays apart.

    Attributes:
      apply: The network's function.
      sampler: The sampler.
      guidance_channels: As for `sampling.guided_prediction`.
      layers: Layers of the search in the order of a genome's genes: path, format of the kernel,
        and how the input is quantized.
      others: Quantized layers that keep their groups, and how their inputs are quantized.
      ranges: What shares a range of a group's channels.
    """

    apply: Apply
    sampler: Sampler
    guidance_channels: int | None
    layers: tuple[tuple[str, KernelFormat, ActSpec | None], ...] = ()
    others: tuple[tuple[str, ActSpec], ...] = ()
    ranges: Ranges = "token"


def network_layers(
    space: Space, entries: Mapping[str, PlanEntry], scale_dtype: str
) -> tuple[tuple[str, KernelFormat, ActSpec | None], ...]:
    """`GenomeNetwork.layers` of a space and the rules' decisions on its layers."""
    layers = []
    for gene in space.genes:
        entry = entries[gene.path]
        axes = kernel_axes(entry.path, len(entry.shape))
        assert entry.weight is not None and axes is not None
        fmt = KernelFormat(gene.choices, entry.weight, axes, scale_dtype)
        layers.append((gene.path, fmt, entry.act))
    return tuple(layers)


def chosen_kernel(
    w: Float[Array, "..."], choice: Int[Array, ""], fmt: KernelFormat
) -> Float[Array, "..."]:
    """The float values of the kernel's integers at the group size of that number."""

    def at(group_size: int) -> Callable[[Array], Array]:
        spec = dataclasses.replace(fmt.weight, granularity="per_group", group_size=group_size)

        def quantized(w: Array) -> Array:
            codes = quantize_weight(
                w,
                spec,
                group_size=group_size,
                channel_axes=fmt.axes.channels,
                group_axis=fmt.axes.group,
                scale_dtype=jnp.dtype(fmt.scale_dtype),
            )
            zero_point = None if codes.zero_point is None else spread(codes.zero_point, w.shape)
            return to_floats(Codes(codes.codes, spread(codes.scale, w.shape), zero_point))

        return quantized

    return jax.lax.switch(choice, [at(g) for g in fmt.choices], w)


def fake_quantize_grouped(
    x: Float[Array, "b *s i"],
    choice: Int[Array, ""],
    choices: Sequence[int],
    act: ActSpec,
    *,
    ranges: Ranges = "token",
) -> Float[Array, "b *s i"]:
    """What dynamic ranges of groups make of an input, the group size being data.

    Args:
      x: Input.
      choice: Number of the group size; may be traced.
      choices: The group sizes; each divides the channels.
      act: Bits and symmetry.
      ranges: Whether a group's range is a token's own or an item's.
    """
    fine = math.gcd(*choices)
    grouped = x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // fine, fine)
    # A range contains 0, as `quantizers.quantize_activation` has it.
    low = jnp.min(grouped, axis=-1, initial=0.0)
    high = jnp.max(grouped, axis=-1, initial=0.0)
    if ranges == "sample":
        between = tuple(range(1, x.ndim - 1))
        low = jnp.min(low, axis=between, keepdims=True)
        high = jnp.max(high, axis=between, keepdims=True)
    low = _of_choice(low, choice, [g // fine for g in choices], jnp.min)[..., None]
    high = _of_choice(high, choice, [g // fine for g in choices], jnp.max)[..., None]
    qmin, qmax = integer_range(act.bits, symmetric=act.symmetric)
    tiny = float(jnp.finfo(jnp.float32).tiny)
    if act.symmetric:
        scale = jnp.maximum(jnp.maximum(-low, high) * (1.0 / qmax), tiny)
        # By the reciprocal, as there; nothing is to be clipped.
        found = jnp.round(grouped * (1.0 / scale)) * scale
    else:
        scale = jnp.maximum((high - low) * (1.0 / (qmax - qmin)), tiny)
        zero_point = jnp.clip(qmin - jnp.round(low / scale), qmin, qmax).astype(jnp.int32)
        codes = round_to_codes(grouped, scale, zero_point, qmin=qmin, qmax=qmax)
        found = to_floats(Codes(codes, scale, zero_point))
    return found.reshape(x.shape).astype(x.dtype)


def _of_choice(
    fine: Float[Array, "*s n"], choice: Array, runs: Sequence[int], extreme: Callable[..., Array]
) -> Float[Array, "*s n"]:
    """For every finest group the extreme of the run of them that shares a scale."""
    *lead, n = fine.shape
    found = [
        jnp.repeat(extreme(fine.reshape(*lead, n // run, run), axis=-1), run, axis=-1)
        for run in runs
    ]
    return jnp.stack(found)[choice] if len(found) > 1 else found[0]


def _hook(network: GenomeNetwork, genome: Int[Array, " l"]) -> Hook:
    """Quantizes the inputs of all layers, those of the search at the genome's group sizes."""
    places = {path: (i, fmt, act) for i, (path, fmt, act) in enumerate(network.layers)}
    others = dict(network.others)

    def hook(path: str, module: nn.Module, x: Array) -> Array:
        if path in others:
            return fake_quantize_dynamic(x, others[path], module)
        i, fmt, act = places.get(path, (0, None, None))
        if fmt is None or act is None:
            return x
        return fake_quantize_grouped(x, genome[i], fmt.choices, act, ranges=network.ranges)

    return hook


def _over(mesh: Mesh | None, function: Callable[..., Any], mapped: Sequence[bool]):
    """The function of one candidate, over all: each device has one, or there is only one.

    Args:
      mesh: The devices; None for one.
      function: Its mapped arguments, and its results, are without the axis of candidates.
      mapped: Of every argument, whether its arrays have that axis first.
    """

    def one(*args):
        inner = [
            jax.tree.map(lambda a: a[0], arg) if each else arg
            for arg, each in zip(args, mapped, strict=True)
        ]
        return jax.tree.map(lambda a: a[None], function(*inner))

    if mesh is None:
        return one
    specs = tuple(PartitionSpec(_AXIS) if each else PartitionSpec() for each in mapped)
    return jax.shard_map(
        one, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(_AXIS), check_vma=False
    )


@functools.partial(jax.jit, static_argnames=("fmt", "mesh"))
def _kernels(w, choice, fmt, mesh):
    return _over(mesh, lambda w, k: chosen_kernel(w, k, fmt), (False, True))(w, choice)


@functools.partial(jax.jit, static_argnames=("network", "mesh"))
def _draw(network, mesh, params, kernels, genomes, x_T, told, null, keys, rows, scale):
    def one(kernels, genome, params, x_T, told, null, keys, rows, scale):
        def apply(variables, x_t, t, told):
            with simulated(_hook(network, genome)):
                return network.apply(variables, x_t, t, told)

        x_0, _ = sample(
            apply,
            with_kernels(params, kernels),
            network.sampler,
            rows,
            x_T,
            told,
            null,
            keys=keys,
            guidance_scale=scale,
            guidance_channels=network.guidance_channels,
        )
        return x_0

    mapped = (True, True, *[False] * 7)
    return _over(mesh, one, mapped)(kernels, genomes, params, x_T, told, null, keys, rows, scale)


@functools.partial(jax.jit, static_argnames=("network",))
def _predict(network, params, kernels, genome, samples):
    with simulated(_hook(network, genome)):
        variables = {"params": with_kernels(params, kernels)}
        return network.apply(variables, samples.x_t, samples.t, samples.told)


@functools.partial(jax.jit, static_argnames=("network",))
def _layer_errors(network, params, kernels, genome, samples):
    found: dict[str, Array] = {}
    quantized = _hook(network, genome)

    def hook(path: str, module: nn.Module, x: Array) -> Array:
        if path in kernels:
            alone = module.copy(parent=None, name=None)
            own = subtree(params, path)
            y: Any = alone.apply({"params": own}, x)
            y_hat: Any = alone.apply(
                {"params": {**own, KERNEL: kernels[path]}}, quantized(path, module, x)
            )
            power = lambda a: jnp.sum(jnp.square(a.astype(jnp.float32)))
            sums = jnp.stack([power(y_hat - y), power(y)])
            found[path] = found.get(path, jnp.zeros((2,))) + sums
        return x

    with simulated(hook):
        network.apply({"params": params}, samples.x_t, samples.t, samples.told)
    return jnp.stack([found[path] for path, _, _ in network.layers])


@dataclasses.dataclass(frozen=True, eq=False)
class Candidates:
    """A network with its params, to be run with any genome.

    Attributes:
      network: The network; without layers it is run as it is.
      params: Its params; kernels of the layers of the search are not read.
      floats: The kernels that are quantized, float, by layer.
      mesh: The devices that draw a candidate each; None for one device.
    """

    network: GenomeNetwork
    params: Params
    floats: Mapping[str, Array]
    mesh: Mesh | None = None

    @classmethod
    def of(
        cls,
        network: GenomeNetwork,
        params: Params,
        floats: Params,
        *,
        devices: Sequence[jax.Device] | None = None,
    ) -> "Candidates":
        """The candidates of a network.

        Args:
          network: The network.
          params: The params of the quantized network: QTensors without `act`, and what is
            float in it.
          floats: The params that its integers stand for.
          devices: What draws candidates; None for all devices of this process.
        """
        devices = jax.local_devices() if devices is None else devices
        mesh = Mesh(np.array(devices), (_AXIS,)) if len(devices) > 1 else None
        kernels = {path: subtree(floats, path)[KERNEL] for path, _, _ in network.layers}
        if mesh is not None:
            everywhere = NamedSharding(mesh, PartitionSpec())
            params, kernels = jax.device_put((params, kernels), everywhere)
        return cls(network, params, kernels, mesh)

    @property
    def at_once(self) -> int:
        """How many candidates are drawn at the same time."""
        return 1 if self.mesh is None else self.mesh.size

    def kernels(self, genomes: Int[np.ndarray, "n l"]) -> dict[str, Float[Array, "n ..."]]:
        """The float values of all layers' integers, for `at_once` genomes."""
        return {
            path: _kernels(self.floats[path], jnp.asarray(genomes[:, i]), fmt, self.mesh)
            for i, (path, fmt, _) in enumerate(self.network.layers)
        }

    def draw(
        self,
        genomes: Int[np.ndarray, "n l"],
        items: Items,
        rows: Mapping[str, np.ndarray],
        *,
        guidance_scale: Array | None,
        batch: int,
    ) -> Iterator[Float[np.ndarray, "n b h w c"]]:
        """What the sampler ends in for every genome, the same noise for all, batch by batch.

        Args:
          genomes: At most `at_once`.
          items: Noise, and what the network is told.
          rows: Of the sampler.
          guidance_scale: Weight of the guidance; None for none.
          batch: Items that run at once; the last batch is filled up with the last item.
        """
        count, n = len(genomes), len(items.x_T)
        filled = np.concatenate([genomes, genomes[-1:].repeat(self.at_once - count, axis=0)])
        kernels, batch = self.kernels(filled), min(batch, n)
        for start in range(0, n, batch):
            index = np.minimum(np.arange(start, start + batch), n - 1)
            x_T, told, null, keys = jax.tree.map(lambda a, index=index: a[index], tuple(items))
            x_0 = _draw(
                self.network,
                self.mesh,
                self.params,
                kernels,
                jnp.asarray(filled),
                x_T,
                told,
                null,
                keys,
                dict(rows),
                guidance_scale,
            )
            yield np.asarray(x_0)[:count, : n - start]

    def predict(self, genome: Int[np.ndarray, " l"], samples: Samples) -> Array:
        """The network's answer at samples, with one genome."""
        return _predict(
            self.network, self.params, self._alone(genome), jnp.asarray(genome), samples
        )

    def layer_errors(
        self, genome: Int[np.ndarray, " l"], samples: Sequence[Samples], params: Params
    ) -> Float[np.ndarray, " l"]:
        """Noise over signal of every layer's output alone, its inputs those of the float network.

        Args:
          genome: Group sizes.
          samples: Where the network is run.
          params: Of the float network.
        """
        kernels = self._alone(genome)
        sums = sum(
            np.asarray(
                _layer_errors(self.network, params, kernels, jnp.asarray(genome), batch),
                np.float64,
            )
            for batch in samples
        )
        noise, signal = np.asarray(sums).T
        return noise / np.maximum(signal, np.finfo(np.float64).tiny)

    def _alone(self, genome: Int[np.ndarray, " l"]) -> dict[str, Float[Array, "..."]]:
        """The kernels of one genome."""
        return {
            path: _kernels(self.floats[path], jnp.asarray(genome[i : i + 1]), fmt, None)[0]
            for i, (path, fmt, _) in enumerate(self.network.layers)
        }
