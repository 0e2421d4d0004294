import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opdctl.artifacts import files, leases
from opdctl.artifacts.manifests import Manifest, PartRecord, RunRecord, UpdateRecord
from opdctl.errors import ExitCode, OpdctlError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["../x", "0" * 64]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "rows", "a"]), inner),
    max_leaves=12,
)


def error_of_reading(path: Path, form: Any = dict[str, Any]) -> OpdctlError:
    with pytest.raises(OpdctlError) as caught:
        files.read_json(path, form)
    assert caught.value.code == ExitCode.BAD_DATA
    assert str(path) in caught.value.message
    assert caught.value.hint
    return caught.value


# ── Writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_atomic_write_replaces_files_and_directories(tmp_path):
    for text in ("one", "two"):
        with files.atomic_write(tmp_path / "sub" / "file") as temporary:
            temporary.write_text(text)
        with files.atomic_write(tmp_path / "directory") as temporary:
            temporary.mkdir()
            (temporary / text).write_text(text)
    assert (tmp_path / "sub" / "file").read_text() == "two"
    assert [path.name for path in (tmp_path / "directory").iterdir()] == ["two"]
    assert not list(tmp_path.rglob(".tmp-*"))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failed_write_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")

    def write():
        with files.atomic_write(path) as temporary:
            temporary.write_text("new")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, "disk_full"),
        (errno.EDQUOT, "disk_full"),
        (errno.EROFS, "failed_write"),
        (errno.EACCES, "failed_write"),
        (errno.EIO, "failed_write"),
    ],
)
def test_errors_of_the_disk_name_the_file(tmp_path, number, kind):
    with pytest.raises(OpdctlError) as caught, files.atomic_write(tmp_path / "file"):
        raise OSError(number, os.strerror(number))
    assert (caught.value.kind, caught.value.code) == (kind, ExitCode.UNAVAILABLE)
    assert str(tmp_path / "file") in caught.value.message


def test_temporary_files_of_dead_processes_are_removed(tmp_path):
    child = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    )
    name = files.temporary_path(tmp_path / "part").name
    dead, alive = (tmp_path / name.replace(str(os.getpid()), pid) for pid in (child.stdout.strip(), str(os.getppid())))
    elsewhere = tmp_path / f".tmp-{'0' * 12}-{child.stdout.strip()}-1-part"
    for path in (dead, alive, elsewhere):
        path.write_text("half")
    files.remove_temporary_files(tmp_path)
    assert not dead.exists()
    assert alive.exists()
    assert elsewhere.exists()
    files.remove_temporary_files(tmp_path, include_running=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_missing", [False, True], ids=["linux", "no /proc"])
def test_temporary_file_of_another_container_is_never_removed(tmp_path, monkeypatch, is_missing):
    """Two containers share the host name, and process 1 of each is another process."""
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    monkeypatch.setattr(os, "getpid", lambda: int(ended.stdout))
    if is_missing:
        monkeypatch.setattr(Path, "read_text", raise_error)
    names = []
    for container in ("first", "second"):
        files.machine_id.cache_clear()
        leases._worker_token.cache_clear()
        if is_missing:
            monkeypatch.setattr(files.uuid, "getnode", lambda container=container: container)
        else:
            monkeypatch.setattr(Path, "read_text", lambda *_, container=container, **__: container)
        names.append(files.temporary_path(tmp_path / "part"))
    for path in names:
        path.write_text("half")
    files.remove_temporary_files(tmp_path)  # as the second container: its process of this number has ended
    assert [path.exists() for path in names] == [True, False]
    files.machine_id.cache_clear()
    leases._worker_token.cache_clear()


def raise_error(*_, **__):
    raise FileNotFoundError


def test_workers_of_one_host_name_and_number_write_to_different_files(tmp_path):
    first = files.temporary_path(tmp_path / "part")
    leases._worker_token.cache_clear()  # as in another container
    assert files.temporary_path(tmp_path / "part") != first


def test_required_space(tmp_path):
    files.require_space(tmp_path, 1, "a test")
    with pytest.raises(OpdctlError) as caught:
        files.require_space(tmp_path / "not" / "yet", 2**60, "a test")
    assert caught.value.kind == "disk_full"
    assert "a test" in caught.value.message


def test_lines_are_written_only_if_they_changed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    files.write_lines(path, [{"a": 1}])
    files.append_line(path, {"a": 2})
    inode = path.stat().st_ino
    files.write_lines(path, [{"a": 1}, {"a": 2}])
    assert path.stat().st_ino == inode
    files.write_lines(path, [{"a": 1}])
    assert path.read_text() == '{"a": 1}\n'


# ── Reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(
    value=st.dictionaries(st.text(max_size=6), JSON),
    form=st.sampled_from([PartRecord, Manifest, RunRecord, UpdateRecord]),
)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_is_read_as_it_was_written_or_refused(tmp_path: Path, value: dict, form: type) -> None:
    path = tmp_path / "any.json"
    for key in ("version", "schema_version", "digest"):
        value.pop(key, None)
    path.unlink(missing_ok=True)
    try:
        files.write_json(path, value)
    except UnicodeEncodeError:  # a lone surrogate, which nothing here writes
        return
    assert repr(files.read_json(path)) == repr(value)
    error_of_reading(path, form)


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"{", b'{"a": 1}', b"[" * 10**5, b"\xff", b"\0" * 9])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_bytes(text)
    assert error_of_reading(path).kind in ("corrupt_artifact", "checksum_mismatch")


def test_changed_value_is_a_checksum_mismatch(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})
    path.write_text(path.read_text().replace("1,", "2,"))
    assert error_of_reading(path).kind == "checksum_mismatch"


def test_missing_file_and_symbolic_link_are_corrupt(tmp_path):
    path = tmp_path / "a.json"
    assert error_of_reading(path).kind == "corrupt_artifact"
    files.write_json(tmp_path / "b.json", {"a": 1})
    path.symlink_to(tmp_path / "b.json")
    assert error_of_reading(path).kind == "corrupt_artifact"


@pytest.mark.parametrize(
    "version",
    [
        {"artifact": "rollout", "version": 99},
        {"artifact": "rollout", "version": 4},
        {"artifact": "rollout", "version": "5"},
        {"artifact": "rollout", "version": True},
        {"artifact": ["rollout"], "version": 6},
        {"artifact": "unknown", "version": 6},
        {"schema_version": 4},
        {"schema_version": 1},
    ],
    ids=str,
)
def test_other_versions_are_refused(tmp_path, version):
    path = tmp_path / "a.json"
    files.write_json(path, version)
    error = error_of_reading(path)
    assert error.kind == "unsupported_version"
    assert repr(version.get("version", version.get("schema_version"))) in error.message
    path.write_text(json.dumps(version))  # without a digest, as the first versions were written
    assert error_of_reading(path).kind == "unsupported_version"


def test_replaced_file_is_read_again(tmp_path):
    path = tmp_path / "a.json"
    for number in (1, 2):
        files.write_json(path, {"a": number})
        assert files.read_json(path) == {"a": number}
        assert files.read_json(path) is files.read_json(path)


def test_error_is_not_remembered(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})
    data = path.read_bytes()
    path.write_bytes(data[:-3])
    error_of_reading(path)
    path.write_bytes(data)
    assert files.read_json(path) == {"a": 1}


def test_error_names_the_file_and_the_key(tmp_path):
    path = tmp_path / "part-00000-of-00001.parquet.receipt.json"
    files.write_json(path, {"name": "a", "rows": -1, "tokens": 1, "bytes": 1, "sha256": "0" * 64})
    assert re.search(r"rows", error_of_reading(path, PartRecord).message)


def test_digest_does_not_depend_on_the_order_of_keys():
    assert files.digest_of({"a": 1, "b": [2]}) == files.digest_of({"b": [2], "a": 1})
    assert files.digest_of({"a": 1}) != files.digest_of({"a": 2})


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1023, "1023 B"), (2**20, "1.0 MiB"), (3 * 2**30, "3.0 GiB")])
def test_bytes_as_text(count, text):
    assert files.format_bytes(count) == text
