# %% [markdown]
# # Quantize your own Flax model in five minutes
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/qjax/blob/main/colab/1_your_own_flax_model.ipynb)
#
# Post-training quantization stores the weights of a trained network in a few bits and computes with
# small integers, without training it anew. qjax does so to params trees: some leaves become
# `QTensor`s, and the model, its code and its `apply` stay what they were. Here this is done to two
# models that know nothing of qjax: an image classifier in Flax NNX and a diffusion model in
# Flax Linen.
#
# You need to know JAX and Flax a little. W4A8 is short for 4-bit weights and 8-bit activations
# (a layer's input).

# %% [markdown]
# ## Setup
#
# The next cell installs qjax from its repository, if it is not installed yet; a package on PyPI has
# the same name, and is another project. Nothing that Colab has is upgraded.

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
# It runs on a CPU, a GPU or a TPU. On a T4 and every other GPU the low-bit layers take the XLA path,
# plain JAX operations that the compiler fuses: weights are small in memory, and how fast it is depends
# on the GPU. On a TPU packed weights go through a Pallas kernel.
#
# With `FULL = False` training below takes seconds, on a CPU too; `FULL = True` trains longer.

# %%
FULL = False

TRAINING_STEPS = 3000 if FULL else 480

# %% [markdown]
# ## Something to learn
#
# Discs, squares and rings of 16x16 pixels, made on the spot.

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from flax import linen as nn
from flax import nnx

CLASSES = ("disc", "square", "ring")


def shapes(key, count):
    """Images [count, 16, 16, 1] in [-1, 1] and their classes [count]."""
    place, size, kind = jax.random.split(key, 3)
    centre = jax.random.uniform(place, (count, 2, 1, 1), minval=5.0, maxval=10.0)
    radius = jax.random.uniform(size, (count, 1, 1), minval=3.0, maxval=5.0)
    labels = jax.random.randint(kind, (count,), 0, len(CLASSES))
    y, x = jnp.abs(jnp.mgrid[:16, :16][:, None] - jnp.moveaxis(centre, 1, 0))
    round_, square = jnp.hypot(x, y), jnp.maximum(x, y)
    far = jnp.where(labels[:, None, None] == 1, square, round_)
    inside = jax.nn.sigmoid(4 * (radius - far))
    hole = jax.nn.sigmoid(4 * (radius - 2 - far)) * (labels == 2)[:, None, None]
    return (2 * (inside - hole) - 1)[..., None], labels


def show(rows, title=""):
    """Pictures [n, h, w, 1] in [0, 1], one row for each entry."""
    figure, axes = plt.subplots(len(rows), 1, figsize=(8, 1.1 * len(rows)), squeeze=False)
    for axis, (name, pictures) in zip(axes[:, 0], rows.items(), strict=True):
        axis.imshow(jnp.concatenate(list(pictures[..., 0]), axis=1), cmap="gray", vmin=0, vmax=1)
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
        axis.set(xticks=[], yticks=[])
    figure.suptitle(title)
    plt.show()


test_images, test_labels = shapes(jax.random.key(1), 1000)
show({"data": test_images[:10] / 2 + 0.5})

# %% [markdown]
# ## An NNX module
#
# A classifier of your own. Train it, then hand it over.


# %%
class Classifier(nnx.Module):
    def __init__(self, rngs):
        self.conv_1 = nnx.Conv(1, 32, (3, 3), strides=2, rngs=rngs)
        self.conv_2 = nnx.Conv(32, 64, (3, 3), strides=2, rngs=rngs)
        self.hidden = nnx.Linear(4 * 4 * 64, 128, rngs=rngs)
        self.out = nnx.Linear(128, len(CLASSES), rngs=rngs)

    def __call__(self, images):
        x = nnx.relu(self.conv_2(nnx.relu(self.conv_1(images))))
        return self.out(nnx.relu(self.hidden(x.reshape(len(x), -1))))


classifier = Classifier(nnx.Rngs(0))
optimizer = nnx.Optimizer(classifier, optax.adam(1e-3), wrt=nnx.Param)


@nnx.jit
def train_classifier(classifier, optimizer, key):
    images, labels = shapes(key, 64)

    def loss(classifier):
        return optax.softmax_cross_entropy_with_integer_labels(classifier(images), labels).mean()

    optimizer.update(classifier, nnx.grad(loss)(classifier))


for key in jax.random.split(jax.random.key(2), TRAINING_STEPS // 6):
    train_classifier(classifier, optimizer, key)


def accuracy(classifier):
    return float((classifier(test_images).argmax(-1) == test_labels).mean())


print(f"right in float: {accuracy(classifier):.1%}")

# %% [markdown]
# `qjax.plan` says what would happen to every parameter, with bytes and reasons; nothing is computed
# yet. A recipe is a set of rules with a name from the literature: `w4a8` stores weights in 4 bits,
# groups of input channels sharing a scale, and quantizes each layer's input to 8 bits as it comes.

# %%
print(qjax.plan(classifier, qjax.recipes.w4a8()))

# %% [markdown]
# `qjax.quantize` returns a new module and leaves the old one alone. The new module computes as it
# did, on weights that are stored in 4 bits and read as floats; `qjax.nnx.low_bit` gives the same
# module with integer arithmetic. `qjax.nnx.layers` says what runs how.

# %%
quantized = qjax.quantize(classifier, qjax.recipes.w4a8())
low_bit = qjax.nnx.low_bit(quantized)

print(f"right with 4-bit weights:                 {accuracy(quantized):.1%}")
print(f"right with 4-bit weights, 8-bit integers: {accuracy(low_bit):.1%}")
for path, how in qjax.nnx.layers(low_bit):
    print(f"{path:16} {how}")

# %% [markdown]
# How few bits will do? Recipes are made of plain settings that you can change. `WeightSpec` says how
# weights are stored; with `act=None`, the default, inputs stay in float.

# %%
for bits in (8, 4, 3, 2):
    weight = qjax.WeightSpec(bits=bits, granularity="per_group", group_size=(32, None))
    config = qjax.QuantConfig(weight=weight)
    plan = qjax.plan(classifier, config)
    right = accuracy(qjax.quantize(classifier, config))
    print(f"{bits} bits: {plan.bytes_after:>9,} bytes, right {right:.1%}")

# %% [markdown]
# ## A Linen model
#
# A diffusion model learns to tell what is behind a noisy picture `x_t`: here the clean picture itself
# (`prediction_type="sample"`), often the noise. A sampler turns pure noise into a picture by asking it
# again and again. This network is a small U-Net with an attention layer, written with Flax's own
# layers.


# %%
class Denoiser(nn.Module):
    width: int = 32

    @nn.compact
    def __call__(self, x_t, t, labels):
        angles = t[:, None] / 1000 * jnp.exp(jnp.linspace(0, jnp.log(1000.0), 32))
        waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        time = nn.Dense(2 * self.width, name="time")(waves)
        told = nn.silu(time + nn.Embed(len(CLASSES), 2 * self.width)(labels))

        def block(x, width):
            h = nn.Conv(width, (3, 3))(nn.silu(nn.GroupNorm(8)(x)))
            h = h + nn.Dense(width)(told)[:, None, None]
            h = nn.Conv(width, (3, 3))(nn.silu(nn.GroupNorm(8)(h)))
            return h + (x if x.shape[-1] == width else nn.Dense(width)(x))

        def up(x, channels):
            b, h, w, _ = x.shape
            x = x.reshape(b, h, w, 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
            return x.reshape(b, 2 * h, 2 * w, channels)

        fine = block(nn.Conv(self.width, (3, 3), strides=2, name="conv_in")(x_t), self.width)
        x = block(nn.Conv(2 * self.width, (3, 3), strides=2)(fine), 2 * self.width)
        tokens = nn.LayerNorm()(x).reshape(len(x), -1, 2 * self.width)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(tokens).reshape(x.shape)
        x = up(nn.Dense(4 * self.width)(block(x, 2 * self.width)), self.width)
        x = block(jnp.concatenate([x, fine], axis=-1), self.width)
        return up(nn.Conv(4, (3, 3), name="conv_out")(x), 1)


from qjax.models.samplers import DDIM
from qjax.models.schedules import Schedule

schedule = Schedule.linear()  # how much noise there is at each of 1,000 timesteps
model = Denoiser()
params = model.init(jax.random.key(0), test_images[:1], jnp.zeros(1), test_labels[:1])["params"]
adam = optax.adam(optax.cosine_decay_schedule(3e-3, TRAINING_STEPS))


@jax.jit
def train_denoiser(params, state, key):
    draw, when, noises = jax.random.split(key, 3)
    images, labels = shapes(draw, 64)
    t = jax.random.randint(when, (64,), 0, 1000)
    noise = jax.random.normal(noises, images.shape)
    alpha_bar = jnp.asarray(schedule.alpha_bar, jnp.float32)[t][:, None, None, None]
    x_t = jnp.sqrt(alpha_bar) * images + jnp.sqrt(1 - alpha_bar) * noise

    def loss(params):
        return jnp.mean((model.apply({"params": params}, x_t, t, labels) - images) ** 2)

    value, gradient = jax.value_and_grad(loss)(params)
    updates, state = adam.update(gradient, state)
    return optax.apply_updates(params, updates), state, value


state = adam.init(params)
for key in jax.random.split(jax.random.key(3), TRAINING_STEPS):
    params, state, loss = train_denoiser(params, state, key)
print(f"loss after {TRAINING_STEPS} steps: {loss:.3f}")

# %% [markdown]
# Rules say what stays in float: here the layers next to the pixels, which hold few weights while their
# error reaches every pixel, and the one that embeds the timestep. A pattern has to match a whole
# path, and one that matches nothing is an error. `method="mse"` searches the range of every group
# for the least squared error.

# %%
config = qjax.QuantConfig(
    rules=(qjax.Rule(pattern=r"(conv_in|conv_out|time)/kernel", reason="few weights"),),
    weight=qjax.WeightSpec(bits=4, granularity="per_group", group_size=32, method="mse"),
    act=qjax.ActSpec(bits=8),
)
print(qjax.plan(params, config))

# %% [markdown]
# The params tree keeps its structure, so `model.apply` takes it as it is. Within `qjax.linen.intercept()`
# Flax's own `Dense`, `DenseGeneral` and `Conv` compute in integers; `log` tells which did. Inside a
# jitted function is the right place for it: what is traced within runs low-bit.

# %%
qparams = qjax.quantize(params, config)
x_t, t, labels = test_images[:8], jnp.full(8, 500), test_labels[:8]

apply_as_it_is = jax.jit(model.apply)
in_float = apply_as_it_is({"params": params}, x_t, t, labels)
weights_only = apply_as_it_is({"params": qparams}, x_t, t, labels)


@jax.jit
def apply_low_bit(params, x_t, t, labels):
    with qjax.linen.intercept() as log:
        y = model.apply({"params": params}, x_t, t, labels)
    print(log)  # while it is traced, once
    return y


integers = apply_low_bit(qparams, x_t, t, labels)

from qjax.core import metrics

print()
for name, y in {"4-bit weights": weights_only, "and 8-bit integers": integers}.items():
    print(f"{name}: relative error of the answer {float(metrics.relative_l2(y, in_float)):.3f}")

# %% [markdown]
# ## Save and load
#
# One safetensors file and one JSON manifest with a hash for every array; there are no pickles, and
# reading runs no code. Packed codes take what they say: two 4-bit values a byte. The last argument
# is a record of your own, anything that JSON can hold.

# %%
from pathlib import Path

from qjax.core import serialize

serialize.save("denoiser-w4a8", qparams, {"model": "Denoiser", "width": model.width})
loaded, record = serialize.load("denoiser-w4a8")

stored = Path("denoiser-w4a8", "model.safetensors").stat().st_size
floats = sum(leaf.size * 4 for leaf in jax.tree.leaves(params))
same = apply_low_bit(qjax.linen.box_tree(loaded), x_t, t, labels)
print(f"{floats:,} bytes in float32, {stored:,} in the file; record {record}")
print("the loaded model answers the same:", bool((same == integers).all()))

# %% [markdown]
# `box_tree` makes a loaded tree one that unmodified Linen models can read. For an NNX module:
#
# ```python
# serialize.save("classifier-w4a8", qjax.nnx.params(quantized), {})
# quantized = qjax.nnx.with_params(classifier, serialize.load("classifier-w4a8")[0])
# ```

# %% [markdown]
# ## A pipeline of your own denoiser, calibrated
#
# `Pipeline.from_apply` puts a sampler around any `apply(variables, x_t, t, labels)`. DDIM, ten steps:


# %%
def apply(variables, x_t, t, labels):
    with qjax.linen.intercept():
        return model.apply(variables, x_t, t, labels)


sampler = DDIM(schedule=schedule, prediction_type="sample")
pipe = qjax.Pipeline.from_apply(apply, params, sampler, (16, 16, 1), num_labels=len(CLASSES))
settings = {"labels": [0, 1, 2] * 3, "steps": 10, "key": jax.random.key(4)}
pictures = pipe(**settings)
show({"float": pictures})

# %% [markdown]
# Quantizing without data rounds every weight to the nearest code. **Calibration** runs the sampler
# and looks: how large is every layer's input at every step, and which roundings make the network's
# answers come out right? `SerialParallel` is such a stage: it draws samples with the quantized network,
# one range for each step (`mode="per_step"`), then fits the weights to the float network's answers
# on these samples. To see a difference, weights get 3 bits and inputs 6.

# %%
import dataclasses

from qjax.calibrate import CalibrationSet, FitSettings, SerialParallel

w3 = dataclasses.replace(config.weight, bits=3)
nearest = dataclasses.replace(config, weight=w3, act=qjax.ActSpec(bits=6))
per_step = qjax.ActSpec(bits=6, mode="per_step", granularity="per_tensor", symmetric=False)
recipe = qjax.Recipe(
    name="w3a6, fitted",
    quant=dataclasses.replace(nearest, act=per_step),
    stages=(
        SerialParallel(
            steps=10,
            fits="network",
            fit=FitSettings(weights="latent", iterations=1000 if FULL else 100),
            refreshes=2,
            data=CalibrationSet(items=96 if FULL else 48),
        ),
    ),
)

rounded = qjax.quantize(pipe, nearest)
calibrated = qjax.calibrate.run(pipe, recipe)
show({"float": pictures, "rounded": rounded(**settings), "calibrated": calibrated(**settings)})

# %%
for name, one in {"rounded to nearest": rounded, "calibrated": calibrated}.items():
    psnr = metrics.psnr(one(**settings), pictures, data_range=1.0).mean()
    print(f"{name}: PSNR to the float model's pictures {psnr:.1f} dB")

# %% [markdown]
# The calibrated pipeline remembers what it was fitted for, and says so rather than draw something
# else:

# %%
try:
    calibrated(**{**settings, "steps": 12})
except ValueError as error:
    print(error)

# %% [markdown]
# ## Where to go from here
#
# - Notebook 2: Stable Diffusion with per-step ranges. Notebook 3: transformers and searched group
#   sizes. Notebook 4: correcting quantization noise in the sampler. Notebook 5: TPUs and pods.
# - `qjax bench` on the command line says how fast every layer is against float on your machine.
# - Have weights in diffusers' layout? `qjax.load(folder)` reads them, and pipelines that are read so
#   save themselves: `pipe.save(folder)`.
