"""Bounded JSON and TOML, and the kinds of files that are opened."""

import os
import socket

import pytest

from opdctl.artifacts import parsing
from opdctl.artifacts.parsing import MAX_DEPTH, MAX_DIGITS, MAX_TOML_BYTES

JSON_BOMBS = [
    "[" * 500 + "]" * 500,
    "[" * 10**6,
    '{"a":' * 300 + "1" + "}" * 300,
    "7" * (MAX_DIGITS + 1),
    "-" + "7" * 10**6,
]
TOML_BOMBS = [
    "x = " + "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1),
    "x = " + "[" * 10**5,
    "x = " + "7" * 10**5,
    "x = 0x" + "f" * 17,
    "x = -9223372036854775809",
    ".".join(["a"] * 10**5) + " = 1",
    "x = {" + ".".join(['"a"'] * 10**4) + " = 1}",
    "[" + " . ".join(["a"] * 10**4) + "]",
    "#" * (MAX_TOML_BYTES + 1),
    "x = \udcff",
]


@pytest.mark.parametrize("text", JSON_BOMBS, ids=range(len(JSON_BOMBS)))
def test_json_beyond_a_bound_is_refused(text):
    with pytest.raises(ValueError, match=r"nested|integer|Exceeds"):
        parsing.parse_json(text)


def test_json_within_the_bounds_is_read():
    depth = MAX_DEPTH - 1
    assert parsing.parse_json('{"model_max_length": 1000000000000000019884624838656}')["model_max_length"] > 2**64
    assert parsing.parse_json("[" * depth + "]" * depth)


@pytest.mark.parametrize("text", TOML_BOMBS, ids=range(len(TOML_BOMBS)))
def test_toml_beyond_a_bound_is_refused(text):
    with pytest.raises(ValueError, match=r"nested|integer|limit|parts|bytes|utf-8"):
        parsing.parse_toml(text.encode(errors="surrogateescape"))


def test_toml_within_the_bounds_is_read():
    text = '\ufeffseed = 9223372036854775807\ntext = "a.b.c. d.e."\n[a.b.c]\nx = [[1], [2.5]]\n'
    assert parsing.parse_toml(text.encode())["a"] == {"b": {"c": {"x": [[1], [2.5]]}}}


def test_only_regular_files_are_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "link-to-fifo").symlink_to("fifo")
    (tmp_path / "directory").mkdir()
    with socket.socket(socket.AF_UNIX) as opened:
        monkeypatch.chdir(tmp_path)  # a socket's path is short
        opened.bind("socket")
        for name in ("fifo", "socket", "link-to-fifo", "directory", "/dev/zero"):
            with pytest.raises(ValueError, match="not a regular file"):
                parsing.read_bytes(tmp_path / name, follow_links=True)
    with pytest.raises(ValueError, match="symbolic link"):
        parsing.read_bytes(tmp_path / "link")
    assert parsing.read_bytes(tmp_path / "link", follow_links=True) == b"x"
    with pytest.raises(ValueError, match="at most 0"):
        parsing.read_bytes(tmp_path / "file", 0)


@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_file_that_is_replaced_after_its_check_is_not_read(tmp_path, monkeypatch, kind):
    (tmp_path / "other").write_text("x")
    path = tmp_path / "file"

    def replaced(path, *, follow_links):
        path.symlink_to(tmp_path / "other") if kind == "link" else os.mkfifo(path)

    monkeypatch.setattr(parsing, "check_regular", replaced)
    with pytest.raises((ValueError, OSError), match=r"not a regular file|symbolic links"):
        parsing.read_bytes(path)
