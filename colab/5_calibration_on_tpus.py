# %% [markdown]
# # Calibration on TPUs, and on pods
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/qjax/blob/main/colab/5_calibration_on_tpus.ipynb)
#
# A calibration is a long job on hardware that may be taken away at any time. This notebook plans one
# without weights, lays a quantized model over several devices, interrupts a calibration in the middle
# and goes on with it to the same bits, and says at the end what is different on a pod.
# Choose *Runtime, Change runtime type, v5e-1 TPU* on Colab, or stay on a CPU.

# %% [markdown]
# ## Setup
#
# Installs qjax from its repository, if it is not installed yet; a package on PyPI has the same name,
# and is another project. Nothing that Colab has is upgraded.

# %%
import importlib.util
import os
import subprocess
import sys

REPOSITORY = "https://github.com/OWNER/qjax"  # where your clone comes from: see colab/README.md

if importlib.util.find_spec("qjax") is None:
    if not os.path.exists("qjax-repository"):  # uploaded, or left by an earlier run of this cell
        if "/OWNER/" in REPOSITORY:
            raise ValueError("put the address of your clone's origin into REPOSITORY, above")
        subprocess.run(["git", "clone", "--depth=1", REPOSITORY, "qjax-repository"], check=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "./qjax-repository"], check=True)

import flax
import jax

import qjax

# Four devices out of a CPU, to see what sharding does; on a GPU or TPU this changes nothing.
jax.config.update("jax_num_cpu_devices", 4)

print("qjax", qjax.__version__, "| jax", jax.__version__, "| flax", flax.__version__)
print(jax.devices())

# %% [markdown]
# A TPU has int8 matrix units: 8-bit arithmetic runs there as XLA's own int8 matmul, and packed 4-bit weights
# go through a Pallas kernel that unpacks them on the way. On a T4 and every other GPU the low-bit layers
# take the XLA path, plain JAX operations. `!qjax doctor`
# tries each way of computing and says which run on the machine.
#
# ## One switch
#
# `FULL = False` takes `fashion-dit`, a small diffusion transformer that ships with qjax, and few steps,
# items and iterations. `FULL = True` downloads DiT-XL/2 and takes real settings.

# %%
from qjax.calibrate import CalibrationSet

FULL = False

if FULL:
    MODEL, PLANNED, STEPS, GUIDANCE = "facebook/DiT-XL-2-256", "dit-xl-2-256", 50, 1.5
    ITEMS, ITERATIONS, KEEP_EVERY = 256, 2000, 500
else:
    MODEL, PLANNED, STEPS, GUIDANCE = "fashion-dit", "dit-xl-2-256", 4, 2.0
    ITEMS, ITERATIONS, KEEP_EVERY = 8, 40, 10

# %% [markdown]
# ## Plan first
#
# Bytes follow from shapes, so nothing has to be downloaded to plan the quantization of a model that is
# published: `shapes` gives its params as shapes. Below, DiT-XL/2 by three recipes, without weights.

# %%
from qjax.api import shapes

published = shapes(PLANNED)
for recipe in (qjax.recipes.w8a8(), qjax.recipes.w4a8(), qjax.recipes.s2p_w4a8()):
    plan = qjax.plan(published, recipe)
    before, after = plan.bytes_before / 1e6, plan.bytes_after / 1e6
    print(f"{recipe.name:9} {before:,.0f} MB in float16, {after:,.0f} MB quantized")

# %% [markdown]
# ## One model on several devices
#
# A `QTensor` has several arrays: packed codes, scales, perhaps zero points. `qjax.sharding_for` says where
# they lie when the float kernel would lie as the given sharding says: every device holds whole bytes and
# whole groups of its own part, and unpacks it alone. Here the output channels of each kernel are cut in as
# many parts as there are devices, and everything else lies on all of them.

# %%
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

pipe = qjax.load(MODEL)
qpipe = qjax.quantize(pipe, qjax.recipes.w4a8())

mesh = Mesh(np.array(jax.devices()), ("model",))
everywhere, columns = NamedSharding(mesh, P()), NamedSharding(mesh, P(None, "model"))


def is_quantized(leaf):
    return isinstance(leaf, qjax.QTensor)


def place(leaf):
    where = qjax.sharding_for(leaf, columns) if is_quantized(leaf) else everywhere
    return jax.device_put(leaf, where)


sharded = qpipe.replace(params=jax.tree.map(place, qpipe.params, is_leaf=is_quantized))

kernel = sharded.params["blocks_0"]["attn"]["qkv"]["kernel"]
print(kernel.shape, "as codes of", kernel.bits, "bits")
for name in ("qvalue", "scale"):
    array = getattr(kernel, name)
    part = array.addressable_shards[0].data.shape
    print(f"{name}: {array.shape} {array.dtype}, on each device {part}")

# %% [markdown]
# The pipeline is called as before; the compiler puts in the communication. The pictures are not the same
# bit by bit, since sums are added up in another order, and an input that lies between two codes may be
# rounded to the other one. For comparison, what quantization itself does.

# %%
draw = {"labels": [0, 1, 7, 9], "steps": STEPS, "key": jax.random.key(0)}
draw["guidance_scale"] = GUIDANCE
one, several = qpipe(**draw), sharded(**draw)
print("devices:", len(several.sharding.device_set))
for name, pictures in {"several devices": several, "the float model": pipe(**draw)}.items():
    difference = np.abs(np.asarray(one) - np.asarray(pictures)).mean()
    print(f"mean difference of a pixel in [0, 1] to {name}: {difference:.4f}")

# %% [markdown]
# ## Calibrate, be interrupted, go on
#
# `out` is a folder that keeps the result of every stage and, within a stage, of every part: roll-outs, and
# the state of a fit every `keep_every` iterations. Mount a bucket or a drive there. The recipe, the seed and
# the model have hashes, so a folder is never continued by another run.
#
# First the whole run without interruption, to have something to compare with.

# %%
from qjax.calibrate import FitSettings

recipe = qjax.recipes.s2p_w4a8(
    steps=STEPS, guidance_scale=GUIDANCE, data=CalibrationSet(items=ITEMS)
).with_settings(
    # `chunk` iterations run as one program, without a look at them in between.
    fit=FitSettings(weights="latent", iterations=ITERATIONS, batch=8, chunk=KEEP_EVERY),
    keep_every=KEEP_EVERY,
    refreshes=1,
)
print("recipe", recipe.digest())
whole = qjax.calibrate.run(pipe, recipe, out="whole")

# %% [markdown]
# Now the same in another folder, broken off in the middle of the fit. A `KeyboardInterrupt` is raised when
# the second part of the fit has been written; a machine that is taken away does the same with less
# courtesy. What is in the folder then:

# %%
from pathlib import Path

written = []


def interrupt(event):
    """Called with every event of a stage's log."""
    if event["event"] == "wrote":
        written.append(event["part"])
        if len(written) == 3:
            raise KeyboardInterrupt


try:
    qjax.calibrate.run(pipe, recipe, out="interrupted", on_event=interrupt)
except KeyboardInterrupt:
    print("interrupted")
for file in sorted(Path("interrupted").rglob("*")):
    if file.is_file():
        print(f"  {file}: {file.stat().st_size:,} bytes")

# %% [markdown]
# The same call goes on: what was written is read, the rest is computed.


# %%
def tell(event):
    """Prints what is read and written."""
    if event["event"] in ("read", "wrote"):
        print(f"{event['event']:6} {event['part']}")


resumed = qjax.calibrate.run(pipe, recipe, out="interrupted", on_event=tell)

# %% [markdown]
# Both folders hold the same model, bit by bit: same codes, same scales, same step table.

# %%
import hashlib

for folder in ("whole", "interrupted"):
    file = Path(folder, "final", "model.safetensors")
    print(f"{folder:12} sha256 {hashlib.sha256(file.read_bytes()).hexdigest()}")

# %% [markdown]
# ## On a pod
#
# *Nothing in this section is run here: it needs a pod, or at least several hosts.*
#
# The same recipe, over a mesh of two axes. The calibration set lies in logical shards (8) along `data`, and
# gradients are added up in their order: the result has the same bits on any two or more devices. Alike
# blocks of the network lie along `block` and are fitted at the same time. `out` has to be a folder that all
# hosts see, a mounted bucket for example.
#
# ```python
# from qjax.calibrate.pod import Pod, start
#
# start()  # first of all: joins the hosts of a TPU pod
# pod = Pod.of(data=8, block=32)
# recipe = recipe.with_settings(shards=8, at_once=pod.block)
# qjax.calibrate.run(pipe, recipe, out="run", pod=pod)
# ```
#
# ```sh
# qjax plan dit-xl-2-256 --recipe s2p_w4a8 --topology v5e:16x16
# qjax calibrate facebook/DiT-XL-2-256 --recipe s2p_w4a8 --steps 50 --guidance 1.5 \
#   --out run --distributed mesh.data=8 mesh.block=32
# ```
#
# Start the same command on every host of the slice. The first line needs no TPU: it compiles the programs of
# the calibration for that slice, and says whether they fit.
