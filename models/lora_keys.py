"""Which layer every tensor of a LoRA file belongs to, in the spellings that are in use.

| written by | a key |
|---|---|
| PEFT, diffusers | `unet.mid_block.attentions.0.proj_in.lora_A.weight` |
| diffusers before PEFT | `unet.mid_block...attn1.processor.to_q_lora.down.weight` |
| the same, text towers | `text_encoder...self_attn.to_q_lora.down.weight` |
| kohya, diffusers' names | `lora_unet_mid_block_attentions_0_proj_in.lora_down.weight` |
| kohya, the authors' names | `lora_unet_middle_block_1_proj_in.lora_down.weight` |

A spelling without dots cannot be taken apart, so it is looked up: every layer of the model is
spelled that way once.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from qjax.models.convert import Target

Tables = Mapping[str, Mapping[str, Target]]
"""Key tables of a pipeline's networks by component: `"unet"`, `"text_encoder"`, ..."""


class Place(NamedTuple):
    """What a key says: a layer (component and checkpoint name) and `down`, `up` or `alpha`."""

    component: str
    layer: str
    role: str


KOHYA_COMPONENTS = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}

_ROLE = re.compile(
    r"\.(?:lora|lora_linear_layer)[._](?P<name>A|B|down|up)(?:\.default)?(?:\.weight)?$|\.(?P<alpha>alpha)$"
)
_ROLES = {"A": "down", "down": "down", "B": "up", "up": "up"}
_OLD = re.compile(r"\.(?P<in>processor|self_attn)\.to_(?P<which>q|k|v|out)_lora(?=\.)")


def places(
    keys: Iterable[str], tables: Tables, *, renames: Mapping[str, Mapping[str, str]] | None = None
) -> tuple[dict[str, Place], list[str]]:
    """The place of every key, and the keys that have none.

    Args:
      keys: Keys of a LoRA file.
      tables: Key tables of the networks that LoRA may change.
      renames: By component, other names of layers (the authors') and what they stand for.
    """
    find = _finder(tables, renames or {})
    found, unmatched = {}, []
    for key in keys:
        modern = _OLD.sub(_modern, key)
        role = _ROLE.search(modern)
        if role is None:
            unmatched.append(key)
            continue
        place = find(modern[: role.start()])
        if place is None:
            unmatched.append(key)
        else:
            found[key] = Place(*place, "alpha" if role["alpha"] else _ROLES[role["name"]])
    return found, unmatched


def _modern(match: re.Match[str]) -> str:
    """`.processor.to_out_lora` as `.to_out.0.lora`, a text tower's as `.self_attn.out_proj.lora`."""
    which = match["which"]
    if match["in"] == "self_attn":
        return f".self_attn.{which}_proj.lora"
    return f".to_{which}{'.0' if which == 'out' else ''}.lora"


def _finder(
    tables: Tables, renames: Mapping[str, Mapping[str, str]]
) -> Callable[[str], tuple[str, str] | None]:
    """From the spelled name of a layer to its component and its name in the key table."""
    layers = {
        component: {key.removesuffix(".weight") for key in table if key.endswith(".weight")}
        for component, table in tables.items()
    }
    spelled: dict[str, tuple[str, str]] = {}
    for prefix, component in KOHYA_COMPONENTS.items():
        known = {name: name for name in layers.get(component, ())}
        known |= {"text_model." + name: name for name in known} if "_te" in prefix else {}
        known |= renames.get(component, {})
        for name, layer in known.items():
            spelled.setdefault(prefix + name.replace(".", "_"), (component, layer))

    def find(name: str) -> tuple[str, str] | None:
        if name in spelled:
            return spelled[name]
        name = name.removeprefix("base_model.model.")
        component, _, layer = name.partition(".")
        if component not in layers:
            # PEFT saves one network by itself, without its name.
            only = [part for part in layers if not part.startswith("text_encoder")]
            component, layer = only[0] if len(only) == 1 else "", name
        known = layers.get(component, set())
        plain = layer.removeprefix("text_model.")
        for candidate in (layer, f"{layer}.0", plain, "text_model." + plain):
            if candidate in known:
                return component, candidate
        return None

    return find
