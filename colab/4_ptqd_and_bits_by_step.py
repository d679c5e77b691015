# %% [markdown]
# # PTQD: quantization noise, corrected in the sampler, and bits by step
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/qjax/blob/main/colab/4_ptqd_and_bits_by_step.ipynb)
#
# A quantized network answers a little wrong, and a sampler adds up its answers. PTQD
# ([He et al. 2023](https://arxiv.org/abs/2305.10657)) looks at the difference between both networks'
# answers at every step, the *quantization noise*, and splits it in three:
#
# - a part that follows the answer, `k` times the float network's: the answer is divided by `1 + k`;
# - a bias, `mu` for each channel: it is subtracted;
# - the rest, of a known variance: where the sampler adds fresh noise of its own, it adds less of it, so that
#   the sum is what the schedule wants.
#
# The weights are not touched by it. The second half of this notebook gives some steps of the sampler fewer
# activation bits than others.

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
# `FULL = False` takes `fashion-unet`, a small diffusion model that ships with qjax, and leaves weights
# rounded to nearest, so that a minute is enough. `FULL = True` downloads Stable Diffusion v1-4 and runs
# PTQD's own recipe, with weights fitted block by block first (AdaRound).

# %%
import dataclasses

from qjax.calibrate import CalibrationSet, NoiseCorrection, SerialParallel, StepBits
from qjax.models.samplers import DDIM, sampler_from_diffusers

FULL = False

if FULL:
    PROMPTS = (
        "a lighthouse on a cliff in a storm, oil painting",
        "a bowl of ripe peaches on a wooden table, photograph",
        "a red tram in a snowy street at night",
        "portrait of an old sailor, pencil drawing",
    )
    MODEL, ASKED = "CompVis/stable-diffusion-v1-4", {"prompts": PROMPTS}
    RUN = {"steps": 50, "guidance_scale": 7.5, "eta": 1.0}
    FEW, MANY = (CalibrationSet(items=n, prompts=PROMPTS) for n in (64, 1024))
else:
    MODEL, ASKED = "fashion-unet", {"labels": list(range(8))}
    RUN = {"steps": 8, "guidance_scale": 2.0, "eta": 1.0}
    FEW, MANY = (CalibrationSet(items=n) for n in (8, 32))

# %% [markdown]
# `eta` is the share of fresh noise that the sampler adds at every step: 0 makes DDIM deterministic,
# 1 adds as much as DDPM. Only with fresh noise has the third part something to correct.

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt

pipe = qjax.load(MODEL)
if not isinstance(pipe.sampler, DDIM):  # Stable Diffusion comes with PNDM, which adds no noise
    settings = {**pipe.sampler.to_diffusers(), "_class_name": "DDIMScheduler"}
    pipe = pipe.replace(sampler=sampler_from_diffusers({**settings, "clip_sample": False}))
draw = {**ASKED, **RUN, "key": jax.random.key(0)}


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
# ## Quantize, then look at the noise
#
# Rules and stages make a recipe. `NoiseCorrection` is the last stage of `ptqd_w4a8`: both networks run
# side by side through the sampler, on the same samples. Before it comes `SerialParallel`, which
# with `fits="ranges"` fits nothing but the ranges of every layer's input at every step, and
# otherwise the weights too. Weights get 3 bits here, so that there is something to see.

# %%
recipe = qjax.recipes.ptqd_w4a8(**RUN, data=MANY)
if not FULL:
    weight = dataclasses.replace(recipe.quant.weight, bits=3)
    recipe = dataclasses.replace(
        recipe,
        quant=dataclasses.replace(recipe.quant, weight=weight),
        stages=(
            SerialParallel(fits="ranges", data=FEW, **RUN),
            NoiseCorrection(data=MANY, **RUN),
        ),
    )
print("stages:", ", ".join(type(stage).__name__ for stage in recipe.stages))

events = []
corrected = qjax.calibrate.run(pipe, recipe, on_event=events.append)
noise = [event for event in events if event["event"] == "noise"]

# %% [markdown]
# One event a step says what the noise was. First the part that follows the answer: its slope `k`, which
# PTQD corrects where it is above 0, and the correlation of noise and answer.

# %%
from IPython.display import SVG, display

from qjax.noise_plot import noise_plot, slope_plot

display(SVG(slope_plot(noise)))

# %% [markdown]
# Signal over noise of the network's answer, as it is and after `k` and `mu` are taken out:

# %%
display(SVG(noise_plot(noise)))

# %% [markdown]
# And the fresh noise that the sampler adds: what the schedule says, and what is left of it when the
# variance of the rest has been taken off. The last step adds none.

# %%
from qjax.plots import line_plot

steps = [event["step"] for event in noise]
lines = {
    "by the schedule": (steps, [event["noise_std"] for event in noise]),
    "corrected": (steps, [event["noise_std_left"] for event in noise]),
}
document = line_plot(
    lines,
    title="Noise that the sampler adds",
    x_label="step of the sampler",
    y_label="standard deviation",
)
display(SVG(document))
for event in noise:
    std, left = event["noise_std"], event["noise_std_left"]
    words = f"k {event['k']:.4f}, bias {event['bias']:.4f}, noise {std:.4f} -> {left:.4f}"
    print(f"step {event['step']}: {words}")

# %% [markdown]
# ## With and without
#
# The correction is an entry of the pipeline's step table: one row of numbers for each step, which the
# sampler reads. Leaving it out is leaving out the entry. The distance is the relative error of the
# last samples against the float model's from the same noise.

# %%
from qjax.core import metrics

uncorrected = corrected.replace(step_table=corrected.step_table.drop("noise_correction"))
many = {**draw, "labels": list(range(10)) * 6} if not FULL else draw
reference = pipe(**many, output="latent")
for name, one in {"quantized": uncorrected, "corrected": corrected}.items():
    error = metrics.relative_l2(one(**many, output="latent"), reference)
    print(f"{name}: relative error {float(error):.4f}")

show({"float": pictures, "quantized": uncorrected(**draw), "corrected": corrected(**draw)})

# %% [markdown]
# In this short run the correction changes next to nothing: `k` is a hundredth or two, and what 3-bit weights
# do is mostly the rest, which a sampler can make room for but not take back. It is no substitute for
# fitting the weights, which `ptqd_w4a8` does before it. `"corrected"` in the plot above is what `k`
# and `mu` do at each step, and it is worth a look before a correction is used.
#
# ## Bits by step
#
# Are all steps equally sensitive? `StepBits` measures it: the sampler runs with 8-bit inputs at every step
# but one, which gets 4 or 6, and the last samples are compared. Then an integer programme chooses the
# bits of every step with the least total error for a mean of at most 6. Weights stay the same at all
# steps, so a schedule is nothing but other rows of the step table.

# %%
stage = StepBits(choices=(4, 6, 8), mean_bits=6.0, data=FEW, **RUN)
recipe = qjax.Recipe(
    name="W8, inputs by step",
    quant=qjax.recipes.ptqd_w8a8().quant,
    stages=(SerialParallel(fits="ranges", data=FEW, **RUN), stage),
)
events = []
by_step = qjax.calibrate.run(pipe, recipe, on_event=events.append)

# %%
costs = [event for event in events if event["event"] == "cost"]
chosen = next(event for event in events if event["event"] == "schedule")
steps = [event["step"] for event in costs]
document = line_plot(
    {
        f"{bits} bits at this step alone": (
            steps,
            [event[f"cost_{bits}"] ** 0.5 for event in costs],
        )
        for bits in (4, 6)
    },
    title="What few bits at one step do to the last samples",
    x_label="step of the sampler",
    y_label="relative error",
    log_y=True,
)
display(SVG(document))
document = line_plot(
    {"chosen": (steps, [event["bits"] for event in costs])},
    title="Bits of the inputs, step by step",
    x_label="step of the sampler",
    y_label="bits",
)
display(SVG(document))
print("bits:", chosen["bits"], "| mean", chosen["mean_bits"])
print(f"error of the last samples to 8 bits at all steps: {chosen['error']:.4f}")
print(f"fewer bit operations than in float: {chosen['gain']:.1f} times")
print(f"with 8 bits at all steps: {chosen['gain_most']:.1f} times")

# %% [markdown]
# Whoever wants the correction too puts it last, since it is fitted to what all stages before have made:
# `ptqd_mp` is that recipe. On the command line, which writes the plots above beside the logs:
#
# ```sh
# qjax calibrate fashion-unet --recipe ptqd_w4a8 --steps 20 --guidance 2 --eta 1 --out run
# ```
