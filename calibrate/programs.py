"""Compiled programs are dropped before there are more than a process can hold."""

from pathlib import Path

import jax

MAPS = Path("/proc/self/maps")
# Linux allows a process 65,530 memory maps (vm.max_map_count).
MOST = 30_000


def drop_programs() -> bool:
    """Drop all compiled programs if this process is half way to the limit of memory maps.

    Every program of XLA:CPU maps memory of its own, and at the limit the next compilation
    ends the process (a segmentation fault): after eighteen calibrations of small models.
    What is needed again is compiled again. Does nothing where there is no `/proc`.

    Returns:
      Whether they were dropped.
    """
    if not MAPS.exists() or MAPS.read_bytes().count(b"\n") <= MOST:
        return False
    jax.clear_caches()
    return True
