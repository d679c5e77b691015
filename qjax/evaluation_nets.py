"""The networks that look at pictures for an evaluation, and what they say of each.

A network is named after its weights. FID is called so only with the published file, known by its
SHA-256; another file of the same shape may be as good, but nobody can tell, and the name says so.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qjax.core.places import local_path
from qjax.core.serialize import params_digest
from qjax.core.typing import Params, UInt8
from qjax.evaluation_data import NetUsed
from qjax.models import inception, lpips
from qjax.models.clip_score import CLIPScorer, load_clip
from qjax.models.weight_files import WeightFile, read_weights
from qjax.zoo import judge

__all__ = [
    "Nets",
    "clip_folder",
    "inception_probe",
    "load_nets",
    "lpips_params",
    "weight_file",
    "zoo_probe",
]

INCEPTION = "Inception 2015-12-05"
UNVERIFIED = "Inception, unverified weights"
ZOO = "fashion-features"
HUB_FILE = re.compile(r"([\w-][\w.-]*/[\w.-]+):([\w./-]+)")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")

# uint8 pictures -> arrays by name, a row a picture.
Probe = Callable[[UInt8[np.ndarray, "b h w c"]], Mapping[str, np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class Nets:
    """What was given to look at pictures with.

    Attributes:
      inception: Params of the Inception network; None if not given.
      lpips: Params of LPIPS by backbone.
      clip: The CLIP model; None if not given.
      used: All of them, for the record.
    """

    inception: Params | None = None
    lpips: Mapping[str, Params]
    clip: CLIPScorer | None = None
    used: tuple[NetUsed, ...] = ()

    def named(self, start: str) -> NetUsed | None:
        """The network whose name begins so."""
        return next((net for net in self.used if net.name.startswith(start)), None)


def weight_file(place: Path | str) -> Path:
    """A file of weights: a path, or `owner/name:FILE` on the hub, which is downloaded.

    Raises:
      FileNotFoundError: If there is none.
    """
    path = local_path(place)
    named = HUB_FILE.fullmatch(str(place))
    if path.is_file() or named is None:
        return path
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(named[1], named[2]))
    except (OSError, ValueError) as error:
        raise _not_given(str(place), "file", error) from error


def clip_folder(place: Path | str) -> Path:
    """The folder of a CLIP model: a path, or `owner/name` on the hub, which is downloaded.

    Raises:
      FileNotFoundError: If there is none.
    """
    path = local_path(place)
    if path.is_dir() or not HUB_ID.fullmatch(str(place)):
        return path
    import huggingface_hub

    try:
        for weights in ("*.safetensors", "pytorch_model.bin"):
            folder = Path(
                huggingface_hub.snapshot_download(
                    str(place), allow_patterns=["*.json", "merges.txt", weights]
                )
            )
            if list(folder.glob(weights)):
                break
        return folder
    except (OSError, ValueError) as error:
        raise _not_given(str(place), "folder", error) from error


def _not_given(place: str, kind: str, error: Exception) -> FileNotFoundError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return FileNotFoundError(
        f"{place!r} is no local {kind}, and the Hugging Face hub did not give it: {reason}. See "
        "that the id is right and the hub can be reached."
    )


def load_nets(
    *,
    inception_file: Path | str | None,
    lpips_files: Sequence[Path | str],
    clip: Path | str | None,
) -> Nets:
    """The networks whose weights were given.

    Raises:
      FileNotFoundError: If something named is not there.
      ValueError: If weights do not fit their network; all keys are named.
    """
    used: list[NetUsed] = []
    inception_params = scorer = None
    if inception_file is not None:
        found = read_weights(weight_file(inception_file))
        inception_params = inception.convert_inception(found.tensors)
        known = found.sha256 == inception.SHA256
        used.append(
            NetUsed(
                name=INCEPTION if known else UNVERIFIED,
                files=(str(inception_file),),
                sha256=(found.sha256,),
                verified=known,
            )
        )
    distances, nets = lpips_params(lpips_files)
    used += nets
    if clip is not None:
        scorer = load_clip(clip_folder(clip))
        used.append(NetUsed(name=f"CLIP {clip}", files=(str(clip),), sha256=(scorer.sha256,)))
    return Nets(inception=inception_params, lpips=distances, clip=scorer, used=tuple(used))


def lpips_params(
    places: Sequence[Path | str],
) -> tuple[dict[str, dict[str, Any]], list[NetUsed]]:
    """The params of LPIPS, by backbone, of files in any order.

    A file holds a backbone, the linear heads, or both; shapes tell of which network.

    Raises:
      FileNotFoundError: If something named is not there.
      ValueError: If a file is neither, two are the same thing, or half of a network is missing.
    """
    halves: dict[tuple[str, str], tuple[str, WeightFile]] = {}
    for place in places:
        found = read_weights(weight_file(place))
        mine = [half for half, is_it in _HALVES.items() if is_it(found.tensors)]
        if not mine:
            raise ValueError(
                f"{place} must hold the weights of torchvision's AlexNet or VGG16, or the linear "
                "heads of LPIPS (lin0.model.1.weight, ...) for one of them."
            )
        if twice := [half for half in mine if half in halves]:
            raise ValueError(
                f"{place} and {halves[twice[0]][0]} are both the {twice[0][1]} of {twice[0][0]}."
            )
        halves |= {half: (str(place), found) for half in mine}
    params, used = {}, []
    for net in lpips.NETS:
        have = {part: halves[net, part] for part in ("backbone", "heads") if (net, part) in halves}
        if len(have) == 1:
            (other,) = {"backbone", "heads"} - have.keys()
            raise ValueError(
                f"LPIPS with {net!r} needs a file of its {other}, too; got {', '.join(have)} alone."
            )
        if have:
            files = dict(have.values())
            tensors = {key: w for found in files.values() for key, w in found.tensors.items()}
            params[net] = lpips.convert_lpips(net, tensors)
            digests = tuple(found.sha256 for found in files.values())
            used.append(NetUsed(name=f"LPIPS {net}", files=tuple(files), sha256=digests))
    return params, used


def _shaped(key: str, shape: tuple[int, ...]) -> Callable[[Mapping[str, np.ndarray]], bool]:
    return lambda tensors: key in tensors and tensors[key].shape == shape


_HALVES = {
    ("alex", "backbone"): _shaped("features.0.weight", (64, 3, 11, 11)),
    ("alex", "heads"): _shaped("lin1.model.1.weight", (1, 192, 1, 1)),
    ("vgg", "backbone"): _shaped("features.0.weight", (64, 3, 3, 3)),
    ("vgg", "heads"): _shaped("lin1.model.1.weight", (1, 128, 1, 1)),
}


def inception_probe(params: Params, *, spatial: bool, logits: bool) -> Probe:
    """What the Inception network says: `pool`, and `spatial` and `logits` where wanted."""

    def probe(images: UInt8[np.ndarray, "b h w c"]) -> dict[str, np.ndarray]:
        found = inception.inception_features(params, images)
        wanted = {"pool": True, "spatial": spatial, "logits": logits}
        return {key: np.asarray(getattr(found, key)) for key, want in wanted.items() if want}

    return probe


def zoo_probe(images: UInt8[np.ndarray, "b 32 32 1"]) -> dict[str, np.ndarray]:
    """What the zoo's classifier says: its penultimate features, as `zoo`."""
    features = judge.judge(images.astype(np.float32) / 255).features
    return {"zoo": features.astype(np.float32)}


def zoo_net() -> NetUsed:
    """The zoo's classifier, for the record."""
    from qjax.core.safetensors_io import open_tensors

    tensors = {
        name: tensor.read()
        for name, tensor in open_tensors(judge.FOLDER / "features.safetensors").items()
    }
    flat = {name.replace("/", "."): array for name, array in tensors.items()}
    return NetUsed(name=ZOO, files=(), sha256=(params_digest(flat),), verified=True)
