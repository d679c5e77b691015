"""LPIPS against PyTorch's functions on the same random weights, for both backbones."""

import numpy as np
import pytest

from qjax.models.lpips import NETS, checkpoint_keys, convert_lpips, lpips

torch = pytest.importorskip("torch")
F = torch.nn.functional


def random_state(net):
    rng = np.random.default_rng(0)
    found = {}
    for key, target in checkpoint_keys(net).items():
        draw = rng.standard_normal(target.shape, np.float32)
        if key.startswith("lin"):
            draw = np.abs(draw) / target.shape[1]  # as published: no weight is negative
        elif len(target.shape) > 1:
            draw *= np.sqrt(2 / np.prod(target.shape[1:]))
        found[key] = draw
    return found


def alexnet(state, x):
    """Activations of torchvision's `alexnet().features`, after each ReLU."""
    conv = lambda i, x, **how: F.relu(
        F.conv2d(x, state[f"features.{i}.weight"], state[f"features.{i}.bias"], **how)
    )
    one = conv(0, x, stride=4, padding=2)
    two = conv(3, F.max_pool2d(one, 3, 2), padding=2)
    three = conv(6, F.max_pool2d(two, 3, 2), padding=1)
    four = conv(8, three, padding=1)
    return [one, two, three, four, conv(10, four, padding=1)]


def vgg16(state, x):
    """Activations of torchvision's `vgg16().features`, after the last ReLU of each block."""
    places = [[0, 2], [5, 7], [10, 12, 14], [17, 19, 21], [24, 26, 28]]
    found = []
    for block in places:
        if found:
            x = F.max_pool2d(x, 2, 2)
        for i in block:
            key = f"features.{i}"
            x = F.relu(F.conv2d(x, state[f"{key}.weight"], state[f"{key}.bias"], padding=1))
        found.append(x)
    return found


def reference(state, taps, x, y):
    """The published code's arithmetic, for pictures `[b, 3, h, w]` in [-1, 1]."""
    shift = torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[None, :, None, None]
    unit = lambda f: f / (torch.sqrt(torch.sum(f**2, dim=1, keepdim=True)) + 1e-10)
    total = 0
    for i, (a, b) in enumerate(
        zip(taps(state, (x - shift) / scale), taps(state, (y - shift) / scale), strict=True)
    ):
        head = state[f"lin{i}.model.1.weight"]
        total = total + F.conv2d((unit(a) - unit(b)) ** 2, head).mean((1, 2, 3))
    return total.numpy()


@pytest.mark.parametrize(
    ("net", "taps", "shape"), [("alex", alexnet, (39, 35, 3)), ("vgg", vgg16, (17, 16, 1))]
)
def test_distances_are_those_of_pytorch_and_grey_counts_as_colour(net, taps, shape):
    state = random_state(net)
    classifier = {"classifier.1.weight": np.zeros((2, 2), np.float32)}
    params = convert_lpips(net, state | classifier)
    rng = np.random.default_rng(1)
    x = rng.random((3, *shape), np.float32)
    y = np.clip(x + np.array([0, 0.1, 0.5])[:, None, None, None] * rng.random(x.shape), 0, 1)
    y = y.astype(np.float32)
    tensors = {key: torch.from_numpy(value) for key, value in state.items()}
    colour = lambda images: np.broadcast_to(images, (*images.shape[:3], 3)).transpose(0, 3, 1, 2)
    theirs = lambda images: torch.from_numpy(colour(images) * 2 - 1)
    expected = reference(tensors, taps, theirs(x), theirs(y))
    found = np.asarray(lpips(net, params, x, y))
    assert found[0] == pytest.approx(0, abs=1e-9)
    assert 0 < found[1] < found[2]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(lpips(net, params, y, x), found, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("net", NETS)
def test_pictures_too_small_for_the_pools_are_refused(net):
    side = NETS[net].smallest - 1
    with pytest.raises(ValueError, match=f"at least {side + 1} pixels"):
        lpips(net, {}, np.zeros((1, side, 64, 3)), np.zeros((1, side, 64, 3)))


def test_pictures_of_two_shapes_are_refused():
    with pytest.raises(ValueError, match="pictures must be"):
        lpips("alex", {}, np.zeros((1, 64, 64, 3)), np.zeros((2, 64, 64, 3)))


def test_missing_heads_are_named():
    state = random_state("alex")
    del state["lin3.model.1.weight"]
    with pytest.raises(ValueError, match=r"lin3\.model\.1\.weight"):
        convert_lpips("alex", state)
