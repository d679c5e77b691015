"""A process of a calibration on a pod, for `test_pod_processes.py`: fashion-dit, a short fit.

python pod_job.py OUT DEVICES DATA BLOCK WEIGHTS [PORT PROCESSES PROCESS]

`POD_MODEL` names another model.
"""

import os
import sys

out, devices, data, block, weights, *others = sys.argv[1:]
# Before JAX is imported: it counts devices once.
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"

import dataclasses

import qjax
from qjax.calibrate.data import CalibrationSet
from qjax.calibrate.pod import Pod, start
from qjax.calibrate.recipe import Recipe, run
from qjax.calibrate.reconstruction import FitSettings
from qjax.calibrate.serial_parallel import SerialParallel


def main() -> None:
    """Run the job."""
    if others:
        port, processes, process = others
        start(coordinator=f"127.0.0.1:{port}", processes=int(processes), process=int(process))
    stage = SerialParallel(
        steps=2,
        guidance_scale=2.0,
        data=CalibrationSet(items=8),
        batch=8,
        pairs=16,
        ranges="minmax",
        fits="both",
        refreshes=1,
        keep_every=4,
        fit=FitSettings(weights="latent", iterations=24, batch=8, chunk=4),
        shards=8,
        at_once=2,
    )
    quant = qjax.recipes.s2p_w4a8().quant
    # Two layers of every block: the others stay in float, so that less is compiled.
    keep = qjax.Rule(pattern=r".*(qkv|proj|modulation|final_.*)/kernel")
    recipe = Recipe(
        quant=dataclasses.replace(quant, rules=(keep, *quant.rules), allow_unmatched=True),
        stages=(stage,),
    )
    pod = Pod.of(data=int(data), block=int(block), weights=weights)
    run(qjax.load(os.environ.get("POD_MODEL", "fashion-dit")), recipe, out=out, seed=3, pod=pod)


if __name__ == "__main__":
    main()
