"""Which metrics of an evaluation can be computed, what the others lack, what all are called."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qjax.core.metrics import SSIM_WINDOW
from qjax.evaluation_data import LeftOut
from qjax.models.lpips import NETS

__all__ = ["METRICS", "Choice", "Given", "choose"]

METRICS = (
    "psnr",
    "ssim",
    "lpips-alex",
    "lpips-vgg",
    "fid",
    "sfid",
    "is",
    "pr",
    "kid",
    "fd",
    "clip",
)
"""In the order of the table."""

NEEDS_INCEPTION = (
    "needs the weights of Inception: --inception FILE, pt_inception-2015-12-05-6726825d.pth that "
    "pytorch-fid publishes, or the same as safetensors"
)
NEEDS_PAIRS = "needs a model to hold the pictures against, one by one, as a rule the float one: --reference MODEL"
NEEDS_SET = "needs pictures to hold the model's against: --reference MODEL_B or --images FOLDER"
NEEDS_ROWS = f"{NEEDS_SET}; statistics alone do not do"
K = 3


@dataclass(frozen=True, kw_only=True)
class Given:
    """What an evaluation has to work with.

    Attributes:
      image_shape: Height, width and channels of the pictures.
      num_images: How many.
      zoo: Whether the classifier of the shipped models can look at them.
      reference: Whether there is a reference model.
      folder: How many pictures there are in a folder; 0 without one.
      statistics: Of what there are statistics of pictures.
      prompts: Whether the pictures have texts.
      inception: Name of the Inception network; None without.
      lpips: Backbones of LPIPS.
      clip: Name of the CLIP model; None without.
    """

    image_shape: tuple[int, int, int]
    num_images: int
    zoo: bool
    reference: bool
    folder: int
    statistics: tuple[str, ...] = ()
    prompts: bool = False
    inception: str | None = None
    lpips: tuple[str, ...] = ()
    clip: str | None = None


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is computed.

    Attributes:
      metrics: In the order of `METRICS`.
      left_out: The others, and why.
      titles: What scores call the metrics.
      nets: Names of their networks, of those that have one.
      keys: Features that they read, of those that read features.
    """

    metrics: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    titles: Mapping[str, str] = field(default_factory=dict)
    nets: Mapping[str, str] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)


def choose(asked: Sequence[str] | None, given: Given, *, verified: bool, zoo_net: str) -> Choice:
    """The metrics to compute.

    Args:
      asked: What somebody wants; None for all that can be had.
      given: What there is.
      verified: Whether the Inception weights are the published ones for certain.
      zoo_net: Name of the classifier of the shipped models.

    Raises:
      ValueError: If one that was asked for is unknown or cannot be had; all of them are named.
        If nothing can be had.
    """
    if unknown := [name for name in asked or () if name not in METRICS]:
        raise ValueError(f"metrics are {', '.join(METRICS)}; got {', '.join(unknown)}.")
    lacks = {name: _lacks(name, given) for name in METRICS}
    wrong = [f"{name} {lacks[name]}" for name in asked or () if lacks[name]]
    if wrong:
        raise ValueError(f"{'; '.join(wrong)}.")
    wanted = tuple(name for name in METRICS if not lacks[name] and name in (asked or METRICS))
    if not wanted:
        raise ValueError(
            "nothing can be computed of these: "
            + "; ".join(f"{name} {reason}" for name, reason in lacks.items())
            + "."
        )
    left_out = tuple(
        LeftOut(metric=name, reason=reason)
        for name, reason in lacks.items()
        if asked is None and reason
    )
    look = {name: _net(name, given, zoo_net) for name in wanted}
    mark = "" if verified or given.inception is None else " (unverified weights)"
    titles = {"fid": f"FID{mark}", "sfid": f"sFID{mark}", "is": f"IS{mark}", "fd": "FD"}
    titles |= {"kid": "KID", "pr": "precision and recall"}
    return Choice(
        metrics=wanted,
        left_out=left_out,
        titles=titles,
        nets={name: net for name, net in look.items() if net is not None},
        keys={name: key for name in wanted if (key := _key(name, given)) is not None},
    )


def _lacks(metric: str, given: Given) -> str | None:
    """What stands in the way of a metric; None if nothing does."""
    if metric in ("psnr", "ssim", "lpips-alex", "lpips-vgg"):
        return NEEDS_PAIRS if not given.reference else _too_small(metric, given)
    if metric == "clip":
        if given.clip is None:
            return "needs a CLIP model: --clip FOLDER or a hub id"
        return None if given.prompts else "needs prompts, and this model is told classes or nothing"
    if given.num_images < 2:
        return "needs two pictures at least"
    if metric == "fd":
        return (
            None if given.zoo else "is for the models that ship with qjax, whose classifier looks"
        )
    if metric in ("fid", "sfid"):
        return _lacks_frechet(metric, given)
    if metric == "is":
        return NEEDS_INCEPTION if given.inception is None else None
    if given.inception is None and not given.zoo:
        return NEEDS_INCEPTION
    if not (given.reference or given.folder):
        return NEEDS_ROWS
    sets = [given.num_images, *([given.folder] if given.folder else [])]
    if metric == "pr" and min(sets) <= K:
        return f"needs more than {K} pictures of each set; there are {' and '.join(map(str, sets))}"
    return None


def _lacks_frechet(metric: str, given: Given) -> str | None:
    if given.inception is None:
        return NEEDS_INCEPTION
    key = "pool" if metric == "fid" else "spatial"
    if given.reference or given.folder or key in given.statistics:
        return None
    return NEEDS_SET if not given.statistics else f"{NEEDS_SET}; the .npz has no mu_s and sigma_s"


def _too_small(metric: str, given: Given) -> str | None:
    height, width, channels = given.image_shape
    net = metric.removeprefix("lpips-")
    smallest = {"psnr": 1, "ssim": SSIM_WINDOW}.get(metric) or NETS[net].smallest
    if min(height, width) < smallest:
        return f"needs pictures of at least {smallest} pixels a side"
    if net != metric and channels not in (1, 3):
        return "needs pictures of one channel or three"
    if net != metric and net not in given.lpips:
        return (
            f"needs two files of weights: --lpips BACKBONE --lpips HEADS, torchvision's "
            f"{'AlexNet' if net == 'alex' else 'VGG16'} and the linear heads of LPIPS 0.1 for it"
        )
    return None


def _net(metric: str, given: Given, zoo_net: str) -> str | None:
    if metric.startswith("lpips-"):
        return f"LPIPS {metric.removeprefix('lpips-')}"
    if metric == "clip":
        return given.clip
    return {None: None, "zoo": zoo_net}.get(_key(metric, given), given.inception)


def _key(metric: str, given: Given) -> str | None:
    if metric in ("pr", "kid"):
        return "zoo" if given.inception is None else "pool"
    return {"fid": "pool", "sfid": "spatial", "is": "logits", "fd": "zoo"}.get(metric)
