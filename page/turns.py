"""Work that goes on only while somebody waits for it."""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")
_END = object()


class _Closed(BaseException):
    """Nobody waits any more. No Exception, so that nothing in between takes it for a failure."""


def in_turns(work: Callable[[Callable[[T], None]], None]) -> Iterator[T]:
    """What ``work(report)`` reports, one value at a time.

    It runs in a thread that stands still inside ``report`` until the next value is asked for: of two such iterators asked in
    turn, never do both compute, so that each can be timed. What it raises is raised here; closing the iterator ends it.
    """
    turn, reports, closed = threading.Semaphore(0), queue.SimpleQueue(), threading.Event()

    def report(value: T) -> None:
        reports.put(value)
        turn.acquire()
        if closed.is_set():
            raise _Closed

    def run() -> None:
        turn.acquire()
        try:
            if not closed.is_set():
                work(report)
            reports.put(_END)
        except _Closed:
            pass
        except BaseException as error:
            reports.put(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    with contextlib.ExitStack() as stack:
        stack.callback(thread.join)
        stack.callback(turn.release)
        stack.callback(closed.set)
        while True:
            turn.release()
            value = reports.get()
            if value is _END:
                return
            if isinstance(value, BaseException):
                raise value
            yield value
