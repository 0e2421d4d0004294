"""Python with a terminal as stderr."""

import os
import pty
import subprocess
import sys


def run_at_terminal(*arguments: str, term: str = "xterm") -> str:
    """Run Python with a terminal of 100 columns as stderr, and return its output there."""
    parent, child = pty.openpty()
    variables = os.environ | {"COLUMNS": "100", "LINES": "40", "TERM": term}
    command = [sys.executable, *arguments]
    with subprocess.Popen(command, stderr=child, stdout=subprocess.DEVNULL, env=variables) as process:
        os.close(child)
        output = b""
        try:
            while chunk := os.read(parent, 4096):
                output += chunk
        except OSError:  # Linux raises EIO after the child has closed its end
            pass
    os.close(parent)
    assert process.returncode == 0, output.decode()
    return output.decode()
