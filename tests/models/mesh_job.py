"""Pictures with and without a mesh, drawn where there are several devices, for `test_mesh.py`.

python mesh_job.py OUT DEVICES PARTS [PORT PROCESSES PROCESS]

Writes OUT.PROCESS.npz, arrays by `case/mesh`.
"""

import os
import sys

out, devices, parts, *others = sys.argv[1:]
# Before JAX is imported: it counts devices once.
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"

import contextlib
import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qjax import compare, evaluate
from qjax.core.config import ActSpec, QuantConfig, Rule, WeightSpec
from qjax.core.quantize import quantize
from qjax.core.steps import StepTable
from qjax.evaluation_data import as_dict
from qjax.kernels.target import target
from qjax.models import pipeline
from qjax.models.autoencoder_config import AutoencoderKLConfig
from qjax.models.components import Component, build_component
from qjax.models.decoders import LatentDecoder
from qjax.models.denoisers import abstract_params, build_denoiser
from qjax.models.dit import DiTConfig
from qjax.models.mesh import start
from qjax.models.pipeline import Pipeline
from qjax.models.samplers import DDIM

warnings.simplefilter("error")
jax.config.update("jax_numpy_dtype_promotion", "strict")

COUNT, BATCH, STEPS = 11, 2, 2
DIT = DiTConfig(
    sample_size=4,
    patch_size=2,
    in_channels=4,
    out_channels=4,
    num_layers=1,
    num_heads=2,
    head_dim=16,
    num_classes=3,
)
AUTOENCODER = AutoencoderKLConfig(
    out_channels=1,
    in_channels=1,
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    block_out_channels=(8, 16),
    norm_num_groups=4,
)
WIDE = dataclasses.replace(DIT, head_dim=64)
RANGES = ActSpec(bits=8, granularity="per_token", symmetric=False)
W4A8 = QuantConfig(
    rules=(Rule(pattern=r"(.*/)?(patch_embed|conditioning|final_linear)(/.*)?"),),
    weight=WeightSpec(bits=4, granularity="per_group", group_size=16),
    act=RANGES,
    allow_unmatched=True,
)
WIDE_W4A8 = dataclasses.replace(W4A8, weight=WeightSpec(bits=4))


def random(abstract):
    """Parameters of these shapes."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        # As large as keeps a signal's size through layer after layer.
        fan_in = int(np.prod(leaf.shape[:-1])) if len(leaf.shape) > 1 else 100
        return jnp.asarray(rng.normal(0, fan_in**-0.5, leaf.shape), jnp.float32)

    return jax.tree.map(draw, abstract)


def decoder():
    """A tiny autoencoder."""
    data = AUTOENCODER.to_diffusers()
    kind = build_component("AutoencoderKL", data)
    params = random(abstract_params(kind))
    return LatentDecoder(
        component=Component(
            class_name="AutoencoderKL", config=data, model=kind.model, params=params
        )
    )


def pipelines():
    """The float one, and one of 4-bit weights with a step table; both draw latents."""
    denoiser = build_denoiser("DiTTransformer2DModel", DIT.to_diffusers())
    pipe = Pipeline.from_apply(
        denoiser.model.apply,
        random(abstract_params(denoiser)),
        DDIM(),
        decoder=decoder(),
        **denoiser.fields,
    )
    low = pipe.replace(params=quantize(pipe.params, W4A8), quant=W4A8)
    shift = jnp.linspace(0.0, 0.5, STEPS)[:, None, None, None]
    table = StepTable().with_entry(
        "shift", {"by": shift}, key=low.table_key(steps=STEPS, eta=1.0, guidance_scale=2.0)
    )
    return pipe, low.replace(step_table=table, apply=functools.partial(shifted, low.apply))


def wide():
    """A network of 4-bit weights wide enough for the kernels of TPUs."""
    denoiser = build_denoiser("DiTTransformer2DModel", WIDE.to_diffusers())
    params = quantize(random(abstract_params(denoiser)), WIDE_W4A8)
    return Pipeline.from_apply(denoiser.model.apply, params, DDIM(), **denoiser.fields)


class Caught(Exception):
    """The program that was asked for is known, and need not run."""


def simple(gain, traced=None):
    """A network without mixing, which tells the batches it is traced with."""

    def apply(variables, x_t, t, labels):
        if traced is not None:
            traced.append(x_t.shape[0])
        return variables["params"]["gain"] * x_t

    return Pipeline.from_apply(apply, {"gain": jnp.float32(gain)}, DDIM(), (12, 12, 1))


def shifted(apply, variables, x_t, t, labels):
    """A network that reads a row of the step table, too."""
    shift = variables["shift"]["by"]
    return apply({"params": variables["params"]}, x_t, t, labels) + shift


def settings():
    """Of all calls."""
    labels = [i % 3 for i in range(COUNT)]
    told = {"labels": labels, "steps": STEPS, "guidance_scale": 2.0, "eta": 1.0}
    return told | {"key": jax.random.key(3)}


def meshes():
    """Meshes of four devices, of two and of one, by name."""
    all_four = jax.devices()
    auto, explicit = (AxisType.Auto,) * 2, (AxisType.Explicit,) * 2
    return {
        "four": Mesh(np.array(all_four), ("data",)),
        "explicit": jax.make_mesh((2, 2), ("a", "b"), axis_types=explicit),
        "two by two": jax.make_mesh((2, 2), ("a", "b"), axis_types=auto),
        "two": Mesh(np.array(all_four[2:]), ("data",)),
        "one": Mesh(np.array(all_four[3:]), ("data",)),
    }


def draw(found, name, mesh, pipe, **changes):
    """Pictures and the way to them, of equal batches on every device whatever the mesh."""
    asked = settings() | {"batch_size": BATCH, "return_trajectory": True} | changes
    images, trajectory = pipe(**asked, mesh=mesh)
    found[f"{name}"] = images
    found[f"x_t of {name}"], found[f"prediction of {name}"] = trajectory


def drawn(found):
    """Pictures of the low-bit pipeline, on one device and on four."""
    _, low = pipelines()
    noise = jax.random.normal(jax.random.key(5), (COUNT, *low.shape))
    for name in ("none", "four"):
        mesh = meshes().get(name)
        draw(found, f"low/{name}", mesh, low)
        draw(found, f"given noise/{name}", mesh, low, latents=noise, start_index=4)


def drawn_on_all_meshes(found):
    """Pictures of both pipelines, on every mesh, within one, and of another batch."""
    pipe, low = pipelines()
    for name, one in (("low", low), ("float", pipe)):
        draw(found, f"{name}/none", None, one)
        for mesh_name, mesh in meshes().items():
            draw(found, f"{name}/{mesh_name}", mesh, one)
    explicit = meshes()["explicit"]
    with jax.set_mesh(explicit):
        draw(found, "low/within a mesh", explicit, low)
    four = meshes()["four"]
    found["other batch"] = low(**settings(), batch_size=64, mesh=four)
    latents = jax.random.normal(jax.random.key(5), (COUNT, *low.shape))
    found["decoded/none"], found["decoded/four"] = low.images(latents), low.on(four).images(latents)


def addresses(pipe):
    """Where the parameters lie on the devices."""
    trees = (pipe.params, pipe.step_table.entries, pipe.decoder.component.params)
    return [
        shard.data.unsafe_buffer_pointer()
        for leaf in jax.tree.leaves(trees)
        for shard in leaf.addressable_shards
    ]


def look(found):
    """Where parameters lie, and how often programs are traced."""
    _, low = pipelines()
    four = meshes()["four"]
    placed = low.on(four)
    again = placed.on(meshes()["two by two"])
    found["placed/once"], found["placed/twice"] = (addresses(one) for one in (placed, again))
    traced = []
    pipe = simple(1.0, traced).on(four)
    for count in (11, 9):
        latents = pipe(
            num_images=count, steps=2, key=jax.random.key(0), batch_size=2, output="latent"
        )
    found["traced"], found["latents"] = traced, latents


def kernels(found):
    """How many Pallas kernels the program of a TPU has, for three ways to lay the arrays out."""
    low = wide()
    four = meshes()["four"]
    real = pipeline.sample_jit

    def program(pipe, **changes):
        caught = []

        def watched(*args, **kwargs):
            caught.append((args, kwargs))
            raise Caught

        pipeline.sample_jit = watched
        with contextlib.suppress(Caught):
            pipe(**settings() | {"labels": [0] * 4} | changes)
        pipeline.sample_jit = real
        ((args, kwargs),) = caught
        with target("tpu", "TPU v5 lite"):
            lowered = real.trace(*args, **kwargs).lower(lowering_platforms=("tpu",))
        return lowered.as_text().count("tpu_custom_call")

    found["kernels/alone"] = program(low)
    found["kernels/mesh"] = program(low, mesh=four)
    everywhere, cut = (NamedSharding(four, PartitionSpec(*axes)) for axes in ((), ("data",)))
    by_hand = low.replace(params=jax.device_put(low.params, everywhere))
    noise = jax.device_put(jnp.zeros((4, *low.shape)), cut)
    found["kernels/partitioned"] = program(by_hand, latents=noise)


def evaluations(found):
    """Scores of pictures, and their intervals."""
    half, one = (simple(gain) for gain in (0.5, 1.0))
    asked = {"num_images": 13, "part_size": 8, "batch_size": 2, "steps": 2, "seed": 1}
    for name in ("none", "four"):
        result = as_dict(evaluate(half, reference=one, mesh=meshes().get(name), **asked))
        found[f"scores/{name}"] = [(s["value"], s["low"], s["high"]) for s in result["scores"]]
        found[f"device/{name}"] = result["device"]


def comparisons(found):
    """What comparing finds of pictures."""
    half, one = (simple(gain) for gain in (0.5, 1.0))
    for name in ("none", "four"):
        report = compare(one, half, num_images=11, steps=2, repeats=1, mesh=meshes().get(name))
        found[f"psnr/{name}"] = report.variants[0].psnr
        found[f"timed/{name}"] = report.variants[0].timing.batch


ALL = (drawn, drawn_on_all_meshes, look, kernels, evaluations, comparisons)
PARTS = {part.__name__: part for part in ALL}


def main() -> None:
    """Run the job."""
    found = {}
    if "drawn_on_all_meshes" not in parts:  # compiled in half the time
        jax.config.update("jax_disable_most_optimizations", True)
    if others:
        port, processes, process = others
        start(coordinator=f"127.0.0.1:{port}", processes=int(processes), process=int(process))
        mesh = Mesh(np.array(jax.devices()), ("data",))
        _, low = pipelines()
        placed = low.on(mesh)
        draw(found, "processes/all", mesh, placed)
        draw(found, "processes/again", mesh, placed.on(mesh))
        here = Mesh(np.array(jax.local_devices()), ("data",))
        draw(found, "processes/own", here, low)
        try:
            theirs = [d for d in jax.devices() if d.process_index != int(process)]
            low.on(Mesh(np.array(theirs), ("data",)))
        except ValueError as error:
            found["processes/refused"] = str(error)
    else:
        for part in parts.split(","):
            PARTS[part](found)
    process = others[2] if others else 0
    np.savez(f"{out}.{process}.npz", **{name: np.asarray(value) for name, value in found.items()})


if __name__ == "__main__":
    main()
