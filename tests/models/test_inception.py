"""The Inception network of FID against PyTorch, block by block as its port to it is published."""

import numpy as np
import pytest

from qjax.models import inception
from qjax.models.inception import (
    POOL_FEATURES,
    SPATIAL_FEATURES,
    checkpoint_keys,
    convert_inception,
    inception_features,
    resize_as_tensorflow_1,
)

torch = pytest.importorskip("torch")
F = torch.nn.functional


class Reference:
    """The port's forward pass in PyTorch's functions, its keys written out."""

    def __init__(self, state):
        self.state = state
        self.used = set()

    def get(self, key):
        self.used.add(key)
        return self.state[key]

    def unit(self, name, x, stride=1, padding=0):
        x = F.conv2d(x, self.get(f"{name}.conv.weight"), stride=stride, padding=padding)
        keys = ("running_mean", "running_var", "weight", "bias")
        mean, var, weight, bias = (self.get(f"{name}.bn.{key}") for key in keys)
        return F.relu(F.batch_norm(x, mean, var, weight, bias, training=False, eps=0.001))

    def pooled(self, x):
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)

    def a(self, b, x):
        one = self.unit(f"{b}.branch1x1", x)
        five = self.unit(f"{b}.branch5x5_1", x)
        five = self.unit(f"{b}.branch5x5_2", five, padding=2)
        three = self.unit(f"{b}.branch3x3dbl_1", x)
        three = self.unit(f"{b}.branch3x3dbl_2", three, padding=1)
        three = self.unit(f"{b}.branch3x3dbl_3", three, padding=1)
        return torch.cat([one, five, three, self.unit(f"{b}.branch_pool", self.pooled(x))], 1)

    def b(self, b, x):
        three = self.unit(f"{b}.branch3x3dbl_1", x)
        three = self.unit(f"{b}.branch3x3dbl_2", three, padding=1)
        three = self.unit(f"{b}.branch3x3dbl_3", three, stride=2)
        return torch.cat(
            [self.unit(f"{b}.branch3x3", x, stride=2), three, F.max_pool2d(x, 3, stride=2)], 1
        )

    def c(self, b, x):
        one = self.unit(f"{b}.branch1x1", x)
        seven = self.unit(f"{b}.branch7x7_1", x)
        seven = self.unit(f"{b}.branch7x7_2", seven, padding=(0, 3))
        seven = self.unit(f"{b}.branch7x7_3", seven, padding=(3, 0))
        double = self.unit(f"{b}.branch7x7dbl_1", x)
        for i, padding in enumerate([(3, 0), (0, 3), (3, 0), (0, 3)], 2):
            double = self.unit(f"{b}.branch7x7dbl_{i}", double, padding=padding)
        return torch.cat([one, seven, double, self.unit(f"{b}.branch_pool", self.pooled(x))], 1)

    def d(self, b, x):
        three = self.unit(f"{b}.branch3x3_1", x)
        three = self.unit(f"{b}.branch3x3_2", three, stride=2)
        seven = self.unit(f"{b}.branch7x7x3_1", x)
        seven = self.unit(f"{b}.branch7x7x3_2", seven, padding=(0, 3))
        seven = self.unit(f"{b}.branch7x7x3_3", seven, padding=(3, 0))
        seven = self.unit(f"{b}.branch7x7x3_4", seven, stride=2)
        return torch.cat([three, seven, F.max_pool2d(x, 3, stride=2)], 1)

    def e(self, b, x, pooled):
        one = self.unit(f"{b}.branch1x1", x)
        three = self.unit(f"{b}.branch3x3_1", x)
        row, column = (0, 1), (1, 0)
        threes = [
            self.unit(f"{b}.branch3x3_2a", three, padding=row),
            self.unit(f"{b}.branch3x3_2b", three, padding=column),
        ]
        double = self.unit(f"{b}.branch3x3dbl_1", x)
        double = self.unit(f"{b}.branch3x3dbl_2", double, padding=1)
        doubles = [
            self.unit(f"{b}.branch3x3dbl_3a", double, padding=row),
            self.unit(f"{b}.branch3x3dbl_3b", double, padding=column),
        ]
        return torch.cat([one, *threes, *doubles, self.unit(f"{b}.branch_pool", pooled)], 1)

    def __call__(self, x):
        x = self.unit("Conv2d_1a_3x3", x, stride=2)
        x = self.unit("Conv2d_2a_3x3", x)
        x = F.max_pool2d(self.unit("Conv2d_2b_3x3", x, padding=1), 3, stride=2)
        x = self.unit("Conv2d_3b_1x1", x)
        x = F.max_pool2d(self.unit("Conv2d_4a_3x3", x), 3, stride=2)
        for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = self.a(name, x)
        x = self.b("Mixed_6a", x)
        for name in ("Mixed_6b", "Mixed_6c"):
            x = self.c(name, x)
        # What ADM's evaluator reads: the first channels of the first branch of this block.
        spatial = self.unit("Mixed_6d.branch1x1", x)[:, :7]
        x = self.d("Mixed_7a", self.c("Mixed_6e", self.c("Mixed_6d", x)))
        x = self.e("Mixed_7b", x, self.pooled(x))
        x = self.e("Mixed_7c", x, F.max_pool2d(x, 3, stride=1, padding=1))
        pool = x.mean((2, 3))
        return pool, spatial, pool @ self.get("fc.weight").T


@pytest.fixture(scope="module")
def state():
    """Random weights that keep activations near 1, under the published keys."""
    rng = np.random.default_rng(0)
    found = {}
    for key, target in checkpoint_keys().items():
        draw = rng.standard_normal(target.shape, np.float32)
        if len(target.shape) > 1:
            draw *= np.sqrt(2 / np.prod(target.shape[1:]))
        elif key.endswith(("running_var", "bn.weight")):
            draw = 1 + 0.2 * np.tanh(draw)
        else:
            draw *= 0.1
        found[key] = draw
    return found


def test_features_and_logits_are_those_of_pytorch_and_every_key_is_used(state):
    counters = {
        key.replace("running_mean", "num_batches_tracked"): np.int64(0)
        for key in state
        if key.endswith("running_mean")
    }
    params = convert_inception(state | counters)
    reference = Reference({key: torch.from_numpy(value) for key, value in state.items()})
    images = np.random.default_rng(1).integers(0, 256, (1, 299, 299, 3), np.uint8)
    with torch.no_grad():
        pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32))
        pool, spatial, logits = (out.numpy() for out in reference((pixels - 128) / 128))
    assert reference.used == state.keys() - {"fc.bias"}
    ours = inception_features(params, images)
    assert ours.pool.shape == (1, POOL_FEATURES)
    assert ours.spatial.shape == (1, SPATIAL_FEATURES)
    np.testing.assert_allclose(ours.pool, pool, atol=1e-4 * np.abs(pool).max())
    expected = spatial.transpose(0, 2, 3, 1).reshape(1, -1)
    np.testing.assert_allclose(ours.spatial, expected, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose(ours.logits, logits, atol=1e-4 * np.abs(logits).max())


def test_the_table_has_every_key_of_the_published_state_dict():
    """94 units of a kernel and four vectors, and the last layer; without counters."""
    keys = checkpoint_keys()
    assert len(keys) == 94 * 5 + 2
    assert keys["fc.weight"].shape == (1008, 2048)
    assert keys["Conv2d_1a_3x3.conv.weight"].shape == (32, 3, 3, 3)
    assert keys["Mixed_7c.branch3x3dbl_3b.bn.running_var"].path[-1] == "var"
    # 95,541,568 bytes of floats; the published file has 95,628,359.
    assert sum(np.prod(target.shape) for target in keys.values()) == 23_885_392


def test_missing_and_strange_keys_are_named(state):
    wrong = {key: value for key, value in state.items() if key != "fc.bias"}
    wrong["AuxLogits.fc.weight"] = np.zeros((1000, 768), np.float32)
    with pytest.raises(ValueError, match=r"fc\.bias.*AuxLogits\.fc\.weight|AuxLogits.*fc\.bias"):
        convert_inception(wrong)


def resized_by_loops(x, side):
    """TensorFlow 1's rule, pixel by pixel, in float32."""
    h, w, c = x.shape
    out = np.zeros((side, side, c))
    for i in range(side):
        for j in range(side):
            y, z = np.float32(i) * np.float32(h / side), np.float32(j) * np.float32(w / side)
            t, l = int(y), int(z)
            b, r = min(t + 1, h - 1), min(l + 1, w - 1)
            dy, dz = y - t, z - l
            top, bottom = x[t, l] * (1 - dz) + x[t, r] * dz, x[b, l] * (1 - dz) + x[b, r] * dz
            out[i, j] = top * (1 - dy) + bottom * dy
    return out


@pytest.mark.parametrize("shape", [(5, 7, 3), (29, 26, 1)])
def test_resizing_follows_tensorflow_1_pixel_by_pixel(shape):
    x = np.random.default_rng(0).uniform(0, 255, shape).astype(np.float32)
    ours = resize_as_tensorflow_1(x[None], 17)[0]
    np.testing.assert_allclose(ours, resized_by_loops(x, 17), atol=1e-3)


def test_pictures_of_the_right_size_are_not_resized():
    x = np.random.default_rng(0).uniform(0, 255, (1, 9, 9, 3)).astype(np.float32)
    np.testing.assert_array_equal(resize_as_tensorflow_1(x, 9), x)


def test_floats_and_strange_channels_are_refused():
    with pytest.raises(TypeError, match="must be uint8"):
        inception_features({}, np.zeros((1, 8, 8, 3), np.float32))
    with pytest.raises(ValueError, match="must be"):
        inception_features({}, np.zeros((1, 8, 8, 4), np.uint8))


def test_the_known_hash_begins_as_the_published_name_says():
    assert inception.SHA256.startswith("6726825d") and len(inception.SHA256) == 64
