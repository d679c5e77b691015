"""Quantize diffusion models after training and run them at low bits in JAX.

qparams = qjax.quantize(params, qjax.recipes.w8a8())
print(qjax.plan(params, qjax.recipes.w4a8()))
pipe = qjax.load("fashion-dit")
report = qjax.compare(pipe, qjax.quantize(pipe, qjax.recipes.w4a8()), out="report.html")
"""

from qjax import _clone as _clone
from qjax import calibrate as calibrate
from qjax import recipes as recipes
from qjax._version import __version__ as __version__
from qjax.api import compare as compare
from qjax.api import evaluate as evaluate
from qjax.api import load as load
from qjax.api import plan as plan
from qjax.api import quantize as quantize
from qjax.api import zoo_names as zoo_names
from qjax.calibrate.recipe import Recipe as Recipe
from qjax.core import linen as linen
from qjax.core import nnx as nnx
from qjax.core import ops as ops
from qjax.core.config import ActSpec as ActSpec
from qjax.core.config import QuantConfig as QuantConfig
from qjax.core.config import Rule as Rule
from qjax.core.config import WeightSpec as WeightSpec
from qjax.core.qtensor import QTensor as QTensor
from qjax.core.quantize import dequantize as dequantize
from qjax.core.sharding import sharding_for as sharding_for
from qjax.core.steps import StepTable as StepTable
from qjax.models.pipeline import Pipeline as Pipeline
