"""From a float model and data to better quantized numbers.

`run` calibrates by a `Recipe`; its stages, their settings and the data are named here, each defined
in the file of its method.

recipe = qjax.recipes.q_dit_w4a8(steps=20, data=qjax.calibrate.CalibrationSet(items=64))
qpipe = qjax.calibrate.run(qjax.load("fashion-dit"), recipe, out="run")
"""

from qjax.calibrate.data import CalibrationSet as CalibrationSet
from qjax.calibrate.evolution import EvolutionSettings as EvolutionSettings
from qjax.calibrate.gptq_stage import GPTQ as GPTQ
from qjax.calibrate.granularity_search import GranularitySearch as GranularitySearch
from qjax.calibrate.low_rank import LowRank as LowRank
from qjax.calibrate.mixed_precision import MixedPrecision as MixedPrecision
from qjax.calibrate.noise_correction import NoiseCorrection as NoiseCorrection
from qjax.calibrate.prompt_files import read_prompts as read_prompts
from qjax.calibrate.recipe import Recipe as Recipe
from qjax.calibrate.recipe import Stage as Stage
from qjax.calibrate.recipe import State as State
from qjax.calibrate.recipe import run as run
from qjax.calibrate.recipe_file import load_search as load_search
from qjax.calibrate.reconstruction import FitSettings as FitSettings
from qjax.calibrate.serial_parallel import SerialParallel as SerialParallel
from qjax.calibrate.smoothing import Smoothing as Smoothing
from qjax.calibrate.step_bits import StepBits as StepBits
from qjax.calibrate.time_table import TimePrecalculation as TimePrecalculation
