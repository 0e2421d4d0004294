"""Text of messages, pasted into a shell."""

import re
import subprocess
from pathlib import Path

from helpers.commands import Result, invoke

RECORD = 'opdctl() { printf \'%s\\0\' "$#" "$@" >> calls; }\n'
"""In place of the program: it records its arguments. Everything else of the text is run by bash."""


def paste(text: str, folder: Path) -> list[list[str]]:
    """Run a text in bash, in `folder`, as if it was pasted there. Return the arguments of each call of opdctl."""
    calls = folder / "calls"
    calls.unlink(missing_ok=True)
    script = f"{RECORD}{text}\n"
    done = subprocess.run(["bash", "-euc", script], cwd=folder, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), f"{text}\n{done.stderr}"
    words = calls.read_text().split("\0")[:-1] if calls.exists() else []
    calls.unlink(missing_ok=True)
    found = []
    while words:
        count = int(words.pop(0))
        found.append(words[:count])
        words = words[count:]
    return found


def run_pasted(text: str, folder: Path) -> Result:
    """Paste a command of opdctl, and run it with the arguments that bash passes. folder: the working directory."""
    (words,) = paste(text, folder)
    return invoke(*words)


def commands_in(result: Result) -> list[str]:
    """Return the commands that a result names: those of its `next` lines, and those in backticks."""
    lines = (result.out + result.err).splitlines()
    following = [found[1] for line in lines if (found := re.search(r"(?:^|; )next:? +(.+)$", line))]
    quoted = re.findall(r"`((?:opdctl|hf) [^`]+)`", "\n".join(lines))
    return list(dict.fromkeys([*following, *quoted]))
