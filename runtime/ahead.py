"""Reading, drawing and writing while computing: each by one thread, and never more than one thing ahead or behind."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")
_END = object()


def read_ahead(items: Iterable[T]) -> Iterator[T]:
    """Yield ``items``, each made by a thread while the caller works on the one before: two of them are in memory."""
    iterator = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        following = thread.submit(next, iterator, _END)
        while (item := following.result()) is not _END:
            following = thread.submit(next, iterator, _END)
            yield item


class CallAhead(Generic[T]):
    """make(k), where a thread makes the next one, up to ``last``, while the caller works on this one.

    Asked for in another order than k, k + 1, ... it gives the same, only later. Its ``with`` ends the thread.
    """

    def __init__(self, make: Callable[[int], T], last: int):
        self._make, self._last = make, last
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._begun: tuple[int, Future[T]] | None = None

    def __call__(self, k: int) -> T:
        begun, self._begun = self._begun, None
        mine = begun[1] if begun and begun[0] == k else self._thread.submit(self._make, k)
        if k < self._last:
            self._begun = k + 1, self._thread.submit(self._make, k + 1)
        return mine.result()

    def __enter__(self) -> "CallAhead[T]":
        return self

    def __exit__(self, *_) -> None:
        self._thread.shutdown(cancel_futures=True)


class WriteBehind(Generic[T]):
    """write(item), by a thread while the caller makes the next one: two of them are in memory.

    What the thread meets is raised by the next call here, and nothing is written after it. ``with`` waits for the last item;
    where its body fails, the item being written is still finished.
    """

    def __init__(self, write: Callable[[T], None]):
        self._write, self._writing = write, None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="behind")

    def put(self, item: T) -> None:
        """Wait for the item before, then leave this one to the thread."""
        self._finish()
        self._writing = self._thread.submit(self._write, item)

    def check(self) -> None:
        """Raise what the thread met, without waiting for it."""
        if self._writing is not None and self._writing.done():
            self._finish()

    def _finish(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def __enter__(self) -> "WriteBehind[T]":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            try:
                self._thread.shutdown()
            except KeyboardInterrupt:  # not the first: the item being written is finished all the same
                self._thread.shutdown()
                raise
