# %% [markdown]
# # DiT with Q-DiT: group sizes by search, rounding by GPTQ
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/qjax/blob/main/colab/3_dit_with_q_dit.ipynb)
#
# Diffusion transformers have a few channels that are much larger than the others, so one scale for a
# whole row of channels is coarse. Q-DiT ([Chen et al. 2025](https://arxiv.org/abs/2406.17343)) gives
# *groups* of input channels a scale of their own, in weights and inputs alike, and takes an input's
# range from the input itself as it comes (*dynamic*). Smaller groups are finer and cost more; which layers
# shall have them is found by an evolutionary *search*. Then *GPTQ*
# ([Frantar et al. 2023](https://arxiv.org/abs/2210.17323)) chooses the roundings of each layer one
# column after the other, later columns making up for the errors of earlier ones.

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
# `FULL = False` takes `fashion-dit`, a small DiT that ships with qjax, and a tiny search: 6 steps of the
# sampler and a population of 5, where the paper draws 550 candidates on 800 pictures each. `FULL = True`
# downloads DiT-XL/2 and searches with the paper's population; an hour or more on a large GPU.

# %%
from qjax.calibrate import CalibrationSet, EvolutionSettings

FULL = False

if FULL:
    MODEL, STEPS, GUIDANCE, CHOICES = "facebook/DiT-XL-2-256", 50, 1.5, (32, 64, 128, 192, 288)
    DATA, SEARCHED = CalibrationSet(items=64), CalibrationSet(items=32)
    EVOLUTION = EvolutionSettings()  # the paper's
    LABELS = [207, 360, 387, 974, 88, 979, 417, 279]
else:
    MODEL, STEPS, GUIDANCE, CHOICES = "fashion-dit", 6, 2.0, (32, 64, 128, 256)
    DATA, SEARCHED = CalibrationSet(items=16), CalibrationSet(items=8)
    EVOLUTION = EvolutionSettings(population=5, keep=2, crossovers=2, mutations=2, generations=2)
    LABELS = list(range(8))

# %% [markdown]
# ## The float model

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt

pipe = qjax.load(MODEL)
draw = {"labels": LABELS, "steps": STEPS, "guidance_scale": GUIDANCE, "key": jax.random.key(0)}


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
# ## The recipe
#
# `q_dit_w4a8` holds rules (4-bit weights, 8-bit inputs, groups of 128 channels or of 64) and one stage,
# GPTQ. Given a `search`, that comes first and replaces the group sizes. Its budget is what a uniform
# size takes: here as many bit operations as groups of 128 everywhere. A candidate's pictures are drawn
# from the same noise as the float model's, and `objective="latent"` minimises the distance between the
# two; the paper's own objective, the Frechet distance to real pictures, is `objective="fd"` and wants
# thousands of them.

# %%
from qjax.calibrate import GranularitySearch

search = GranularitySearch(
    objective="latent",
    uniform=128,
    choices=CHOICES,
    steps=STEPS,
    guidance_scale=GUIDANCE,
    data=SEARCHED,
    finalists=2,  # the best are judged again, on noise that the search has not seen
    evolution=EVOLUTION,
)
recipe = qjax.recipes.q_dit_w4a8(steps=STEPS, guidance_scale=GUIDANCE, data=DATA, search=search)
print("stages:", ", ".join(type(stage).__name__ for stage in recipe.stages))
print("candidates:", EVOLUTION.evaluations)

# %%
events = []
searched = qjax.calibrate.run(pipe, recipe, out="run", on_event=events.append)

# %% [markdown]
# ## What the search found
#
# Every point of the front is a choice of group sizes that no other candidate betters in both cost and
# distance; the uniform choices are drawn for comparison. With few candidates, as here, there may be
# little between the two.

# %%
from IPython.display import SVG

from qjax.search_plot import front_plot

candidates = [e for e in events if e["event"] == "candidate" and e["search"] == "search"]
SVG(front_plot(candidates, label="distance to the float model's latents"))

# %%
winner = next(e for e in events if e["event"] == "winner")
print("layers by group size:", winner["layers"])
for name in ("fitness", "fresh_fitness", "uniform_fitness", "uniform_fresh_fitness"):
    print(f"{name:22} {winner[name]:.4f}")

# %% [markdown]
# `fitness` is the winner's distance on the noise of the search, `fresh_fitness` on noise it has not
# seen; the two below are those of the best uniform group size, which is among the candidates. Where they
# are equal, the search has found nothing better: 13 candidates are few. What a search of full length
# gains on this model is in docs/calibration.md.
#
# ## What GPTQ gained
#
# For every layer the error of its output, by GPTQ and by rounding to nearest. Where GPTQ is no
# better, the layer keeps the latter.

# %%
rounded = [e for e in events if e["event"] == "layer"]
ratios = sorted((e["gptq"] / e["nearest"], e["layer"]) for e in rounded)
print(f"{len(rounded)} layers, {sum(e['taken'] for e in rounded)} rounded by GPTQ")
for ratio, layer in [*ratios[:4], *ratios[-4:]]:
    print(f"{layer:28} {ratio:.2f} of the error of rounding to nearest")

# %% [markdown]
# ## Before and after

# %%
plain = qjax.quantize(pipe, qjax.recipes.w4a8())
report = qjax.compare(
    pipe,
    {"W4A8, rounded": plain, "Q-DiT W4A8": searched},
    labels=LABELS,
    steps=STEPS,
    guidance_scale=GUIDANCE,
    repeats=3 if FULL else 0,  # rounds of timing; 0 for none
    out="report.html",
)
qjax.report.image_grid(report, tile=48)

# %%
import rich

rich.print(qjax.report.summary_table(report))

# %% [markdown]
# ## Use the group sizes again
#
# A search is expensive, and what it found fits every checkpoint of the same architecture: one that
# you fine-tuned, say. It left a *recipe file*: YAML with the group size of every layer, a hash, and the
# shapes of the architecture, without which it is refused.

# %%
from pathlib import Path

from qjax.calibrate import load_search

file = next(Path("run").rglob("granularity.yaml"))
found = load_search(file)
print(file.name, file.stat().st_size, "bytes;", dict(list(found.groups.items())[:3]), "...")

config = found.config_for(pipe.params)  # rules; of another checkpoint of the same architecture
again = qjax.quantize(pipe, config)
print(qjax.plan(pipe, config).mean_bits, "bits a value on average")

try:
    found.config_for(qjax.load("fashion-unet").params)
except ValueError as error:
    print(str(error)[:160], "...")

# %% [markdown]
# `again` is rounded to nearest. With a stage it is calibrated for the other checkpoint, without a search:

# %%
from qjax.calibrate import GPTQ

gptq = GPTQ(steps=STEPS, guidance_scale=GUIDANCE, data=DATA)
recipe = qjax.Recipe(name="q_dit_w4a8, groups from a file", quant=config, stages=(gptq,))
reused = qjax.calibrate.run(pipe, recipe)
show({"float": pictures, "searched": searched(**draw), "from the file": reused(**draw)})

# %% [markdown]
# The rows agree closely but not bit for bit: GPTQ has drawn other samples. On the command line:
#
# ```sh
# qjax calibrate fashion-dit --recipe q_dit_w4a8 --steps 20 --guidance 2 --out run
# ```
