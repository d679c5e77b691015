"""StepTable: what changes from one sampler step to the next, one row a step.

A quantized sampler is shared low-bit weights plus a table with as many rows as the sampler
makes calls of the network. The sampler's `lax.scan` walks over the rows, so nothing is
recompiled and nothing branches. The table has named entries, each a tree of arrays whose
first axis is the step:

- `"quant"`: activation ranges, nested as the `"quant"` variable collection of the model;
- `"time"`: what depends on the timestep alone, as the `"time"` variable collection;
- `"noise_correction"`: statistics of the quantization noise, used by the sampler.

Every entry carries a `TableKey`, the settings it was fitted for. A table is checked against
the settings of a run before it is used, and a table of other settings is an error: a wrong
row does not crash, it only makes worse images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

__all__ = ["StepTable", "TableKey"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableKey:
    """The settings an entry depends on; None where it does not depend on that setting.

    The key of a run is one too: there None means that the run does not say, and what one
    side leaves open is not compared.
    """

    timesteps: tuple[float, ...] | None = None
    """The timestep of every call of the network, in the sampler's order."""
    sampler: str | None = None
    """Name of the sampler, `"ddim"`."""
    eta: float | None = None
    """Share of fresh noise in every update, 0 to 1."""
    guidance_scale: float | None = None
    """Weight of classifier-free guidance; 1.0 is a run without guidance."""
    prediction_type: str | None = None
    """What the network answers: `"epsilon"`, `"v_prediction"` or `"sample"`."""
    method: str | None = None
    """Name or hash of how weights and activations were quantized, bits included."""
    guidance_rescale: float | None = None
    """How far guidance is taken back to the spread of the conditional half, 0 to 1."""
    sampler_config: str | None = None
    """Hash of the sampler's settings: noise schedule, clipping, where the last step ends."""
    settings: str | None = None
    """How the entry was fitted, as JSON, for whoever fits it again; not compared."""

    def __post_init__(self) -> None:
        if self.timesteps is not None:
            # int(5) == float(5.0), but their JSON differs: one spelling for both.
            plain = tuple(int(t) if float(t).is_integer() else float(t) for t in self.timesteps)
            object.__setattr__(self, "timesteps", plain)

    def mismatch(self, other: TableKey) -> list[str]:
        """Every setting in which `other` is not what this key was fitted for.

        Args:
          other: The key of the run.

        Returns:
          One phrase a setting, with its name and both values; empty when the run fits.
        """
        problems = []
        for field in dataclasses.fields(self):
            fitted, run = getattr(self, field.name), getattr(other, field.name)
            if field.name == "settings" or fitted is None or run is None or fitted == run:
                continue
            if field.name == "sampler_config" and self.sampler != other.sampler:
                continue  # said already
            if field.name == "timesteps":
                problems.append(f"timesteps {_describe(fitted, run)}")
            else:
                problems.append(f"{field.name} was {fitted!r}, the run has {run!r}")
        return problems


def _describe(fitted: tuple[float, ...], run: tuple[float, ...]) -> str:
    """Both lists of timesteps, shortened, and the first step at which they part."""
    first = next((i for i, (a, b) in enumerate(zip(fitted, run, strict=False)) if a != b), None)
    where = "" if first is None else f" (step {first}: {fitted[first]} and {run[first]})"
    return f"were {_shorten(fitted)}, the run has {_shorten(run)}{where}"


def _shorten(values: tuple[float, ...]) -> str:
    if len(values) <= 6:
        return str(values)
    head, tail = ", ".join(map(str, values[:3])), ", ".join(map(str, values[-2:]))
    return f"({head}, ..., {tail}) of {len(values)} steps"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StepTable:
    """Named trees of arrays with one row a step, and the settings each was fitted for.

    A pytree: the arrays are its leaves, the keys are static. `StepTable()` is empty; build
    a table with `with_entry`.

    Example:
      >>> import jax.numpy as jnp
      >>> key = TableKey(timesteps=(501, 1))
      >>> table = StepTable().with_entry("quant", {"scale": jnp.array([0.5, 0.25])}, key=key)
      >>> float(table.row(1)["quant"]["scale"])
      0.25
    """

    entries: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Trees by name; every leaf has the steps as its first axis."""
    keys: tuple[tuple[str, TableKey], ...] = ()
    """The key of each entry, by name."""

    @property
    def steps(self) -> int:
        """The number of rows; 0 when the table has no arrays."""
        lengths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(dict(self.entries))}
        if len(lengths) > 1 or () in lengths:
            raise ValueError(
                f"every leaf of a step table must have the steps as its first axis; got first "
                f"axes of {sorted(lengths)}. Build the table with StepTable.with_entry."
            )
        return lengths.pop()[0] if lengths else 0

    def row(self, step: int | jax.Array) -> dict[str, Any]:
        """Every entry at one step, without the steps' axis; `step` may be traced."""
        return jax.tree.map(lambda leaf: leaf[step], dict(self.entries))

    def key(self, name: str) -> TableKey:
        """The settings that the entry `name` was fitted for.

        Raises:
          KeyError: If the table has no such entry.
        """
        for entry, key in self.keys:
            if entry == name:
                return key
        raise KeyError(f"no entry {name!r} in the step table; it has {sorted(self.entries)}.")

    def check(self, key: TableKey) -> None:
        """Return if every entry was fitted for the run that `key` describes.

        Raises:
          ValueError: If one was not; it names every entry and setting, with both values.
        """
        problems = {name: fitted.mismatch(key) for name, fitted in self.keys}
        if key.timesteps is not None and self.steps not in (0, len(key.timesteps)):
            for found in problems.values():
                if not any(problem.startswith("timesteps") for problem in found):
                    found.append(f"it has {self.steps} rows, the run {len(key.timesteps)} steps")
        bad = {name: found for name, found in problems.items() if found}
        if bad:
            said = "; ".join(f"{name!r}: {', '.join(found)}" for name, found in bad.items())
            # Without a time table a network lacks the layers that it stands for.
            names = ", ".join(repr(name) for name in bad if name != "time")
            drop = f", or leave it out with drop({names})" if names else ""
            raise ValueError(
                f"a step table serves the settings it was fitted for; got {said}. "
                "Make it suit the run with pipe.retarget(steps=...), calibrate again at the run's "
                f"settings{drop}."
            )

    def with_entry(self, name: str, value: Any, *, key: TableKey) -> StepTable:
        """A table that has `value` under `name`, in place of what was there.

        Args:
          name: Name of the entry.
          value: Tree of arrays, each with the steps as its first axis.
          key: The settings `value` was fitted for.

        Raises:
          ValueError: If the rows are not as many as the key's timesteps or as the rows of the
            other entries, if there are none, or if the name is `"params"`.
        """
        if name == "params":
            raise ValueError(
                "an entry becomes a variable collection of its name, and 'params' are the "
                "parameters; got name='params'. Use 'quant', or a collection of the model's own."
            )
        shapes = {
            jax.tree_util.keystr(path): np.shape(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(value)
        }
        rest = self.drop(name) if name in self.entries else self
        steps = rest.steps or (len(key.timesteps) if key.timesteps is not None else 0)
        steps = steps or next((shape[0] for shape in shapes.values() if shape), 0)
        wrong = {path: shape for path, shape in shapes.items() if shape[:1] != (steps,)}
        if key.timesteps is not None and len(key.timesteps) != steps:
            wrong["key.timesteps"] = (len(key.timesteps),)
        if not shapes or wrong:
            raise ValueError(
                f"every leaf of {name!r} must have one row for each of the table's {steps} steps "
                f"as its first axis; got {wrong or shapes}. Stack one row a step, and put entries "
                f"of another number of steps in another table."
            )
        return StepTable(entries={**rest.entries, name: value}, keys=(*rest.keys, (name, key)))

    def drop(self, *names: str) -> StepTable:
        """The table without these entries.

        Raises:
          KeyError: If the table lacks one of them.
        """
        missing = [name for name in names if name not in self.entries]
        if missing:
            raise KeyError(f"no entries {missing} in the step table; it has {list(self.entries)}.")
        return StepTable(
            entries={name: tree for name, tree in self.entries.items() if name not in names},
            keys=tuple((name, key) for name, key in self.keys if name not in names),
        )


jax.tree_util.register_dataclass(StepTable, data_fields=["entries"], meta_fields=["keys"])
