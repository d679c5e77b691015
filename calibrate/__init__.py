"""From a float model and data to better quantized numbers."""

from qjax.calibrate.recipe import Recipe as Recipe
from qjax.calibrate.recipe import Stage as Stage
from qjax.calibrate.recipe import State as State
from qjax.calibrate.recipe import run as run
