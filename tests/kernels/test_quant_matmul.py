"""The low-bit matmul, every implementation against sums of 64-bit integers in numpy."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.kernels import packing, quant_matmul_xla
from qjax.kernels.packing import Format
from qjax.kernels.problem import Problem
from qjax.kernels.quant_matmul import choose, prefer, quant_matmul, weight_matmul
from qjax.kernels.quant_matmul_hopper import quant_matmul_hopper
from qjax.kernels.quant_matmul_tpu import quant_matmul_tpu
from qjax.kernels.quant_matmul_xla import integer_dot, piece_columns
from qjax.kernels.target import target
from qjax.kernels.tiles_tpu import Blocks, choose_blocks
from qjax.kernels.weight_matmul_hopper import weight_matmul_hopper
from qjax.kernels.weight_matmul_tpu import weight_matmul_tpu

ON_GPU = jax.__version_info__ >= (0, 10)  # whether kernels for GPUs can be lowered
INTERPRETED = jax.__version_info__ >= (0, 12)


def interpreted(kernel, *operands, **settings):
    import jax.experimental.pallas.mosaic_gpu as plgpu

    return kernel(*operands, interpret=plgpu.InterpretGPUParams(), **settings)


# By name: the matmul of codes and that of floats. Kernels are interpreted.
IMPLEMENTATIONS = {
    "xla": (
        functools.partial(quant_matmul, implementation="xla"),
        functools.partial(weight_matmul, implementation="xla"),
    ),
    "tpu": (
        functools.partial(quant_matmul_tpu, interpret=True),
        functools.partial(weight_matmul_tpu, interpret=True),
    ),
    "hopper": (
        functools.partial(interpreted, quant_matmul_hopper),
        functools.partial(interpreted, weight_matmul_hopper),
    ),
}
# Of the activations of the matmul of floats.
FLOATS = {"xla": jnp.float32, "tpu": jnp.float32, "hopper": jnp.bfloat16}
TARGETS = {"tpu": ("tpu", "TPU v5 lite"), "hopper": ("gpu", "NVIDIA H200")}

# The integers are exact. What remains is the epilogue: an int32 read as float32, two
# products, and one sum per group, each off by at most 2**-24 of its size.
EPILOGUE_RTOL = 1e-6


class Case(NamedTuple):
    """A format and a shape; `x_groups` and `w_groups` are 1 or the same number."""

    bits: int
    m: int = 5
    k: int = 96
    n: int = 70
    x_groups: int = 1
    w_groups: int = 1
    x_zero: bool = False
    w_zero: bool = False
    packed: bool = True
    x_shared: bool = False  # one scale for all rows
    w_shared: bool = False  # one scale for all columns
    pieces: bool = False  # columns in pieces of 32, of which the last overlaps
    blocks: Blocks | None = None  # of kernels that take them

    def __str__(self):
        given = [f"{k}={v}" for k, v in self._asdict().items() if v != self._field_defaults.get(k)]
        return ",".join(given)


CASES = [
    *(Case(bits=bits) for bits in (2, 3, 4, 5, 6, 8)),
    *(Case(bits=bits, packed=False) for bits in (4, 8)),
    *(Case(bits=4, x_zero=x, w_zero=w) for x, w in itertools.product((False, True), repeat=2)),
    *(Case(bits=8, packed=False, x_zero=True, w_zero=w) for w in (False, True)),
    Case(bits=4, w_groups=3),
    Case(bits=4, x_groups=3, w_groups=3, x_zero=True, w_zero=True),
    Case(bits=3, x_groups=3, x_zero=True),
    Case(bits=8, w_groups=12, packed=False, w_zero=True),
    Case(bits=4, m=1, k=1, n=1),
    Case(bits=4, m=7, k=333, n=65),  # padded: no block divides K
    Case(bits=5, m=3, k=333, n=33, w_groups=3, w_zero=True),
    Case(bits=4, k=520, n=40, w_groups=65),  # groups of 8 in blocks of 104
    Case(bits=4, x_shared=True, w_shared=True, x_zero=True, w_zero=True),
    Case(bits=4, pieces=True),
    Case(bits=8, x_zero=True, w_zero=True, packed=False, pieces=True),
    Case(bits=4, w_groups=3, w_zero=True, pieces=True),
    Case(bits=4, x_groups=3, w_groups=3, x_zero=True, w_zero=True, pieces=True),
    Case(bits=3, m=7, k=333, n=65, w_shared=True, pieces=True),
    # Several blocks on every axis, the last of rows and columns in part.
    *(Case(bits=bits, m=40, k=512, n=130, blocks=Blocks(32, 128, 256)) for bits in (2, 3, 4, 6, 8)),
    Case(
        bits=8,
        m=40,
        k=1024,
        n=130,
        packed=False,
        x_zero=True,
        w_zero=True,
        blocks=Blocks(32, 128, 512),
    ),
    *(
        Case(
            bits=4,
            m=40,
            k=1152,
            n=130,
            x_groups=g,
            w_groups=g,
            x_zero=True,
            w_zero=True,
            blocks=Blocks(32, 128, k),
        )
        for g, k in ((36, 384), (9, 384), (6, 384), (4, 1152), (18, 128))
    ),
    Case(bits=4, m=33, k=320, n=130, w_groups=10, w_zero=True),
    Case(bits=4, m=1, k=1152, n=129, x_groups=9, x_zero=True),
    Case(bits=4, packed=False, m=9, k=256, n=70, w_groups=2, w_zero=True),
    # Columns of whole blocks of a GPU's kernel; groups of one, two and nine of its steps.
    Case(bits=8, m=150, k=256, n=128, packed=False),
    Case(bits=4, m=100, k=256, n=96, x_zero=True, w_zero=True),
    Case(bits=4, m=70, k=384, n=64, x_groups=3, w_groups=3, x_zero=True, w_zero=True),
    Case(bits=4, m=5, k=384, n=64, w_groups=2, w_zero=True),
    Case(bits=8, m=70, k=576, n=64, x_groups=2, w_groups=2, x_zero=True, packed=False),
    # Few rows: groups of a half, of a whole and of several packing blocks; several parts.
    Case(bits=4, m=3, k=512, n=128),
    Case(bits=4, m=64, k=384, n=128, w_groups=6, w_zero=True),
    Case(bits=4, m=9, k=512, n=256, w_groups=2, w_zero=True),
    Case(bits=4, m=17, k=1024, n=128, w_groups=2),
]


def of_implementation(name: str, case: Case):
    """The two matmuls, None for one that the implementation refuses."""
    if name == "hopper" and not INTERPRETED:
        pytest.skip("Mosaic GPU's interpreter needs jax >= 0.12")
    fmt, groups = stored_format(case), max(case.x_groups, case.w_groups)
    found = []
    for one, dtype in zip(IMPLEMENTATIONS[name], (jnp.int8, FLOATS[name]), strict=True):
        with target(*TARGETS.get(name, ("cpu", "cpu"))):
            try:
                choose(name, Problem(case.m, case.k, case.n, groups, fmt, dtype))
            except NotImplementedError as error:
                assert any(word in str(error) for word in ("channels", "bytes", "rows"))
                found.append(None)
                continue
        given = {"blocks": case.blocks} if name == "tpu" and case.blocks else {}
        found.append(functools.partial(one, **given))
    return found


def draw(case: Case):
    """Operands of the kernels as numpy arrays, the weights unpacked."""
    rng = np.random.default_rng(abs(hash(case)) % 2**32)
    low, high = -(2 ** (case.bits - 1)), 2 ** (case.bits - 1)
    x_shape = (1 if case.x_shared else case.m, case.x_groups)
    w_shape = (case.w_groups, 1 if case.w_shared else case.n)
    p = rng.integers(-128, 128, (case.m, case.k)).astype(np.int8)
    q = rng.integers(low, high, (case.k, case.n)).astype(np.int8)
    x_scale = rng.uniform(0.01, 0.1, x_shape).astype(np.float32)
    w_scale = rng.uniform(0.01, 0.1, w_shape).astype(jnp.bfloat16)
    x_zero = rng.integers(-128, 128, x_shape).astype(np.int32) if case.x_zero else None
    w_zero = rng.integers(low, high, w_shape).astype(np.int8) if case.w_zero else None
    return p, x_scale, x_zero, q, w_scale, w_zero


def stored_format(case: Case) -> Format:
    if not case.packed:
        return Format(bits=case.bits)
    block, _, pad = packing.packed_size(case.k, case.bits)
    return Format(bits=case.bits, block=block, pad=pad, packed=True)


def stored(q, case: Case) -> tuple[jax.Array, Format]:
    fmt = stored_format(case)
    if not case.packed:
        return jnp.asarray(q).astype(jnp.int4 if case.bits <= 4 else jnp.int8), fmt
    return jax.jit(functools.partial(packing.pack, bits=case.bits))(q), fmt


def wide(small, axis, size):
    """A scale or zero point in float64, repeated along the contracted axis."""
    return np.repeat(np.asarray(small, np.float64), size // small.shape[axis], axis=axis)


def reference(p, x_scale, x_zero, q, w_scale, w_zero):
    """The formula of `quant_matmul_xla`, group by group, integers in int64."""
    groups = max(x_scale.shape[1], w_scale.shape[0])
    size = p.shape[1] // groups
    y, magnitude = 0.0, 0.0
    at = lambda array, axis, g: array.take([g if array.shape[axis] > 1 else 0], axis=axis)
    for g in range(groups):
        run = slice(g * size, (g + 1) * size)
        a, b = p[:, run].astype(np.int64), q[run].astype(np.int64)
        a = a if x_zero is None else a - at(x_zero, 1, g).astype(np.int64)
        b = b if w_zero is None else b - at(w_zero, 0, g).astype(np.int64)
        scales = at(x_scale, 1, g).astype(np.float64) * at(w_scale, 0, g).astype(np.float64)
        y, magnitude = y + a @ b * scales, magnitude + np.abs(a @ b * scales)
    return y, magnitude


@pytest.fixture
def small_pieces(monkeypatch):
    """Call it, and every matmul of more than 32 columns is done in pieces."""

    def set_sizes():
        monkeypatch.setattr(quant_matmul_xla, "SMALL_VALUES", 0)
        monkeypatch.setattr(quant_matmul_xla, "PIECE_VALUES", 1)
        monkeypatch.setattr(quant_matmul_xla, "LARGE_OUTPUT", 0)
        monkeypatch.setattr(quant_matmul_xla, "LARGE_OUTPUT_COLUMNS", 32)

    return set_sizes


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_matmul_is_that_of_the_formula(case, implementation, small_pieces):
    if case.pieces:
        small_pieces()
    matmul = of_implementation(implementation, case)[0]
    if matmul is None:
        return
    p, x_scale, x_zero, q, w_scale, w_zero = draw(case)
    packed, fmt = stored(q, case)
    run = jax.jit(functools.partial(matmul, fmt=fmt))
    y = np.asarray(run(p, x_scale, x_zero, packed, w_scale, w_zero))
    wanted, magnitude = reference(p, x_scale, x_zero, q, w_scale, w_zero)
    assert y.dtype == np.float32
    assert (np.abs(y - wanted) <= EPILOGUE_RTOL * magnitude).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", [c for c in CASES if not c.x_zero and c.x_groups == 1], ids=str)
def test_the_matmul_of_floats_dequantizes(case, implementation, small_pieces):
    if case.pieces:
        small_pieces()
    matmul = of_implementation(implementation, case)[1]
    if matmul is None:
        return
    _, _, _, q, w_scale, w_zero = draw(case)
    x = np.random.default_rng(1).standard_normal((case.m, case.k)).astype(FLOATS[implementation])
    packed, fmt = stored(q, case)
    run = jax.jit(functools.partial(matmul, fmt=fmt))
    y = np.asarray(run(x, packed, w_scale, w_zero), np.float64)
    x = np.asarray(x, np.float64)
    weights = q.astype(np.float64) - (0 if w_zero is None else wide(w_zero, 0, case.k))
    weights = weights * wide(w_scale, 0, case.k)
    magnitude = np.abs(x) @ np.abs(weights)
    # Sums of K float32 products in any order, and the rounding of weights and result.
    rounded = 2 * 2**-8 if FLOATS[implementation] == jnp.bfloat16 else 4 * 2**-24
    assert (np.abs(y - x @ weights) <= (case.k * 2**-24 + rounded) * magnitude).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("pieces", (False, True))
def test_unit_scales_give_the_integers_bit_for_bit(implementation, pieces, small_pieces):
    """Below 2**24 a float32 holds every integer."""
    if pieces:
        small_pieces()
    case = Case(bits=4, m=9, k=256, n=64, x_zero=True, w_zero=True)
    matmul = of_implementation(implementation, case)[0]
    p, _, x_zero, q, _, w_zero = draw(case)
    packed, fmt = stored(q, case)
    ones = jnp.ones((9, 1)), jnp.ones((1, 64))
    run = functools.partial(matmul, fmt=fmt)
    y = jax.jit(run)(p, ones[0], x_zero, packed, ones[1], w_zero)
    exact = (p.astype(np.int64) - x_zero) @ (q.astype(np.int64) - w_zero)
    np.testing.assert_array_equal(np.asarray(y, np.int64), exact)


@pytest.mark.parametrize("zeros", [(None, None), (-128, None), (None, 127), (-128, 127)])
def test_the_largest_sums_do_not_overflow(zeros):
    """All codes at their ends, K as large as the module says."""
    k = 131_071 if zeros == (None, None) else 33_025
    p_zero, q_zero = zeros
    p = np.full((2, k), -128 if p_zero is None else 127, np.int8)
    q = np.full((k, 3), -128, np.int8)
    column = lambda zero, shape: None if zero is None else jnp.full(shape, zero, jnp.int32)
    dot = jax.jit(integer_dot)(p, q, column(p_zero, (2, 1)), column(q_zero, (1, 3)))
    exact = (p[:1].astype(np.int64) - (p_zero or 0)) @ (q[:, :1].astype(np.int64) - (q_zero or 0))
    assert abs(int(exact[0, 0])) > 2**29
    np.testing.assert_array_equal(dot, np.full((2, 3), exact[0, 0]))


def test_vmap_over_stacked_weights_is_the_loop(small_pieces):
    small_pieces()
    case = Case(bits=4, n=64, w_groups=3)
    p, x_scale, _, q, w_scale, _ = draw(case)
    stack = jnp.stack([stored(np.roll(q, shift, 0), case)[0] for shift in range(3)])
    fmt = stored(q, case)[1]
    run = lambda packed: quant_matmul(p, x_scale, None, packed, w_scale, None, fmt=fmt)
    one_by_one = jnp.stack([jax.jit(run)(packed) for packed in stack])
    np.testing.assert_allclose(jax.jit(jax.vmap(run))(stack), one_by_one, rtol=1e-6)


def test_bfloat16_inputs_are_summed_in_float32():
    case = Case(bits=4, k=1024, n=40)
    q = np.ones((1024, 40), np.int8)
    packed, fmt = stored(q, case)
    x = jnp.ones((2, 1024), jnp.bfloat16)
    y = jax.jit(functools.partial(weight_matmul, fmt=fmt))(
        x, packed, jnp.full((1, 40), 1 / 1024, jnp.bfloat16), None
    )
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y.astype(np.float32), 1.0)


@pytest.mark.parametrize("columns", (1, 31, 70, 320, 1000, 1152, 10_240))
@pytest.mark.parametrize("size", (1, 64, 320, 1152, 11_520))
@pytest.mark.parametrize("widened", (True, False))
def test_a_piece_is_the_whole_or_a_small_multiple_of_32(columns, size, widened):
    piece = piece_columns(2048, size, columns, widened=widened)
    assert piece == columns or (piece < columns and piece % 32 == 0)
    if widened and piece < columns:
        assert piece * size <= max(quant_matmul_xla.PIECE_VALUES, 32 * size)
    if widened and size * columns > quant_matmul_xla.SMALL_VALUES and columns > 64:
        assert piece < columns


def test_unequal_groups_raise():
    p, ones = jnp.zeros((2, 12), jnp.int8), jnp.ones
    run = functools.partial(quant_matmul, fmt=Format(bits=8))
    with pytest.raises(ValueError, match="2 and 3 groups of 12 input channels"):
        run(p, ones((2, 2)), None, jnp.zeros((12, 4), jnp.int8), ones((3, 4)), None)
    with pytest.raises(ValueError, match="1 and 5 groups of 12 input channels"):
        run(p, ones((2, 1)), None, jnp.zeros((12, 4), jnp.int8), ones((5, 4)), None)
    with pytest.raises(ValueError, match="5 groups of 12 input channels"):
        weight_matmul(
            jnp.ones((2, 12)), jnp.zeros((12, 4), jnp.int8), ones((5, 4)), None, fmt=Format(bits=8)
        )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("abacus", "'auto', 'xla', 'tpu', 'hopper'; got 'abacus'"),
        ("tpu", "it needs a TPU"),
        ("hopper", "it needs a Hopper GPU"),
    ],
)
def test_an_implementation_that_cannot_run_says_so(name, message):
    p, one, q = jnp.zeros((1, 32), jnp.int8), jnp.ones((1, 1)), jnp.zeros((32, 1), jnp.int8)
    with pytest.raises(NotImplementedError, match=message):
        quant_matmul(p, one, None, q, one, None, fmt=Format(bits=8), implementation=name)
    with pytest.raises(NotImplementedError, match=message):
        weight_matmul(jnp.ones((1, 32)), q, one, None, fmt=Format(bits=8), implementation=name)


@pytest.mark.parametrize("rows", (1, 63, 64, 300, None))
@pytest.mark.parametrize("dtype", (jnp.int8, jnp.bfloat16, jnp.float32))
@pytest.mark.parametrize("size", (1152, 8992, 20_000))
@pytest.mark.parametrize("groups", (1, 4))
def test_a_tpu_takes_a_matmul_exactly_if_there_are_blocks_for_it(rows, dtype, size, groups):
    """Long inputs that no divisor cuts fit with few rows and narrow values only."""
    fmt, most = Format(bits=4), rows or 512
    itemsize = jnp.dtype(dtype).itemsize
    blocks = choose_blocks(most, size, 256, groups=groups, fmt=fmt, itemsize=itemsize)
    taken = blocks is not None and size // groups % 32 == 0
    with target("tpu", "TPU v5 lite"):
        found = choose("auto", Problem(rows, size, 256, groups, fmt, dtype)).implementation
    assert found == ("tpu" if taken else "xla")


def test_on_a_tpu_the_kernel_is_for_packed_and_grouped_weights_and_on_a_gpu_if_preferred():
    def chosen(groups=1, packed=True, rows=4096, dtype=jnp.int8):
        fmt = Format(bits=4, block=256, packed=True) if packed else Format(bits=8)
        return choose("auto", Problem(rows, 1024, 256, groups, fmt, dtype)).implementation

    with target("tpu", "TPU v5 lite"):
        assert chosen() == "tpu"
        assert chosen(groups=8, packed=False) == "tpu"
        assert chosen(packed=False) == "xla"
        assert chosen(groups=64) == "xla"  # groups of 16
    assert chosen() == "xla"
    with target("gpu", "NVIDIA H200"):
        assert chosen() == "xla"
        with prefer("hopper"):
            assert chosen() == ("hopper" if ON_GPU else "xla")
            floats = functools.partial(chosen, dtype=jnp.bfloat16)
            assert floats(rows=16) == ("hopper" if ON_GPU else "xla")
            assert floats(rows=65) == floats(rows=16, packed=False) == "xla"
    with target("gpu", "Tesla T4"), prefer("hopper"):
        assert chosen() == "xla"
