"""Choices that were measured: kept, found again on the same machine, and used."""

import functools
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.kernels import quant_matmul_xla, tuning
from qjax.kernels.packing import Format, block_size
from qjax.kernels.problem import Problem
from qjax.kernels.quant_matmul import choose, prefer, quant_matmul, weight_matmul
from qjax.kernels.target import target
from qjax.kernels.tuning import Choice

ON_GPU = jax.__version_info__ >= (0, 10)  # whether kernels for GPUs can be lowered


def problem(rows=64, size=256, columns=96, groups=1, bits=4, dtype=jnp.int8):
    fmt = Format(bits=8) if bits == 8 else Format(bits, block_size(size, bits), packed=True)
    return Problem(rows, size, columns, groups, fmt, dtype)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QJAX_CACHE", str(tmp_path))
    return tmp_path / "tuning.json"


def test_without_a_file_rules_decide(cache):
    assert tuning.path() == cache
    assert tuning.choice(problem()) is None
    assert choose("auto", problem()) == Choice("xla")


def test_a_cache_in_a_bucket_is_refused(monkeypatch):
    monkeypatch.setenv("QJAX_CACHE", "gs://bucket/cache")
    with pytest.raises(ValueError, match="QJAX_CACHE must be a folder of this machine; got 'gs://"):
        tuning.path()


def test_what_is_kept_is_chosen_on_this_machine_alone(cache):
    tuning.keep({problem(): Choice("xla", (64,))})
    tuning.keep({problem(rows=65): Choice("xla", (96,))})
    assert choose("auto", problem()) == Choice("xla", (64,))
    assert choose("auto", problem(rows=65)) == Choice("xla", (96,))
    assert tuning.choice(problem(rows=66)) is None
    assert choose("xla", problem()) == Choice("xla")  # named, so by its rule
    with target("gpu", "NVIDIA H200"):
        assert tuning.choice(problem()) is None


@pytest.mark.parametrize(
    "stored",
    [
        Choice("hopper", (64, 96, 128, 4)),  # not on this chip
        Choice("cuda"),
        Choice("xla", (0,)),
        Choice("xla", ("64",)),
        Choice("xla", (-32,)),
    ],
)
def test_what_is_no_candidate_is_left_to_the_rules(cache, stored):
    tuning.keep({problem(): stored})
    assert choose("auto", problem()) == Choice("xla")


@pytest.mark.parametrize("value", [[], None, {"xla": 1}, 3])
def test_a_machine_or_a_choice_of_another_form_is_left_to_the_rules(cache, value):
    cache.write_text(json.dumps({tuning.machine(): {problem().name(): value}}))
    assert choose("auto", problem()) == Choice("xla")
    cache.write_text(json.dumps({tuning.machine(): value}))
    assert choose("auto", problem()) == Choice("xla")


def test_a_file_that_cannot_be_read_is_as_good_as_none(cache):
    cache.mkdir()
    assert choose("auto", problem()) == Choice("xla")


def test_what_is_kept_can_be_read_by_everybody(cache):
    tuning.keep({problem(): Choice("xla", (64,))})
    assert cache.stat().st_mode & 0o777 == 0o644


def test_those_that_keep_at_once_lose_nothing(cache):
    """Threads here; locks are of open files, so processes wait for each other alike."""
    begin = threading.Barrier(2)

    def keep(rows):
        begin.wait()
        for columns in range(1, 21):
            tuning.keep({problem(rows=rows, columns=columns): Choice("xla")})

    with ThreadPoolExecutor(2) as both:
        list(both.map(keep, (1, 2)))
    assert len(tuning.choices()) == 40
    assert {file.name for file in cache.parent.iterdir()} == {"tuning.json", ".tuning.lock"}


def test_what_cannot_be_written_leaves_the_file_as_it_was(cache):
    tuning.keep({problem(): Choice("xla", (64,))})
    before = cache.read_text()
    with pytest.raises(TypeError):
        tuning.keep({problem(rows=65): Choice("xla", (object(),))})
    assert cache.read_text() == before
    assert {file.name for file in cache.parent.iterdir()} == {"tuning.json", ".tuning.lock"}


def test_weights_are_unpacked_in_pieces_whatever_is_tuned():
    big = problem(rows=16, size=1024, columns=1024)
    for one in tuning.candidates(big):
        assert one.blocks is None or one.blocks[0] * 1024 <= 2 * quant_matmul_xla.PIECE_VALUES


def test_what_is_preferred_goes_before_what_was_measured(cache):
    with target("tpu", "TPU v5 lite"):
        tuning.keep({problem(columns=512): Choice("tpu", (64, 256, 256))})
        assert choose("auto", problem(columns=512)) == Choice("tpu", (64, 256, 256))
        with prefer("xla"):
            assert choose("auto", problem(columns=512)) == Choice("xla")
        with prefer("xla"), prefer("auto"):
            assert choose("auto", problem(columns=512)) == Choice("tpu", (64, 256, 256))


def test_what_is_preferred_is_taken_without_a_look_at_the_file(cache):
    cache.write_text("no JSON")
    with prefer("xla"):
        assert choose("auto", problem()) == Choice("xla")


def test_nobody_can_prefer_what_there_is_not():
    with pytest.raises(NotImplementedError, match="'hopper'; got 'abacus'"), prefer("abacus"):
        pass


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000])
def test_a_file_that_is_no_json_says_what_to_do(cache, text):
    cache.write_text(text)
    with pytest.raises(ValueError, match="Delete it, and tune again"):
        tuning.choice(problem())


def test_programs_say_what_they_multiply():
    shape = lambda dtype, *sizes: jax.ShapeDtypeStruct(sizes, dtype)
    ones = shape(jnp.float32, 64, 1), shape(jnp.float32, 1, 96)
    fmt, stored = problem().fmt, shape(jnp.uint8, 128, 96)
    with tuning.recording() as found:
        run = lambda p, xs, q, ws: quant_matmul(p, xs, None, q, ws, None, fmt=fmt)
        jax.eval_shape(run, shape(jnp.int8, 64, 256), ones[0], stored, ones[1])
        floats = lambda x, q, ws: weight_matmul(x, q, ws, None, fmt=fmt)
        jax.eval_shape(floats, shape(jnp.bfloat16, 64, 256), stored, ones[1])
    assert found == [problem(), problem(dtype=jnp.bfloat16)._replace(out=jnp.bfloat16)]
    assert [one.name() for one in found] == [
        "int8 64x256x96 to float32, 1 groups, 4 bits packed by 256, 0 padded",
        "bfloat16 64x256x96 to bfloat16, 1 groups, 4 bits packed by 256, 0 padded",
    ]


@pytest.mark.parametrize("x_zero, w_zero", [(True, False), (False, True), (True, True)])
def test_zero_points_and_the_dtype_of_the_result_make_another_matmul(cache, x_zero, w_zero):
    shape = lambda dtype, *sizes: jax.ShapeDtypeStruct(sizes, dtype)
    scales = shape(jnp.float32, 64, 1), shape(jnp.float32, 1, 96)
    zeros = shape(jnp.int32, 64, 1) if x_zero else None, shape(jnp.int8, 1, 96) if w_zero else None
    with tuning.recording() as found:
        jax.eval_shape(
            functools.partial(quant_matmul, fmt=problem().fmt, dtype=jnp.bfloat16),
            *(shape(jnp.int8, 64, 256), scales[0], zeros[0]),
            *(shape(jnp.uint8, 128, 96), scales[1], zeros[1]),
        )
    (one,) = found
    assert one == problem()._replace(out=jnp.bfloat16, x_zero=x_zero, w_zero=w_zero)
    tuning.keep({problem(): Choice("xla", (64,)), one: Choice("xla", (96,))})
    assert choose("auto", one) == Choice("xla", (96,))
    assert len({problem().name(), problem()._replace(out=jnp.bfloat16).name(), one.name()}) == 3


def test_columns_are_computed_in_the_pieces_that_were_chosen(monkeypatch):
    """With the same integers, whatever the pieces."""
    seen = []
    in_pieces = quant_matmul_xla._in_pieces

    def spy(compute, weight, rows, piece, dtype):
        seen.append(piece)
        return in_pieces(compute, weight, rows, piece, dtype)

    monkeypatch.setattr(quant_matmul_xla, "_in_pieces", spy)
    rng = np.random.default_rng(0)
    p = rng.integers(-128, 128, (64, 256)).astype(np.int8)
    q = rng.integers(0, 256, (128, 96)).astype(np.uint8)
    results = []
    for piece in (32, 64, 96):
        with tuning.using({problem(): Choice("xla", (piece,))}):
            run = lambda p, q: quant_matmul(
                p, jnp.ones((64, 1)), None, q, jnp.ones((1, 96)), None, fmt=problem().fmt
            )
            results.append(jax.jit(run)(p, q))
    assert seen == [32, 64, 96]
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


@pytest.mark.parametrize(
    ("device", "names"),
    [
        (("cpu", "cpu"), {"xla"}),
        (("tpu", "TPU v5 lite"), {"xla", "tpu"}),
        (("gpu", "NVIDIA H200"), {"xla", "hopper"} if ON_GPU else {"xla"}),
        (("gpu", "Tesla T4"), {"xla"}),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.bfloat16])
def test_candidates_are_those_of_the_device_and_each_once(device, names, dtype):
    with target(*device):
        found = tuning.candidates(problem(size=1024, columns=256, dtype=dtype))
    assert {one.implementation for one in found} == names
    assert len(set(found)) == len(found) and found[0] == Choice("xla")
    if len(names) > 1 or device[0] == "cpu":
        assert any(one.blocks is not None for one in found)


@pytest.mark.parametrize("device", [("tpu", "TPU v5 lite"), ("gpu", "NVIDIA H200")])
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("size", [1024, 1032])
def test_a_kernel_is_a_candidate_where_it_could_be_named(device, dtype, size):
    """Of every size and dtype: what `choose` refuses is not measured."""
    one = problem(size=size, columns=256, dtype=dtype)
    with target(*device):
        found = {choice.implementation for choice in tuning.candidates(one)}
        for name in ("tpu", "hopper"):
            if name in found:
                assert choose(name, one) == Choice(name)
            else:
                with pytest.raises(NotImplementedError, match="cannot run here"):
                    choose(name, one)
