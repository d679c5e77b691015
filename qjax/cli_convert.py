"""The command that converts checkpoints."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp

from qjax.api import folder_bytes
from qjax.cli_models import OUT_FOLDER, require_free
from qjax.cli_options import Command, Option, one_of, path, whole
from qjax.cli_output import Output
from qjax.conversion import convert_checkpoint
from qjax.report_words import bytes_text

DTYPES = ("float32", "float16", "bfloat16")


def convert(settings: SimpleNamespace, output: Output) -> dict[str, Any]:
    """A checkpoint in the layout of diffusers, checked by reading it back."""
    require_free(settings.out)
    with output.progress(f"reading {settings.checkpoint}") as tell:
        account = convert_checkpoint(
            settings.checkpoint,
            settings.out,
            dtype=None if settings.dtype is None else jnp.dtype(settings.dtype),
            num_heads=settings.heads,
            on_tensor=lambda key, done, total: tell(done, total, ""),
        )
    stored = ", ".join(f"{count} in {name}" for name, count in account.dtypes.items())
    disk = folder_bytes(settings.out)
    output.say(
        f"{account.network} from {account.layout}",
        f"{account.tensors} tensors in the result, {account.parameters:,} parameters; nothing "
        "missing, nothing unexpected",
        f"stored: {stored}; {bytes_text(disk)} in {settings.out}",
        f"read back and equal, bit for bit (sha256 {account.sha256[:16]})",
    )
    if account.left_out:
        output.say(f"left out, because they are recomputed: {', '.join(account.left_out)}")
    for note in account.notes:
        output.say(note)
    result = dataclasses.asdict(account) | {"dtypes": dict(account.dtypes)}
    return result | {"out": settings.out, "bytes_on_disk": disk}


COMMANDS = (
    Command(
        name="convert",
        help="turn a checkpoint into a folder in the layout of diffusers, and check it",
        run=convert,
        arguments=(
            (
                "CHECKPOINT",
                "a diffusers folder, a hub id, or a file of DiT's or latent diffusion's authors "
                + "(safetensors, or a .ckpt or .pt that holds nothing but tensors)",
            ),
        ),
        options=(
            dataclasses.replace(OUT_FOLDER, read=path, help="folder to write into"),
            Option(
                name="dtype",
                read=one_of(DTYPES),
                metavar="NAME",
                help=f"float type to store: {', '.join(DTYPES)} (default: as it is)",
            ),
            Option(
                name="heads",
                read=whole(1),
                metavar="N",
                help="attention heads of an authors' DiT of unusual width",
            ),
        ),
        example="qjax convert DiT-XL-2-256x256.safetensors --out DiT-XL-2-256",
    ),
)
