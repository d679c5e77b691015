"""Pictures are the same on a mesh, whatever its devices, and every device runs the kernels.

Several devices are virtual ones of a process of their own, `mesh_job.py`.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.models.mesh import batch_of, data_mesh, start
from qjax.models.pipeline import Pipeline
from qjax.models.samplers import DDIM

JOB = Path(__file__).with_name("mesh_job.py")


def job(out, parts):
    """What a process with four devices has found, by name."""
    words = [sys.executable, str(JOB), str(out), "4", parts]
    cpu = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=cpu)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(np.load(f"{out}.0.npz"))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return job(tmp_path_factory.mktemp("mesh") / "found", "drawn,look,kernels,evaluations")


def assert_equal_on_all_meshes(found, cases):
    for name in cases:
        case, _, mesh = name.partition("/")
        np.testing.assert_array_equal(found[name], found[f"{case}/none"], err_msg=name)
        assert len(np.unique(found[name])) > 100 and mesh


def test_pictures_and_trajectories_have_the_same_bits_with_and_without_a_mesh(found):
    names = [name for name in found if name.endswith("/four") and "low" in name]
    assert names == ["low/four", "x_t of low/four", "prediction of low/four"]
    assert_equal_on_all_meshes(found, names)
    assert len(found["low/four"]) == 11 and found["x_t of low/four"].shape[:2] == (2, 11)


def test_given_noise_is_spread_too(found):
    assert_equal_on_all_meshes(found, ["given noise/four", "x_t of given noise/four"])
    assert not np.array_equal(found["given noise/four"], found["low/four"])


def test_every_device_runs_the_kernels_of_a_device_alone(found):
    assert found["kernels/alone"] > 0
    assert found["kernels/mesh"] == found["kernels/alone"]
    # What is avoided: arrays laid out by hand, of which the compiler cuts the matmuls.
    assert found["kernels/partitioned"] == 0


def test_parameters_that_lie_on_the_devices_stay_there(found):
    assert len(found["placed/once"]) > 4
    np.testing.assert_array_equal(found["placed/once"], found["placed/twice"])


def test_other_counts_of_pictures_run_the_same_program(found):
    assert found["traced"].tolist() == [2]  # 11 and 9 pictures, 2 at a time on every device
    assert len(found["latents"]) == 9


def test_scores_of_an_evaluation_do_not_depend_on_the_mesh(found):
    assert np.isfinite(found["scores/none"]).all()
    np.testing.assert_array_equal(found["scores/four"], found["scores/none"])
    assert str(found["device/four"]).startswith("4 devices, each ")


@pytest.mark.slow
def test_two_processes_both_have_all_pictures_of_one(pod_jobs, tmp_path):
    alone = job(tmp_path / "alone", "drawn")
    port = str(pod_jobs.free_port())
    words = [sys.executable, str(JOB), str(tmp_path / "both"), "2", "drawn", port, "2"]
    cpu = os.environ | {"JAX_PLATFORMS": "cpu"}
    jobs = [
        subprocess.Popen([*words, str(i)], stderr=subprocess.PIPE, text=True, env=cpu)
        for i in range(2)
    ]
    errors = [process.communicate(timeout=600)[1] for process in jobs]
    assert [process.returncode for process in jobs] == [0, 0], "\n".join(errors)[-4000:]
    for found in (np.load(f"{tmp_path / 'both'}.{i}.npz") for i in range(2)):
        for name in ("all", "again", "own"):
            for what in ("x_t of ", "prediction of "):
                ours, theirs = found[f"{what}processes/{name}"], alone[f"{what}low/none"]
                np.testing.assert_array_equal(ours, theirs)
            # On CPUs a decoder's sums are split over threads, of which more devices have more.
            ours = found[f"processes/{name}"]
            np.testing.assert_allclose(ours, alone["low/none"], rtol=0, atol=1e-7)
        assert "process" in str(found["processes/refused"])


@pytest.mark.slow
def test_float_and_low_bit_pictures_are_the_same_on_any_mesh(tmp_path):
    found = job(tmp_path / "found", "drawn_on_all_meshes,comparisons")
    names = [name for name in found if name.startswith(("low/", "float/"))]
    meshes = {name.partition("/")[2] for name in names}
    assert meshes == {
        *("none", "four", "explicit", "two by two", "two", "one"),
        "within a mesh",
    }
    assert_equal_on_all_meshes(found, names)
    # Other programs: the same to the rounding of float32, over two steps of a 4-bit network.
    np.testing.assert_allclose(found["other batch"], found["low/none"], atol=1e-4)
    np.testing.assert_allclose(found["decoded/four"], found["decoded/none"], atol=1e-5)
    np.testing.assert_allclose(found["psnr/four"], found["psnr/none"], rtol=1e-5)
    assert found["timed/four"] == 11


def _apply(variables, x_t, t, labels):
    return variables["params"]["gain"] * x_t


def simple():
    return Pipeline.from_apply(_apply, {"gain": jnp.ones(())}, DDIM(), (4, 4, 1))


def test_a_mesh_of_one_device_draws_what_no_mesh_draws(key):
    mesh = data_mesh(1)
    images = simple()(num_images=3, steps=2, key=key, mesh=mesh)
    np.testing.assert_array_equal(images, simple()(num_images=3, steps=2, key=key))
    placed = simple().on(mesh)
    assert placed.mesh == mesh and simple().mesh is None
    np.testing.assert_array_equal(images, placed(num_images=3, steps=2, key=key))


@pytest.mark.parametrize(
    ("count", "batch_size", "devices", "size"),
    [(11, 2, 1, 2), (11, 64, 1, 11), (1, 64, 4, 4), (9, 2, 4, 8), (8, 64, 4, 8), (10, 3, 4, 12)],
)
def test_every_device_draws_as_many_pictures_and_no_more_than_needed(
    count, batch_size, devices, size
):
    class Devices:
        def __init__(self, size):
            self.size = size

    assert batch_of(count, batch_size, Devices(devices)) == size


def test_what_is_no_mesh_of_all_devices_is_named():
    with pytest.raises(TypeError, match=r"mesh must be a jax.sharding.Mesh; got int"):
        simple()(num_images=1, steps=1, key=jax.random.key(0), mesh=4)
    with pytest.raises(ValueError, match=r"mesh.data must be the number of devices, 1; got 3"):
        data_mesh(3)
    with pytest.raises(ValueError, match="go together"):
        start(processes=2)
