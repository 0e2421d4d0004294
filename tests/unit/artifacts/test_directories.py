import hashlib
import os

import pytest

from opdctl.artifacts import directories, files
from opdctl.errors import ExitCode, OpdctlError


def write(path, text="1"):
    directories.write_directory(path, lambda folder: (folder / "a").write_text(text))
    return directories.complete_directory(path, {})


def test_directory_is_written_completely_or_not_at_all(tmp_path):
    digests = write(tmp_path / "m")
    directories.check_directory(tmp_path / "m", digests)

    def fail(folder):
        (folder / "a").write_text("2")
        raise RuntimeError("torn")

    with pytest.raises(RuntimeError, match="torn"):
        directories.write_directory(tmp_path / "m", fail)
    directories.check_directory(tmp_path / "m", digests)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    digests = write(tmp_path / "m", "3")
    directories.check_directory(tmp_path / "m", digests)


def test_directory_may_be_flushed_and_hashed_by_several_processes_later(tmp_path, monkeypatch):
    flushed, path = [], tmp_path / "m"
    for module in (directories, files):
        monkeypatch.setattr(module, "fsync_path", flushed.append)

    def fill(folder):
        for name in ("a", "b", "c/d"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(name)

    directories.write_directory(path, fill, flush=False)
    assert flushed == []
    known = directories.flush_and_hash(path, ["a"])
    assert flushed == [path / "a"]
    assert known == {"a": (hashlib.sha256(b"a").hexdigest(), 1)}

    def read(paths):
        assert path / "a" not in paths  # what is known is not read again
        return {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in paths}

    monkeypatch.setattr(directories, "sha256_files", read)
    digests = directories.complete_directory(path, known)
    assert digests == {name: hashlib.sha256(name.encode()).hexdigest() for name in ("a", "b", "c/d")}
    assert flushed[-2:] == [path, tmp_path]
    assert {path / name for name in ("a", "b", "c", "c/d")} <= {*flushed}


def test_file_that_another_process_has_changed_is_corrupt(tmp_path):
    write(tmp_path / "m")
    known = directories.flush_and_hash(tmp_path / "m", ["a"])
    (tmp_path / "m/a").write_text("more")
    with pytest.raises(OpdctlError) as caught:
        directories.complete_directory(tmp_path / "m", known)
    assert caught.value.kind == "corrupt_artifact"
    (tmp_path / "m/a").unlink()
    with pytest.raises(OpdctlError) as caught:
        directories.flush_and_hash(tmp_path / "m", ["a"])
    assert caught.value.kind == "corrupt_artifact"


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda folder: (folder / "b").write_text("more"), "b"),
        (lambda folder: (folder / "a").write_text("2"), "a"),
        (lambda folder: (folder / "a").unlink(), "a"),
        (lambda folder: (folder / "a").rename(folder / "c"), "a"),
        (lambda folder: (folder / "link").symlink_to(folder / "a"), "link"),
    ],
)
def test_changed_directory_is_corrupt(tmp_path, change, name):
    digests = write(tmp_path / "m")
    change(tmp_path / "m")
    with pytest.raises(OpdctlError) as caught:
        directories.check_directory(tmp_path / "m", digests, "do this")
    assert (caught.value.kind, caught.value.code) == ("corrupt_artifact", ExitCode.BAD_DATA)
    assert str(tmp_path / "m" / name) in caught.value.message


def test_model_card_and_hidden_files_do_not_count(tmp_path):
    digests = write(tmp_path / "m")
    (tmp_path / "m" / directories.CARD_FILE).write_text("a card")
    directories.check_directory(tmp_path / "m", digests)
    directories.check_directory(tmp_path / "m", {**digests, directories.CARD_FILE: "0" * 64})  # of an older run
    assert directories.directory_digests(tmp_path / "m") == digests
    (tmp_path / "m" / ".DS_Store").write_text("of a file manager")
    directories.check_directory(tmp_path / "m", digests)


@pytest.mark.parametrize("can_link", [True, False])
def test_link_or_copy_takes_files_and_directories_without_hidden_files(tmp_path, monkeypatch, can_link):
    old, new = tmp_path / "old", tmp_path / "new"
    for name in ("a/b/one", "a/two", "a/.hidden", "three", "four"):
        (old / name).parent.mkdir(parents=True, exist_ok=True)
        (old / name).write_text(name)
    if not can_link:

        def fail(*paths):
            raise OSError(18, "Invalid cross-device link")

        monkeypatch.setattr(os, "link", fail)
    assert directories.link_or_copy([old / "a", old / "three"], old, new) == 3
    files = {str(path.relative_to(new)): path for path in new.rglob("*") if path.is_file()}
    assert {name: path.read_text() for name, path in files.items()} == {
        name: name for name in ("a/b/one", "a/two", "three")
    }
    assert all(os.path.samefile(path, old / name) == can_link for name, path in files.items())


def test_link_or_copy_skips_a_file_that_a_worker_removes_meanwhile(tmp_path, monkeypatch):
    old, new, link = tmp_path / "old", tmp_path / "new", os.link
    (old / "a").mkdir(parents=True)
    for name in ("kept", "removed"):
        (old / "a" / name).write_text(name)

    def remove_first(source, target):
        if source.name == "removed":
            source.unlink()
        link(source, target)

    monkeypatch.setattr(os, "link", remove_first)
    assert directories.link_or_copy([old / "a"], old, new) == 1
    assert [path.name for path in new.rglob("*") if path.is_file()] == ["kept"]
