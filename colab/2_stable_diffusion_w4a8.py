# %% [markdown]
# # Stable Diffusion in W4A8, calibrated serial to parallel
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/qjax/blob/main/colab/2_stable_diffusion_w4a8.ipynb)
#
# W4A8 means 4-bit weights and 8-bit activations (a layer's input). Of 4-bit weights Stable Diffusion's
# U-Net takes a quarter of its float16 bytes. Inputs of layers change a lot while an image is drawn,
# so each sampler step gets ranges of its own, and they and the weights are fitted to what the
# network sees at inference. That is *serial-to-parallel* calibration
# ([Li et al. 2024](https://arxiv.org/abs/2412.06661); what of it is a reconstruction is said in
# docs/methods.md).

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

print("qjax", qjax.__version__, "| jax", jax.__version__, "| flax", flax.__version__)
print(jax.devices())

# %% [markdown]
# On a T4 and every other GPU the low-bit layers take the XLA path, plain JAX operations: memory is saved,
# and how fast it is depends on the GPU. On a TPU packed weights go through a Pallas kernel.
#
# ## One switch
#
# `FULL = False` takes `fashion-ldm`, a latent diffusion model with the parts of Stable Diffusion
# (denoising U-Net with cross-attention, autoencoder) that ships with qjax: small, trained on
# Fashion-MNIST, told a class in place of a text. Everything below is cut short, too: few steps, few
# items, few iterations. `FULL = True` downloads Stable Diffusion v1-4 and uses real settings; fitting
# the whole network takes a GPU or TPU with 40 GB or more. With less memory write `fits="blocks"`,
# which fits one block at a time.

# %%
from qjax.calibrate import CalibrationSet

FULL = False

if FULL:
    MODEL, STEPS, GUIDANCE, ITERATIONS, REFRESHES = "CompVis/stable-diffusion-v1-4", 50, 7.5, 600, 3
    PROMPTS = (
        "a lighthouse on a cliff in a storm, oil painting",
        "a bowl of ripe peaches on a wooden table, photograph",
        "a red tram in a snowy street at night",
        "portrait of an old sailor, pencil drawing",
    )  # for a model of your own use a few hundred that look like its use
    ASKED, DATA = {"prompts": PROMPTS}, CalibrationSet(items=64, prompts=PROMPTS)
else:
    MODEL, STEPS, GUIDANCE, ITERATIONS, REFRESHES = "fashion-ldm", 6, 2.0, 40, 2
    ASKED, DATA = {"labels": list(range(8))}, CalibrationSet(items=16)

# %% [markdown]
# ## The float model

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt

pipe = qjax.load(MODEL)
draw = {**ASKED, "steps": STEPS, "guidance_scale": GUIDANCE, "key": jax.random.key(0)}


def show(rows):
    """Pictures [n, h, w, c] in [0, 1], one row for each entry."""
    axes = plt.subplots(len(rows), 1, figsize=(8, 1.2 * len(rows)), squeeze=False)[1]
    for axis, (name, pictures) in zip(axes[:, 0], rows.items(), strict=True):
        axis.imshow(jnp.concatenate(list(pictures), axis=1), cmap="gray", vmin=0, vmax=1)
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
        axis.set(xticks=[], yticks=[])
    plt.show()


pictures = pipe(**draw)
show({"float": pictures})

# %% [markdown]
# ## What would be quantized
#
# A recipe is a set of rules for the layers and a list of stages that need data. `plan` shows what the
# rules do to each leaf of the params tree, before anything is computed; here the first lines of the
# table, and the last.

# %%
recipe = qjax.recipes.s2p_w4a8(steps=STEPS, guidance_scale=GUIDANCE, data=DATA)
lines = str(qjax.plan(pipe, recipe)).splitlines()
print("\n".join(line[:140] for line in [*lines[:12], "...", lines[-1]]))

# %% [markdown]
# ## Calibrate
#
# The recipe has two stages. `SerialParallel` works in turns:
#
# 1. *serial*: the quantized sampler runs through its steps once, and finds a range for every
#    layer's input at every step, each layer seeing what the quantized ones before it made;
# 2. *parallel*: weights (through their rounding) and ranges are fitted to the float network's
#    answers, on shuffled pairs of an image and a step of that roll-out.
#
# `refreshes` is how many such turns there are. `TimePrecalculation` comes after it, and is explained
# below. `with_settings` changes a setting in every stage that has it; `chunk` is after how many
# iterations the error is told.

# %%
from qjax.calibrate import FitSettings

fit = FitSettings(weights="latent", iterations=ITERATIONS, batch=16, chunk=10)
recipe = recipe.with_settings(fit=fit, refreshes=REFRESHES, pairs=512 if FULL else 96)
errors = []


def on_event(event):
    """Called with every event of a stage's log; keeps the errors of the fit."""
    if event["event"] == "fit":
        errors.append(event["error"])


calibrated = qjax.calibrate.run(
    pipe,
    recipe,
    out="run",  # the result of every stage; the same call again goes on where it was interrupted
    on_stage=lambda done, total, name: print(f"{done} of {total} stages done, next: {name}"),
    on_event=on_event,
)

# %% [markdown]
# The error of the network's answer against the float network's, relative to rounding to the nearest code,
# after every chunk of iterations:

# %%
print(" ".join(f"{error:.3f}" for error in errors))

# %% [markdown]
# ## Time precalculation
#
# What a U-Net computes of the timestep alone is the same for every image. The second stage has computed
# it once, in float, for the steps of the sampler, and left those layers out of the quantized params. The
# result is one row of arrays for each step in `step_table`, beside the ranges.

# %%
from qjax.core.quantize import tree_bytes

for name, key in calibrated.step_table.keys:
    arrays = jax.tree.leaves(calibrated.step_table.entries[name])
    size = sum(a.nbytes for a in arrays)
    print(f"{name!r}: {len(arrays)} arrays, {size:,} bytes, for {len(key.timesteps)} timesteps")

with_time = qjax.plan(pipe, recipe).bytes_after
print(f"params: {tree_bytes(calibrated.params):,} bytes; with the time layers {with_time:,}")

# %% [markdown]
# So a calibrated pipeline is for one number of steps and says so if another is asked for.
# `retarget` makes a table for other steps: the time rows are computed anew from float layers that are kept
# in a file of their own, and each step takes the ranges of the nearest noise level.

# %%
try:
    calibrated(**{**draw, "steps": STEPS + 2})
except ValueError as error:
    print(error)

other_steps = calibrated.retarget(steps=STEPS + 2, guidance_scale=GUIDANCE)
show({f"{STEPS + 2} steps": other_steps(**{**draw, "steps": STEPS + 2})})

# %% [markdown]
# ## Before and after
#
# `compare` draws the same pictures with both models, measures, and writes one HTML page that needs no
# network to be read. `w4a8` is the data-free recipe: the same bits, rounded to nearest, with ranges
# taken from each input as it comes. `repeats` times the models in turns; 0 leaves speed out, which a
# small model on a shared machine says little about.

# %%
variants = {
    "W4A8, rounded": qjax.quantize(pipe, qjax.recipes.w4a8()),
    "W4A8, S2P": calibrated,
}
report = qjax.compare(
    pipe,
    variants,
    **ASKED,
    steps=STEPS,
    guidance_scale=GUIDANCE,
    repeats=3 if FULL else 0,
    out="report.html",
)
qjax.report.image_grid(report, tile=48)

# %%
import rich

rich.print(qjax.report.summary_table(report))

# %% [markdown]
# The error maps are brightest where a picture differs most from the float model's. On Colab,
# `google.colab.files.download("report.html")` fetches the page.
#
# ## Save and load
#
# Loading needs no float weights of the denoiser. `model.safetensors` holds the step table, the autoencoder and
# what embeds the class or the text, too; `time.safetensors` the time layers that `retarget` reads.

# %%
from pathlib import Path

calibrated.save("fashion-w4a8")
loaded = qjax.load("fashion-w4a8")
for file in sorted(Path("fashion-w4a8").rglob("*")):
    if file.is_file():
        print(f"{file}: {file.stat().st_size:,} bytes")
print("the same pictures:", bool((loaded(**draw) == calibrated(**draw)).all()))

# %% [markdown]
# The same on the command line:
#
# ```sh
# qjax calibrate fashion-ldm --recipe s2p_w4a8 --steps 20 --guidance 2 --out run
# qjax compare fashion-ldm run/final --steps 20 --guidance 2 --out report.html
# ```
