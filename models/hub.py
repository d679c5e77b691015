"""The Hugging Face hub: downloading what can be read here, uploading a save.

Only JSON, safetensors and the text files of tokenizers are ever fetched. Which of a repository's
two layouts it has, that of diffusers or that of `saving.py`, is looked at before any weight is; and of
the former the weights that loading reads, not their copies in other precisions, for other programs,
or of networks that are not read.
"""

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from qjax.core.manifest import MANIFEST
from qjax.core.plain_json import read_json
from qjax.models.checkpoints import STEM
from qjax.models.components import weights_stem
from qjax.models.loading_sides import IGNORED, named_components
from qjax.models.model_card import CARD, HUB_ID, Report
from qjax.models.saving import save_pipeline

if TYPE_CHECKING:
    from qjax.models.pipeline import Pipeline

INDEX = "model_index.json"

# No pickle has one of these endings: `*.bin`, `*.ckpt`, `*.pt`, `*.pkl` and `*.msgpack` stay there.
# `*` stands for folders, too: `unet/config.json`.
CONFIGS = ("*.json",)
TEXTS = ("tokenizer*/*.txt", CARD)
WEIGHTS = "*.safetensors"


def split_revision(name: str) -> tuple[str, str | None] | None:
    """Repository and revision of `owner/name` or `owner/name@revision`; None of anything else."""
    repository, at, revision = name.partition("@")
    if not HUB_ID.fullmatch(repository) or (at and not re.fullmatch(r"[\w./-]+", revision)):
        return None
    return repository, revision or None


def check_id(repository: str) -> None:
    """Raise unless it is `owner/name`, as the hub spells ids.

    Raises:
      ValueError: If it is not.
    """
    if not HUB_ID.fullmatch(repository):
        raise ValueError(
            f"repository must be an id of the form owner/name, without a revision; got "
            f"{repository!r}."
        )


def download(
    repository: str,
    *,
    weights: bool = True,
    variant: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """The folder of a repository, downloaded or from the cache of an earlier download.

    Args:
      repository: `owner/name`.
      weights: Whether weights are wanted; else the configs alone.
      variant: Which weights, as `load_pipeline` has it: None for the plain ones, and where there
        are none for those in fp16.
      revision: Branch, tag or commit; None for the main branch.
      token: As huggingface_hub has it: None for the one of `hf auth login`, False for none.

    Raises:
      FileNotFoundError: If the hub did not give it: no such repository or revision, no access, or
        no connection and nothing in the cache.
      ValueError: If it has neither of the layouts that are read here.
    """
    import huggingface_hub

    def snapshot(patterns: tuple[str, ...], revision: str | None) -> Path:
        try:
            return Path(
                huggingface_hub.snapshot_download(
                    repository, revision=revision, allow_patterns=list(patterns), token=token
                )
            )
        except client_errors() as error:
            _raise_not_given(repository, revision, error)

    folder = snapshot(CONFIGS, revision)
    if not any((folder / name).is_file() for name in (MANIFEST, INDEX)):
        raise ValueError(
            f"{repository} on the hub holds neither {MANIFEST} (a model saved by qjax) nor {INDEX} "
            "(diffusers' layout), so it is nothing that can be read here. Of a repository of single "
            "files download the one you need, and see `qjax convert`."
        )
    if not weights:
        return folder
    # The commit that was looked at: the branch may have moved on.
    commit = folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else revision
    if (folder / MANIFEST).is_file():
        return snapshot((*CONFIGS, *TEXTS, WEIGHTS), commit)
    wanted = _weights_read(folder, variant)
    folder = snapshot((*CONFIGS, *TEXTS, *sum(wanted.values(), ())), commit)
    if variant is None:
        there = lambda patterns: any(list(folder.glob(pattern)) for pattern in patterns)
        half = _weights_read(folder, "fp16")
        lacking = [half[part] for part, patterns in wanted.items() if not there(patterns)]
        if lacking:
            return snapshot((*CONFIGS, *TEXTS, *sum(lacking, ())), commit)
    return folder


def _weights_read(folder: Path, variant: str | None) -> dict[str, tuple[str, ...]]:
    """Patterns of the weights that loading reads of a variant, by component."""
    mark = "" if variant is None else f".{variant}"
    # Shards have been named in two ways.
    names = (f"{mark}.safetensors", f"{mark}-*-of-*.safetensors", f"-*-of-*{mark}.safetensors")
    files = lambda start: tuple(dict.fromkeys(f"{start}{name}" for name in names))
    components = named_components(read_json(folder / INDEX))
    found = {
        name: files(f"{name}/{weights_stem(class_name)}")
        for name, (_, class_name) in components.items()
        if (folder / name / "config.json").is_file() and not name.startswith(IGNORED)
    }
    # Older repositories keep the one network beside the index.
    return found | ({"": files(STEM)} if (folder / "config.json").is_file() else {})


def push(
    pipe: "Pipeline",
    repository: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    report: Report | None = None,
    card: str | None = None,
) -> str:
    """Upload a pipeline as `save_pipeline` writes it, and nothing else; the address of the commit.

    Files that the repository has beside those of the save stay as they are.

    Args:
      pipe: The pipeline.
      repository: `owner/name`; created if it is not there.
      private: Whether a repository that is created is private; None for the hub's default.
      token: As for `download`; it must be allowed to write.
      revision: Branch to upload to, created from the main one if it is not there; None for that.
      commit_message: Of the commit; None names qjax and the model.
      report: As for `save_pipeline`.
      card: Likewise.

    Raises:
      ValueError: If the pipeline cannot be saved, or `repository` is no id.
      OSError: If the hub refused, or could not be reached. Nothing is left half uploaded: the
        files are one commit.
    """
    import huggingface_hub

    check_id(repository)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        save_pipeline(pipe, folder, report=report, card=card, place=repository)
        names = sorted(
            path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
        )
        if commit_message is None:
            named = pipe.source.name if pipe.source and pipe.source.name else "a model"
            commit_message = f"Upload {named}, saved by qjax"
        api = huggingface_hub.HfApi(token=token)
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repository, branch=revision, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                allow_patterns=names,
                revision=revision,
                commit_message=commit_message,
            )
        except client_errors() as error:
            raise OSError(
                f"The Hugging Face hub did not take {repository}: {_reason(error)}. Log in with "
                "`hf auth login`, or give a token that may write to it, and see that the hub can "
                "be reached; or save to a folder and upload that later."
            ) from error
    return str(getattr(commit, "commit_url", commit))


def client_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises, that of its HTTP client included, whichever it is."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    # httpx, of newer versions, has its own base of all its errors; that of requests is an OSError.
    of_client: list[Any] = [
        base for base in HfHubHTTPError.__mro__ if base.__module__.partition(".")[0][:5] == "httpx"
    ]
    return (OSError, ValueError, EntryNotFoundError, *of_client)


def _raise_not_given(repository: str, revision: str | None, error: Exception) -> NoReturn:
    at = "" if revision is None else f" at revision {revision!r}"
    raise FileNotFoundError(
        f"{repository!r}{at} is no local folder, and the Hugging Face hub did not give it: "
        f"{_reason(error)}. See that the id is right and the hub can be reached; for a private or "
        "gated repository log in with `hf auth login`. Without a connection a model that was "
        "downloaded before is read from the cache, and any folder by its path."
    ) from error


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")
