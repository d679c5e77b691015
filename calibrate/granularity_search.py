"""Granularity search: a group size for every layer, found by the pictures that come of it.

The paper (Q-DiT, 2025) quantizes weights and inputs in groups of channels, whose size both
share, and finds that smaller groups are not always better: at equal cost it matters which
layers have them. So it searches, by evolution, for the group sizes whose generated pictures are
nearest to real ones within a budget of BitOps (`evolution.py`, `genome.py`). This stage

1. reads from the rules which layers are quantized, and counts their multiplications;
2. searches with one program for all candidates (`genome_forward.py`), the same noise for each;
3. evaluates the best, and the uniform group sizes that fit the budget, on fresh noise;
4. quantizes the student anew with the winner, rounding to nearest from the floats, with a rule
   for every layer, and writes the recipe file that makes the same of another checkpoint
   (`recipe_file.py`) beside the log.

It comes before stages that fit rounding or ranges. Bits, symmetry and range search stay what
the rules say; inputs have dynamic ranges, one for each token and group.

Where this departs from the released program, on purpose: that one sets the groups of weights
alone and leaves those of inputs at 128; it counts no BitOps, its constraint being an unweighted
mean of group sizes of at least 128 (here `uniform=128`: what groups of 128 in all layers take);
it searches symmetric ranges and deploys asymmetric ones; and its last generation is not ranked.

References:
  Chen et al., Q-DiT: Accurate Post-Training Quantization for Diffusion Transformers, CVPR 2025,
  https://arxiv.org/abs/2406.17343.
"""

import dataclasses

from qjax.calibrate.granularity_run import RECIPE_FILE, Search, with_group_sizes
from qjax.calibrate.granularity_settings import GranularitySettings
from qjax.calibrate.recipe import State
from qjax.calibrate.work import Work
from qjax.core.typing import PRNGKeyArray

__all__ = ["RECIPE_FILE", "GranularitySearch", "GranularitySettings", "with_group_sizes"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GranularitySearch(GranularitySettings):
    """The stage of a recipe: its settings are those of `GranularitySettings`."""

    def run(self, state: State, key: PRNGKeyArray, work: Work) -> State:
        """The state with the student's layers in the groups of the winner.

        Raises:
          ValueError: If nothing is quantized, no choice divides a layer's channels, no group
            sizes fit the budget, or the student has a step table.
        """
        student = Search(state, self, key, work).run()
        return dataclasses.replace(state, student=student)
