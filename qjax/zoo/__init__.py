"""Small trained models that ship with the package, each in a folder of its own."""

from pathlib import Path

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Names of the diffusion models."""
    return sorted(path.parent.name for path in FOLDER.glob("*/model_index.json"))
