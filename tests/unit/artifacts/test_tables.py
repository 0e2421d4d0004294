import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file

from opdctl.artifacts import tables
from opdctl.artifacts.records import GradedResponse, Prompt, Response, TokenScores
from opdctl.errors import ExitCode, OpdctlError


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


def with_columns(row: Response) -> Response:
    """Return the response with an entropy and three most probable ids at each token."""
    tokens = len(row.response_ids)
    top_ids = np.arange(3 * tokens, dtype=np.int32).reshape(tokens, 3)
    return dataclasses.replace(row, entropies=row.logprobs * -2, top_ids=top_ids, top_logprobs=-top_ids.astype("f4"))


def graded() -> GradedResponse:
    ids = np.array([2, 3], np.int32)
    return GradedResponse("s", "p", ids, "text", "stop", "7", extracted="7", correct=True, verdict="ok", vote=None)


def error_of(read, *arguments) -> OpdctlError:
    with pytest.raises(OpdctlError) as caught:
        read(*arguments)
    assert caught.value.code == ExitCode.BAD_DATA
    assert str(arguments[0]) in caught.value.message
    return caught.value


def check_equal(rows, expected):
    for row, wanted in zip(rows, expected, strict=True):
        for field in dataclasses.fields(wanted):
            np.testing.assert_array_equal(getattr(row, field.name), getattr(wanted, field.name), strict=True)


# ── Rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("change", [lambda row: row, with_columns])
def test_responses_round_trip(tmp_path, change):
    rows = [change(row) for row in (response("a"), response("b", tokens=0), response("c", tokens=1))]
    tables.write_rows(tmp_path / "r.parquet", rows, Response)
    check_equal(tables.read_rows(tmp_path / "r.parquet", Response), rows)


def test_prompts_and_graded_responses_round_trip(tmp_path):
    ids = np.array([1], np.int32)
    prompts = [Prompt("p", ids, "x", "teacher"), Prompt("q", ids, None, "teacher-math", np.array([4, 5], np.int32))]
    for rows, record in ((prompts, Prompt), ([graded()], GradedResponse), ([], GradedResponse)):
        tables.write_rows(tmp_path / "r.parquet", rows, record)
        check_equal(tables.read_rows(tmp_path / "r.parquet", record), rows)


def test_equal_rows_make_equal_bytes(tmp_path):
    for name in ("a", "b"):
        tables.write_rows(tmp_path / name, [response()], Response)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_flipped_byte_in_parquet_is_never_read_silently(tmp_path):
    """Each seventh byte is flipped: the file is refused, or the byte carries no value and the rows are intact."""
    path, wanted = tmp_path / "r.parquet", [response(tokens=50)]
    tables.write_rows(path, wanted, Response)
    data, refused = path.read_bytes(), 0
    for position in range(0, len(data), 7):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :])
        try:
            rows = tables.read_rows(path, Response)
        except OpdctlError:
            refused += 1
        else:
            assert rows[0].response_ids.tolist() == wanted[0].response_ids.tolist()
            assert rows[0].logprobs.tolist() == wanted[0].logprobs.tolist()
            assert rows[0].sample_id == wanted[0].sample_id
    assert refused > len(data) // 7 // 4


def test_rows_of_another_record_are_refused(tmp_path):
    tables.write_rows(tmp_path / "p.parquet", [Prompt("p", np.array([1], np.int32), "x", "teacher")], Prompt)
    error = error_of(tables.read_rows, tmp_path / "p.parquet", Response)
    assert error.kind == "corrupt_artifact"
    assert "prompt_id" in error.message


def rewrite(path, change):
    pq.write_table(change(pq.read_table(path)), path)


@pytest.mark.parametrize(
    ("record", "row", "column"),
    [
        (Response, with_columns(response()), "entropies"),
        (Response, with_columns(response()), "top_logprobs"),
        (Prompt, Prompt("p", np.array([1], np.int32), "x", "teacher", np.array([2], np.int32)), "teacher_prompt_ids"),
    ],
)
def test_missing_column_has_its_default(tmp_path, record, row, column):
    path = tmp_path / "r.parquet"
    tables.write_rows(path, [row], record)
    rewrite(path, lambda table: table.drop_columns([column]))
    check_equal(tables.read_rows(path, record), [dataclasses.replace(row, **{column: None})])


@pytest.mark.parametrize("column", ["answer", "sample_id", "response_ids"])
def test_missing_column_without_default_is_corrupt(tmp_path, column):
    path = tmp_path / "r.parquet"
    tables.write_rows(path, [response()], Response)
    rewrite(path, lambda table: table.drop_columns([column]))
    assert error_of(tables.read_rows, path, Response).kind == "corrupt_artifact"


def test_unknown_column_is_an_unsupported_version(tmp_path):
    path = tmp_path / "r.parquet"
    tables.write_rows(path, [response()], Response)
    rewrite(path, lambda table: table.append_column("rewards", pa.array([1.0])))
    error = error_of(tables.read_rows, path, Response)
    assert error.kind == "unsupported_version"
    assert "rewards" in error.message
    assert "logprobs" not in error.message
    assert error.hint


@pytest.mark.parametrize(
    ("column", "values", "kind"),
    [
        ("policy_version", [0], pa.int64()),
        ("response_ids", [[1]], pa.list_(pa.int64())),
        ("logprobs", [[-1.0]], pa.list_(pa.float64())),
        ("sample_id", [None], pa.string()),
        ("response_ids", [None], pa.list_(pa.int32())),
        ("response_ids", [[1, None]], pa.list_(pa.int32())),
    ],
)
def test_column_of_another_type_or_with_nulls_is_corrupt(tmp_path, column, values, kind):
    path = tmp_path / "r.parquet"
    tables.write_rows(path, [response()], Response)
    rewrite(path, lambda table: table.set_column(table.schema.get_field_index(column), column, pa.array(values, kind)))
    error = error_of(tables.read_rows, path, Response)
    assert error.kind == "corrupt_artifact"
    assert column in error.message


def test_table_is_written_as_parquet_and_csv(tmp_path):
    paths = tables.write_table(tmp_path / "t", {"step": [0, 1], "k1": [0.5, float("nan")]})
    assert [path.name for path in paths] == ["t.parquet", "t.csv"]
    assert pq.read_table(paths[0]).to_pydict() == {"step": [0, 1], "k1": [0.5, None]}
    assert paths[1].read_text().splitlines() == ['"step","k1"', "0,0.5", "1,"]


# ── Scores ───────────────────────────────────────────────────────────────────────────────────────────────────────────

ONE = TokenScores(np.array([-1.0], np.float32))


@pytest.fixture
def scores(tmp_path):
    """A score part of one response."""
    tables.write_scores(tmp_path / "s.safetensors", ["a"], [ONE], {"rollout": "r"})
    return tmp_path / "s.safetensors"


def test_scores_are_read_by_id(tmp_path):
    logprobs = [np.array([-1.5, -2.5], np.float32), np.zeros(0, np.float32), np.array([-3.0], np.float32)]
    tables.write_scores(
        tmp_path / "s.safetensors", ["a", "b", "c"], [TokenScores(row) for row in logprobs], {"rollout": "r"}
    )
    found = tables.read_scores(tmp_path / "s.safetensors", "r")
    assert {name: s.logprobs.tolist() for name, s in found.items()} == {"a": [-1.5, -2.5], "b": [], "c": [-3.0]}
    assert all(score.entropies is None and score.hidden_states is None for score in found.values())


def test_all_columns_of_scores_are_read_by_id(tmp_path):
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


def test_truncated_scores_are_corrupt(scores):
    scores.write_bytes(scores.read_bytes()[:-2])
    assert error_of(tables.read_scores, scores, "r").kind == "corrupt_artifact"


def test_scores_whose_ids_repeat_are_corrupt(tmp_path):
    path = tmp_path / "s.safetensors"
    tables.write_scores(path, ["a", "a"], [ONE] * 2, {"rollout": "r"})
    assert error_of(tables.read_scores, path, "r").kind == "corrupt_artifact"


def test_scores_of_other_responses_are_refused(scores):
    assert error_of(tables.read_scores, scores, "another").kind == "checksum_mismatch"


def test_unknown_tensor_is_an_unsupported_version(scores):
    metadata = {"opdctl": json.dumps({"rollout": "r", "sample_ids": ["a"]})}
    save_file({**load_file(scores), "rewards": np.zeros(1, np.float32)}, scores, metadata=metadata)
    error = error_of(tables.read_scores, scores, "r")
    assert error.kind == "unsupported_version"
    assert "rewards" in error.message


def test_schemas_follow_the_annotations():
    assert tables.arrow_schema(Response).field("top_ids").type == pa.list_(pa.int32())
    assert tables.arrow_schema(Response).field("answer").nullable
    assert not tables.arrow_schema(Response).field("sample_id").nullable
    assert tables.tensor_specs() == {
        "offsets": ("I64", 1),
        "logprobs": ("F32", 1),
        "entropies": ("F32", 1),
        "top_ids": ("I32", 2),
        "top_logprobs": ("F32", 2),
        "student_top_logprobs": ("F32", 2),
        "hidden_states": ("F32", 2),
    }
