"""Time information precalculation as a stage: a float table in place of the time layers.

What a network computes of the timestep alone is computed once, in float32, from the teacher's
weights (or those that a stage before has put in their place, `State.floats`), for the timesteps
at which the sampler will stop; the student's own layers, quantized or not, are left out. What a
table holds depends on the network (`qjax.models.time_rows`).

References:
  Li et al., Efficiency Meets Fidelity, 2024, https://arxiv.org/abs/2412.06661.
  Huang et al., TFMQ-DM, 2024, https://arxiv.org/abs/2311.16503, for what quantization does to
  the temporal features of a network that still computes them.
"""

import dataclasses

from qjax.calibrate.low_rank import without_branches
from qjax.calibrate.recipe import State
from qjax.calibrate.work import Work
from qjax.core.typing import PRNGKeyArray
from qjax.models.pipeline import Pipeline
from qjax.models.retargeting import Keep, network_of, precalculate_time
from qjax.models.time_table import replaced_layers

__all__ = ["TimePrecalculation"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimePrecalculation:
    """The student with a time table of the teacher's float weights, and without its time layers.

    Other entries of the student's step table stay, and must be of the same timesteps.

    Attributes:
      steps: Of the sampler; the pipeline draws with no other number until it is retargeted
        (`Pipeline.retarget`). None: not chosen yet, which `check` refuses.
      keep: Dtype in which the float layers are kept beside the params, in a file of their own;
        retargeting needs them. None leaves them out for good.
    """

    steps: int | None = None
    keep: Keep | None = "float16"

    def check(self, pipe: Pipeline) -> int:
        """The steps of the sampler, if they are chosen.

        Raises:
          ValueError: If they are not; if the network is not one of this library, or has nothing that
            depends on t alone.
        """
        replaced_layers(network_of(pipe))
        if self.steps is None:
            raise ValueError(
                "a time table is made for the steps of the sampler, whose number is not chosen: "
                "give steps (on the command line --steps)."
            )
        return self.steps

    def run(self, state: State, key: PRNGKeyArray, work: Work) -> State:
        """The state with the student's time tabulated; nothing is random.

        Raises:
          ValueError: If the network has nothing that depends on t alone, or the student's step
            table is of other timesteps.
        """
        del key, work
        steps = self.check(state.teacher)
        student, floats = state.student, state.floats
        if floats is None:
            floats = state.teacher.params
        else:
            # A table is made of whole kernels; what `LowRank` has moved beside them comes back.
            layers = replaced_layers(network_of(student))
            params, floats = without_branches(student.params, floats, layers)
            student = student.replace(params=params)
        student = precalculate_time(student, floats, steps=steps, keep=self.keep)
        return dataclasses.replace(state, student=student)
