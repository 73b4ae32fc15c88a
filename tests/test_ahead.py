"""runtime.ahead: what threads do one thing ahead or behind, in what order, how far, and how they end."""

import threading
import time

import pytest

from runtime.ahead import CallAhead, WriteBehind


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def wait_until(condition) -> None:
    limit = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.001)


# CallAhead


@pytest.mark.parametrize("order", [[1, 2, 3, 4], [1], [3, 1, 2, 2, 4], []])
def test_any_order_gives_the_same(order):
    with CallAhead(lambda k: 10 * k, last=4) as call:
        assert [call(k) for k in order] == [10 * k for k in order]


def test_one_is_made_ahead_and_no_more():
    made = []
    with CallAhead(made.append, last=3) as call:
        for k, expected in ((1, [1, 2]), (2, [1, 2, 3]), (3, [1, 2, 3])):
            call(k)
            wait_until(lambda expected=expected: made == expected)
            time.sleep(0.01)
            assert made == expected


def test_an_error_comes_with_its_own_call():
    with CallAhead(lambda k: 1 // (k - 2), last=3) as call:
        assert call(1) == -1
        with pytest.raises(ZeroDivisionError):
            call(2)
        assert call(3) == 1


# WriteBehind


def test_items_are_written_in_order_while_the_caller_goes_on():
    written, go_on = [], threading.Event()

    def write(item):
        assert go_on.wait(10)
        written.append(item)

    with WriteBehind(write) as behind:
        behind.put(0)
        assert written == []  # the caller is back before it is written
        go_on.set()
        for item in (1, 2, 3):
            behind.put(item)
            assert written[:item] == list(range(item))  # two in memory: this one, and the next when the caller has made it
    assert written == [0, 1, 2, 3]


@pytest.mark.parametrize("where", ["check", "put", "end"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_nothing_is_written_after_an_error(where, error):
    written = []

    def write(item):
        if item == 1:
            raise error
        written.append(item)

    def work():
        with WriteBehind(write) as behind:
            behind.put(0)
            behind.put(1)
            wait_until(behind._writing.done)
            if where == "check":
                behind.check()
            if where == "put":
                behind.put(2)

    with pytest.raises(type(error)):
        work()
    assert written == [0]


def test_checking_does_not_wait():
    go_on = threading.Event()
    with WriteBehind(lambda _: go_on.wait(10)) as behind:
        behind.check()
        behind.put(0)
        behind.check()
        assert not behind._writing.done()
        go_on.set()


def test_the_bodys_error_is_told_and_the_item_in_work_is_finished():
    begun, written = threading.Event(), []

    def write(item):
        begun.set()
        time.sleep(0.05)
        written.append(item)
        raise OSError("a second error")

    with pytest.raises(ZeroDivisionError), WriteBehind(write) as behind:
        behind.put(0)
        begun.wait(10)
        _ = 1 / 0
    assert written == [0]
