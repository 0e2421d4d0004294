"""Files in memory: another process reads them through links, and the system frees them when their process ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from opdctl.artifacts.memory_directory import MemoryDirectory, make_temporary_directory, remove_temporary_directory

CREATE_AND_DIE = """
import os, signal, sys
from pathlib import Path
from opdctl.artifacts.memory_directory import MemoryDirectory
directory = MemoryDirectory(Path(sys.argv[1]))
with directory.create_file(directory.path / "weights") as file:
    file.write(b"content")
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def directory(tmp_path: Path) -> MemoryDirectory:
    """One with a file in memory and one on disk."""
    directory = MemoryDirectory(tmp_path / "student")
    (directory.path / "adapter").mkdir(parents=True)
    (directory.path / "adapter/config.json").write_text("{}")
    with directory.create_file(directory.path / "weights") as file:
        file.write(b"content")
    return directory


def test_another_process_reads_the_file_until_it_is_closed(directory: MemoryDirectory) -> None:
    path = directory.path / "weights"
    read = [sys.executable, "-c", f"print(open({str(path)!r}).read())"]
    assert subprocess.run(read, check=True, capture_output=True, text=True).stdout == "content\n"
    assert str(path.resolve()).startswith("/memfd:")
    directory.close()
    assert path.is_symlink()
    assert not path.exists()


def test_open_descriptors_are_those_of_the_files(directory: MemoryDirectory) -> None:
    before = len(os.listdir("/proc/self/fd"))
    directory.close()
    directory.close()
    assert len(os.listdir("/proc/self/fd")) == before - 1


def test_memory_of_a_killed_process_is_free(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", CREATE_AND_DIE, tmp_path], check=False)
    assert (tmp_path / "weights").is_symlink()
    assert not (tmp_path / "weights").exists()


def test_copies_are_files(directory: MemoryDirectory, tmp_path: Path) -> None:
    assert directory.names_on_disk() == ["adapter/config.json"]
    directory.copy_files(["weights", "adapter/config.json"], tmp_path / "copy")
    directory.close()
    assert (tmp_path / "copy/weights").read_bytes() == b"content"
    assert not (tmp_path / "copy/weights").is_symlink()
    assert (tmp_path / "copy/adapter/config.json").read_text() == "{}"


def test_temporary_directory_is_removed_with_all_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = make_temporary_directory("step-00001")
    assert path.name == "step-00001"
    (path / "link").symlink_to("/nowhere")
    remove_temporary_directory(path)
    assert not list(tmp_path.iterdir())
