import contextlib
import json
import shutil
import time
from functools import lru_cache, partial

import numpy as np
import pytest
from helpers.commands import rewrite_json
from helpers.stages import fill, stage

from opdctl.artifacts import files, leases, stage_dir, tables
from opdctl.artifacts.records import Response
from opdctl.artifacts.stage_dir import Fingerprint, StageDir, changed_settings, recorded_stage
from opdctl.artifacts.versions import VERSIONS
from opdctl.errors import ExitCode, OpdctlError


@pytest.fixture
def finished(tmp_path):
    """A finished stage of three parts."""
    made = stage(tmp_path / "s")
    fill(made, 0, 1, 2)
    made.finalize()
    return made


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def leases_in(folder):
    return [path.name for path in folder.glob(".*.lock")]


# ── Parts and the manifest ───────────────────────────────────────────────────────────────────────────────────────────


def test_the_manifest_finishes_a_stage(tmp_path):
    made = stage(tmp_path / "s")
    assert made.missing() == [0, 1, 2]
    fill(made, 0, 1)
    assert made.missing() == [2]
    assert not made.finalize()
    assert not made.is_finished()
    fill(made, 2)
    assert made.finalize()
    assert made.is_finished()
    manifest = json.loads(made.manifest_path.read_text())
    assert [part["rows"] for part in manifest["parts"]] == [1, 2, 3]
    assert [part["name"] for part in manifest["parts"]] == [f"part-0000{i}-of-00003.txt" for i in range(3)]
    assert manifest["logprob_metadata"] == {"engine": "test"}
    assert (manifest["artifact"], manifest["version"]) == ("rollout", VERSIONS["rollout"])
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["manifest.json", *made.names]


def test_another_process_resumes_from_existing_parts(tmp_path):
    fill(stage(tmp_path / "s"), 1)
    assert stage(tmp_path / "s").missing() == [0, 2]


def test_part_without_receipt_is_missing(tmp_path):
    """As after a power cut, or when something else put a file there."""
    made = stage(tmp_path / "s")
    fill(made, 0)
    (tmp_path / "s" / made.names[1]).write_text("part 1")
    assert made.missing() == [1, 2]


@pytest.mark.parametrize(("text", "digests", "missing"), [("part 9", True, [0, 2]), ("part 9", False, [2])])
def test_unlisted_part_that_differs_from_its_receipt_is_missing(tmp_path, text, digests, missing):
    made = stage(tmp_path / "s")
    fill(made, 0, 1)
    (tmp_path / "s" / made.names[0]).write_text(text)  # of the same length
    assert made.missing(digests=digests) == missing
    (tmp_path / "s" / made.names[0]).write_text("longer than before")
    assert made.missing(digests=digests) == [0, 2]


def test_failing_writer_leaves_no_file(tmp_path):
    made = stage(tmp_path / "s")
    fill(made, 0)

    def fail(path):
        path.write_text("half")
        raise RuntimeError("torn")

    with pytest.raises(RuntimeError, match="torn"):
        made.write(1, fail, rows=1, tokens=1)
    assert made.missing() == [1, 2]
    assert not list((tmp_path / "s").glob(".tmp*"))


def test_full_disk_is_one_error(tmp_path):
    made = stage(tmp_path / "s")
    made.start({})

    def fail(path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OpdctlError) as caught:
        made.write(0, fail, rows=1, tokens=1)
    assert (caught.value.kind, caught.value.code) == ("disk_full", ExitCode.UNAVAILABLE)
    assert not list((tmp_path / "s").glob(".tmp*"))


def test_rows_are_saved_under_a_temporary_path(tmp_path):
    made = stage(tmp_path / "s", parts=1)
    made.start({})
    row = Response(
        sample_id="p/00000/0",
        prompt_id="p",
        prompt_ids=np.array([5, 6], np.int32),
        response_ids=np.arange(4, dtype=np.int32),
        logprobs=np.zeros(4, np.float32),
        finish_reason="stop",
        policy_version=0,
        source="toy:sort12",
        teacher="teacher",
        answer=None,
    )
    made.write(0, partial(tables.write_rows, rows=[row], record=Response), rows=1, tokens=4)
    made.finalize()
    assert [row.sample_id for row in made.read_all(Response)] == ["p/00000/0"]


def test_items_are_divided_into_even_slices(tmp_path):
    made = stage(tmp_path / "s")
    assert [made.items_of_part(list(range(8)), index) for index in range(3)] == [[0, 1], [2, 3, 4], [5, 6, 7]]


# ── Corrupt parts ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("damage", "kind", "why"),
    [
        (lambda data: data[:-1], "corrupt_artifact", "5 bytes, expected 6"),
        (lambda data: bytes([data[0] ^ 1]) + data[1:], "checksum_mismatch", "SHA-256"),
        (lambda data: None, "corrupt_artifact", "is missing"),
    ],
)
def test_corrupt_part_is_refused_and_regenerated_once_it_is_removed(finished, damage, kind, why):
    path = finished.path / finished.names[1]
    data = damage(path.read_bytes())
    path.write_bytes(data) if data is not None else path.unlink()
    finished.verify(0)
    with pytest.raises(OpdctlError) as caught:
        finished.verify(1)
    assert (caught.value.kind, caught.value.code) == (kind, ExitCode.BAD_DATA)
    assert str(path) in caught.value.message
    assert why in caught.value.message
    assert "opdctl rollout" in caught.value.hint
    assert (f"remove {path}" in caught.value.hint) == (data is not None)
    assert list(finished.corrupted_parts()) == [1]
    path.unlink(missing_ok=True)
    assert finished.finished_but_missing() == [path]
    assert not finished.is_finished()
    with finished.claim_parts() as parts:
        fill(finished, *parts)
    assert finished.verify(1).read_text() == "part 1"
    assert finished.corrupted_parts() == {}
    assert finished.is_finished()


def test_changed_part_changes_the_digest_of_the_stage(finished):
    before = finished.digest
    (finished.path / finished.names[1]).unlink()
    finished.start({"engine": "test"})
    finished.write(1, lambda path: path.write_text("other"), rows=1, tokens=1)
    finished.finalize()
    assert finished.digest != before
    finished.verify(1)


def test_swapped_parts_are_corrupt(finished):
    a, b = (finished.path / finished.names[i] for i in (0, 1))
    first, second = a.read_text(), b.read_text()
    a.write_text(second)
    b.write_text(first)
    assert list(finished.corrupted_parts()) == [0, 1]
    assert list(finished.corrupted_parts(digests=False)) == []  # of the same size


def test_digest_of_an_unfinished_stage_names_the_command(tmp_path):
    with pytest.raises(OpdctlError) as caught:
        _ = stage(tmp_path / "s").digest
    assert (caught.value.kind, caught.value.code) == ("missing_input", ExitCode.FAILED)
    assert "opdctl rollout" in caught.value.hint


# ── Fingerprints and versions ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("parts", [(0, 1, 2), (0,)])
def test_other_fingerprint_is_refused_with_the_change(tmp_path, parts):
    made = stage(tmp_path / "s")
    fill(made, *parts)
    made.finalize()
    with pytest.raises(OpdctlError) as caught:
        stage(tmp_path / "s", settings={"rollout.temperature": 0.7})
    assert (caught.value.kind, caught.value.code) == ("settings_mismatch", ExitCode.RECIPE_MISMATCH)
    assert "rollout.temperature 1.0 → 0.7" in caught.value.message
    with pytest.raises(OpdctlError, match="inputs: prompts") as caught:
        stage(tmp_path / "s", inputs={"prompts": "xyz"})
    assert caught.value.kind == "settings_mismatch"


def test_changed_settings_lists_old_and_new_values():
    assert changed_settings({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 4, "d": 5}) == [
        ("b", 2, 4),
        ("c", 3, None),
        ("d", None, 5),
    ]


@pytest.mark.parametrize("changes", [{"version": 99}, {"version": 4}, {"schema_version": 4, "version": None}])
def test_other_version_is_refused(finished, changes):
    manifest = json.loads(finished.manifest_path.read_text()) | changes
    finished.manifest_path.write_text(json.dumps({key: value for key, value in manifest.items() if value is not None}))
    with pytest.raises(OpdctlError) as caught:
        stage(finished.path)
    assert (caught.value.kind, caught.value.code) == ("unsupported_version", ExitCode.BAD_DATA)
    assert str(next(value for value in changes.values() if value)) in caught.value.message


# ── Recorded stages ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("parts", [(0, 1, 2), (1,)])
def test_recorded_stage_has_the_parts_and_fingerprint_that_were_written(tmp_path, parts):
    made = stage(tmp_path / "s")
    assert recorded_stage(made.path, "opdctl rollout") is None
    made.start({})
    assert recorded_stage(made.path, "opdctl rollout") is None  # no part was started
    fill(made, *parts)
    made.finalize()
    recorded = recorded_stage(made.path, "opdctl rollout")
    assert recorded.names == made.names
    assert recorded.fingerprint == made.fingerprint
    assert recorded.missing() == made.missing()


def test_recorded_stage_survives_a_worker_that_finishes_it_meanwhile(tmp_path, monkeypatch):
    made, read = stage(tmp_path / "s"), files.read_json
    fill(made, 0, 1, 2)

    def finish_first(path, *arguments):
        monkeypatch.undo()
        made.finalize()  # removes the header that is to be read
        return read(path, *arguments)

    monkeypatch.setattr(stage_dir, "read_json", finish_first)
    assert recorded_stage(made.path, "opdctl rollout").names == made.names


@pytest.mark.parametrize("name", ["strange", "part-00000-of-99999999999999.txt", "part-00000-of-00004.txt"])
def test_manifest_with_other_part_names_is_corrupt(finished, name):
    part = json.loads(finished.manifest_path.read_text())["parts"][0]
    rewrite_json(finished.manifest_path, parts=[{**part, "name": name}])
    with pytest.raises(OpdctlError) as caught:
        recorded_stage(finished.path, "opdctl rollout")
    assert caught.value.kind == "corrupt_artifact"
    assert str(finished.path) in caught.value.message


# ── Claims ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_each_part_goes_to_one_worker(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.1)
    one, two = stage(tmp_path / "s"), stage(tmp_path / "s")
    with one.claim_parts() as mine:
        assert next(mine) == 0
        with two.claim_parts() as theirs:
            for index in theirs:
                assert index != 0
                fill(two, index)
        assert not two.is_finished()
        fill(one, 0)
        assert list(mine) == []
    assert one.is_finished()
    with stage(tmp_path / "s").claim_parts() as parts:
        assert parts is None


def test_nothing_to_claim_while_another_worker_has_the_last_part(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.1)
    one, two = stage(tmp_path / "s", parts=1), stage(tmp_path / "s", parts=1)
    with one.claim_parts() as mine:
        next(mine)
        with two.claim_parts() as theirs:
            assert theirs is None
        fill(one, 0)
        list(mine)
    assert two.is_finished()


class StopError(BaseException):
    pass


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, StopError])
def test_error_in_a_part_releases_its_lease(tmp_path, error):
    made = stage(tmp_path / "s")

    def work():
        with made.claim_parts() as parts:
            fill(made, next(parts))
            assert next(parts) == 1
            assert leases_in(tmp_path) == [".s-part-00001.lock"]
            raise error

    with pytest.raises(error):
        work()
    assert leases_in(tmp_path) == []
    assert made.missing() == [1, 2]
    with made.claim_parts() as parts:
        fill(made, *parts)
    assert made.is_finished()


def test_worker_that_stops_early_releases_its_lease(tmp_path):
    made = stage(tmp_path / "s")
    with made.claim_parts() as parts:
        fill(made, next(parts))
        next(parts)
    assert leases_in(tmp_path) == []
    assert not made.is_finished()
    assert not made._leases


def test_part_of_a_lost_lease_is_dropped(tmp_path):
    """The worker was suspended for longer than its lease, and another has made the part with other bytes."""
    loser, winner = stage(tmp_path / "s", parts=1), stage(tmp_path / "s", parts=1)
    with loser.claim_parts() as mine:
        next(mine)
        (tmp_path / ".s-part-00000.lock").unlink()  # as the acquisition of a stale lease does
        with winner.claim_parts() as theirs:
            fill(winner, *theirs)
        written = contents(tmp_path / "s")
        assert not loser.write(0, lambda path: path.write_text("another part 0"), rows=1, tokens=10)
    assert contents(tmp_path / "s") == written
    winner.verify(0)


@pytest.mark.parametrize("moment", range(1, 6), ids=["header", "part", "receipt", "part again", "manifest"])
def test_worker_that_slept_past_its_leases_publishes_nothing(tmp_path, monkeypatch, moment):
    """It sleeps while it flushes a temporary file, before the rename; another worker makes the stage meanwhile."""
    folder, flush = tmp_path / "s", files.fsync_path
    loser, winner, flushed, written = stage(folder, parts=1), stage(folder, parts=1), [], {}

    def flush_and_sleep(path):
        flush(path)
        flushed.extend([path] * path.name.startswith(".tmp-"))
        if len(flushed) == moment and not written:
            written["started"] = b""
            for lock in tmp_path.glob(".*.lock"):
                lock.unlink()  # as the acquisition of a stale lease does
            with monkeypatch.context() as other_process:
                other_process.setattr(leases, "_held", [])
                leases._worker_token.cache_clear()
                with winner.claim_parts() as parts:
                    fill(winner, *(parts or ()))
            written.update(visible_contents(folder))

    for module in (files, stage_dir):
        monkeypatch.setattr(module, "fsync_path", flush_and_sleep)
    with contextlib.suppress(OpdctlError), loser.claim_parts() as mine:
        for index in mine:
            loser.start({"engine": "the one that slept"})
            loser.write(index, lambda path: path.write_text("another part 0"), rows=1, tokens=10)
    assert {"started": b"", **visible_contents(folder)} == written
    assert winner.is_finished()
    winner.verify(0)


def visible_contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def test_part_of_settings_that_changed_meanwhile_is_dropped(tmp_path):
    slow = stage(tmp_path / "s", parts=1)
    with slow.claim_parts() as mine:
        next(mine)
        slow.start({"engine": "test"})
        shutil.rmtree(tmp_path / "s")
        assert not slow.write(0, lambda path: path.write_text("part 0"), rows=1, tokens=10)
        other = stage(tmp_path / "s", parts=1, settings={"rollout.temperature": 0.7})
        other.start({"engine": "test"})
        assert not slow.write(0, lambda path: path.write_text("part 0"), rows=1, tokens=10)
    assert other.missing() == [0]


def test_two_workers_that_regenerate_parts_of_a_finished_stage_lose_none(finished, monkeypatch):
    """One is done with its parts while the other still makes its own."""
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.1)
    for name in finished.names[:2]:
        (finished.path / name).unlink()
    one, two = stage(finished.path), stage(finished.path)
    with one.claim_parts() as mine:
        assert next(mine) == 0
        one.start({"engine": "test"})
        with two.claim_parts() as theirs:
            fill(two, *theirs)
        one.write(0, lambda path: path.write_text("part 0, otherwise"), rows=1, tokens=10)
    again = stage(finished.path)
    assert again.corrupted_parts() == {}
    assert again.is_finished()
    assert again.sha256(0) == files.sha256_file(finished.path / finished.names[0])
    assert not list(finished.path.glob("*.receipt.json"))


def test_stage_whose_worker_died_before_the_manifest_is_finished_by_the_next(tmp_path):
    made = stage(tmp_path / "s")
    fill(made, 0, 1, 2)
    with stage(tmp_path / "s").claim_parts() as parts:
        assert parts is None
    assert made.is_finished()


@pytest.mark.parametrize("receipts", [0, 1, 3])
def test_stage_whose_worker_died_after_the_manifest_is_tidied_by_the_next(tmp_path, receipts):
    made = stage(tmp_path / "s")
    fill(made, 0, 1, 2)
    remaining = [made.path / "in_progress.json", *sorted(made.path.glob("*.receipt.json"))[:receipts]]
    saved = {path: path.read_bytes() for path in remaining}
    made.finalize()
    for path, data in saved.items():
        path.write_bytes(data)
    with stage(tmp_path / "s").claim_parts():
        pass
    assert sorted(contents(made.path)) == ["manifest.json", *made.names]
    assert stage(tmp_path / "s").corrupted_parts() == {}


# ── Reads ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def parsed(monkeypatch):
    """The paths of the JSON files that are read from disk and checked, in order. The cache is empty at first."""
    paths, read = [], files._read_json_once.__wrapped__
    files._read_json_once.cache_clear()

    def counted(path, form, identity):
        paths.append(path.name)
        return read(path, form, identity)

    monkeypatch.setattr(files, "_read_json_once", lru_cache(maxsize=4096)(counted))
    return paths


def test_manifest_of_many_parts_is_read_once(tmp_path, parsed):
    made = stage(tmp_path / "s", parts=60)
    fill(made, *range(60))
    made.finalize()
    parsed.clear()
    again = stage(tmp_path / "s", parts=60)
    assert again.missing() == []
    assert again.corrupted_parts() == {}
    for index in range(60):
        again.verify(index)
        again.sha256(index)
    assert again.is_finished()
    assert again.digest
    assert parsed == ["manifest.json"]


def test_each_receipt_of_an_unfinished_stage_is_read_once(tmp_path, parsed):
    made = stage(tmp_path / "s", parts=20)
    fill(made, *range(19))
    parsed.clear()
    again = stage(tmp_path / "s", parts=20)
    for _ in range(3):
        assert again.missing() == [19]
    assert sorted(parsed) == ["in_progress.json", *(f"part-{i:05d}-of-00020.txt.receipt.json" for i in range(19))]


def test_replaced_manifest_is_read_again(finished):
    before = finished.digest
    (finished.path / finished.names[0]).unlink()
    time.sleep(0.01)
    finished.start({})
    finished.write(0, lambda path: path.write_text("PART 0"), rows=1, tokens=10)
    finished.finalize()
    assert StageDir(
        finished.path,
        stage="rollout",
        num_parts=3,
        suffix=".txt",
        fingerprint=Fingerprint({"rollout.temperature": 1.0}, {"prompts": "abc"}),
        rerun_command="opdctl rollout",
    ).digest not in (before, None)
