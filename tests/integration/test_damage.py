"""Corrupt artifacts: every file is refused by name, with the reason, and without much memory.

First the damage of disks and people, which digests find; then forged files with valid digests, which only the check of
their form finds.
"""

import json
import random
import shutil
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.commands import invoke, rewrite_json
from safetensors.numpy import load_file, save_file

from opdctl.artifacts import files, stage_dir, tables
from opdctl.artifacts.records import EvalPrompt, Response
from opdctl.artifacts.versions import VERSIONS
from opdctl.errors import ExitCode, OpdctlError
from opdctl.evaluation.results import load_evaluation
from opdctl.runs.run import Run
from opdctl.runs.scored_responses import read_scored

SLACK = 2**20  # bytes that the reader may take for a small file
POOLS: list[pa.MemoryPool] = []


@pytest.fixture(scope="module")
def run(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps. Every test restores what it changes."""
    return Path(shutil.copytree(finished_run, tmp_path_factory.mktemp("damage") / "run"))


def read_everything(path: Path) -> None:
    """Read what the commands read of a run, each thing once."""
    run = Run.load(path)
    assert run.prompts
    for step in range(2):
        for stage in (run.rollout_stage(step), *run.score_stages(step).values()):
            assert len(stage.names) == 2
        assert len(list(read_scored(run, step))) == 8
        assert run.student_at(step + 1)
        run.check_trainer_state(step + 1)
    for summary in path.glob("eval/*/*/summary.json"):
        assert len(load_evaluation(summary.parent).rows()) == 4
        prompts = stage_dir.recorded_stage(summary.parent / "prompts", "opdctl eval")
        assert prompts is not None
        assert len(prompts.read_all(EvalPrompt)) == 4
    for description in path.glob("eval/*/benchmark.json"):
        assert files.read_json(description)


def refusal(read: Callable[[], object], size: int, *codes: ExitCode) -> OpdctlError:
    """Return the error of reading, which must not take more memory than twice the file's `size`."""
    (error, bytes_used), limit = attempt(read), 2 * size + SLACK
    if bytes_used > limit:  # again: sometimes a library loads a module
        error, bytes_used = attempt(read)
    assert bytes_used < limit, bytes_used
    assert error.code in (codes or (ExitCode.BAD_DATA,)), error.message
    return error


def attempt(read: Callable[[], object]) -> tuple[OpdctlError, int]:
    """Return the error of reading, and the peak of the bytes that it took."""
    before, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    POOLS.append(pool)  # a buffer must not outlive its pool
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        with pytest.raises(OpdctlError) as caught:
            read()
        bytes_used = tracemalloc.get_traced_memory()[1] + max(pool.max_memory(), 0)
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)
    return caught.value, bytes_used


# ── Damage of disks and people ────────────────────────────────────────────────────────────────────────────────────────


def cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def flip(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]


def blank(data: bytes, chance: random.Random) -> bytes:
    """A block of zeros, as after a power cut."""
    at = chance.randrange(len(data))
    return data[:at] + bytes(min(512, len(data) - at)) + data[at + 512 :]


def lengthen(data: bytes, chance: random.Random) -> bytes:
    return data + chance.randbytes(chance.randrange(1, 64))


def run_files(run: Path) -> list[Path]:
    """Return the files that have a recorded digest: recipe.toml and cards are the user's, metrics.jsonl is a copy."""
    paths = [path for path in sorted(run.rglob("*")) if path.is_file() and path.suffix != ".lock"]
    return [path for path in paths if path.name not in ("recipe.toml", "metrics.jsonl", "README.md")]


def test_every_damaged_file_is_refused_with_its_name(run: Path) -> None:
    chance, count, read = random.Random(0), 0, lambda: read_everything(run)
    read()
    for path in run_files(run):
        whole = path.read_bytes()
        for damage in (cut, flip, flip, blank, lengthen):
            damaged = damage(whole, chance)
            if damaged == whole:
                continue
            path.write_bytes(damaged)
            error = refusal(read, path.stat().st_size)
            assert str(path) in error.message, (damage, error.message)
            assert error.hint
            count += 1
        path.write_bytes(whole)
    read()
    assert count > 150


def test_prompts_and_summaries_are_verified(finished_copy: Path) -> None:
    copy = finished_copy
    for path in (*copy.rglob("summary.json"), *copy.glob("eval/*/*/prompts/part-*"), copy / "prompts.parquet"):
        whole = path.read_bytes()
        path.write_bytes(flip(whole, random.Random(3)))
        result = invoke("status", copy, "--verify")
        assert result.code == ExitCode.BAD_DATA
        assert str(path) in result.out + result.err
        path.write_bytes(whole)
    assert invoke("status", copy, "--verify").code == 0


def test_swapped_parts_are_refused(run: Path) -> None:
    for folder, other in (("rollout", "rollout"), ("teacher", "teacher"), ("rollout", "teacher")):
        one, two = (
            sorted((run / "step-00000" / folder).glob("part-*"))[0],
            sorted((run / "step-00001" / other).glob("part-*"))[1],
        )
        first, second = one.read_bytes(), two.read_bytes()
        one.write_bytes(second)
        two.write_bytes(first)
        error = refusal(lambda: read_everything(run), len(first) + len(second))
        assert str(one) in error.message
        one.write_bytes(first)
        two.write_bytes(second)


def test_symbolic_link_is_not_followed(run: Path, tmp_path: Path) -> None:
    step = run / "step-00000"
    names = ("rollout", "rollout/manifest.json", "teacher/part-00001-of-00002.safetensors", "update.json")
    for path in (run / "run.json", step, *(step / name for name in names), run / "student/step-00001/config.json"):
        elsewhere = tmp_path / "elsewhere"
        path.rename(elsewhere)
        path.symlink_to(elsewhere)
        error = refusal(lambda: read_everything(run), 2**20)
        assert error.kind == "corrupt_artifact"
        assert str(path) in error.message
        path.unlink()
        elsewhere.rename(path)
    read_everything(run)


# ── Forged files with valid digests ───────────────────────────────────────────────────────────────────────────────────


def part(**changes: Any) -> dict[str, Any]:
    whole = {"name": "part-00000-of-00002.parquet", "rows": 2, "tokens": 9, "bytes": 9, "sha256": "0" * 64}
    return {key: value for key, value in {**whole, **changes}.items() if value is not ...}


MANIFESTS: list[dict[str, Any]] = [
    *({"parts": [part(name=name)]} for name in ("../../x", "/etc/passwd", "a/b", "..", "", "a\n", "C:\\x", None, 5)),
    *({"parts": [part(sha256=value)]} for value in ("", "0" * 63, "G" * 64, "0" * 64 + "\n", 0, None, ...)),
    *(
        {"parts": [part(**{key: value})]}
        for key in ("rows", "bytes")
        for value in (-1, 1.5, True, "1", 2**63, None, ...)
    ),
    *({"parts": value} for value in (None, {}, "parts", [1], [[]], [{}], ...)),
    *({"settings": value} for value in (None, [], "x", ...)),
    *({"inputs": value} for value in (None, [], {"policy": 1}, ...)),
    *({"fingerprint": value} for value in (None, 1, "x", ...)),
    *({"version": value} for value in (1, VERSIONS["rollout"] - 1, VERSIONS["rollout"] + 1, "3", None, ...)),
    *({key: ...} for key in ("artifact", "logprob_metadata")),
]


@pytest.mark.parametrize("changes", MANIFESTS, ids=str)
def test_forged_manifest_is_refused_with_the_key(run: Path, changes: dict[str, Any]) -> None:
    path = run / "step-00001/rollout/manifest.json"
    whole = path.read_bytes()
    try:
        rewrite_json(path, **changes)
        error = refusal(lambda: read_everything(run), path.stat().st_size)
        assert str(path) in error.message
        assert next(iter(changes)).replace("_", " ") in error.message.replace("_", " ")
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize(
    "parts", [[], [part()], [part(name="part-00000-of-00004.parquet")] * 2, [part(), part(), part()]], ids=len
)
def test_manifest_of_other_parts_is_refused(run: Path, parts: list[dict[str, Any]]) -> None:
    path = run / "step-00001/rollout/manifest.json"
    whole = path.read_bytes()
    try:
        rewrite_json(path, parts=parts)
        error = refusal(lambda: read_everything(run), path.stat().st_size)
        assert error.kind == "corrupt_artifact"
        assert str(path) in error.message
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("run.json", {"models": {}}),
        ("run.json", {"models": {"student": {}}}),
        ("run.json", {"models": None}),
        ("run.json", {"prompts": {"rows": 1, "dropped": 0, "sha256": "x", "source_sha256": None}}),
        ("run.json", {"prompts": ...}),
        ("run.json", {"version": 1}),
        ("step-00000/update.json", {"student": {"../model.safetensors": "0" * 64}}),
        ("step-00000/update.json", {"student": {"/etc/passwd": "0" * 64}}),
        ("step-00000/update.json", {"student": {"config.json": "0" * 64}}),
        ("step-00000/update.json", {"trainer": []}),
        ("step-00000/update.json", {"metrics": {"loss": "0.1"}}),
        ("step-00000/update.json", {"version": 99}),
    ],
    ids=str,
)
def test_other_forged_files_are_refused(run: Path, name: str, changes: dict[str, Any]) -> None:
    whole = (run / name).read_bytes()
    try:
        rewrite_json(run / name, **changes)
        codes = (
            ExitCode.BAD_DATA,
            ExitCode.RECIPE_MISMATCH,
        )  # with another student in update.json the next step was sampled by a different policy
        assert refusal(lambda: read_everything(run), len(whole), *codes).hint
    finally:
        (run / name).write_bytes(whole)


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"null", b"{", b'{"a": 1}', b"[" * 10**5, b'{"a":' * 10**5, b"\xff", b"\0" * 9]
)
def test_other_json_files_are_refused(run: Path, text: bytes) -> None:
    for name in ("run.json", "step-00000/update.json", "step-00000/teacher/manifest.json"):
        whole = (run / name).read_bytes()
        (run / name).write_bytes(text)
        error = refusal(lambda: read_everything(run), len(text))
        assert str(run / name) in error.message
        (run / name).write_bytes(whole)


def scores(run: Path) -> Path:
    return sorted((run / "step-00000/teacher").glob("part-*"))[0]


def logprob_metadata(path: Path) -> dict[str, Any]:
    with tables.safe_open(path, "np") as file:
        found: dict[str, Any] = json.loads(file.metadata()["opdctl"])
    return found


Tensors = dict[str, np.ndarray]
FORGED_TENSORS: dict[str, Callable[[Tensors], Tensors | None]] = {
    "nan": lambda t: t["logprobs"].__setitem__(3, np.nan),
    "minus infinity": lambda t: t["logprobs"].__setitem__(0, -np.inf),
    "infinity": lambda t: t["logprobs"].__setitem__(-1, np.inf),
    "float64": lambda t: {**t, "logprobs": t["logprobs"].astype(np.float64)},
    "float16": lambda t: {**t, "logprobs": t["logprobs"].astype(np.float16)},
    "integers": lambda t: {**t, "logprobs": t["logprobs"].astype(np.int32)},
    "two dimensions": lambda t: {**t, "logprobs": t["logprobs"][:, None]},
    "no dimension": lambda t: {**t, "logprobs": np.float32(1)[None].reshape(())},
    "one token less": lambda t: {**t, "logprobs": t["logprobs"][:-1]},
    "one token more": lambda t: {**t, "logprobs": np.append(t["logprobs"], np.float32(-1))},
    "no log-probs": lambda t: {"offsets": t["offsets"]},
    "no offsets": lambda t: {"logprobs": t["logprobs"]},
    "a stranger": lambda t: {**t, "stranger": t["logprobs"]},
    "entropies of nan": lambda t: {**t, "entropies": t["logprobs"] * np.float32(np.nan)},
    "short entropies": lambda t: {**t, "entropies": t["logprobs"][1:]},
    "top ids of floats": lambda t: {**t, "top_ids": t["logprobs"][:, None]},
    "hidden states of one dimension": lambda t: {**t, "hidden_states": t["logprobs"]},
    "an empty hidden size of 2^40": lambda t: {**t, "top_logprobs": np.zeros((0, 2**40), np.float32)},
    "huge offsets": lambda t: t["offsets"].__setitem__(-1, 2**62),
    "offsets that wrap": lambda t: t["offsets"].__setitem__(slice(1, 3), [2**63 - 1, -(2**63)]),
    "negative offsets": lambda t: t["offsets"].__setitem__(1, -5),
    "falling offsets": lambda t: t["offsets"].__setitem__(1, t["offsets"][-1] + 1),
    "offsets from one": lambda t: t["offsets"].__setitem__(0, 1),
    "moved offsets": lambda t: t["offsets"].__setitem__(1, t["offsets"][1] - 1),
    "floating offsets": lambda t: {**t, "offsets": t["offsets"].astype(np.float64)},
    "short integers as offsets": lambda t: {**t, "offsets": t["offsets"].astype(np.int32)},
    "no offset at all": lambda t: {**t, "offsets": t["offsets"][:0]},
    "an offset too many": lambda t: {**t, "offsets": np.append(t["offsets"], t["offsets"][-1])},
    "offsets of two dimensions": lambda t: {**t, "offsets": t["offsets"][:, None]},
}
FORGED_METADATA: dict[str, Callable[[dict[str, Any]], Any]] = {
    "duplicate ids": lambda m: {**m, "sample_ids": [m["sample_ids"][0]] * len(m["sample_ids"])},
    "another id": lambda m: {**m, "sample_ids": ["stranger", *m["sample_ids"][1:]]},
    "an id less": lambda m: {**m, "sample_ids": m["sample_ids"][1:]},
    "ids of numbers": lambda m: {**m, "sample_ids": list(range(len(m["sample_ids"])))},
    "ids of lists": lambda m: {**m, "sample_ids": [[] for _ in m["sample_ids"]]},
    "no ids": lambda m: {"rollout": m["rollout"]},
    "other responses": lambda m: {**m, "rollout": "0" * 64},
    "no responses": lambda m: {**m, "rollout": None},
    "a list": lambda m: [m],
    "a number": lambda m: 5,
}


def replace_first_part(stage: stage_dir.StageDir, data: bytes) -> None:
    """Replace the first part by `data`, and its entry in the manifest."""
    path = stage.path / stage.names[0]
    path.write_bytes(data)
    manifest = json.loads(stage.manifest_path.read_text())
    manifest["parts"][0] |= {"bytes": len(data), "sha256": files.sha256_file(path)}
    rewrite_json(stage.manifest_path, parts=manifest["parts"])


@pytest.fixture
def teacher(run: Path) -> Iterator[stage_dir.StageDir]:
    stage = Run.load(run).score_stage(0, "teacher")
    saved = {path: path.read_bytes() for path in stage.path.iterdir()}
    yield stage
    for path, data in saved.items():
        path.write_bytes(data)


@pytest.mark.parametrize("name", [*FORGED_TENSORS, *FORGED_METADATA])
def test_scores_of_another_form_are_refused(run: Path, teacher: stage_dir.StageDir, tmp_path: Path, name: str) -> None:
    path, forged = scores(run), tmp_path / "forged"
    tensors, metadata = load_file(path), logprob_metadata(path)
    if name in FORGED_TENSORS:
        tensors = FORGED_TENSORS[name](tensors) or tensors
    else:
        metadata = FORGED_METADATA[name](metadata)
    save_file(tensors, forged, metadata={"opdctl": json.dumps(metadata)})
    replace_first_part(teacher, forged.read_bytes())
    error = refusal(lambda: read_everything(run), forged.stat().st_size)
    assert "sort12-" in error.message or str(path) in error.message, error.message


def header(tensors: dict[str, Any], data: int = 64) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


META = {"opdctl": "{}"}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(7),
        struct.pack("<Q", 2**63) + bytes(64),
        struct.pack("<Q", 2**40) + bytes(64),
        header({"logprobs": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
        header({"logprobs": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 64]}}),
        header({"logprobs": {"dtype": "F32", "shape": [16], "data_offsets": [64, 0]}}),
        header({"logprobs": {"dtype": "F32", "shape": [16], "data_offsets": [-64, 0]}}),
        header({"logprobs": {"dtype": "F128", "shape": [4], "data_offsets": [0, 64]}}),
        header({"logprobs": {"dtype": "F32", "shape": [15], "data_offsets": [0, 64]}}),
        header({"logprobs": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}, "__metadata__": META}),
        header({"__metadata__": {"opdctl": "[" * 10**5}}, 0),
        header({"__metadata__": {"opdctl": "no json"}}, 0),
        header({"__metadata__": {}}, 0),
        header({}, 0),
        b"PK\x03\x04" + bytes(64),  # the start of a file by torch.save: a pickle in a zip
        b"\x80\x04\x95" + bytes(64),
    ],
)
def test_other_safetensors_files_are_refused(run: Path, teacher: stage_dir.StageDir, data: bytes) -> None:
    replace_first_part(teacher, data)
    error = refusal(lambda: read_everything(run), len(data))
    assert str(scores(run)) in error.message


def responses(run: Path) -> list[Response]:
    return tables.read_rows(sorted((run / "step-00000/rollout").glob("part-*"))[0], Response)


def rows_table(rows: list[Response], **columns: Any) -> pa.Table:
    """Return the rows as a table with some columns replaced; `...` removes one."""
    schema = tables.arrow_schema(Response)
    plain = {name: [getattr(row, name) for row in rows] for name in schema.names}
    arrays = {name: pa.array(plain[name], schema.field(name).type) for name in schema.names} | columns
    return pa.table({name: array for name, array in arrays.items() if array is not ...})


def lists(values: list[Any], kind: pa.DataType) -> pa.Array:
    return pa.array(values, pa.list_(kind))


FORGED_ROWS: dict[str, Callable[[list[Response]], pa.Table]] = {
    "a column less": lambda rows: rows_table(rows, answer=...),
    "a column more": lambda rows: rows_table(rows, more=pa.array([1] * len(rows))),
    "ids of 64 bits": lambda rows: rows_table(rows, response_ids=lists([[2]] * len(rows), pa.int64())),
    "log-probs of 64 bits": lambda rows: rows_table(rows, logprobs=lists([[-1.0]] * len(rows), pa.float64())),
    "text as ids": lambda rows: rows_table(rows, response_ids=lists([["a"]] * len(rows), pa.string())),
    "a null id": lambda rows: rows_table(rows, sample_id=pa.array([None] * len(rows), pa.string())),
    "null ids": lambda rows: rows_table(rows, response_ids=lists([None] * len(rows), pa.int32())),
    "ids with nulls": lambda rows: rows_table(rows, response_ids=lists([[2, None]] * len(rows), pa.int32())),
    "log-probs with nulls": lambda rows: rows_table(rows, logprobs=lists([[None]] * len(rows), pa.float32())),
    "ragged top ids": lambda rows: rows_table(
        rows, top_ids=lists([[1] * (len(r.response_ids) + 1) for r in rows], pa.int32())
    ),
    "prompts": lambda rows: pa.table({"prompt_id": ["a"], "answer": ["b"]}),
    "no columns": lambda rows: pa.table({}),
}


@pytest.mark.parametrize("name", FORGED_ROWS)
def test_rows_of_another_form_are_refused(run: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "part.parquet"
    pq.write_table(FORGED_ROWS[name](responses(run)), path, write_page_checksum=True)
    assert str(path) in refusal(lambda: tables.read_rows(path, Response), path.stat().st_size).message


@pytest.mark.parametrize("damage", [cut, flip, blank, lengthen])
def test_parquet_damaged_before_its_digest_is_taken_is_refused_or_read_correctly(
    run: Path, tmp_path: Path, damage: Callable[[bytes, random.Random], bytes]
) -> None:
    chance, path, rows, refused = random.Random(1), tmp_path / "part.parquet", responses(run), list[OpdctlError]()
    whole = sorted((run / "step-00000/rollout").glob("part-*"))[0].read_bytes()
    for _ in range(25):
        path.write_bytes(damage(whole, chance))
        try:
            found = tables.read_rows(path, Response)
        except OpdctlError as error:
            refused.append(error)
        else:
            assert [row.response_ids.tolist() for row in found] == [row.response_ids.tolist() for row in rows]
            assert [row.logprobs.tolist() for row in found] == [row.logprobs.tolist() for row in rows]
    kinds = {error.kind for error in refused}
    assert kinds <= {"corrupt_artifact", "unsupported_version"}  # a flipped bit may be in the name of a column
    assert all(str(path) in error.message for error in refused)
    assert len(refused) > 5


@pytest.mark.parametrize(
    ("name", "command"),
    [
        *(
            ("run.json", command)
            for command in ("train", "rollout", "score-teacher", "analyze-position", "status", "eval")
        ),
        *(("step-00001/update.json", command) for command in ("train", "status", "eval")),
        *(
            ("step-00001/rollout/manifest.json", each)
            for each in ("rollout", "score-teacher", "analyze-position", "status")
        ),
    ],
)
def test_every_command_reports_a_corrupt_file_without_a_traceback(
    run: Path, tmp_path: Path, command: str, name: str
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    (copy / name).write_bytes((copy / name).read_bytes()[:-40])
    place = [copy] if command in ("status", "analyze-position") else ["--output", copy]
    result = invoke(command, *place)
    assert result.code == ExitCode.BAD_DATA, result.err
    assert str(copy / name) in result.out + result.err
    assert "Traceback" not in result.err
    assert result.kind != "internal_error"
