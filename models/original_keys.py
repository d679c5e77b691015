"""The names that latent diffusion's authors gave to layers, from those of diffusers.

Their checkpoints (LDM, Stable Diffusion 1 and 2, XL) hold the whole model in one file:

| keys | what |
|---|---|
| `model.diffusion_model.*` | the UNet |
| `model_ema.*` | its averaged weights, the names without dots; not read |
| `first_stage_model.*` | the autoencoder |
| `cond_stage_model.*` | the class embedder or the text tower |

The UNet is a list of blocks there, three or two entries of which are a level here; a
transformer's layers have the same names. Attention without a text has its three projections in
one tensor, head by head. The autoencoder counts its decoder's levels from the largest.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

UNET, AUTOENCODER = "model.diffusion_model.", "first_stage_model."

_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
_SELF_ATTENTION = {"group_norm": "norm", "to_out.0": "proj_out"}
_PARTS = {"to_q": 0, "to_k": 1, "to_v": 2}

_BLOCK = re.compile(
    r"(?P<side>down|up)_blocks\.(?P<level>\d+)\."
    r"(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<place>\d+)\.(?P<rest>.+)"
)
_MID = re.compile(r"mid_block\.(?P<which>(?:resnets|attentions)\.\d+)\.(?P<rest>.+)")


class Original(NamedTuple):
    """Where a layer's tensors are: a name and, of three projections in one, which."""

    name: str
    part: int | None = None


def unet_layers(layers: Iterable[str], *, layers_per_block: int) -> dict[str, Original]:
    """The authors' names of the layers of a UNet, without `UNET`.

    Args:
      layers: diffusers' names, without `.weight` and `.bias`.
      layers_per_block: ResNet blocks of a down block.

    Example:
      >>> unet_layers(["up_blocks.1.resnets.0.conv1"], layers_per_block=2)
      {'up_blocks.1.resnets.0.conv1': Original(name='output_blocks.3.0.in_layers.2', part=None)}
    """
    layers = list(layers)
    attended = {
        match["side"] + match["level"]
        for layer in layers
        if (match := _BLOCK.fullmatch(layer)) and match["kind"] == "attentions"
    }
    return {layer: _unet_layer(layer, layers_per_block, attended) for layer in layers}


def _unet_layer(layer: str, layers_per_block: int, attended: set[str]) -> Original:
    if layer in _OUTSIDE:
        return Original(_OUTSIDE[layer])
    if match := _MID.fullmatch(layer):
        return _inside(f"middle_block.{_MIDDLE[match['which']]}", match["rest"])
    match = _BLOCK.fullmatch(layer)
    if match is None:
        raise ValueError(f"{layer!r} is no layer of a UNet of latent diffusion.")
    level, place = int(match["level"]), int(match["place"])
    period = layers_per_block + 1
    if match["side"] == "down":
        if match["kind"] == "downsamplers":
            return Original(f"input_blocks.{period * (level + 1)}.0.op")
        block = f"input_blocks.{1 + period * level + place}"
    else:
        if match["kind"] == "upsamplers":
            index = 2 if f"up{level}" in attended else 1
            return Original(f"output_blocks.{period * level + layers_per_block}.{index}.conv")
        block = f"output_blocks.{period * level + place}"
    return _inside(f"{block}.{0 if match['kind'] == 'resnets' else 1}", match["rest"])


def _inside(block: str, rest: str) -> Original:
    """A layer of a ResNet block, a transformer or plain self-attention."""
    if rest in _PARTS:
        return Original(f"{block}.qkv", _PARTS[rest])
    return Original(f"{block}.{(_RESNET | _SELF_ATTENTION).get(rest, rest)}")


def autoencoder_layers(layers: Iterable[str], *, levels: int) -> dict[str, str]:
    """The authors' names of the layers of an autoencoder, without `AUTOENCODER`.

    Args:
      layers: diffusers' names, without `.weight` and `.bias`.
      levels: Sizes of the encoder, the largest and the smallest included.

    Example:
      >>> autoencoder_layers(["decoder.up_blocks.0.upsamplers.0.conv"], levels=4)
      {'decoder.up_blocks.0.upsamplers.0.conv': 'decoder.up.3.upsample.conv'}
    """
    return {layer: _autoencoder_layer(layer, levels) for layer in layers}


_HALF = {
    "conv_norm_out": "norm_out",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.attentions.0": "mid.attn_1",
    "mid_block.resnets.1": "mid.block_2",
}
_FINE = {
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_STAGE = re.compile(
    r"(?P<side>down|up)_blocks\.(?P<level>\d+)\."
    r"(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<place>\d+)"
)


def _autoencoder_layer(layer: str, levels: int) -> str:
    def stage(match: re.Match[str]) -> str:
        level = int(match["level"])
        if match["side"] == "up":
            level = levels - 1 - level
        kind = {"resnets": "block", "attentions": "attn"}.get(match["kind"])
        name = f"{match['side']}.{level}."
        return name + (f"{kind}.{match['place']}" if kind else match["kind"][:-3] + "e")

    name = _STAGE.sub(stage, layer)
    for theirs, ours in (_HALF | _FINE).items():
        name = re.sub(rf"(?<=\.){re.escape(theirs)}(?=\.|$)", ours, name)
    return name
