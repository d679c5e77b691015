"""Serial to parallel: roll the quantized sampler out, then fit on what it went through.

The paper ("Efficiency Meets Fidelity", 2024) calls its pipeline so in its abstract; how it goes
about it is not public, and this is a reconstruction of ours, which the documentation says
(docs/methods.md). It alternates, `refreshes` times:

1. serial: the quantized sampler runs over its steps on the calibration items. Each layer's
   range at each step is fitted in the order of execution on what the quantized network itself
   has made, and the sampler goes on with the quantized prediction (`rollout.py`);
2. parallel: weights, and the ranges of all steps, are fitted on shuffled pairs of an item and
   a step of that roll-out, the float network on the same samples being the aim: block by
   block, or the whole network at once (`optimize.py`).

At the end weights are integers; ranges stay as they were learned, or where they were not a last
roll-out finds them. Other readings of
the abstract, and the methods that it improves on, are settings:

| settings | what it is |
|---|---|
| the defaults | serial to parallel |
| `fit.act_rate=0` | ranges are fitted serially alone, weights in parallel |
| `fits="both"` | blocks one after the other, then all together |
| `schedule="register"` | online: all steps at once, the samples moving on meanwhile |
| `horizon=k` | the aim is the sample k steps later |
| `samples="float"`, `fits="blocks"`, AdaRound | block reconstruction (Q-Diffusion, TFMQ-DM) |
| `samples="float"`, `fit.order="serial"` | one step after the other, float samples (EfficientDM) |
| `schedule="serial"` | the same online, on own samples |
| `fits="ranges"` | ranges alone, progressively (PCR) |
| `shards=8` | data in logical shards, for the devices of a pod (`sharded_calibration.py`) |

References:
  Li et al., Efficiency Meets Fidelity, 2024, https://arxiv.org/abs/2412.06661 (the abstract);
  Ross et al., DAgger, 2011, https://arxiv.org/abs/1011.0686 (own samples, teacher's answers).
"""

import dataclasses

from qjax.calibrate.calibration import Calibration
from qjax.calibrate.pod import Pod
from qjax.calibrate.recipe import State
from qjax.calibrate.serial_parallel_settings import SerialParallelSettings
from qjax.calibrate.sharded_calibration import ShardedCalibration
from qjax.calibrate.work import Work
from qjax.core.typing import PRNGKeyArray

__all__ = ["Calibration", "SerialParallel", "SerialParallelSettings"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SerialParallel(SerialParallelSettings):
    """The stage of a recipe: its settings are those of `SerialParallelSettings`."""

    def run(self, state: State, key: PRNGKeyArray, work: Work) -> State:
        """The state with the student's integers and ranges fitted.

        Raises:
          ValueError: If nothing is quantized, or the calibration set does not suit the model.
        """
        arguments = (state.teacher, state.student, self, key, work)
        if self.shards is None:
            calibration = Calibration(*arguments, floats=state.floats)
        else:
            pod = work.pod or Pod.single()
            calibration = ShardedCalibration(*arguments, floats=state.floats, pod=pod)
        return dataclasses.replace(state, student=calibration.run())
