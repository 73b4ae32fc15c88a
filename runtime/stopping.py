"""Being asked to stop: by a signal of the scheduler or the user, by the clock, or because the launcher is gone."""

import os
import signal
import sys
import threading
import time

from runtime import watch

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # Slurm's --signal is often USR1
# A launcher forwards what it is sent, and a terminal or scheduler signals every process: one request arrives several times.
ONE_REQUEST_SECONDS = 3.0


class StopRequest:
    """Between ``with`` and its end the first of :data:`SIGNALS` is only noted, a second one ends the process at once.

    time_limit: seconds from now after which the work is to stop; None: never.
    """

    def __init__(self, time_limit: float | None = None):
        self._time_limit = time_limit
        self._deadline = None if time_limit is None else time.monotonic() + time_limit
        self._signal: signal.Signals | None = None
        self._signalled = 0.0
        self._handlers = {}

    @property
    def reason(self) -> str | None:
        """Why to stop; None: go on."""
        if self._signal is not None:
            return self._signal.name
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return f"--time-limit ({self._time_limit:g} s)"
        return "the death of the launcher" if watch.launcher_is_gone() else None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, _) -> None:
        now = time.monotonic()
        if self._signal is None:
            self._signal, self._signalled = signal.Signals(number), now
        elif "TORCHELASTIC_RUN_ID" not in os.environ or now - self._signalled > ONE_REQUEST_SECONDS:
            os.write(sys.stderr.fileno(), b"error: stopped at once by a second signal; the last checkpoint is whole\n")
            os._exit(128 + number)


def duration(text: str) -> float:
    """Seconds, from Slurm's way of writing them: minutes, M:SS, H:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS. Raises ValueError."""
    days, dash, clock = text.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdecimal() and part.isascii() for part in (parts + [days] if dash else parts)) or len(parts) > 3:
        raise ValueError(f"{text!r} is no duration: write MINUTES, MM:SS, HH:MM:SS or D-HH:MM:SS")
    if dash or len(parts) == 3:
        hours, minutes, seconds = (*map(int, parts), 0, 0)[:3]
    else:
        hours, (minutes, seconds) = 0, (*map(int, parts), 0)[:2]
    total = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    if total == 0:
        raise ValueError(f"{text!r} must be above 0")
    return float(total)
