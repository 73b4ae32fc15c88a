"""What processes learn of one another: failures, attempts, launchers. Jobs of many processes are in test_processes.py."""

import os
import subprocess
import sys
import threading
from datetime import timedelta

import pytest
import torch
from torch.distributed import PrefixStore, TCPStore

from runtime import cli, distributed, watch
from tests.launch import ROOT

SECONDS = timedelta(seconds=20)


@pytest.fixture
def server() -> TCPStore:
    return TCPStore("127.0.0.1", 0, None, True, SECONDS, wait_for_workers=False)


@pytest.fixture
def of_three(server):
    """of_three(rank): watch as that process of a job."""

    def begin(rank: int) -> watch._Watch:
        watch.begin(PrefixStore("job", server.clone()), rank, 3)
        return watch._watch

    yield begin
    watch.end()


@pytest.fixture
def ends(monkeypatch) -> list:
    """Exit codes of os._exit, which ends a thread here."""
    codes = []
    monkeypatch.setattr(os, "_exit", lambda code: codes.append(code) or sys.exit(code))
    monkeypatch.setattr(watch, "TELL_SECONDS", 0)
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.01)
    return codes


def test_the_first_process_to_fail_tells(of_three, ends, capsys):
    of_three(2)
    with pytest.raises(SystemExit, match="1"):
        cli.run(lambda _: int("x"))
    assert capsys.readouterr().err == "\nerror: process 2 of 3: invalid literal for int() with base 10: 'x'\n"
    of_three(1).ended.set()  # its thread is slower than its own failure
    with pytest.raises(SystemExit):
        cli.run(lambda _: int("y"))
    assert ends == [1]


def raise_(error: BaseException):
    raise error


@pytest.mark.parametrize("error", [SystemExit(3), TypeError("a bug")])
def test_whatever_ends_a_process_is_announced(of_three, ends, error):
    of_three(0)
    with pytest.raises(type(error)):
        cli.run(lambda _: raise_(error))
    assert not of_three(1).announce()


def test_a_successful_end_is_no_failure(of_three, ends):
    of_three(0)
    with pytest.raises(SystemExit):
        cli.run(lambda _: raise_(SystemExit(0)))
    assert of_three(1).announce()


def test_an_error_that_all_share_names_no_process(of_three, ends, capsys):
    of_three(2)
    with pytest.raises(SystemExit):
        cli.run(lambda _: raise_(distributed.SharedError("no such file")))
    assert capsys.readouterr().err == "\nerror: no such file\n"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[/build/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:5520. "),
        torch.distributed.DistBackendError("NCCL communicator was aborted on rank 0."),
    ],
)
def test_a_lost_process_is_one_line(of_three, ends, capsys, error):
    of_three(0)
    with pytest.raises(SystemExit, match="1"):
        cli.run(lambda _: raise_(error))
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: process 0 of 3: lost another process of this job (killed? out of memory?): ")


def test_other_runtime_errors_keep_their_traceback(of_three, ends):
    of_three(0)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        cli.run(lambda _: torch.zeros(2, 3) @ torch.zeros(2, 3))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_thread_ends_a_process_when_another_failed(of_three, ends):
    waiting, ended = of_three(0), threading.Event()
    assert not ended.wait(0.1) and not ends
    watch._Watch(waiting.store, 1, 3).announce()
    waiting.join(10)
    assert ends == [1]


def test_a_process_that_left_hears_nothing(of_three, ends):
    left = of_three(0)
    distributed.leave_group()
    watch._Watch(left.store, 1, 3).announce()
    left.join(10)
    assert not ends and not left.is_alive()


def test_a_store_that_ended_is_no_failure(ends):
    server = TCPStore("127.0.0.1", 0, None, True, SECONDS, wait_for_workers=False)
    watch.begin(PrefixStore("job", server.clone()), 0, 2)
    thread = watch._watch
    del server
    threading.Event().wait(0.2)
    assert thread.is_alive() and thread.store is None and not ends
    assert watch.announce_failure(), "nobody else can tell"


def test_one_process_has_no_thread(monkeypatch):
    monkeypatch.setattr(watch, "LAUNCHED", False)
    watch.begin(None, 0, 1)
    assert watch._watch is None and watch.announce_failure() and watch.whose() == ""


# --- the launcher


def test_under_plain_python_a_dead_parent_is_no_reason_to_stop(monkeypatch):
    monkeypatch.setattr(watch, "PARENT", 0)
    monkeypatch.setattr(watch, "LAUNCHED", False)
    assert not watch.launcher_is_gone()
    monkeypatch.setattr(watch, "LAUNCHED", True)
    assert watch.launcher_is_gone()
    monkeypatch.setattr(watch, "PARENT", os.getppid())
    assert not watch.launcher_is_gone()


def launched(environment: dict[str, str], before: str = "") -> bool:
    done = subprocess.run(
        [sys.executable, "-c", f"{before}\nfrom runtime import watch\nprint(watch.has_launcher())"],
        env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=90, check=True,
    )  # fmt: skip
    return {"True\n": True, "False\n": False}[done.stdout]


def test_accelerate_is_a_launcher_also_of_one_process():
    """It sets none of torchrun's variables there: its process went on for ever when it was gone."""
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    plain = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "TORCHELASTIC_"))}
    line = ["--cpu", "--num_processes=1", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "train.py"]
    _, environment = prepare_simple_launcher_cmd_env(launch_command_parser().parse_args(line))
    assert launched({**plain, **environment}) and launched({**plain, "TORCHELASTIC_RUN_ID": "none"})
    assert not launched(plain)
    assert not launched(plain, "from runtime import distributed; distributed.start_training('bf16')")


def test_an_orphan_ends():
    """Without --signals-to-handle SIGUSR1 killed the launcher, and its processes went on for ever."""
    work = (
        "import time\n"
        "from runtime import watch\n"
        "watch.orphan_grace_seconds = 0\n"
        "watch.begin(None, 0, 1)\n"
        "print('begun', flush=True)\n"
        "time.sleep(100)\n"
    )
    launcher = (
        "import subprocess, sys\n"
        f"process = subprocess.Popen([sys.executable, '-c', {work!r}], stdout=subprocess.PIPE)\n"
        "process.stdout.readline()\n"
    )
    env = {**os.environ, "TORCHELASTIC_RUN_ID": "none", "PYTHONPATH": str(ROOT)}
    # Returns when the last process that holds the pipe has ended.
    done = subprocess.run([sys.executable, "-c", launcher], env=env, stderr=subprocess.PIPE, text=True, timeout=90)
    assert done.stderr.startswith("error: the launcher (torchrun or accelerate) is gone") and done.stderr.count("\n") == 1


# --- attempts


def agree(store: TCPStore, world: int) -> list[str]:
    """What all processes of an attempt agree on."""
    names = [None] * world

    def join(rank: int) -> None:
        names[rank] = distributed.agree_on_attempt(store.clone(), rank, world)

    threads = [threading.Thread(target=join, args=(rank,), daemon=True) for rank in reversed(range(world))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return names


def test_every_attempt_has_a_name_of_its_own(server):
    """The launcher's store outlives its restarts: gloo met the addresses of killed processes there, and waited for them."""
    first, second, third = (agree(server, world) for world in (3, 3, 2))
    assert len({*first}) == len({*second}) == len({*third}) == 1 and None not in first + second + third
    assert len({*first, *second, *third}) == 3


def test_calls_of_a_killed_attempt_are_not_waited_for(server):
    server.set("call/1", "of one that was killed before it was answered")
    assert len(set(agree(server, 3))) == 1


def test_a_process_that_never_joins(server, monkeypatch):
    monkeypatch.setattr(distributed, "JOIN_SECONDS", 0.1)
    with pytest.raises(ValueError, match="processes that the launcher announced joined within 0"):
        distributed.agree_on_attempt(server, 0, 2)
