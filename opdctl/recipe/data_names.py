"""Names of prompt sources and benchmarks: files, patterns, data sets of the hub. Imports no torch."""

import re
from pathlib import Path

TABLE_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
COMPRESSED_SUFFIXES = tuple(f"{suffix}{packed}" for suffix in TABLE_SUFFIXES[:-1] for packed in (".gz", ".zst"))
HUB_BENCHMARK_PATTERN = re.compile(
    r"hub:(?P<id>(?:[\w.-]{1,96}/)?[\w.-]{1,96})(?::(?P<subset>[^:@/]{1,96}))?(?:@(?P<revision>[^:@]{1,96}))?", re.ASCII
)
"""A data set of the hub as a benchmark: hub:ORG/NAME[:SUBSET][@REVISION]."""


def is_data_file(name: str) -> bool:
    """Whether the name of a benchmark or of a prompt source is that of a file."""
    return name.lower().endswith((*TABLE_SUFFIXES, *COMPRESSED_SUFFIXES)) and not is_hub_benchmark(name)


def is_local(source: str | list[str]) -> bool:
    """Whether a prompt source is local data, by its name or because it exists."""
    if isinstance(source, list):
        return True
    try:
        return is_data_file(source) or is_pattern(source) or Path(source).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long; the home of an unknown user
        return False


def is_pattern(name: str) -> bool:
    """Whether the name of a prompt source is a pattern of local files."""
    return any(char in name for char in "*?[")


def data_file_stem(name: str) -> str:
    """Return the name of a data file without directories and endings."""
    base = name.rpartition("/")[2]
    *stem, _ = [part for part in base.split(".") if part.lower() not in ("gz", "zst")]
    return ".".join(stem)


def is_hub_benchmark(name: str) -> bool:
    """Whether the name of a benchmark is that of a data set of the hub."""
    return HUB_BENCHMARK_PATTERN.fullmatch(name) is not None


def is_named_by_data(bench: str) -> bool:
    """Whether a benchmark is a file or a data set of the hub. The others are registered."""
    return is_data_file(bench) or is_hub_benchmark(bench)


def benchmark_directory(name: str) -> str:
    """Return the name of a benchmark's directory under eval/: `ORG-NAME-SUBSET` of hub:ORG/NAME:SUBSET@REVISION."""
    if is_hub_benchmark(name):
        return re.sub(r"[^\w-]", "-", name.removeprefix("hub:").partition("@")[0], flags=re.ASCII)
    return data_file_stem(name) if is_data_file(name) else name
