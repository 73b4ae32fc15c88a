"""What becomes of the other processes of a job: one that fails ends all, and so does a launcher that is gone.

A process that fails says so in the job's store; the first one alone tells the user. A thread in every process looks there and
ends its process when another has failed, also where its main thread waits for that one in vain.
"""

import os
import sys
import threading
import time

from torch.distributed import Store

POLL_SECONDS = 0.5
TELL_SECONDS = 1.0  # what the first process to fail has for telling before the launcher, seeing another end, ends it too
FAILED = "failed"
PARENT = os.getppid()
# torchrun sets the first; accelerate launch, for one process, only its own. The second is set by no library within a process.
LAUNCHED = not os.environ.keys().isdisjoint(("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_USE_FULLGRAPH"))

orphan_grace_seconds = 5.0  # from the launcher's end to this process's

_watch: "_Watch | None" = None


def has_launcher() -> bool:
    """Whether torchrun or accelerate launch started this process."""
    return LAUNCHED


def launcher_is_gone() -> bool:
    """Whether this process outlived its launcher.

    Under plain python a dead parent is a shell that was left, which is no reason to stop.
    """
    return has_launcher() and os.getppid() != PARENT


def begin(store: Store | None, rank: int, world: int) -> None:
    """Watch from now on. store: seen by all processes of the job and by no other job; None for one process."""
    global _watch
    end()
    if store is not None or has_launcher():
        _watch = _Watch(store, rank, world)
        _watch.start()


def end() -> None:
    """Watch no more: what becomes of the others no longer concerns this process."""
    global _watch
    if _watch is not None:
        _watch.ended.set()
        _watch = None


def announce_failure() -> bool:
    """Tell the other processes that this one failed. Returns whether it was the first to, so that it tells the user."""
    return _watch is None or _watch.announce()


def whose() -> str:
    """How this process is named in its error: nothing where it is the only one."""
    return "" if _watch is None or _watch.store is None else f"process {_watch.rank} of {_watch.world}: "


def end_quietly() -> None:
    """End this process for another has failed and tells why. Exit handlers could wait for that one."""
    try:
        time.sleep(TELL_SECONDS)
    finally:  # also where a second Ctrl-C arrives
        os._exit(1)


class _Watch(threading.Thread):
    def __init__(self, store: Store | None, rank: int, world: int):
        super().__init__(name="watch", daemon=True)
        self.store, self.rank, self.world = store, rank, world
        self.ended = threading.Event()

    def run(self) -> None:
        gone_since = None
        while not self.ended.wait(POLL_SECONDS):
            if launcher_is_gone():
                # The launcher held the store. Without it a failure shows when the connections to the failed process close.
                gone_since = gone_since or time.monotonic()
                if time.monotonic() - gone_since >= orphan_grace_seconds:
                    self._end_orphan()
            elif self._another_failed() and not self.ended.is_set():
                end_quietly()

    def announce(self) -> bool:
        self.ended.set()
        try:
            return self.store is None or self.store.compare_set(FAILED, "", str(self.rank)) == str(self.rank).encode()
        except RuntimeError:  # the store is gone: better told twice than not at all
            return True

    def _another_failed(self) -> bool:
        try:
            return self.store is not None and self.store.check([FAILED])
        except RuntimeError:
            self.store = None  # it ended with the process that held it, which is no failure
            return False

    def _end_orphan(self) -> None:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(
                "error: the launcher (torchrun or accelerate) is gone, and so its processes end; the same command goes on",
                file=sys.stderr,
                flush=True,
            )
        os._exit(1)
