"""A job that is told to stop keeps what it has and ends: SIGTERM, as clouds send it.

Within `preemptible` the signal is only noted. Whoever keeps a state asks `stop_if_asked` when it
is safe to end, and the exception goes up through everything as an exit does. What was kept is
read when the same run is started again.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator

from qjax.calibrate.pod import Pod

_asked = threading.Event()


class Preempted(SystemExit):
    """The process was asked to stop, and what it had is kept; exit status 143."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)

    def __str__(self) -> str:
        return "asked to stop; what is done is kept, and the same command goes on from there"


@contextlib.contextmanager
def preemptible() -> Iterator[None]:
    """Within it SIGTERM is noted; outside of the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _asked.clear()
    before = signal.signal(signal.SIGTERM, lambda *_: _asked.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _asked.clear()


def asked() -> bool:
    """Whether this process was asked to stop."""
    return _asked.is_set()


def stop_if_asked(pod: Pod | None = None) -> None:
    """End here if this process, or another one of the pod, was asked to.

    Raises:
      Preempted: If so; in all processes at the same place.
    """
    if asked() if pod is None else pod.any(asked()):
        raise Preempted
