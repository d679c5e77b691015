"""Checkpoints that are pickles, read by another process that can load tensors and nothing else.

A pickle is a program: reading one runs it. PyTorch's restricted reader (`weights_only=True`)
builds tensors, numbers, texts and containers of them and refuses everything else, and here it
runs in a process of its own, which writes what it found as safetensors. This process reads
only that file. There is no way to read a pickle that the restricted reader refuses.

    python -m qjax.models.pickles CHECKPOINT.ckpt OUT.safetensors

References:
  https://docs.pytorch.org/docs/stable/generated/torch.load.html
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qjax.core.safetensors_io import write_tensors
from qjax.models.checkpoints import listed

SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
# Where training code keeps the weights among other things; the averaged ones first.
_WRAPPERS = ("ema", "state_dict", "model", "module")


def to_safetensors(source: Path, out: Path) -> tuple[str, ...]:
    """Write the tensors of the pickle `source` into `out`, from another process.

    Returns:
      What was decided or left out, in sentences.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If the file holds anything but tensors, numbers, texts and containers of
        them, or no tensors; nothing is written then.
      ModuleNotFoundError: If PyTorch is not installed.
    """
    if not source.is_file():
        raise FileNotFoundError(f"There is no file {source}.")
    # It needs no device, and must not take one.
    command = [sys.executable, "-m", "qjax.models.pickles", str(source), str(out)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    lines = done.stdout.strip().splitlines()
    try:
        answer = json.loads(lines[-1]) if lines else {}
    except ValueError:
        answer = {}
    if done.returncode == 0 and "notes" in answer and out.is_file():
        return tuple(answer["notes"])
    out.unlink(missing_ok=True)
    if answer.get("missing"):
        raise ModuleNotFoundError(
            f"{source.name} is a pickle, and only PyTorch reads those; install torch, or convert "
            "it elsewhere."
        )
    raised = re.findall(r"^[\w.]*(?:Error|Exception)\b.*", done.stderr, re.MULTILINE)
    reason = answer.get("error") or (raised[-1] if raised else "no answer")
    raise ValueError(
        f"{source} cannot be read as tensors alone, and anything else could run code; got "
        f"{reason}. Ask its authors for safetensors."
    )


def main(arguments: list[str]) -> int:
    """The other process: read, write, and say in one line of JSON how it went."""
    source, out = map(Path, arguments)
    try:
        import torch
    except ModuleNotFoundError:
        return _answer(missing="torch")
    # Whatever it raises ends this process, and the other one reads why.
    found = torch.load(source, map_location="cpu", weights_only=True, mmap=_is_zip(source))
    try:
        tensors, notes = unwrap(found, torch.Tensor)
        write_tensors(out, {name: as_numpy(tensor) for name, tensor in tensors.items()})
    except (TypeError, ValueError) as error:
        return _answer(error=str(error))
    return _answer(notes=notes)


def unwrap(found: Any, kind: type) -> tuple[dict[str, Any], list[str]]:
    """The tensors of a state dict, out of what training code puts around it.

    Args:
      found: What a checkpoint holds.
      kind: Class of a tensor.

    Raises:
      ValueError: If there are none.
    """
    notes = []
    while isinstance(found, Mapping):
        inside = [name for name in _WRAPPERS if isinstance(found.get(name), Mapping)]
        if not inside:
            break
        others = sorted(str(name) for name in found if name != inside[0])
        notes.append(f"the weights are those of {inside[0]!r}; left out: {listed(others)}.")
        found = found[inside[0]]
    if not isinstance(found, Mapping) or not any(isinstance(v, kind) for v in found.values()):
        raise ValueError(f"it holds no state dict but a {type(found).__name__}")
    strange = sorted(str(name) for name, value in found.items() if not isinstance(value, kind))
    if strange:
        notes.append(f"these are no tensors and were left out: {listed(strange)}.")
    return {str(k): v for k, v in found.items() if isinstance(v, kind)}, notes


def as_numpy(tensor: Any) -> np.ndarray:
    """A tensor of PyTorch as an array of the same dtype, bfloat16 included."""
    import ml_dtypes
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.contiguous().numpy()


def _is_zip(path: Path) -> bool:
    """Whether it is of today's format, which can be read lazily."""
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def _answer(**fields: Any) -> int:
    print(json.dumps(fields))
    return 0 if "notes" in fields else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
