"""The end of the command's process, and what it sets at its start."""

import subprocess
import sys

START = """
import atexit, gc, sys, threading, time
from opdctl import signals
from opdctl.__main__ import main
atexit.register(lambda: print("threshold", gc.get_threshold()[0]))
"""
LIST = "sys.argv = ['opdctl', 'list', 'engines', '--json']\nmain()\n"
THREAD = """
from opdctl.cli import main as command_line
is_ending, end_process = threading.Event(), command_line._end_process
command_line._end_process = lambda end: (is_ending.set(), end_process(end))
threading.Thread(target=lambda: (is_ending.wait(), time.sleep(0.5), print("delayed")), name={name}).start()
"""


def run(code: str) -> tuple[int, str]:
    result = subprocess.run([sys.executable, "-c", START + code], capture_output=True, text=True)
    return result.returncode, result.stdout


def test_process_ends_with_its_exit_functions() -> None:
    code, output = run(LIST)
    assert code == 0
    assert "vllm" in output
    assert output.endswith("threshold 100000\n")


def test_process_waits_for_threads_that_are_no_daemons() -> None:
    assert run(THREAD.format(name="'upload'") + LIST)[1].endswith("delayed\nthreshold 100000\n")


def test_process_does_not_wait_for_an_episode_that_hangs() -> None:
    code, output = run(THREAD.format(name="signals.EPISODE_THREAD + '0'") + LIST)
    assert code == 0
    assert "vllm" in output
    assert "delayed" not in output


def test_exit_code_of_an_error_is_kept() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "opdctl", "status", "/nowhere"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
