"""Bounded parsers of files that others wrote, JSON and TOML. Imports no torch.

A file is data that nobody vouches for. Its size, depth, digits and claims are bounded before they cost memory, and
every fault is a ValueError with the reason. The caller adds the path.
"""

import contextlib
import json
import os
import re
import stat
import tomllib
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 512 * 2**20
"""The largest tokenizer.json has a tenth of it."""
MAX_HEADER_BYTES = 100_000_000
"""Of safetensors: the limit of its library."""
TEXT_SUFFIXES = (".json", ".jinja", ".md", ".txt", ".py")
MAX_TOML_BYTES = 2**18
MAX_LINE_BYTES = 64 * 2**20
"""Of one row of JSON lines: a row of a code data set has 1 MiB of test cases."""
MAX_DEPTH = 64
MAX_KEY_PARTS = 32
LONG_KEY = re.compile(rf"""(?<![\w-])(?:(?:[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*){{{MAX_KEY_PARTS}}}""")
MAX_DIGITS = 100
"""Of an integer: tokenizer configs have a `model_max_length` of 31 digits."""
MAX_TOML_INTEGER = 2**63


def check_regular(path: Path, *, follow_links: bool = False) -> os.stat_result:
    """Check that `path` is a regular file, so that opening it neither blocks nor reads something else.

    follow_links: a symbolic link to a regular file is allowed, as in a model directory of the hub's cache.

    Raises:
        ValueError: it is a link, or not a regular file.
        OSError: it does not exist.
    """
    state = path.stat() if follow_links else path.lstat()
    if stat.S_ISLNK(state.st_mode):
        raise ValueError("is a symbolic link")
    if not stat.S_ISREG(state.st_mode):
        raise ValueError("is not a regular file")
    return state


@contextlib.contextmanager
def open_regular(path: Path, *, follow_links: bool = False) -> Iterator[tuple[BufferedReader, int]]:
    """Open a regular file for reading; yield it and its size.

    Another process may replace a file after the check of its name, so the opened one is checked again.

    Raises:
        ValueError: it is a link, or not a regular file.
        OSError: it does not exist, or has become a link.
    """
    check_regular(path, follow_links=follow_links)  # before: opening a device may have an effect
    flags = os.O_NONBLOCK | (0 if follow_links else os.O_NOFOLLOW)
    with open(path, "rb", opener=lambda name, mode: os.open(name, mode | flags)) as file:
        state = os.fstat(file.fileno())
        if not stat.S_ISREG(state.st_mode):
            raise ValueError("is not a regular file")
        yield file, state.st_size


def read_bytes(path: Path, max_bytes: int = MAX_JSON_BYTES, *, follow_links: bool = False) -> bytes:
    """Return the content of a regular file. Raises ValueError if it is another kind of file or larger."""
    with open_regular(path, follow_links=follow_links) as (file, size):
        if size > max_bytes:
            raise ValueError(f"has {size} bytes, at most {max_bytes} are read")
        return file.read(size)


def check_size(path: Path) -> None:
    """Check that a file is not larger than its kind allows, before all of it is hashed: a sparse file takes no space.

    Raises:
        ValueError: a text file is too large, or a safetensors file has another size than its header describes.
    """
    with open_regular(path) as (file, size):
        if path.suffix in TEXT_SUFFIXES and size > MAX_JSON_BYTES:
            raise ValueError(f"has {size} bytes, at most {MAX_JSON_BYTES} are read")
        if path.suffix != ".safetensors":
            return
        length = int.from_bytes(file.read(8), "little")
        if length > min(MAX_HEADER_BYTES, size):
            raise ValueError(f"a header of {length} bytes in a file of {size} bytes")
        header = parse_json(file.read(length))
    try:
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        described = 8 + length + max(ends, default=0)
    except (LookupError, TypeError, AttributeError):
        raise ValueError("has an invalid header") from None
    if size != described:
        raise ValueError(f"has {size} bytes, its header describes {described}")


def parse_json(data: bytes | str, *, unique_keys: bool = False) -> Any:
    """Return the JSON value in `data`. Raises ValueError if there is none, or if it exceeds a bound.

    unique_keys: an object with two equal keys is an error, too. Otherwise the last one holds.
    """
    try:
        value = json.loads(data, parse_int=_parse_int, object_pairs_hook=_unique_items if unique_keys else None)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    _check_depth(value)
    return value


def _parse_int(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def _unique_items(items: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(unique := dict(items)) < len(items):
        names = [name for name, _ in items]
        raise ValueError(f"key `{next(name for name in names if names.count(name) > 1)}` occurs twice")
    return unique


def parse_toml(data: bytes) -> dict[str, Any]:
    """Return the TOML table in `data`. Raises ValueError if there is none, or if it exceeds a bound."""
    if len(data) > MAX_TOML_BYTES:
        raise ValueError(f"has {len(data)} bytes, at most {MAX_TOML_BYTES} are read")
    text = data.decode("utf-8-sig")
    if LONG_KEY.search(text):  # a dotted key of n parts takes the parser n² steps
        raise ValueError(f"a key of more than {MAX_KEY_PARTS} parts")
    try:
        value = tomllib.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    for number in _check_depth(value):
        if abs(number) > MAX_TOML_INTEGER:
            raise ValueError(f"an integer of {number.bit_length()} bits")
    return value


def _check_depth(value: Any) -> list[int]:
    """Return the integers in a parsed value. Raises ValueError if it is nested too deeply."""
    integers, level = [], [value]
    for _ in range(MAX_DEPTH):
        integers += [each for each in level if isinstance(each, int)]
        level = [item for each in level for item in _items(each)]
        if not level:
            return integers
    raise ValueError(f"nested more than {MAX_DEPTH} levels deep")


def _items(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value
