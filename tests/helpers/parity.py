"""Modules of diffusers with random weights, ours with the same, and how near their answers are.

Images are NHWC here and NCHW there; `to_torch` and `from_torch` go between.
"""

import functools

import jax
import numpy as np
import pytest

from qjax.models.convert import convert
from qjax.models.unet2d_condition_keys import transformer_keys_of_params

TOLERANCE = 1e-4
"""Largest error over largest output: float32 sums in another order."""


def array(*shape, seed=0):
    """Standard normal numbers in float32, the same for the same seed."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def randomize(module):
    """Every parameter drawn anew, norms and biases too, so that none can be mixed up."""
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
        parameter.data = noise * fan_in**-0.5 + (parameter.ndim == 1) * 0.5
    return module.eval()


def to_torch(x):
    """A tensor; what has four axes is an image."""
    torch = pytest.importorskip("torch")
    return torch.tensor(x if x.ndim != 4 else x.transpose(0, 3, 1, 2).copy())


def from_torch(x):
    """A NumPy array; what has four axes is an image."""
    x = x.detach().numpy()
    return x if x.ndim != 4 else x.transpose(0, 2, 3, 1)


def params_of(torch_module, module, *inputs):
    """The parameters of `torch_module` as `module` holds them; keys must agree exactly."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    tensors = {k: v.numpy() for k, v in torch_module.state_dict().items()}
    return convert(tensors, transformer_keys_of_params(shapes.get("params", {})))


def with_weights_of(torch_module, module, *inputs):
    """`module` with the parameters of `torch_module`, compiled."""
    params = params_of(torch_module, module, *inputs)
    return jax.jit(functools.partial(module.apply, {"params": params}))


def assert_close(ours, reference, tolerance=TOLERANCE):
    """Of one shape, and nowhere further apart than `tolerance` times the largest number."""
    reference = from_torch(reference) if hasattr(reference, "detach") else reference
    assert ours.shape == reference.shape
    assert np.abs(ours - reference).max() <= tolerance * np.abs(reference).max()
