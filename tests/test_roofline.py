"""What devices can do at most."""

import pytest

from qjax import roofline
from qjax.kernels.target import target


@pytest.mark.parametrize(
    ("platform", "kind", "int8"),
    [
        ("tpu", "TPU v5 lite", 394e12),
        ("tpu", "TPU v5p", 918e12),
        ("tpu", "TPU v6 lite", 1836e12),
        ("gpu", "NVIDIA H200", 1979e12),
        ("gpu", "NVIDIA H100 80GB HBM3", 1979e12),
        ("gpu", "NVIDIA L4", 242e12),
        ("gpu", "NVIDIA L40S", 733e12),
        ("gpu", "Tesla T4", 130e12),
    ],
)
def test_a_known_accelerator_has_its_published_rate(platform, kind, int8):
    with target(platform, kind):
        found = roofline.peak()
    assert found.int8_operations == pytest.approx(int8) and found.source == "published"


@pytest.mark.parametrize("kind", ["Quux 1", "NVIDIA L40", "NVIDIA T400 4GB", "NVIDIA GH200 480GB"])
def test_an_unknown_accelerator_has_none(kind):
    with target("gpu", kind):
        assert roofline.peak() is None


def test_an_a100_of_40_gb_has_less_bandwidth():
    with target("gpu", "NVIDIA A100-SXM4-40GB"):
        assert roofline.peak().bytes == pytest.approx(1.56e12)


def test_shares_are_one_at_the_device_s_limits():
    peak = roofline.Peak(10.0, 20.0, 5.0, "published")
    assert roofline.shares(peak, operations=40, moved=5, seconds=2, int8=True) == (1.0, 0.5)
    assert roofline.shares(peak, operations=20, moved=10, seconds=2, int8=False) == (1.0, 1.0)
