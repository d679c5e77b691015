"""Compile the programs of a calibration for TPUs that are not there, and tell what they need.

libtpu has the compiler of TPUs and runs on a CPU; params are shapes, nothing is executed. What is
compiled are the programs that `sharded_calibration.py` runs and the blocks of the low-bit
network as sampling runs them: of blocks of equal structure one, on the whole mesh. HBM is what
the compiler says a program holds on a device, arguments, results and temporaries, and beside it
what stays there in the meantime: inputs of blocks while their outputs are collected, the rest of
the low-bit network while one of its blocks runs. Of roll-outs, whose programs are not compiled, the
sum is told.

Networks are run, as far as the last of some blocks, by the two programs that collect these blocks'
data. They are compiled for the blocks whose data and the weights up to there are most.

The compiler is told to take no pains (`QUICKLY`), so that a model takes minutes.
"""

import dataclasses
import itertools
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.calibrate import optimize, sharded_collect, sharded_fit
from qjax.calibrate.blocks import Block, alike, params_of
from qjax.calibrate.capture import bytes_per_item, items_within
from qjax.calibrate.collect import Samples
from qjax.calibrate.fitted import quantized_kernels, with_kernels
from qjax.calibrate.pod import BLOCK, DATA, SHARDS, Pod, Weights
from qjax.calibrate.ranges import empty, to_fitted
from qjax.calibrate.reconstruction import Problem
from qjax.calibrate.serial_parallel_settings import SerialParallelSettings
from qjax.calibrate.spread import placed_shapes
from qjax.calibrate.student import Student, Tables
from qjax.core.config import QuantConfig
from qjax.core.quantize import quantize, tree_bytes
from qjax.core.typing import Apply, Array, Params
from qjax.kernels.target import target

HBM = {"v4": 32e9, "v5e": 16e9, "v5p": 95e9, "v6e": 32e9}
"""Bytes of a chip, as Google Cloud's pages of TPU versions have them."""

QUICKLY = {"exec_time_optimization_effort": -1.0, "memory_fitting_effort": -1.0}
"""Options of the compiler: what it does for speed is left out. Tried by hand on three blocks of
Stable Diffusion v1-4: 16 s instead of 79, and -0.3 to +4.8 % as much temporary memory."""

AT_ONCE = 4
"""Programs that are compiled at the same time, at most: each may take gigabytes of the host."""

_COLLECTIVE = re.compile(
    r"= (?P<shapes>.*?) (?P<kind>all-to-all|all-gather|all-reduce|reduce-scatter|"
    r"collective-permute)(?:-start)?\("
)
# What the compiler says of a program that no chip could hold.
_TOO_MUCH = re.compile(r"RESOURCE_EXHAUSTED.*?\(?([\d.]+)([MGT])\)?.*?exceeds", re.DOTALL)
_SHAPE = re.compile(r"(f32|bf16|f16|s32|u32|s8|u8|pred)\[([\d,]*)\]")
_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "s8": 1, "u8": 1, "pred": 1}


class Network(NamedTuple):
    """A float network as shapes.

    Attributes:
      apply: Its function.
      params: Its params.
      x_t: One noisy sample, `[1, h, w, c]`.
      told: What it is told of one sample.
      halves: Evaluations for a prediction: 2 with guidance.
    """

    apply: Apply
    params: Params
    x_t: jax.ShapeDtypeStruct
    told: Any
    halves: int


class Program(NamedTuple):
    """What a compiled program needs on every device.

    Attributes:
      what: `"collect inputs"`, `"collect outputs"`, `"fit"` or `"sample"`.
      block: Path of the first block that runs it.
      blocks: How many do.
      argument_bytes: Of its arguments.
      temp_bytes: While it runs.
      hbm_bytes: All that it holds; of a program that the compiler refused, for it is more than a
        chip has, what the compiler says it needs.
      flops: Of one pass through its loops, by the compiler's count.
      bytes_accessed: Likewise.
      collectives: How many of each kind it has.
      collective_bytes: Of their results, in one pass.
      seconds: To compile it, beside others.
      beside_bytes: What stays on the device while it runs.
    """

    what: str
    block: str
    blocks: int
    argument_bytes: int
    temp_bytes: int
    hbm_bytes: int
    flops: float
    bytes_accessed: float
    collectives: dict[str, int]
    collective_bytes: int
    seconds: float
    beside_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class AheadOfTime:
    """A calibration and a sampler on a topology, compiled.

    Attributes:
      topology: Its name, as `"v5e:16x16"`.
      data: Devices along the axis of data.
      block: Devices along the axis of blocks.
      programs: What was compiled.
      weights: Whether every device has networks whole while it runs them, or parts.
      seconds: To trace and compile everything.
      float_bytes: Of the float network, as far as a device has it.
    """

    topology: str
    data: int
    block: int
    programs: tuple[Program, ...]
    weights: Weights
    seconds: float
    float_bytes: int

    @property
    def hbm(self) -> float:
        """Bytes of a chip."""
        return HBM[self.topology.split(":")[0]]

    def held(self, what: str) -> int:
        """Most that a device holds while programs of a kind run."""
        mine = (p for p in self.programs if p.what.startswith(what))
        return max((p.hbm_bytes + p.beside_bytes for p in mine), default=0)

    @property
    def rolled_out(self) -> int:
        """What a device holds while samples are rolled out, by a sum and not by a program.

        The low-bit network runs as it does where data is collected, and beside it is the float
        network, which makes the samples.
        """
        runs = (
            p.argument_bytes + p.temp_bytes for p in self.programs if p.what == "collect inputs"
        )
        return self.float_bytes + max(runs, default=0)

    @property
    def fits(self) -> bool:
        """Whether everything fits into a chip."""
        held = map(self.held, ("collect", "fit", "sample"))
        return max(self.rolled_out, *held) <= self.hbm


def topology_devices(name: str) -> list[Any]:
    """The devices of a slice, as `"v5e:16x16"` or `"v5p:4x4x4"`; none has to be there.

    Raises:
      ValueError: If the name is none, or libtpu is not installed.
    """
    chip, _, shape = name.partition(":")
    if chip not in HBM or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise ValueError(
            f"a topology is a chip of {', '.join(HBM)} and a shape, as v5e:16x16; got {name!r}."
        )
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no TPU is opened
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as error:
        raise ValueError(
            f"{name} cannot be compiled for: {' '.join(str(error).split())[:200]} libtpu has the "
            'compiler of TPUs and needs none of them: pip install "jax[tpu]".'
        ) from error


def mesh_for(count: int, shards: int, data: int | None, block: int | None) -> tuple[int, int]:
    """Devices along data and block: as asked, else as many along data as shards allow."""
    if data is None and block is None:
        data = max(d for d in range(1, min(shards, count) + 1) if not (shards % d or count % d))
    data = count // block if data is None and block is not None else data
    assert data is not None
    return data, count // data if block is None else block


def compile_ahead(
    network: Network,
    quant: QuantConfig,
    settings: SerialParallelSettings,
    topology: str,
    *,
    data: int | None = None,
    block: int | None = None,
    weights: Weights = "whole",
    images: int = 1,
    count: int | None = None,
    on_program: Callable[[Program, int, int], None] | None = None,
) -> AheadOfTime:
    """Compile everything that a calibration and sampling run on a topology.

    Args:
      network: The float network.
      quant: How it is quantized.
      settings: Of the serial-to-parallel stage; its `steps` are chosen.
      topology: As for `topology_devices`.
      data: Devices along the axis of data; None: as many as there are shards.
      block: Along the axis of blocks; None: the rest.
      weights: Whether every device has the networks whole while it calibrates, or parts.
      images: Images that every device samples at once.
      count: How many of the slice's devices are used; None for all.
      on_program: Progress: called with every program, its number and how many there will be.

    Raises:
      ValueError: If the topology is none, or the mesh does not suit it.
    """
    devices = topology_devices(topology)[:count]
    settings = dataclasses.replace(
        settings, shards=settings.shards or SHARDS, steps=settings.steps or 1
    )
    shards = settings.shards
    assert shards is not None and settings.steps is not None
    data, block = mesh_for(len(devices), shards, data, block)
    pod = Pod.of(data=data, block=block, devices=devices, weights=weights)
    pod.check(shards)
    quantized = quantize(network.params, quant)
    student, tables = student_of(network, quantized, settings.steps)
    blocks = blocks_of(network, student)
    groups = alike(blocks)
    fits = [_Fit.of(pod, network, student, group, settings, tables) for group in groups]
    run = _run_until(blocks, network.params)
    parts = 1 if weights == "whole" else len(devices)
    collects = [f.data_bytes + run[g[-1].path] // parts for f, g in zip(fits, groups, strict=True)]
    most = collects.index(max(collects))
    collect = lambda side: (
        lambda g: _collect(side, pod, network, student, groups, g, fits[g], settings, tables)
    )
    fit = lambda g: _fit(pod, student, groups[g], fits[g], settings)
    sample = lambda g: _sample(pod, quantized, groups[g], images * network.halves)
    every = range(len(groups))
    # The longest first: the others are compiled beside it.
    wanted: list[tuple[str, int, Any, int]] = [("collect inputs", most, collect("inputs"), 0)]
    wanted += [("collect outputs", most, collect("outputs"), fits[most].input_bytes)]
    wanted += [("fit", g, fit, 0) for g in every]
    wanted += [("sample", g, sample, tree_bytes(quantized)) for g in every]

    def lowered() -> Iterator[tuple[str, tuple[Block, ...], Any, int]]:
        for what, g, lower, beside in wanted:
            with target("tpu", devices[0].device_kind):
                program = lower(g)
            yield what, groups[g], program, beside

    start = time.perf_counter()
    programs = _compile_all(lowered(), len(wanted), on_program)
    seconds = time.perf_counter() - start
    floats = tree_bytes(network.params) // parts
    return AheadOfTime(topology, data, block, tuple(programs), weights, seconds, floats)


def student_of(network: Network, quantized: Params, steps: int) -> tuple[Student, Tables]:
    """The quantized network of shapes while it is calibrated, and its ranges."""
    student = Student.of_params(network.apply, quantized, network.params)
    tables: Tables = jax.eval_shape(
        lambda: to_fitted([empty(student.formats)] * steps, student.formats)
    )
    return student, tables


def blocks_of(network: Network, student: Student) -> tuple[Block, ...]:
    """The blocks of a network of shapes."""
    found: list[Block] = []

    def look(params: Params, x_t: Array, t: Array, told: Any) -> None:
        one = dataclasses.replace(student, params=params)
        found.extend(one.blocks(x_t, t, told))

    t = jax.ShapeDtypeStruct((1,), jnp.int32)
    jax.eval_shape(look, student.params, network.x_t, t, network.told)
    return tuple(found)


def _run_until(blocks: tuple[Block, ...], params: Params) -> dict[str, int]:
    """Bytes of the blocks up to each and with it, by its path."""
    sums = itertools.accumulate(tree_bytes(params_of(block, params)) for block in blocks)
    return {block.path: total for block, total in zip(blocks, sums, strict=True)}


def _inputs(block: Block, lead: tuple[int, ...]) -> Any:
    """Shapes of what goes into a block, with other axes in place of the items'."""
    treedef, leaves = block.structure[1]  # type: ignore[index]
    shapes = [jax.ShapeDtypeStruct((*lead, *shape[1:]), dtype) for shape, dtype in leaves]
    return jax.tree.unflatten(treedef, shapes)


def _placed(pod: Pod, tree: Any, *axes: str | None) -> Any:
    sharding = pod.sharding(*axes)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)


def fit_shapes(
    network: Network,
    student: Student,
    block: Block,
    settings: SerialParallelSettings,
    tables: Tables,
) -> tuple[Params, Any, optimize.Carry, Any]:
    """Shapes of what fitting a block takes.

    Args:
      network: The float network.
      student: The quantized one.
      block: The block.
      settings: Of the stage; its `steps` are chosen.
      tables: Of the ranges of its layers' inputs.

    Returns:
      The block's params, what is fixed of its layers, the state of the optimizer, and input and
      output of one item.
    """
    fit, calls = settings.fit, settings.steps or 1
    runner = student.runner(block)

    def make(params: Params, floats: Params, kernels: Any, tables: Tables, key: Array) -> Any:
        one = Student(network.apply, params, floats, kernels)
        fixed = one.fixed(block)
        begin = one.begin(block, fixed, tables, fit, jax.random.wrap_key_data(key))
        nothing = jnp.zeros((1,), jnp.int32)
        problem = Problem(
            one.block_params(block, fixed), fixed, None, nothing, nothing, jnp.float32(1)
        )
        carry = optimize.start_optimizer(begin, calls, fit, runner, problem)
        return problem.params, fixed, carry

    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    params, fixed, carry = jax.eval_shape(
        make, student.params, student.floats, student.kernels, tables, key
    )
    return params, fixed, carry, (_inputs(block, (1,)), _output(block, params))


class _Fit(NamedTuple):
    """A fit of as many blocks of a group as the mesh takes at once, as shapes.

    Attributes:
      shapes: `fit_shapes` of its first block.
      places: Blocks.
      axis: Of the mesh, along which they lie.
      items: Of every shard.
      data_bytes: Of a device's data.
      input_bytes: Of the inputs among them.
    """

    shapes: tuple[Params, Any, optimize.Carry, Any]
    places: int
    axis: str | None
    items: int
    data_bytes: int
    input_bytes: int

    @classmethod
    def of(cls, pod, network, student, group, settings, tables) -> "_Fit":
        """The fit of a group."""
        shapes = fit_shapes(network, student, group[0], settings, tables)
        k = sharded_fit.padded(pod, min(max(settings.at_once, pod.block), len(group)))
        blocks_here, shards_here, _ = map(int, sharded_fit.counts_of(pod, k, settings.shards))
        here = blocks_here * shards_here
        held, of_inputs = (bytes_per_item(tree, 1) * here for tree in (shapes[-1], shapes[-1][0]))
        wanted = settings.pairs * network.halves // settings.shards
        items = items_within(settings.memory_gib, held, wanted, least=1)
        return cls(
            shapes, k, sharded_fit.block_axis(pod, k), items, held * items, of_inputs * items
        )


def _fit(pod, student, group, found, settings) -> Any:
    """The program that fits blocks."""
    fit, shards = settings.fit, settings.shards
    runner = student.runner(group[0])
    (params, fixed, carry, item), k, axis, items, *_ = found
    lead = (k, shards, items)
    grow = lambda tree: jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((*lead, *a.shape[1:]), a.dtype), tree
    )
    stack = lambda tree: _placed(
        pod,
        jax.tree.map(lambda a: jax.ShapeDtypeStruct((k, *a.shape), a.dtype), tree),
        axis,
    )
    problem = Problem(
        stack(params),
        stack(fixed),
        _placed(pod, grow(item[0]), axis, DATA),
        _placed(pod, grow(item[1]), axis, DATA),
        _placed(pod, jax.ShapeDtypeStruct(lead, jnp.int32), axis, DATA),
        stack(jax.ShapeDtypeStruct((), jnp.float32)),
    )
    return sharded_fit.run_chunk.lower(
        runner,
        fit,
        fit.chunk,
        pod,
        shards,
        settings.reduction == "ordered",
        axis,
        stack(carry),
        problem,
        _placed(pod, jax.ShapeDtypeStruct((), jnp.int32)),
        _placed(pod, jax.ShapeDtypeStruct((k, 2), jnp.uint32), axis),
        _placed(pod, jax.ShapeDtypeStruct((3,), jnp.int32)),
    )


def _collect(side, pod, network, student, groups, group, found, settings, tables) -> Any:
    """The program that collects inputs or outputs of blocks of a group."""
    size = max(settings.batch // settings.shards, 1) * network.halves
    lead = (max(found.items // size, 1) * settings.shards, size)
    ints: Any = jax.ShapeDtypeStruct(lead, jnp.int32)
    grow: Any = lambda a: jax.ShapeDtypeStruct((*lead, *a.shape[1:]), a.dtype)
    samples = Samples(grow(network.x_t), ints, jax.tree.map(grow, network.told), ints)
    apply, params, tables = {
        "inputs": (student.apply, student.params, tables),
        "outputs": (network.apply, network.params, {}),
    }[side]
    return sharded_collect.collect_pieces.lower(
        side,
        apply,
        tuple(student.formats.items()),
        groups,
        group,
        pod,
        found.axis,
        _placed(pod, jax.ShapeDtypeStruct((2,), jnp.int32)),
        (placed_shapes(pod, params), _placed(pod, tables)),
        _placed(pod, jax.ShapeDtypeStruct((found.places,), jnp.int32), found.axis),
        _placed(pod, samples, DATA),
    )


def _output(block: Block, params: Params) -> Any:
    """Shape of what a block makes of one item."""
    args, kwargs = _inputs(block, (1,))
    assert block.module is not None
    module = block.module
    return jax.eval_shape(
        lambda p, a, k: module.apply({"params": p}, *a, **k), params, args, kwargs
    )


def _sample(pod, quantized, group, batch) -> Any:
    """A block of the low-bit network, on a batch of every device."""
    first: Block = group[0]
    module = first.module
    assert module is not None
    args, kwargs = _inputs(first, (batch * pod.data * pod.block,))
    spread = (BLOCK, DATA)

    def run(params: Params, args: Any, kwargs: Any) -> Any:
        return module.apply({"params": params}, *args, **kwargs)

    def on_device(params: Params, args: Any, kwargs: Any) -> Any:
        every, mine = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec(spread)
        return jax.shard_map(
            run, mesh=pod.mesh, in_specs=(every, mine, mine), out_specs=mine, check_vma=False
        )(params, args, kwargs)

    params = _without_ranges(params_of(first, quantized))
    place = lambda tree: _placed(pod, tree, spread)  # type: ignore[arg-type]
    return jax.jit(on_device).lower(_placed(pod, params), place(args), place(kwargs))


def _without_ranges(params: Params) -> Params:
    """The params with ranges found as the inputs come, where they would be of the step's row."""
    kernels = {
        path: q.replace(act=dataclasses.replace(q.act, mode="dynamic")) if q.act is not None else q
        for path, q in quantized_kernels(params).items()
    }
    return with_kernels(params, kernels)


def _compile_all(
    lowered: Iterable[tuple[str, tuple[Block, ...], Any, int]],
    total: int,
    on_program: Callable[[Program, int, int], None] | None,
) -> list[Program]:
    """Compile programs, some at once, while the next are traced and lowered."""
    done, lock = 0, threading.Lock()

    def compile_one(what: str, group: tuple[Block, ...], program: Any, beside: int) -> Program:
        nonlocal done
        compiled = _compiled(what, group, program)._replace(beside_bytes=beside)
        with lock:
            done += 1
            if on_program is not None:
                on_program(compiled, done, total)
        return compiled

    with ThreadPoolExecutor(min(os.cpu_count() or 1, AT_ONCE)) as pool:
        try:
            futures = [pool.submit(compile_one, *one) for one in lowered]
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _compiled(what: str, group: tuple[Block, ...], lowered: Any) -> Program:
    start = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options=QUICKLY)
    except jax.errors.JaxRuntimeError as error:
        needed = _TOO_MUCH.search(str(error))
        if needed is None:
            raise
        held = int(float(needed[1]) * {"M": 2**20, "G": 2**30, "T": 2**40}[needed[2]])
        seconds = round(time.perf_counter() - start, 1)
        return Program(what, group[0].path, len(group), 0, held, held, 0.0, 0.0, {}, 0, seconds)
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    held += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    cost = compiled.cost_analysis() or {}
    kinds: dict[str, int] = {}
    sent = 0
    for kind, size in _collectives(compiled.as_text()):
        kinds[kind] = kinds.get(kind, 0) + 1
        sent += size
    return Program(
        what,
        group[0].path,
        len(group),
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        held,
        float(cost.get("flops", 0.0)),
        float(cost.get("bytes accessed", 0.0)),
        kinds,
        sent,
        round(seconds, 1),
    )


def _collectives(text: str) -> Iterator[tuple[str, int]]:
    """Kind and bytes of every collective of a compiled program."""
    for match in _COLLECTIVE.finditer(text):
        size = 0
        for dtype, axes in _SHAPE.findall(match["shapes"]):
            size += _BYTES[dtype] * int(np.prod([int(n) for n in axes.split(",") if n] or [1]))
        yield match["kind"], size
