"""Parts, manifests and digests: what a kill leaves behind, and what damage is found."""

import dataclasses
import json
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from helpers.stages import fill, stage
from hypothesis import given
from hypothesis import strategies as st

from opdctl.artifacts import directories, files, tables
from opdctl.artifacts.records import Prompt, Response, TokenScores, cumulative_offsets, sample_id, sample_seed
from opdctl.errors import ExitCode, OpdctlError


def test_a_stage_is_finished_when_its_manifest_is_written(tmp_path):
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
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["manifest.json", *made.names]


def test_another_process_goes_on_with_the_parts_that_are_there(tmp_path):
    fill(stage(tmp_path / "s"), 1)
    again = stage(tmp_path / "s")
    assert again.missing() == [0, 2]


def test_a_part_without_its_receipt_is_made_again(tmp_path):
    """As after a power cut, or when something else put a file there."""
    made = stage(tmp_path / "s")
    fill(made, 0)
    (tmp_path / "s" / made.names[1]).write_text("part 1")
    assert made.missing() == [1, 2]


def test_an_unlisted_part_that_does_not_match_its_receipt_is_made_again(tmp_path):
    made = stage(tmp_path / "s")
    fill(made, 0, 1)
    (tmp_path / "s" / made.names[0]).write_text("part 9")  # the same length
    assert made.missing() == [0, 2]


def test_a_writer_that_fails_leaves_nothing_under_any_name(tmp_path):
    made = stage(tmp_path / "s")
    fill(made, 0)

    def torn(path):
        path.write_text("half")
        raise RuntimeError("torn")

    with pytest.raises(RuntimeError, match="torn"):
        made.write(1, torn, rows=1, tokens=1)
    assert made.missing() == [1, 2]
    assert not list((tmp_path / "s").glob(".tmp*"))


def test_what_a_dead_process_left_half_written_is_swept_and_a_live_one_s_is_not(tmp_path):
    child = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    )
    host = files.temporary_path(tmp_path / "x").name.split("-")[1]
    dead, alive = tmp_path / f".tmp-{host}-{int(child.stdout)}-part", tmp_path / f".tmp-{host}-{os.getppid()}-part"
    for path in (dead, alive):
        path.write_text("half")
    files.remove_temporary_files(tmp_path)
    assert not dead.exists()
    assert alive.exists()


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda data: data[:-1], "5 bytes, 6 were written"),
        (lambda data: bytes([data[0] ^ 1]) + data[1:], "its SHA-256 is"),
        (lambda data: None, "the part is missing"),
    ],
)
def test_a_damaged_part_is_named_with_the_command_that_makes_it_again(tmp_path, damage, why):
    made = stage(tmp_path / "s")
    fill(made, 0, 1, 2)
    made.finalize()
    path = tmp_path / "s" / made.names[1]
    data = damage(path.read_bytes())
    path.write_bytes(data) if data is not None else path.unlink()
    made.verify(0)
    with pytest.raises(OpdctlError) as caught:
        made.verify(1)
    assert caught.value.code == ExitCode.BAD_DATA
    assert str(path) in caught.value.message
    assert why in caught.value.message
    assert "opdctl rollout --repair" in caught.value.hint
    assert made.parts_to_make(repair=True) == [1]
    with made.claim_parts(repair=True) as parts:
        fill(made, *parts)
    assert made.verify(1).read_text() == "part 1"
    assert made.parts_to_make(repair=True) == []


def test_a_part_made_again_with_other_bytes_changes_the_stage_s_digest(tmp_path):
    made = stage(tmp_path / "s")
    fill(made, 0, 1, 2)
    made.finalize()
    before = made.digest
    (tmp_path / "s" / made.names[1]).unlink()
    made.start({"engine": "test"})
    made.write(1, lambda path: path.write_text("other"), rows=1, tokens=1)
    made.finalize()
    assert made.digest != before
    made.verify(1)


def test_swapped_parts_are_found(tmp_path):
    made = stage(tmp_path / "s")
    fill(made, 0, 1, 2)
    made.finalize()
    a, b = (tmp_path / "s" / made.names[i] for i in (0, 1))
    first, second = a.read_text(), b.read_text()
    a.write_text(second)
    b.write_text(first)
    assert list(made.corrupted_parts()) == [0, 1]


@pytest.mark.parametrize("finished", [True, False])
def test_another_fingerprint_is_refused_and_the_change_named(tmp_path, finished):
    made = stage(tmp_path / "s")
    fill(made, *((0, 1, 2) if finished else (0,)))
    made.finalize()
    with pytest.raises(OpdctlError) as caught:
        stage(tmp_path / "s", settings={"rollout.temperature": 0.7})
    assert caught.value.code == ExitCode.RECIPE_MISMATCH
    assert "rollout.temperature 1.0 → 0.7" in caught.value.message
    with pytest.raises(OpdctlError, match="its inputs changed: prompts"):
        stage(tmp_path / "s", inputs={"prompts": "xyz"})


def test_a_newer_schema_is_refused(tmp_path):
    made = stage(tmp_path / "s", parts=1)
    fill(made, 0)
    made.finalize()
    manifest = json.loads(made.manifest_path.read_text()) | {"schema_version": 99}
    made.manifest_path.write_text(json.dumps(manifest))
    with pytest.raises(OpdctlError, match="schema version 99"):
        stage(tmp_path / "s", parts=1)


def response(name="p/00000/0", tokens=4) -> Response:
    return Response(
        sample_id=name,
        prompt_id="p",
        prompt_ids=np.array([5, 6], np.int32),
        response_ids=np.arange(tokens, dtype=np.int32),
        logprobs=np.linspace(-1, 0, tokens, dtype=np.float32),
        finish_reason="stop",
        policy_version=0,
        source="toy:sort12",
        teacher="teacher",
        answer=None,
    )


def with_more(row: Response) -> Response:
    """Return the response with an entropy and three most probable ids at each token."""
    tokens = len(row.response_ids)
    top_ids = np.arange(3 * tokens, dtype=np.int32).reshape(tokens, 3)
    return dataclasses.replace(row, entropies=row.logprobs * -2, top_ids=top_ids, top_logprobs=-top_ids.astype("f4"))


@pytest.mark.parametrize("more", [lambda row: row, with_more])
def test_responses_come_back_as_they_were(tmp_path, more):
    rows = [more(row) for row in (response("a"), response("b", tokens=0), response("c", tokens=1))]
    tables.write_rows(tmp_path / "r.parquet", rows, Response)
    for want, found in zip(rows, tables.read_rows(tmp_path / "r.parquet", Response), strict=True):
        for name in Response.__dataclass_fields__:
            np.testing.assert_array_equal(getattr(found, name), getattr(want, name), strict=True)


def test_the_same_rows_make_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        tables.write_rows(tmp_path / name, [response()], Response)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_flipped_byte_in_parquet_is_never_read_in_silence(tmp_path):
    """Each byte in turn: it is refused, or it carries no value and the rows are as they were."""
    path, want = tmp_path / "r.parquet", [response(tokens=50)]
    tables.write_rows(path, want, Response)
    whole, refused = path.read_bytes(), 0
    for position in range(0, len(whole), 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        try:
            found = tables.read_rows(path, Response)
        except OpdctlError:
            refused += 1
        else:
            assert found[0].response_ids.tolist() == want[0].response_ids.tolist()
            assert found[0].logprobs.tolist() == want[0].logprobs.tolist()
            assert found[0].sample_id == want[0].sample_id
    assert refused > len(whole) // 7 // 4


def test_rows_of_another_kind_are_refused(tmp_path):
    tables.write_rows(tmp_path / "p.parquet", [Prompt("p", np.array([1], np.int32), "x", "teacher")], Prompt)
    with pytest.raises(OpdctlError, match="has columns"):
        tables.read_rows(tmp_path / "p.parquet", Response)


ONE = TokenScores(np.array([-1.0], np.float32))


def test_scores_come_back_by_id(tmp_path):
    logprobs = [np.array([-1.5, -2.5], np.float32), np.zeros(0, np.float32), np.array([-3.0], np.float32)]
    tables.write_scores(
        tmp_path / "s.safetensors", ["a", "b", "c"], [TokenScores(row) for row in logprobs], {"rollout": "r"}
    )
    found = tables.read_scores(tmp_path / "s.safetensors", "r")
    assert {name: s.logprobs.tolist() for name, s in found.items()} == {"a": [-1.5, -2.5], "b": [], "c": [-3.0]}
    assert all(score.entropies is None and score.hidden_states is None for score in found.values())


def test_everything_that_can_be_scored_comes_back_by_id(tmp_path):
    rng = np.random.default_rng(0)

    def scores(tokens: int) -> TokenScores:
        floats = [rng.normal(size=(tokens, *width)).astype(np.float32) for width in ((), (), (3,), (2,), (5,))]
        ids = rng.integers(0, 9, (tokens, 3)).astype(np.int32)
        return TokenScores(floats[0], floats[1], ids, floats[2], floats[3], lambda: floats[4])

    wanted = {"a": scores(4), "b": scores(0), "c": scores(1)}
    tables.write_scores(tmp_path / "s.safetensors", list(wanted), list(wanted.values()), {"rollout": "r"})
    for name, found in tables.read_scores(tmp_path / "s.safetensors", "r").items():
        for column in ("logprobs", "entropies", "top_ids", "top_logprobs", "student_top_logprobs"):
            np.testing.assert_array_equal(getattr(found, column), getattr(wanted[name], column), strict=True)
        np.testing.assert_array_equal(found.hidden_states(), wanted[name].hidden_states(), strict=True)


def test_a_truncated_score_part_is_refused(tmp_path):
    path = tmp_path / "s.safetensors"
    tables.write_scores(path, ["a"], [ONE], {"rollout": "r"})
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(OpdctlError, match="damaged"):
        tables.read_scores(path, "r")


def test_scores_whose_offsets_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "s.safetensors"
    tables.write_scores(path, ["a", "a"], [ONE] * 2, {"rollout": "r"})
    with pytest.raises(OpdctlError, match="do not fit together"):
        tables.read_scores(path, "r")


def test_scores_of_other_responses_are_refused(tmp_path):
    path = tmp_path / "s.safetensors"
    tables.write_scores(path, ["a"], [ONE], {"rollout": "r"})
    with pytest.raises(OpdctlError, match="scores other responses"):
        tables.read_scores(path, "another")


def test_a_directory_is_published_whole_or_not_at_all(tmp_path):
    digests = directories.write_directory_with_digests(
        tmp_path / "m", lambda folder: (folder / "a").write_text("1") and None
    )
    directories.check_directory(tmp_path / "m", digests)

    def torn(folder):
        (folder / "a").write_text("2")
        raise RuntimeError("torn")

    with pytest.raises(RuntimeError, match="torn"):
        directories.write_directory_with_digests(tmp_path / "m", torn)
    directories.check_directory(tmp_path / "m", digests)
    (tmp_path / "m" / "b").write_text("intruder")
    with pytest.raises(OpdctlError, match="was not written by this run"):
        directories.check_directory(tmp_path / "m", digests)


def test_ids_and_seeds_are_fixed_for_ever():
    """Another value here would make every run directory's responses others."""
    assert sample_id("sort12-abc", 3, 0) == "sort12-abc/00003/0"
    assert sample_seed(0, "sort12-abc/00003/0") == SEED


SEED = 939531662881426345  # the first 63 bits of BLAKE2b-64 of "0/sort12-abc/00003/0"


@given(st.integers(0, 2**31), st.text(max_size=30))
def test_seeds_fit_every_engine(run_seed, name):
    assert 0 <= sample_seed(run_seed, name) < 2**63


def test_offsets_by_hand():
    assert cumulative_offsets([2, 0, 3]).tolist() == [0, 2, 2, 5]
    assert cumulative_offsets([]).tolist() == [0]


def test_a_full_disk_is_one_clear_error(tmp_path):
    made = stage(tmp_path / "s")
    made.start({})

    def full(path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OpdctlError, match="the disk is full") as caught:
        made.write(0, full, rows=1, tokens=1)
    assert caught.value.code == ExitCode.UNAVAILABLE
    assert not list((tmp_path / "s").glob(".tmp*"))


def test_partial_saves_are_called_with_the_temporary_path(tmp_path):
    made = stage(tmp_path / "s", parts=1)
    made.start({})
    made.write(0, partial(tables.write_rows, rows=[response()], kind=Response), rows=1, tokens=4)
    made.finalize()
    assert tables.read_rows(made.verify(0), Response)[0].sample_id == "p/00000/0"
