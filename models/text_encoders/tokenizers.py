"""From prompts to token ids, through the tokenizer that a diffusers folder holds.

A tokenizer's folder has `vocab.json` and `merges.txt`, or both in `tokenizer.json`, beside
`tokenizer_config.json` and, in older ones, `special_tokens_map.json`. transformers reads it,
without PyTorch, and decides every id, so that prompts mean what they mean to diffusers:

    <|startoftext|>  the prompt  <|endoftext|>  padding ...        77 ids in all

What pads is up to the folder: the end token in Stable Diffusion 1 and in the first tokenizer of
XL, "!" (id 0) in Stable Diffusion 2 and in the second tokenizer of XL. There "!" is a special
token, and one in a prompt becomes id 0 too.
"""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qjax.core.places import local_path
from qjax.core.plain_json import read_json
from qjax.core.typing import Int
from qjax.models.checkpoints import listed

CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast")
FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
"""What a tokenizer is read from, and what is copied of its folder with a pipeline."""

# A tokenizer whose folder names no length claims one of 1e30.
_LONGEST = 100_000


def load_tokenizer(folder: str | os.PathLike[str], subfolder: str | None = None) -> Any:
    """The tokenizer in a local folder, as transformers makes it; nothing is downloaded.

    Args:
      folder: The tokenizer's own folder, or the whole model's.
      subfolder: The tokenizer's name inside `folder`, such as "tokenizer_2".

    Returns:
      A `CLIPTokenizer` of transformers 5, or a `CLIPTokenizerFast` of transformers 4.

    Raises:
      FileNotFoundError: If the folder or its vocabulary is missing; all missing files are named.
      ValueError: If the folder is another kind of tokenizer's, or says nothing of the length of
        prompts or of padding.
    """
    folder = local_path(folder) if subfolder is None else local_path(folder) / subfolder
    _check_files(folder)
    import transformers

    # transformers 4 has two classes; this is the one that transformers 5 has kept.
    kind = getattr(transformers, "CLIPTokenizerFast", transformers.CLIPTokenizer)
    try:
        tokenizer = kind.from_pretrained(str(folder), local_files_only=True)
    # What it raises of a broken file depends on the file and its version: KeyError, Exception.
    except Exception as error:  # noqa: BLE001
        said = " ".join(str(error).split())
        raise ValueError(f"{folder} does not hold a tokenizer of CLIP: {said:.300}.") from None
    _check_tokenizer(tokenizer, str(folder))
    return tokenizer


def encode_prompts(tokenizer: Any, prompts: Sequence[str]) -> Int[np.ndarray, "b t"]:
    """Token ids of the prompts, int32, all of the tokenizer's `model_max_length` (77).

    Longer prompts are cut at their end, with one warning that says for each of them what was
    cut off.

    Args:
      tokenizer: As `load_tokenizer` gives it.
      prompts: At least one text; "" is the empty prompt of unguided predictions.

    Raises:
      TypeError: If `prompts` is one text, or holds something else than texts.
      ValueError: If there is no prompt, or the tokenizer has no length or no padding.
    """
    _check_prompts(prompts)
    _check_tokenizer(tokenizer, type(tokenizer).__name__)
    t = tokenizer.model_max_length
    texts = list(prompts)
    # `verbose` speaks of long prompts too, but once in a process and without naming any.
    whole = tokenizer(texts, verbose=False)["input_ids"]
    lost = [
        f"prompt {i} loses {tokenizer.decode(ids[t - 1 : -1])!r}"
        for i, ids in enumerate(whole)
        if len(ids) > t
    ]
    if lost:
        warnings.warn(
            f"prompts may have {t} tokens, with the two at start and end; {len(lost)} of "
            f"{len(texts)} are longer and were cut: {listed(lost)}. Shorten them.",
            stacklevel=2,
        )
    ids = tokenizer(texts, padding="max_length", max_length=t, truncation=True)["input_ids"]
    return np.asarray(ids, np.int32)


def _check_files(folder: Path) -> None:
    """Whether the folder holds what transformers needs; it would take an empty one, too."""
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    if not (folder / "tokenizer.json").is_file():
        missing = [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{folder} must hold tokenizer.json, or vocab.json and merges.txt; "
                f"{' and '.join(missing)} not found. Pass the tokenizer's own folder, or its name "
                "as subfolder."
            )
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; it tells the length of prompts.")
    name = read_json(path).get("tokenizer_class") or CLASSES[0]
    if name not in CLASSES:
        raise ValueError(f"{path} must be that of a {' or '.join(CLASSES)}; got {name!r}.")


def _check_tokenizer(tokenizer: Any, name: str) -> None:
    if tokenizer.model_max_length > _LONGEST:
        raise ValueError(
            f"the tokenizer must say how long prompts may be, and {name} does not. Set "
            "model_max_length in its tokenizer_config.json: 77 for CLIP."
        )
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"the tokenizer must have a token for padding, and {name} has none. Set pad_token in "
            "its tokenizer_config.json."
        )


def _check_prompts(prompts: Sequence[str]) -> None:
    if isinstance(prompts, str):
        raise TypeError(f"prompts must be a list of texts; got {prompts!r:.80}. Write [prompt].")
    if not len(prompts):
        raise ValueError("prompts must hold at least one text; got none. Pass [''] for no prompt.")
    strange = [
        f"{prompt!r:.40} at {i}" for i, prompt in enumerate(prompts) if not isinstance(prompt, str)
    ]
    if strange:
        raise TypeError(f"prompts must be texts; got {listed(strange)}.")
