"""Genomes: costs add up and fall as groups grow, draws keep to the budget, programs do not grow."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.calibrate.data import CalibrationSet
from qjax.calibrate.genome import (
    PAPER_CHOICES,
    Budget,
    Gene,
    Space,
    crossover,
    float_operations,
    generator,
    group_choices,
    mutation,
    random_genome,
)
from qjax.calibrate.genome_forward import (
    Candidates,
    GenomeNetwork,
    KernelFormat,
    chosen_kernel,
    fake_quantize_grouped,
    network_layers,
)
from qjax.calibrate.genome_space import (
    build_space,
    entries_of,
    grouped_config,
    layers_of,
    macs_of_layers,
)
from qjax.calibrate.granularity_search import with_group_sizes
from qjax.calibrate.recipe import quantize_pipeline
from qjax.calibrate.simulate import fake_quantize_dynamic
from qjax.calibrate.student import Student
from qjax.core.config import ActSpec, QuantConfig, Rule, WeightSpec
from qjax.core.layers import Dense
from qjax.core.plan import Axes
from qjax.core.quantize import plan, quantize_leaf
from qjax.core.quantizers import integer_range
from qjax.core.serialize import params_digest


def gene(path="a", macs=64, choices=(2, 4, 8), stored=(40, 30, 20), **fields) -> Gene:
    fields = {"weight_bits": 4, "act_bits": 8, "float_ops": 3} | fields
    return Gene(path=path, macs=macs, choices=choices, stored=stored, **fields)


@st.composite
def spaces(draw):
    genes = []
    for number in range(draw(st.integers(1, 6))):
        count = draw(st.integers(1, 4))
        fine = draw(st.sampled_from([2, 3, 32]))
        sizes = tuple(fine * 2**k for k in range(count))
        bits = draw(st.sampled_from([2, 3, 4, 8]))
        macs = draw(st.integers(1, 1000)) * max(sizes)
        stored = tuple(macs // 2 + 3 * macs // g for g in sizes)
        genes.append(gene(f"l{number}", macs, sizes, stored, weight_bits=bits))
    return Space(tuple(genes))


# Costs.


def test_bitops_are_those_of_the_formula():
    one = gene(macs=10 * 16 * 32, weight_bits=4, act_bits=8, float_ops=3)
    assert one.bitops == tuple(10 * 16 * 32 * (4 * 8 + 32 * 3 / g) for g in (2, 4, 8))
    assert float_operations(weight_symmetric=True, act_symmetric=True) == 3
    assert float_operations(weight_symmetric=False, act_symmetric=False) == 7
    assert float_operations(weight_symmetric=True, act_symmetric=None) == 2


@settings(max_examples=40, deadline=None)
@given(spaces(), st.integers(0, 99))
def test_cost_falls_with_every_coarser_group_by_what_the_layer_weighs(space, seed):
    genome = random_genome(space, Budget(), generator(seed))
    for layer in range(len(genome)):
        if genome[layer] == space.coarsest[layer]:
            continue
        coarser = genome.copy()
        coarser[layer] += 1
        one = space.genes[layer]
        fine, coarse = (one.choices[g[layer]] for g in (genome, coarser))
        saved = one.macs * 32 * one.float_ops * (1 / fine - 1 / coarse)
        assert space.bitops(genome) - space.bitops(coarser) == pytest.approx(saved, rel=1e-6)
        assert space.stored(genome) >= space.stored(coarser)
    assert space.bitops(space.coarsest) <= space.bitops(genome) <= space.bitops(space.finest)


@settings(max_examples=40, deadline=None)
@given(spaces(), st.integers(0, 99))
def test_cost_is_the_sum_over_layers_and_in_proportion_to_their_size(space, seed):
    genome = random_genome(space, Budget(), generator(seed))
    alone = [Space((one,)) for one in space.genes]
    each = [(s, genome[i : i + 1]) for i, s in enumerate(alone)]
    assert space.bitops(genome) == pytest.approx(sum(s.bitops(g) for s, g in each))
    assert space.stored(genome) == sum(s.stored(g) for s, g in each)
    double = Space(tuple(dataclasses.replace(one, macs=2 * one.macs) for one in space.genes))
    assert double.bitops(genome) == pytest.approx(2 * space.bitops(genome))


def test_choices_divide_the_channels():
    assert group_choices(1152, PAPER_CHOICES) == PAPER_CHOICES == group_choices(4608, PAPER_CHOICES)
    assert group_choices(128, PAPER_CHOICES) == (32, 64, 128)
    assert group_choices(96, None) == (16, 32, 48, 96)
    assert group_choices(20, PAPER_CHOICES) == ()


def test_genomes_and_group_sizes_are_the_same_thing():
    space = Space((gene("a"), gene("b", choices=(4, 8), stored=(9, 8))))
    genome = np.array([2, 0], np.int32)
    assert space.groups(genome) == {"a": 8, "b": 4}
    np.testing.assert_array_equal(space.genome({"b": 4, "a": 8}), genome)
    np.testing.assert_array_equal(space.uniform(2), [0, 0])  # b has nothing as fine
    np.testing.assert_array_equal(space.uniform(100), [2, 1])
    assert list(space.uniforms()) == [2, 4, 8]
    with pytest.raises(ValueError, match=r"got b: 2 \(of \(4, 8\)\)"):
        space.genome({"a": 8, "b": 2})


def test_genes_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="the finest first; a has"):
        gene(choices=(8, 4), stored=(1, 2))
    with pytest.raises(ValueError, match="a number for every choice"):
        gene(stored=(1,))


# Budgets and draws.


def test_an_infeasible_budget_says_what_is_feasible():
    space = Space((gene("a"), gene("b")))
    least, most = space.bitops(space.coarsest), space.bitops(space.finest)
    with pytest.raises(ValueError, match=f"of 100 BitOps.*from {least:,.10g}.*to {most:,.10g}"):
        Budget(bitops=100).check(space)
    with pytest.raises(ValueError, match="of 39 bytes.*from 40.*to 80"):
        Budget(stored=39).check(space)
    Budget(bitops=least, stored=40).check(space)


@settings(max_examples=25, deadline=None)
@given(spaces(), st.floats(0, 1), st.integers(0, 99))
def test_every_draw_keeps_to_the_budget(space, share, seed):
    least, most = space.bitops(space.coarsest), space.bitops(space.finest)
    budget = Budget(bitops=least + share * (most - least))
    a, b = (random_genome(space, budget, generator(seed, i)) for i in (0, 1))
    for genome in (
        a,
        crossover(np.stack([a, b]), space, budget, generator(seed, 2)),
        mutation(a[None], space, budget, generator(seed, 3), probability=0.5),
    ):
        assert budget.fits(space, genome) and genome.dtype == np.int32
        assert (genome >= 0).all() and (genome <= space.coarsest).all()


def test_draws_are_those_of_their_number_and_no_others():
    space = Space(tuple(gene(f"l{i}") for i in range(20)))
    draw = lambda *entropy: random_genome(space, Budget(), generator(*entropy)).tolist()
    assert draw(7, 1, 2) == draw(7, 1, 2)
    assert len({str(draw(7, i, j)) for i in range(3) for j in range(3)}) == 9


def test_crossover_takes_half_of_each_and_mutation_a_tenth_anew():
    space = Space(tuple(gene(f"l{i}") for i in range(600)))
    a, b = np.zeros(600, np.int32), np.full(600, 2, np.int32)
    child = crossover(np.stack([a, b]), space, Budget(), generator(0))
    assert set(child.tolist()) == {0, 2} and 0.4 < (child == 0).mean() < 0.6
    changed = (mutation(a[None], space, Budget(), generator(0)) != a).mean()
    assert 0.03 < changed < 0.11  # a third of the redrawn are what they were


def test_known_genomes_are_drawn_again_while_there_are_others():
    space = Space((gene("a"),))
    seen = {np.array([k], np.int32).tobytes() for k in (0, 1)}
    for i in range(5):
        assert random_genome(space, Budget(), generator(i), seen=seen).tolist() == [2]
    seen.add(np.array([2], np.int32).tobytes())
    assert random_genome(space, Budget(), generator(0), seen=seen).shape == (1,)


# The space of a pipeline.


@pytest.fixture(scope="module")
def student(dit):
    act = ActSpec(bits=8, symmetric=False)
    weight = WeightSpec(bits=4, symmetric=False)
    modulation = Rule(pattern=r"blocks_0/modulation/kernel", weight=weight)
    blocks = Rule(pattern=r"blocks_0/.*kernel", weight=weight, act=act)
    return quantize_pipeline(dit, QuantConfig(rules=(modulation, blocks)))


def space_of(dit, student, choices=(2, 4, 8, 16)):
    entries = entries_of(dit.params, student.quant)
    layers = layers_of(entries, None)
    x, t, told = jnp.zeros((1, 4, 4, 2)), jnp.zeros((1,)), jnp.zeros((1,), jnp.int32)
    macs = macs_of_layers(lambda: dit.apply({"params": dit.params}, x, t, told), layers, items=1)
    return entries, layers, build_space(layers, macs, choices=choices, scale_dtype="bfloat16")


def test_a_space_has_the_layers_the_costs_and_the_bytes_of_a_pipeline(dit, student):
    entries, _, space = space_of(dit, student)
    by_path = {one.path: one for one in space.genes}
    assert len(by_path) == 5
    qkv, modulation = by_path["blocks_0/attn/qkv"], by_path["blocks_0/modulation"]
    assert qkv.macs == 4 * 16 * 48 and modulation.macs == 16 * 96  # tokens, or none
    assert (qkv.act_bits, qkv.float_ops) == (8, 7)
    assert (modulation.act_bits, modulation.float_ops) == (16, 4)
    assert by_path["blocks_0/mlp/fc2"].choices == (2, 4, 8, 16)
    for genome in (space.coarsest, space.uniform(4)):
        config = grouped_config(student.quant, entries, space.groups(genome))
        planned = plan(dit.params, config).entries
        stored = sum(entry.bytes_after for entry in planned if entry.weight)
        assert space.stored(genome) == stored
        assert {e.group_size or e.shape[-2] for e in planned if e.weight} == set(
            space.groups(genome).values()
        )


def test_multiplications_of_a_convolution_count_its_pixels_and_taps(unet):
    x, t, told = jnp.zeros((2, 8, 8, 1)), jnp.zeros((2,)), jnp.zeros((2,), jnp.int32)
    forward = lambda: unet.apply({"params": unet.params}, x, t, told)
    macs = macs_of_layers(forward, ["conv_in", "conv_out"], items=2)
    assert macs == {"conv_in": 64 * 9 * 1 * 8, "conv_out": 64 * 9 * 8 * 1}
    with pytest.raises(ValueError, match="did not run nowhere"):
        macs_of_layers(forward, ["nowhere"], items=2)


def test_layers_that_no_choice_divides_are_named(dit, student):
    with pytest.raises(ValueError, match=r"\(5, 7\) none divides.*blocks_0/attn/proj \(16\)"):
        space_of(dit, student, choices=(5, 7))


def test_layers_without_dynamic_ranges_are_named(dit, quantize):
    entries = entries_of(dit.params, quantize(dit).quant)
    with pytest.raises(ValueError, match="dynamic ranges.*blocks_0/attn/proj"):
        layers_of(entries, None)
    with pytest.raises(ValueError, match="matches none of them"):
        layers_of(entries, "nothing")


# Group sizes as data.


@pytest.mark.parametrize(("shape", "symmetric"), [((3, 5, 48), True), ((2, 4, 4, 48), False)])
def test_inputs_at_any_choice_are_those_of_the_real_quantizer(shape, symmetric, key):
    x = jax.random.normal(key, shape) + 0.3
    choices, plain = (4, 6, 48), ActSpec(symmetric=symmetric)
    run = jax.jit(lambda x, k: fake_quantize_grouped(x, k, choices, plain))
    real = jax.jit(lambda x, act: fake_quantize_dynamic(x, act, Dense(1)), static_argnums=1)
    for k, group_size in enumerate(choices):
        act = ActSpec(granularity="per_group", group_size=group_size, symmetric=symmetric)
        np.testing.assert_allclose(run(x, jnp.int32(k)), real(x, act), atol=1e-6)


@pytest.mark.quick_cases("shape0-mse")
@pytest.mark.parametrize(("shape", "method"), [((24, 5), "mse"), ((3, 3, 24, 5), "minmax")])
def test_kernels_at_any_choice_are_those_of_the_real_quantizer(shape, method, key):
    w = jax.random.normal(key, shape) + 0.2
    spec = WeightSpec(bits=3, symmetric=False, method=method)
    fmt = KernelFormat((4, 6, 24), spec, Axes(-2, (-1,)), "bfloat16")
    run = jax.jit(lambda w, k: chosen_kernel(w, k, fmt))
    for k, group_size in enumerate(fmt.choices):
        rule = Rule(
            pattern=".*",
            weight=dataclasses.replace(spec, granularity="per_group", group_size=group_size),
        )
        q = quantize_leaf("a/kernel", w, QuantConfig(rules=(rule,)), box=False)
        np.testing.assert_allclose(run(w, jnp.int32(k)), q.dequantize(), atol=1e-6)


def test_a_range_of_a_sample_is_that_of_all_its_tokens(key):
    x = jax.random.normal(key, (2, 5, 8))
    act = ActSpec(symmetric=True)
    found = fake_quantize_grouped(x, jnp.int32(1), (2, 4), act, ranges="sample")
    _, qmax = integer_range(8, symmetric=True)
    groups = x.reshape(2, 5, 2, 4)
    scale = jnp.max(jnp.abs(groups), axis=(1, 3), keepdims=True) / qmax
    expected = (jnp.round(groups / scale) * scale).reshape(x.shape)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    # A vector without tokens has one range either way.
    token, sample = (
        fake_quantize_grouped(x[:, 0], jnp.int32(0), (2, 4), act, ranges=ranges)
        for ranges in ("token", "sample")
    )
    np.testing.assert_array_equal(token, sample)


@pytest.fixture(scope="module")
def counted(dit, student):
    """Candidates of a network that counts how often it is traced."""
    traces = []

    def apply(*args):
        traces.append(1)
        return dit.apply(*args)

    entries, layers, space = space_of(dit, student, choices=(4, 16))
    network = GenomeNetwork(apply, dit.sampler, None, network_layers(space, layers, "bfloat16"))
    base = Student.of(student, dit.params)
    candidates = Candidates.of(network, base.params, dit.params, devices=jax.devices()[:1])
    return candidates, space, entries, traces


def drawn(candidates, genome, items, rows):
    parts = candidates.draw(genome[None], items, rows, guidance_scale=jnp.float32(2.0), batch=4)
    return np.concatenate([part[0] for part in parts])


def test_many_genomes_are_one_program_and_the_pipelines_they_stand_for(dit, student, counted):
    candidates, space, entries, traces = counted
    items = CalibrationSet(items=6).draw(dit, jax.random.key(1), guidance_scale=2.0)
    rows = dit.sampler.rows(2)
    genomes = [random_genome(space, Budget(), generator(i)) for i in range(5)]
    found = [drawn(candidates, genome, items, rows) for genome in genomes]
    first = len(traces)
    drawn(candidates, space.coarsest, items, rows)
    assert len(traces) == first <= 2  # a scan may trace its body twice
    assert len({x.tobytes() for x in found}) == len({g.tobytes() for g in genomes}) > 3
    for genome, x_0 in zip(genomes[:1], found, strict=False):
        config = grouped_config(student.quant, entries, space.groups(genome))
        real = with_group_sizes(student, dit.params, config)
        assert params_digest(real.params) == params_digest(quantize_pipeline(dit, config).params)
        there = real(
            latents=items.x_T,
            labels=items.told,
            steps=2,
            guidance_scale=2.0,
            output="latent",
            batch_size=4,
        )
        np.testing.assert_allclose(x_0, there, atol=1e-5)


SEVERAL_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from flax import linen as nn
from qjax.calibrate.genome_forward import Candidates, GenomeNetwork, KernelFormat
from qjax.calibrate.rollout import Items
from qjax.core.config import ActSpec, WeightSpec
from qjax.core.layers import Dense
from qjax.core.plan import Axes
from qjax.models.samplers import DDIM
from qjax.models.sampling import image_keys

assert jax.device_count() == 2

class Net(nn.Module):
    @nn.compact
    def __call__(self, x, t, told):
        return Dense(8, name="a")(nn.silu(Dense(8, name="b")(x))) + t[:, None, None, None] * 1e-3

net = Net()
key = jax.random.key(0)
x = jax.random.normal(key, (3, 2, 2, 8))
params = net.init(key, x, jnp.zeros((3,)), None)["params"]
fmt = KernelFormat((2, 4, 8), WeightSpec(bits=4), Axes(-2, (-1,)), "bfloat16")
layers = tuple((path, fmt, ActSpec(bits=6)) for path in "ab")
network = GenomeNetwork(net.apply, DDIM(), None, layers)
items = Items(x, None, None, image_keys(key, jnp.arange(3, dtype=jnp.uint32)))
rows = DDIM().rows(2, eta=1.0)
genomes = np.array([[0, 2], [1, 1], [2, 0]], np.int32)

def draw(devices):
    found = Candidates.of(network, params, params, devices=devices)
    parts = [genomes[a : a + found.at_once] for a in range(0, 3, found.at_once)]
    run = lambda part: found.draw(part, items, rows, guidance_scale=None, batch=2)
    return np.concatenate([np.concatenate(list(run(part)), axis=1) for part in parts])

alone, together = draw(jax.devices()[:1]), draw(jax.devices())
assert alone.shape == (3, 3, 2, 2, 8) and len({a.tobytes() for a in alone}) == 3
np.testing.assert_array_equal(alone, together)
"""


@pytest.mark.slow
def test_several_devices_draw_what_one_draws_candidate_by_candidate():
    flags = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL_DEVICES],
        env=os.environ | flags,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
