"""`qjax calibrate`: it fits and saves, tells of its progress, and says what it lacks in one line."""

import json
from xml.etree import ElementTree

import jax
import pytest

import qjax
from qjax import cli, loss_plot
from qjax.loss_plot import save_losses
from qjax.noise_plot import save_noise
from qjax.search_plot import save_fronts

MODEL = "fashion-dit"
S2P = ("calibrate", MODEL, "--recipe", "s2p_w4a8")


def test_it_fits_saves_and_plots(run, tmp_path):
    out = tmp_path / "run"
    words = ("--steps", "2", "--items", "4", "--iterations", "3", "--out", out, "--json")
    with jax.numpy_dtype_promotion("standard"):  # optax adds floats and counts
        result = run(*S2P, *words)
    assert result.status == 0, result.err
    said = json.loads(result.out)
    assert said["stages"] == ["SerialParallel", "TimePrecalculation"]
    assert said["losses"] == str(out / "loss.svg")
    assert ElementTree.parse(out / "loss.svg").getroot().tag.endswith("svg")

    log = out / "stage-0-serialparallel-parts" / "log.jsonl"
    events = [json.loads(line) for line in log.read_text().splitlines()]
    shares = [event["share"] for event in events if "share" in event]
    assert shares == sorted(shares) and shares[0] > 0 and shares[-1] == 1.0
    assert [e["iteration"] for e in events if e["event"] == "fit"] == [1, 2, 3]

    pipe = qjax.load(out / "final")
    assert {"quant"} <= set(pipe.step_table.entries) and pipe.step_table.steps == 2
    assert "time" in pipe.step_table.entries


@pytest.fixture(scope="module")
def corrected(tmp_path_factory):
    """The folder of a run of a recipe with a noise correction."""
    out = tmp_path_factory.mktemp("ptqd") / "run"
    words = ("--steps", "2", "--eta", "1", "--items", "4", "--iterations", "1", "--out", str(out))
    with jax.numpy_dtype_promotion("standard"):
        assert cli.main(["calibrate", MODEL, "--recipe", "ptqd_w4a8", *words]) == 0
    return out


@pytest.mark.slow
def test_the_noise_of_every_step_is_plotted(corrected):
    plots = sorted(corrected.glob("stage-1-noisecorrection-parts/*.svg"))
    assert [plot.name for plot in plots] == ["noise.svg", "normality.svg", "slope.svg"]
    for plot in plots:
        assert ElementTree.parse(plot).getroot().tag.endswith("svg")


@pytest.mark.slow
def test_a_correction_of_another_run_is_refused_until_it_is_retargeted(run, corrected, tmp_path):
    saved = corrected / "final"
    picture = tmp_path / "shoe.png"
    words = ("generate", saved, "--labels", "7", "--steps", "2", "--eta", "0.5", "--out", picture)
    refused = run(*words)
    assert refused.status == 2 and "eta was 1.0, the run has 0.5" in refused.err
    assert not picture.exists()
    left_out = run(*words, "--retarget")
    assert left_out.status == 0, left_out.err
    assert "noise_correction: left out (eta was 1.0, the run has 0.5)" in left_out.out
    assert "quant: kept" in left_out.out
    fitted = run(*words, "--retarget", "--teacher", MODEL)
    assert fitted.status == 0, fitted.err
    assert "noise_correction: fitted again (eta was 1.0, the run has 0.5)" in fitted.out
    same = run(*words, "--retarget", "--teacher", saved)
    assert same.status == 2 and "it is quantized itself" in same.err
    said = json.loads(run(*words, "--retarget", "--json").out)
    assert said["retargeted"]["quant"] == "kept"
    other = run(*words, "--retarget", "--teacher", "fashion-unet")
    assert other.status == 2 and "its params have another hash" in other.err


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (
            ("generate", MODEL, "--teacher", MODEL, "--out", "out.png"),
            ["--teacher fits a noise correction again; it needs --retarget"],
        ),
        ((*S2P, "--out", "out"), ["give steps (on the command line --steps)"]),
        (
            ("quantize", MODEL, "--recipe", "s2p_w4a8", "--out", "out"),
            ["s2p_w4a8", "qjax calibrate"],
        ),
        (
            (*S2P, "--steps", "2", "--out", "out", "--prompts", "empty.txt"),
            ["empty.txt must hold at least one prompt"],
        ),
        (
            (*S2P, "--steps", "2", "--out", "out", "--prompts", "none.txt"),
            ["--prompts must be a file", "got none.txt"],
        ),
        (
            (*S2P, "--steps", "2", "--out", "out", "--prompts", "one.txt"),
            ["reads labels, not prompts"],
        ),
        (
            ("calibrate", MODEL, "--recipe", "w8a8", "--iterations", "3", "--out", "out"),
            ["--iterations: w8a8 has no stage that fits anything"],
        ),
        (
            ("calibrate", MODEL, "--recipe", "w8a8", "--steps", "3", "--out", "out"),
            ["w8a8 has no stage with steps; its stages are none"],
        ),
    ],
)
def test_what_is_lacking_or_out_of_place_is_one_line_and_writes_nothing(
    run, words, fragments, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n# nothing\n")
    (tmp_path / "one.txt").write_text("a shoe\n")
    result = run(*words)
    assert result.status == 2 and result.out == ""
    assert result.err.startswith("qjax: error: ") and result.err.count("\n") == 1
    assert all(fragment in result.err for fragment in fragments), result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "one.txt"]


def test_what_a_run_left_that_was_killed_at_its_first_file_is_no_hindrance(run, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / ".run.json.0123456789abcdef.tmp").write_text("{")
    words = ("calibrate", MODEL, "--recipe", "w8a8", "--out", out)
    (out / "letter.txt").write_text("dear")
    assert "is not empty" in run(*words).err
    (out / "letter.txt").unlink()
    assert run(*words).status == 0
    assert sorted(path.name for path in out.iterdir()) == ["final", "run.json"]


def test_iterations_that_a_killed_run_told_of_twice_are_drawn_once(monkeypatch, tmp_path):
    parts, drawn = tmp_path / "stage-0-x-parts", {}
    parts.mkdir()
    event = lambda iteration, error: json.dumps(
        {"event": "fit", "block": "b", "iteration": iteration, "error": error}
    )
    lines = [event(100, 0.9), event(200, 0.8), event(100, 0.9), event(200, 0.8), event(300, 0.7)]
    lines.insert(2, event(300, 0.1)[:20])  # the disk was full, or the machine went
    (parts / "log.jsonl").write_text("\n".join(lines) + "\n")

    def draw(series, **words):
        drawn.update(series)
        return "<svg/>"

    monkeypatch.setattr(loss_plot, "line_plot", draw)
    assert save_losses(tmp_path) == tmp_path / "loss.svg"
    assert save_fronts(tmp_path) == save_noise(tmp_path) == []
    assert drawn == {"b": ([100, 200, 300], [0.9, 0.8, 0.7])}
    (parts / "log.jsonl").unlink()
    assert save_losses(tmp_path) is None
