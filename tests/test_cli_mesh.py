"""Commands that draw spread pictures over devices and processes."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

DRAWING = ["generate", "fashion-dit", "--num-images", "7", "--steps", "1", "--batch-size", "2"]
SCORING = ["eval", "fashion-dit", "--reference", "fashion-unet", "--num-images", "11", "--steps"]
SCORING += [
    "1",
    "--batch-size",
    "2",
    "--part-size",
    "8",
    "--metrics",
    "psnr,fd",
    "--resamples",
    "0",
]


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "fashion-dit", "--out", "a.png"],
        ["compare", "fashion-dit", "fashion-unet"],
        ["eval", "fashion-dit"],
    ],
)
def test_a_mesh_of_devices_that_are_not_there_is_named(run, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = run(*words, "mesh.data=3")
    assert found.status == 2
    assert "mesh.data must be the number of devices, 1; got 3" in found.err
    assert "go together" in run(*words, "mesh.process=1").err
    assert not list(tmp_path.iterdir())


def start(words, devices):
    # Networks of the right numbers, compiled in less time.
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    flags |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "qjax", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | flags,
    )


def done(*jobs):
    """What processes have printed."""
    try:
        said = [job.communicate(timeout=900) for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert [job.returncode for job in jobs] == [0] * len(jobs), said
    return [out for out, _ in said]


def two(words, port):
    """Two processes with two devices each."""
    mesh = [f"mesh.coordinator=127.0.0.1:{port}", "mesh.processes=2"]
    return done(*(start([*words, *mesh, f"mesh.process={i}"], 2) for i in (0, 1)))


def result(folder):
    return json.loads((folder / "evaluation.json").read_text())


@pytest.mark.slow
def test_pictures_and_scores_are_the_same_by_one_process_and_by_two(pod_jobs, tmp_path):
    plain, mesh, both = (tmp_path / f"{name}.npy" for name in ("plain", "mesh", "both"))
    done(start([*DRAWING, "--out", plain], 1))
    (said,) = done(start([*DRAWING, "--out", mesh, "mesh.data=4"], 4))
    assert "spread over 4 devices" in said
    first, second = two([*DRAWING, "--out", both], pod_jobs.free_port())
    assert "7 pictures" in first and "pictures" not in second
    images = np.load(plain)
    assert len(images) == 7 and np.ptp(images) > 1
    np.testing.assert_array_equal(np.load(mesh), images)
    np.testing.assert_array_equal(np.load(both), images)

    plain, mesh, both = (tmp_path / name for name in ("plain", "mesh", "both"))
    done(start([*SCORING, "--out", plain], 1))
    done(start([*SCORING, "--out", mesh, "mesh.data=4"], 4))
    assert result(mesh)["scores"] == result(plain)["scores"]
    two([*SCORING, "--out", both], pod_jobs.free_port())
    assert result(both)["scores"] == result(plain)["scores"]
    # A part that is lost is drawn again by both; the other is read.
    (both / "pictures-00000008.safetensors").unlink()
    (both / "evaluation.json").unlink()
    two([*SCORING, "--out", both], pod_jobs.free_port())
    assert result(both)["scores"] == result(plain)["scores"]


@pytest.mark.slow
def test_a_folder_of_another_run_ends_both_processes(pod_jobs, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(AssertionError, match="no empty folder"):
        two([*SCORING, "--out", tmp_path], pod_jobs.free_port())
    assert [file.name for file in tmp_path.iterdir()] == ["note.txt"]
