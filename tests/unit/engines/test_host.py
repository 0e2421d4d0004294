"""The process of an engine: results, environment, errors, hangs and ends."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.clocks import PlantedClock
from helpers.hosted import COMMANDS, group, host, model, wait_until_empty

from opdctl.engines import host as host_module
from opdctl.engines import host_process
from opdctl.engines.base import Request, ScoreRequest
from opdctl.errors import OpdctlError
from opdctl.models.startup import measure_stage
from opdctl.recipe.schema import Sampling, Score

PROMPT = np.array([3, 4, 5], np.int32)
WORDS = {
    "start": "its start",
    "load_weights": "loading weights",
    "generate": "sampling",
    "score": "scoring",
    "release": "falling asleep",
}


def run(engine, command):
    """Let an engine run a command of the protocol."""
    if command == "start":
        return engine.logprob_metadata
    if command == "generate":
        return engine.generate([Request(PROMPT, 7)], Sampling(), 4, lambda n: None)
    if command == "score":
        return engine.score([ScoreRequest(PROMPT, PROMPT)], Score(), lambda n: None)
    if command == "load_weights":
        return engine.load_weights(model("other"))
    return engine.release(keep_weights=True) if command == "release" else engine.close()


@pytest.fixture
def start():
    """A function that starts a host, which is ended after the test."""
    engines = []

    def start(*arguments, **options):
        engines.append(host(*arguments, **options))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


def test_results_are_arrays_and_progress_is_reported(start):
    engine, progress = start(), []
    assert engine.logprob_metadata == {"engine": "faulty", "weights": "model"}
    (completion,) = engine.generate([Request(PROMPT, 7)], Sampling(), 4, progress.append)
    np.testing.assert_array_equal(completion.response_ids, [5, 4, 3])
    assert completion.response_ids.dtype == np.int32
    (scores,) = engine.score([ScoreRequest(PROMPT, PROMPT)], Score(), progress.append)
    assert scores.logprobs.dtype == np.float32
    assert progress == [1, 1]
    engine.load_weights(model("other"))
    assert engine._call("path") == "other"


def test_wait_for_the_process_is_start_up(start, monkeypatch):
    """The process of an engine that has given its memory back starts anew within the next call."""
    clock = PlantedClock(monkeypatch)
    clock.delay(host_module.HostedEngine, "_spawn", 60.0)
    clock.delay(host_module.HostedEngine, "_stream", 2.0)
    engine = start()
    engine._can_sleep = False
    run(engine, "start")
    run(engine, "release")
    with measure_stage() as times:
        run(engine, "generate")
    assert (times.work, times.startup) == (2.0, 60.0)


def test_metadata_are_those_of_the_loaded_weights(start):
    engine = start()
    for name in ("first", "second"):
        engine.load_weights(model(name))
        assert engine.logprob_metadata["weights"] == name
    engine.close()
    assert engine.logprob_metadata["weights"] == "second"
    assert engine._process is None
    engine.load_weights(model("third"))
    assert engine.logprob_metadata["weights"] == "third"


def test_host_has_its_gpus_and_no_variable_of_a_launcher(start, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR"):
        monkeypatch.setenv(name, "1")
    for name in ("MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.setenv(name, "29500")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setenv("KEPT", "yes")
    environment = start(gpus=("2", "3"))._call("environment")
    assert environment["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert environment["KEPT"] == "yes"
    assert not [name for name in environment if "RANK" in name or "WORLD" in name or "MASTER" in name]
    assert not [name for name in environment if "ELASTIC" in name]


def test_hosts_start_at_the_same_time(start):
    """Both processes exist before the first one is asked for anything."""
    engines = [start(), start()]
    assert len({engine._process.pid for engine in engines}) == 2
    assert [engine.logprob_metadata["engine"] for engine in engines] == ["faulty"] * 2


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "close"])
@pytest.mark.parametrize(("fault", "words"), [("kill", "was killed by SIGKILL"), ("exit", "ended with exit code 3")])
def test_end_of_a_host_is_one_error_with_its_last_lines(start, fault, words, command):
    engine = start(fault, command, worker=True)
    pid = engine._process.pid
    with pytest.raises(OpdctlError) as error:
        run(engine, command)
    assert error.value.kind == "failed_engine"
    assert words in error.value.detail
    assert WORDS[command] in error.value.detail
    assert ("the last words of the engine" in error.value.detail) == (fault == "exit")
    wait_until_empty(pid, 0)


@pytest.mark.parametrize(
    ("fault", "command", "device", "words"),
    [
        ("stop", "start", "cpu", "has not responded for 6 seconds"),
        ("hang", "start", "cpu", "has used neither the CPU nor a disk for 6 seconds"),
        ("hang", "load_weights", "cpu", "has used neither the CPU nor a disk for 6 seconds"),
        ("hang", "generate", "cpu", "has used neither the CPU nor a disk for 6 seconds"),
        ("spin", "score", "cuda", "has finished no forward pass for 3 seconds"),
    ],
)
def test_hang_is_an_error(start, monkeypatch, fault, command, device, words):
    monkeypatch.setattr(host_module, "HANG_SECONDS", 6.0)
    monkeypatch.setattr(host_module, "PASS_SECONDS", 3.0)
    engine = start(fault, command, worker=True, device=device)
    pid = engine._process.pid
    with pytest.raises(OpdctlError, match=f"{words} during {WORDS[command]}") as error:
        run(engine, command)
    assert error.value.kind == "failed_engine"
    wait_until_empty(pid, 0)


def test_load_from_a_slow_disk_is_no_hang(start, monkeypatch):
    monkeypatch.setattr(host_module, "HANG_SECONDS", 6.0)
    engine = start("slow_read", "load_weights")
    engine.load_weights(model("other"))
    assert engine._call("path") == "other"


def test_work_of_descendants_counts():
    """Also in another process group, as of ninja's compilers."""

    def work():
        return host_process._measure_work()[0] - time.process_time()

    compiler = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'], {})"
    before = work()
    ninja = subprocess.Popen(
        [sys.executable, "-c", compiler.format("process_group=0, timeout=5")], stderr=subprocess.DEVNULL
    )
    while work() - before < 0.2:
        assert ninja.poll() is None
    ninja.wait()
    assert work() - before > 0.2  # of processes that have ended


@pytest.mark.parametrize(
    ("change", "seconds"),
    [
        ({}, host_module.HANG_SECONDS),
        ({"cpu_seconds": 0.001}, host_module.HANG_SECONDS),
        ({"disk_faults": 1}, host_module.PASS_SECONDS),
        ({"cpu_seconds": 2.0}, host_module.PASS_SECONDS),
        ({"cpu_seconds": -9.0}, host_module.PASS_SECONDS),  # a worker has ended
        ({"cpu_seconds": 2.0, "num_passes": 1}, None),
    ],
)
@pytest.mark.parametrize("has_short_passes", [True, False])
def test_hang_is_found_when_there_was_no_progress_for_too_long(monkeypatch, change, seconds, has_short_passes):
    """Each heartbeat, every 2 seconds, has the numbers of the one before plus `change`."""
    now = 1000.0
    monkeypatch.setattr(host_module, "time", SimpleNamespace(monotonic=lambda: now))
    detection, progress = host_module._HangDetection(has_short_passes), dict.fromkeys(host_module.Progress._fields, 0)
    while now < 1400 and not detection.describe():
        detection.note(host_module.Progress(**progress))
        progress = {name: value + change.get(name, 0) for name, value in progress.items()}
        now += 2
    if seconds is None or (seconds == host_module.PASS_SECONDS and not has_short_passes):
        assert now == 1400
    else:
        assert now - 1000 == pytest.approx(seconds, abs=4)


@pytest.mark.parametrize("command", ["start", "generate", "score"])
def test_error_of_opdctl_arrives_with_kind_detail_and_hint(start, command):
    engine = start("opdctl_error", command)
    with pytest.raises(OpdctlError) as error:
        run(engine, command)
    found = error.value
    assert (found.kind, found.detail, found.hint) == ("unsupported_setting", "score.entropy: not here", "unset it")
    assert "FAULTS" in found.__notes__[0]  # the traceback of the engine's process, for -v
    if command != "start":  # the engine is intact
        assert engine._call("path") == "model"


@pytest.mark.parametrize(
    ("fault", "error", "text"),
    [
        ("library_error", RuntimeError, "LibraryError: CUDA out of memory"),
        ("memory_error", MemoryError, "8 GiB"),
        ("system_exit", RuntimeError, "SystemExit: 4"),
    ],
)
def test_other_errors_arrive_without_the_classes_of_libraries(start, fault, error, text):
    with pytest.raises(error, match=text):
        run(start(fault, "generate"), "generate")


def test_signals_to_the_host_reach_its_parent(start):
    with pytest.raises(KeyboardInterrupt):
        run(start("interrupt", "score"), "score")
    terminated = []
    signal.signal(signal.SIGTERM, lambda *_: terminated.append(True))
    try:
        run(start("terminate", "score"), "score")
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert terminated


def test_interrupted_call_ends_the_host_at_once(start):
    engine = start("hang", "generate", worker=True)
    engine.logprob_metadata  # noqa: B018 - waits for the start
    pid = engine._process.pid

    def interrupt(count):
        raise KeyboardInterrupt

    before = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        engine.generate([Request(PROMPT, 7)], Sampling(), 4, interrupt)
    assert time.monotonic() - before < host_module.CLOSE_SECONDS
    wait_until_empty(pid, 0)


@pytest.mark.parametrize("fault", ["none", "kill", "hang", "library_error"])
def test_close_leaves_no_process(start, monkeypatch, fault):
    monkeypatch.setattr(host_module, "CLOSE_SECONDS", 3.0)
    engine = start(fault, "close", worker=True)
    engine.logprob_metadata  # noqa: B018 - waits for the start
    pid = engine._process.pid
    assert len(group(pid)) >= 2
    engine.close()
    wait_until_empty(pid, 0)
    engine.close()


def test_closed_engine_starts_again_with_the_latest_weights(start):
    engine = start()
    engine.close()
    engine.load_weights(model("other"))
    assert engine._process is None
    assert engine._call("path") == "other"


def test_engine_that_cannot_load_weights_continues_in_a_new_process(start):
    """As vLLM, whose second instance in a process may find no memory."""
    engine = start("replace", "none", worker=True)
    engine.logprob_metadata  # noqa: B018 - waits for the start
    pid = engine._process.pid
    engine.load_weights(model("other"))
    assert engine._process.pid != pid
    wait_until_empty(pid, 0)
    assert engine._call("path") == "other"
    assert engine._call("handover") == {"predecessor": pid}
    engine.close()
    assert engine._call("handover") is None  # of a process that loads weights as any other


def test_failed_load_leaves_the_weights_of_before(start):
    engine = start("library_error", "load_weights")
    with pytest.raises(RuntimeError):
        engine.load_weights(model("other"))
    assert engine._process is None  # it may have some of the new ones
    assert engine._call("path") == "model"


def test_warning_reaches_the_user_once(start, capsys):
    for _ in range(2):
        engine = start("warning", "score")
        run(engine, "score")
        run(engine, "score")
    assert capsys.readouterr().err.count("warning: a warning of the engine") == 1


PARENT = """
import subprocess, sys, time
from helpers.hosted import host
from test_host import run
engine = host("hang", sys.argv[1], worker=True)
other = subprocess.Popen(["sleep", "60"], pass_fds=[engine._connection.fileno()] * int(sys.argv[2]))
print(engine._process.pid, other.pid, flush=True)
run(engine, "start")
run(engine, sys.argv[1])
"""


@pytest.fixture
def parent():
    """A function that starts a process with a host that hangs in a command, and returns it and the host's id.

    shares_connection: another process keeps the connection open.
    """
    parents, others = [], []

    def start_parent(command, *, shares_connection=False):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
        arguments = [sys.executable, "-c", PARENT, command, str(int(shares_connection))]
        parent = subprocess.Popen(arguments, stdout=subprocess.PIPE, env=environment)
        parents.append(parent)
        pid, other = map(int, parent.stdout.readline().split())
        others.append(other)
        deadline = time.monotonic() + 60
        while len(group(pid)) < 2:
            assert time.monotonic() < deadline, "the host has no worker"
            time.sleep(0.05)
        time.sleep(1)
        return parent, pid

    yield start_parent
    for parent in parents:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    for other in others:
        with contextlib.suppress(ProcessLookupError):
            os.kill(other, signal.SIGKILL)


@pytest.mark.parametrize("command", ["start", "load_weights", "generate", "close"])
def test_host_and_its_workers_end_with_a_killed_parent(parent, command):
    process, pid = parent(command)
    process.kill()
    wait_until_empty(pid)


def test_kernel_ends_a_host_with_its_parent(parent):
    """Without the end of the connection, which another process has open."""
    process, pid = parent("score", shares_connection=True)
    process.kill()
    wait_until_empty(pid)


def test_kernel_ends_the_workers_with_their_host(parent):
    """Without the host's parent, which is stopped."""
    process, pid = parent("score")
    process.send_signal(signal.SIGSTOP)
    os.kill(pid, signal.SIGKILL)
    wait_until_empty(pid)


def test_host_and_its_workers_end_with_the_connection(start):
    """Where the kernel does not end them: the parent is alive."""
    engine = start("hang", "release", worker=True)
    engine.logprob_metadata  # noqa: B018 - waits for the start
    pid = engine._process.pid
    engine._send("release", keep_weights=True)
    engine._connection.close()
    wait_until_empty(pid)


def test_start_on_a_gpu_is_reported(start, capsys):
    """It takes minutes with vLLM."""
    start()
    assert capsys.readouterr().err == ""
    start(device="cuda")
    assert "starting an engine for model" in capsys.readouterr().err
