"""Being asked to stop: by a signal of the scheduler or the user, by the clock, or because the launcher is gone."""

import contextlib
import os
import signal
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
        self._noted = _Signals()
        self._restore = contextlib.ExitStack()

    @property
    def reason(self) -> str | None:
        """Why to stop; None: go on."""
        if self._noted.first is not None:
            return self._noted.first.name
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return f"--time-limit ({self._time_limit:g} s)"
        return "the death of the launcher" if watch.launcher_is_gone() else None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._listen()
            for number in SIGNALS:
                self._restore.callback(signal.signal, number, signal.signal(number, lambda n, _: self._noted.add(n)))
        return self

    def __exit__(self, *_) -> None:
        self._restore.close()

    def _listen(self) -> None:
        """Python's handlers wait until the main thread comes back from what it called, such as a collective that never ends.
        The numbers of signals come through a pipe at once, and a thread takes them."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        thread = threading.Thread(target=_take_signals, args=(reader,), name="signals", daemon=True)
        thread.start()
        self._restore.callback(thread.join)
        self._restore.callback(os.close, writer)  # which ends the thread
        self._restore.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(writer, warn_on_full_buffer=False))


class _Signals:
    """The signals that one listener hears: the handler and the thread each have their own, since both hear all."""

    _ending = threading.Lock()

    def __init__(self):
        self.first: signal.Signals | None = None
        self._noted = 0.0

    def add(self, number: int) -> None:
        """Note the first. The second, unless it is the first one's echo, ends the process."""
        now = time.monotonic()
        if self.first is None:
            self.first, self._noted = signal.Signals(number), now
        elif (not watch.has_launcher() or now - self._noted > ONE_REQUEST_SECONDS) and self._ending.acquire(blocking=False):
            try:
                os.write(2, b"error: stopped at once by a second signal; what was saved before is whole\n")
            finally:  # also where nobody listens any more
                os._exit(128 + number)


def _take_signals(reader: int) -> None:
    heard = _Signals()
    with open(reader, "rb", buffering=0) as pipe:
        while numbers := pipe.read(64):
            for number in numbers:
                if number in SIGNALS:  # others may have handlers, too
                    heard.add(number)


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
