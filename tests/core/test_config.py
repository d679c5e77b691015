"""Settings: what is not allowed says so, and what is survives a dict and a YAML file."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.core.config import BITS, ActSpec, QuantConfig, Rule, WeightSpec

sizes = st.integers(1, 512)
group_sizes = st.one_of(sizes, st.lists(st.none() | sizes, min_size=1, max_size=3).map(tuple))


def specs(cls, granularities, **others):
    """Every allowed setting of a spec: a group size where there are groups, and only there."""

    def with_granularity(granularity):
        group_size = group_sizes if granularity == "per_group" else st.none()
        return st.builds(
            cls,
            bits=st.sampled_from(BITS),
            symmetric=st.booleans(),
            granularity=st.just(granularity),
            group_size=group_size,
            **others,
        )

    return st.sampled_from(granularities).flatmap(with_granularity)


weights = specs(
    WeightSpec,
    ("per_tensor", "per_channel", "per_group"),
    method=st.sampled_from(("minmax", "mse")),
)
acts = specs(
    ActSpec,
    ("per_tensor", "per_token", "per_group"),
    mode=st.sampled_from(("dynamic", "static", "per_step")),
)
pairs = st.one_of(st.just((None, None)), st.tuples(weights, st.none()), st.tuples(weights, acts))
rules = st.builds(
    lambda pair, **rest: Rule(weight=pair[0], act=pair[1], **rest),
    pairs,
    pattern=st.sampled_from((".*", "blocks_[0-3]/attn/.*", "conv_in/kernel", r"\w+: 'x' # no")),
    kind=st.sampled_from((None, "dense", "conv")),
    reason=st.text(max_size=20),
)
configs = st.builds(
    lambda pair, **rest: QuantConfig(weight=pair[0], act=pair[1], **rest),
    pairs,
    rules=st.lists(rules, max_size=3),
    scale_dtype=st.sampled_from(("bfloat16", "float16", "float32")),
    float_dtype=st.sampled_from((None, "bfloat16", "float16")),
    allow_unmatched=st.booleans(),
)


@given(configs)
def test_a_config_survives_a_dict(config):
    assert QuantConfig.from_dict(config.to_dict()) == config


@given(configs)
@settings(max_examples=50)
def test_a_config_survives_a_yaml_file(tmp_path_factory, config):
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    config.to_yaml(path)
    assert QuantConfig.from_yaml(path) == config


@given(configs)
def test_equal_configs_hash_alike(config):
    assert hash(dataclasses.replace(config)) == hash(config)


def test_defaults_are_left_out_of_the_dict():
    config = QuantConfig(weight=WeightSpec(bits=4), act=ActSpec())
    assert config.to_dict() == {"weight": {"bits": 4}, "act": {}}


def test_a_file_written_by_hand_is_read(tmp_path):
    path = tmp_path / "w4a8.yaml"
    path.write_text(
        "weight: {bits: 4, granularity: per_group, group_size: [128, 64, null]}\n"
        "act: {bits: 8}\n"
        "rules:\n"
        "- {pattern: conv_out/.*, reason: the last layer}\n"
    )
    group_size = (128, 64, None)
    weight = WeightSpec(bits=4, granularity="per_group", group_size=group_size)
    rule = Rule(pattern="conv_out/.*", reason="the last layer")
    wanted = QuantConfig(rules=(rule,), weight=weight, act=ActSpec(bits=8))
    assert QuantConfig.from_yaml(path) == wanted


@pytest.mark.parametrize("spec", (WeightSpec, ActSpec))
@pytest.mark.parametrize("bits", (0, 1, 7, 9, 16, 8.0, "8", True, None))
def test_a_width_that_is_not_stored_raises(spec, bits):
    with pytest.raises(ValueError, match=r"bits must be one of 2, 3, 4, 5, 6, 8; got"):
        spec(bits=bits)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: WeightSpec(bits=4, granularity="per_token"), "granularity must be one of"),
        (lambda: WeightSpec(bits=4, method="adaround"), "method must be one of minmax, mse"),
        (lambda: ActSpec(granularity="per_channel"), "granularity must be one of"),
        (lambda: ActSpec(mode="online"), "mode must be one of dynamic, static, per_step"),
        (lambda: Rule(pattern="x", kind="embed"), "kind must be one of"),
        (lambda: QuantConfig(scale_dtype="float64"), "scale_dtype must be one of"),
        (lambda: WeightSpec(bits=4, symmetric="false"), "symmetric must be one of True, False"),
        (lambda: ActSpec(symmetric=0), "symmetric must be one of True, False"),
        (lambda: QuantConfig(allow_unmatched="no"), "allow_unmatched must be one of"),
    ],
)
def test_an_unknown_choice_names_the_known_ones(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("group_size", (None, 0, -1, 2.0, True, (), (64, 0), ("64",)))
def test_groups_need_positive_sizes(group_size):
    with pytest.raises(ValueError, match="needs a positive group_size"):
        WeightSpec(bits=4, granularity="per_group", group_size=group_size)


@pytest.mark.parametrize("granularity", ("per_tensor", "per_channel"))
def test_a_group_size_without_groups_raises(granularity):
    with pytest.raises(ValueError, match="group_size goes with granularity='per_group'"):
        WeightSpec(bits=4, granularity=granularity, group_size=64)


def test_a_list_of_group_sizes_is_a_tuple():
    spec = WeightSpec(bits=4, granularity="per_group", group_size=[128, None])
    assert spec.group_size == (128, None)
    assert isinstance(hash(spec), int)


def test_a_broken_pattern_raises():
    with pytest.raises(ValueError, match=r"pattern must be a regular expression; got 'a\(b'"):
        Rule(pattern="a(b")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: QuantConfig(weight=8), "weight must be of type WeightSpec, or None; got 8"),
        (lambda: QuantConfig(weight=WeightSpec(bits=8), act=8), "act must be of type ActSpec"),
        (lambda: Rule(pattern=".*", weight={"bits": 8}), "weight must be of type WeightSpec"),
        (lambda: QuantConfig(rules=(".*",)), "a rule must be of type Rule"),
        (lambda: Rule(pattern=3), "pattern must be text"),
    ],
)
def test_specs_of_another_type_are_refused_where_they_are_given(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_quantized_inputs_need_quantized_weights():
    with pytest.raises(ValueError, match="has act but no weight"):
        Rule(pattern=".*", act=ActSpec())
    with pytest.raises(ValueError, match="a default act but no default weight"):
        QuantConfig(act=ActSpec())


@pytest.mark.parametrize(
    "data, message",
    [
        ({"weights": {"bits": 4}}, "QuantConfig has no field weights; it has act, allow_unma"),
        ({"weight": {"bit": 4}}, "WeightSpec has no field bit"),
        ({"weight": {"symmetric": True}}, "WeightSpec needs the field bits"),
        ({"weight": 4}, "WeightSpec needs a mapping of fields; got 4"),
        ({"weight": {"bits": 7}}, "weight bits must be one of"),
        ({"rules": [{"reason": "x"}]}, "Rule needs the field pattern"),
        ({"rules": {"pattern": ".*"}}, "rules must be a list of mappings"),
        ({"rules": None}, "rules must be a list of mappings; got None"),
    ],
)
def test_a_wrong_dict_names_the_field(data, message):
    with pytest.raises(ValueError, match=message):
        QuantConfig.from_dict(data)


@pytest.mark.parametrize("text", ("", "- 1\n", "w4a8\n"))
def test_a_file_without_a_mapping_raises(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="must hold a mapping"):
        QuantConfig.from_yaml(path)
