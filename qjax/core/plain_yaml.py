"""YAML without what a small file could blow up by."""

import functools
from pathlib import Path
from typing import Any

MAX_BYTES = 4_000_000
"""Of a text; a config by hand has some hundred bytes, a recipe file of DiT-XL/2 20 kB."""

_MAX_NUMBER = 400


def read_yaml(path: Path | str, text: str | bytes) -> Any:
    """What a YAML text says, in plain lists, mappings, texts and numbers.

    Args:
      path: Where it is from, for messages.
      text: The text, or its UTF-8 bytes; at most `MAX_BYTES`.

    Raises:
      ValueError: If it is no YAML, has a key twice or is too long, or has references
        (`*name`), by which a small file could stand for an enormous one.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"{path} is larger than a YAML file may be here, {MAX_BYTES:,} bytes.")
    try:
        loader = _loader()(text if isinstance(text, str) else text.decode())
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except _Reference:
        said = f"{path} has references (*name), which are not read. Write them out."
        raise ValueError(said) from None
    # A tag such as `!!int ""` is an IndexError of the library.
    except Exception as error:  # noqa: BLE001
        said = " ".join(str(error).split())
        raise ValueError(f"{path} is not YAML: {said}.") from None


class _Reference(Exception):
    """A reference was found."""


@functools.cache
def _loader() -> Any:
    """yaml's safe loader, which refuses references, keys that come twice and endless numbers."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise _Reference
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key in (self.construct_object(key, deep=True) for key, _ in node.value):
                if key in seen:
                    raise ValueError(f"the key {key!r:.80} twice")
                seen.add(key)
            return super().construct_mapping(node, deep=deep)

        def construct_yaml_int(self, node: Any) -> int:
            # 1:1:1:... is a number to the base of 60, and slow to read if it is long.
            if len(str(node.value)) > _MAX_NUMBER:
                raise ValueError(f"a number of more than {_MAX_NUMBER} digits")
            return super().construct_yaml_int(node)

        def construct_yaml_float(self, node: Any) -> float:
            if len(str(node.value)) > _MAX_NUMBER:
                raise ValueError(f"a number of more than {_MAX_NUMBER} digits")
            return super().construct_yaml_float(node)

    Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
    Loader.add_constructor("tag:yaml.org,2002:float", Loader.construct_yaml_float)
    return Loader
