"""Where the tensors of published DiT checkpoints go: diffusers' layout and the authors'.

diffusers stores the timestep and class embedder once in every block (`norm1.emb`); all copies
share a path here and must be equal. It stores query, key and value apart, the authors fused;
the port has them fused, query first.
"""

from collections.abc import Mapping

from qjax.models.convert import Target, conv, linear, same
from qjax.models.dit import DiTConfig

EMBEDDING_WIDTH = 256  # of the sinusoid that goes into the timestep MLP


def _linear(name: str, path: str, i: int, o: int, part=(0, 1)) -> dict[str, Target]:
    keys = tuple(path.split("/"))
    return {
        f"{name}.weight": Target((*keys, "kernel"), (o, i), linear, part),
        f"{name}.bias": Target((*keys, "bias"), (o,), same, part),
    }


def _embedder(time: str, label: str, config: DiTConfig, names: tuple[str, str]):
    d, (first, second) = config.width, names
    table = Target(("conditioning", "label", "embedding"), (config.num_classes + 1, d))
    return (
        _linear(f"{time}.{first}", "conditioning/time_in", EMBEDDING_WIDTH, d)
        | _linear(f"{time}.{second}", "conditioning/time_out", d, d)
        | {f"{label}.embedding_table.weight": table}
    )


def _patch_embed(name: str, config: DiTConfig) -> dict[str, Target]:
    shape = (config.width, config.in_channels, config.patch_size, config.patch_size)
    return {
        f"{name}.weight": Target(("patch_embed", "kernel"), shape, conv),
        f"{name}.bias": Target(("patch_embed", "bias"), (config.width,)),
    }


def diffusers_keys(config: DiTConfig) -> dict[str, Target]:
    """The key table of `DiTTransformer2DModel`."""
    d, out = config.width, config.patch_size**2 * config.out_channels
    targets = _patch_embed("pos_embed.proj", config)
    for i in range(config.num_layers):
        name, path = f"transformer_blocks.{i}", f"blocks_{i}"
        embedder = f"{name}.norm1.emb"
        targets |= _embedder(
            f"{embedder}.timestep_embedder",
            f"{embedder}.class_embedder",
            config,
            ("linear_1", "linear_2"),
        )
        targets |= _linear(f"{name}.norm1.linear", f"{path}/modulation", d, 6 * d)
        for part, letter in enumerate("qkv"):
            targets |= _linear(f"{name}.attn1.to_{letter}", f"{path}/attn/qkv", d, d, (part, 3))
        targets |= _linear(f"{name}.attn1.to_out.0", f"{path}/attn/proj", d, d)
        targets |= _linear(f"{name}.ff.net.0.proj", f"{path}/mlp/fc1", d, 4 * d)
        targets |= _linear(f"{name}.ff.net.2", f"{path}/mlp/fc2", 4 * d, d)
    targets |= _linear("proj_out_1", "final_modulation", d, 2 * d)
    return targets | _linear("proj_out_2", "final_linear", d, out)


def original_keys(config: DiTConfig) -> dict[str, Target]:
    """The key table of the authors' release; its `pos_embed` is a constant and not read."""
    d, out = config.width, config.patch_size**2 * config.out_channels
    targets = _patch_embed("x_embedder.proj", config)
    targets |= _embedder("t_embedder", "y_embedder", config, ("mlp.0", "mlp.2"))
    for i in range(config.num_layers):
        name, path = f"blocks.{i}", f"blocks_{i}"
        targets |= _linear(f"{name}.adaLN_modulation.1", f"{path}/modulation", d, 6 * d)
        targets |= _linear(f"{name}.attn.qkv", f"{path}/attn/qkv", d, 3 * d)
        targets |= _linear(f"{name}.attn.proj", f"{path}/attn/proj", d, d)
        targets |= _linear(f"{name}.mlp.fc1", f"{path}/mlp/fc1", d, 4 * d)
        targets |= _linear(f"{name}.mlp.fc2", f"{path}/mlp/fc2", 4 * d, d)
    targets |= _linear("final_layer.adaLN_modulation.1", "final_modulation", d, 2 * d)
    return targets | _linear("final_layer.linear", "final_linear", d, out)


# Buffers of the authors' layout that are recomputed.
ORIGINAL_CONSTANTS = ("pos_embed",)


def is_original(keys: Mapping[str, object]) -> bool:
    """Whether a checkpoint is in the authors' layout rather than in diffusers'."""
    return "x_embedder.proj.weight" in keys


def original_config(shapes: Mapping[str, tuple[int, ...]], *, num_heads: int = 16) -> DiTConfig:
    """The sizes of a checkpoint in the authors' layout, which comes without a config.

    Args:
      shapes: Shape of every tensor by key.
      num_heads: Attention heads, which no shape shows; 16 in DiT-XL and DiT-L, 12 in DiT-B, 6
        in DiT-S.

    Raises:
      ValueError: If a tensor that is needed is missing, or the width is no multiple of
        `num_heads`.
    """
    needed = (
        "x_embedder.proj.weight",
        "pos_embed",
        "y_embedder.embedding_table.weight",
        "final_layer.linear.weight",
    )
    if missing := [key for key in needed if key not in shapes]:
        raise ValueError(
            f"A DiT checkpoint in the authors' layout needs {', '.join(missing)} to tell its "
            "sizes; see that the file is whole and holds the model's state dict."
        )
    width, in_channels, patch, _ = shapes[needed[0]]
    if width % num_heads:
        raise ValueError(f"num_heads must divide the width; got {num_heads=}, {width=}.")
    blocks = {key.split(".")[1] for key in shapes if key.startswith("blocks.")}
    return DiTConfig(
        sample_size=patch * round(shapes["pos_embed"][1] ** 0.5),
        patch_size=patch,
        in_channels=in_channels,
        out_channels=shapes[needed[3]][0] // patch**2,
        num_layers=len(blocks),
        num_heads=num_heads,
        head_dim=width // num_heads,
        num_classes=shapes[needed[2]][0] - 1,
        norm_eps=1e-6,
        freq_shift=0,
    )
