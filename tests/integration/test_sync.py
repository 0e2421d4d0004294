"""`opdctl run sync` with an S3 server on this machine: increments, order, faults, kills, conflicts, untrusted keys."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.commands import Result, contents, invoke, rewrite_json
from helpers.object_stores import (
    BUCKET,
    SECRET,
    Answer,
    Fault,
    Request,
    Store,
    cut,
    drop,
    first,
    serve_s3,
    slow_down,
    use,
)

from opdctl.artifacts import object_store
from opdctl.errors import ExitCode

PREFIX = "runs/x/"
URL = f"s3://{BUCKET}/runs/x"


@pytest.fixture(scope="module")
def server() -> Iterator[Store]:
    with serve_s3() as store:
        yield store


@pytest.fixture
def store(server: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(object_store, "RETRY_SECONDS", 0.01)
    return use(server, monkeypatch)


def sync(*words: object) -> Result:
    result = invoke("run", "sync", *words)
    assert SECRET not in result.out + result.err
    assert "Traceback" not in result.err
    return result


def succeed(*words: object) -> dict[str, dict[str, int]]:
    result = sync(*words, "--json")
    assert result.code == 0, result.err
    counts: dict[str, dict[str, int]] = result.json()
    return counts


@pytest.fixture
def run(finished_copy: Path) -> Path:
    return finished_copy


@pytest.fixture
def stored(store: Store, run: Path) -> Store:
    """The store with the run."""
    succeed(run, URL)
    store.proxy.set()
    return store


# ── Increments ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_run_arrives_as_it_is_and_a_second_sync_makes_one_request(store: Store, run: Path, tmp_path: Path) -> None:
    sent = succeed(run, URL)
    assert store.contents(PREFIX) == contents(run)
    size = sum(map(len, contents(run).values()))
    assert sent["sent"] == {"files": len(contents(run)), "bytes": size}
    store.proxy.set()
    again = succeed(run, URL)
    assert again["sent"] == again["received"] == {"files": 0, "bytes": 0}
    assert again["unchanged"] == sent["sent"]
    assert [request.is_list for request in store.proxy.seen] == [True]

    copy = tmp_path / "copy"
    assert succeed(URL, copy)["received"] == sent["sent"]
    assert contents(copy) == contents(run)
    assert invoke("status", copy, "--verify").code == 0
    store.proxy.set()
    assert succeed(URL, copy)["received"] == {"files": 0, "bytes": 0}
    assert succeed(copy, URL)["sent"] == {"files": 0, "bytes": 0}
    assert [request.is_list for request in store.proxy.seen] == [True, True]


def test_changes_alone_are_sent(stored: Store, run: Path, tmp_path: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2}\n')
    shutil.copyfile(run / "recipe.toml", tmp_path / "same")
    os.replace(tmp_path / "same", run / "recipe.toml")  # another file with the same content
    assert invoke("status", run).code == 0
    assert succeed(run, URL)["sent"]["files"] == 1
    assert stored.proxy.sent() == [f"{PREFIX}metrics.jsonl"]


def test_copy_without_a_journal_is_compared_by_its_records(stored: Store, run: Path) -> None:
    """Parts, students and trainer states are not read: of equal records their digests are known."""
    for journal in run.glob(".sync-*"):
        journal.unlink()
    assert succeed(run, URL)["sent"]["files"] == 0
    fetched = {name.removeprefix(PREFIX) for name in stored.proxy.fetched()}
    assert not [name for name in fetched if "part-" in name or name.endswith(".safetensors")]
    stored.proxy.set()
    assert succeed(run, URL)["sent"]["files"] == 0
    assert not stored.proxy.fetched()


def test_dry_run_writes_nothing(store: Store, run: Path, tmp_path: Path) -> None:
    assert succeed(run, URL, "--dry-run")["sent"]["files"] == len(contents(run))
    assert not store.names()
    succeed(run, URL)
    assert succeed(URL, tmp_path / "copy", "--dry-run")["received"]["files"] == len(contents(run))
    assert not (tmp_path / "copy").exists()


def test_other_files_are_not_synced_and_nothing_is_deleted(store: Store, run: Path, tmp_path: Path) -> None:
    expected = contents(run)
    for name in ("heartbeats/train-1.json", "corrupt/x", "wandb/log", "step-00000/rollout/.tmp-part", ".train.lock"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("x")
    (run / "notes.txt").write_text("x")
    store.put(f"{PREFIX}notes-of-others.txt", b"x")
    succeed(run, URL)
    assert store.contents(PREFIX) == expected | {"notes-of-others.txt": b"x"}
    shutil.rmtree(run / "student/step-00001")
    succeed(run, URL)
    assert store.contents(PREFIX) == expected | {"notes-of-others.txt": b"x"}


def test_unfinished_stage_is_sent_with_its_receipts_and_continued_elsewhere(
    store: Store, run: Path, tmp_path: Path
) -> None:
    finished = contents(run)
    stage = run / "step-00001/teacher"
    shutil.rmtree(run / "student/step-00002")
    shutil.rmtree(run / "trainer/step-00002")
    (run / "step-00001/update.json").unlink()
    manifest = json.loads((stage / "manifest.json").read_text())
    parts, _ = manifest.pop("parts"), manifest.pop("digest")
    rewrite_json_file(stage / "in_progress.json", manifest)
    rewrite_json_file(stage / f"{parts[0]['name']}.receipt.json", parts[0])
    (stage / "manifest.json").unlink()
    succeed(run, URL)
    assert f"{PREFIX}step-00001/teacher/{parts[0]['name']}" in store.names()
    assert f"{PREFIX}step-00001/teacher/{parts[1]['name']}" not in store.names()  # has no receipt
    copy = tmp_path / "copy"
    succeed(URL, copy)
    made = invoke("score-teacher", copy, "--json")
    assert made.json()["parts_made"] == 1, made.err
    assert invoke("train", copy).code == 0
    weights = "student/step-00002/model.safetensors"
    assert (copy / weights).read_bytes() == finished[weights]
    succeed(copy, URL)
    assert store.get(PREFIX + weights) == finished[weights]
    succeed(URL, tmp_path / "third")
    assert not list((tmp_path / "third").rglob("*receipt.json"))


def rewrite_json_file(path: Path, value: dict[str, object]) -> None:
    path.write_text("{}")
    rewrite_json(path, **value)


@pytest.mark.parametrize("url", ["memory://sync-tests/x", "file://{}/bucket/x"])
def test_other_file_systems(url: str, run: Path, tmp_path: Path) -> None:
    address = url.format(tmp_path)
    succeed(run, address)
    assert succeed(run, address)["sent"]["files"] == 0
    succeed(address, tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(run)
    assert not list(tmp_path.rglob(".tmp-*"))


# ── Order ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def referred(record: Path, run: Path) -> set[str]:
    """Return the files that a record of the run refers to."""
    value, directory = json.loads(record.read_text()), record.parent.relative_to(run).as_posix()
    if record.name == "manifest.json":
        return {f"{directory}/{part['name']}" for part in value["parts"]}
    if record.name == "digests.json":
        return {f"{directory}/{name}" for name in value["files"]}
    if record.name == "update.json":
        student = {f"student/step-{value['step'] + 1:05d}/{name}" for name in value["student"]}
        return student | {f"{directory}/{stage}/manifest.json" for stage in ("rollout", "teacher")}
    return {"recipe.toml", "prompts.parquet"} if record.name == "run.json" else set()


def test_each_record_follows_what_it_refers_to(store: Store, run: Path) -> None:
    succeed(run, URL)
    sent = [name.removeprefix(PREFIX) for name in store.proxy.sent()]
    assert sorted(sent) == sorted(contents(run))
    records = [name for name in sent if name.endswith(".json") and referred(run / name, run)]
    assert len(records) > 10
    for name in records:
        assert referred(run / name, run) <= {*sent[: sent.index(name)]}, name


# ── Faults ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("fault", [slow_down, drop, cut], ids=lambda fault: fault.__name__)
def test_faults_of_the_store_are_overcome(fault: Fault, store: Store, run: Path, tmp_path: Path) -> None:
    store.proxy.set(first(3, "PUT", fault))
    succeed(run, URL)
    assert store.contents(PREFIX) == contents(run)
    store.proxy.set(first(3, "GET", fault))
    succeed(URL, tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(run)


def test_large_file_is_sent_in_parts_and_survives_faults(store: Store, run: Path, tmp_path: Path) -> None:
    data = os.urandom(2 * object_store.BLOCK_BYTES + 12345)
    (run / "analysis").mkdir()
    (run / "analysis/large.bin").write_bytes(data)
    store.proxy.set(first(2, "PUT", drop))
    succeed(run, URL)
    assert len([each for each in store.proxy.seen if "partNumber" in each.query]) == 3
    assert store.get(f"{PREFIX}analysis/large.bin") == data
    store.proxy.set(lambda request, forward: cut_once(request, forward))
    cut_names.clear()
    succeed(URL, tmp_path / "copy")
    assert (tmp_path / "copy/analysis/large.bin").read_bytes() == data


cut_names: set[str] = set()


def cut_once(request: Request, forward: Callable[[], Answer]) -> Answer:
    """Cut the first answer for each large object."""
    if request.name.endswith(".bin") and request.name not in cut_names:
        cut_names.add(request.name)
        return cut(request, forward)
    return forward()


def test_unanswered_transfer_ends_with_one_error_and_the_same_command_resumes(store: Store, run: Path) -> None:
    def fault(request: Request, forward: Callable[[], Answer]) -> Answer:
        if request.method == "PUT" and "student/step-00002" in request.name:
            raise ConnectionResetError
        return forward()

    store.proxy.set(fault)
    result = sync(run, URL)
    assert (result.code, result.kind) == (ExitCode.UNAVAILABLE, "unavailable_server")
    arrived = {*store.names()}
    assert f"{PREFIX}step-00001/update.json" not in arrived
    store.proxy.set()
    succeed(run, URL)
    assert not arrived & {*store.proxy.sent()}
    assert store.contents(PREFIX) == contents(run)


def kill_after(count: int, method: str, process: list[subprocess.Popen[bytes]]) -> Fault:
    """Return a fault that kills a process when the `count`-th object was transferred."""
    left, lock = [count], threading.Lock()

    def fault(request: Request, forward: Callable[[], Answer]) -> Answer:
        answer = forward()
        with lock:
            left[0] -= request.method == method and request.name != ""
            if left[0] == 0:
                process[0].kill()
        return answer

    return fault


def run_until_killed(store: Store, count: int, method: str, *words: object) -> None:
    started: list[subprocess.Popen[bytes]] = []
    store.proxy.set(kill_after(count, method, started))
    command = [sys.executable, "-m", "opdctl", "run", "sync", *map(str, words)]
    started.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    assert started[0].wait(timeout=120) == -signal.SIGKILL
    names: list[str] = []
    while names != (names := store.names()):  # the proxy still forwards what it had received
        time.sleep(1)


def test_killed_sync_sends_only_the_rest(store: Store, run: Path) -> None:
    run_until_killed(store, 20, "PUT", run, URL)
    arrived = {*store.names()}
    assert 20 <= len(arrived) < len(contents(run))
    store.proxy.set()
    sent = succeed(run, URL)["sent"]["files"]
    assert sent == len(contents(run)) - len(arrived)
    assert not arrived & {*store.proxy.sent()}
    assert store.contents(PREFIX) == contents(run)


def test_killed_download_fetches_only_the_rest(stored: Store, run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    records = [name for name in contents(run) if name.endswith(("manifest.json", "update.json", "digests.json"))]
    run_until_killed(stored, len(records) + 1 + 30, "GET", URL, copy)
    arrived = contents(copy)
    assert 0 < len(arrived) < len(contents(run))
    stored.proxy.set()
    succeed(URL, copy)
    # The record of a student has no digest of its card: a kill just after its arrival has it fetched again.
    recorded = {PREFIX + name for name in arrived if "part-" in name or name.startswith("student/")}
    recorded = {name for name in recorded if not name.endswith("README.md")}
    assert recorded
    assert not recorded & {*stored.proxy.fetched()}
    assert contents(copy) == contents(run)
    assert not list(copy.rglob(".tmp-*"))


# ── Objects that differ from their records ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("step-00000/rollout/part-00000-of-00002.parquet", "checksum_mismatch"),
        ("student/step-00001/model.safetensors", "checksum_mismatch"),
        ("trainer/step-00002/shard-00001-of-00001.safetensors", "checksum_mismatch"),
        ("step-00001/teacher/manifest.json", "checksum_mismatch"),
        ("eval/sort12/step-00001/summary.json", "checksum_mismatch"),
    ],
)
def test_tampered_object_is_an_error_and_is_not_put_in_place(
    name: str, kind: str, stored: Store, tmp_path: Path
) -> None:
    data = stored.get(PREFIX + name)
    digit = max(index for index, byte in enumerate(data) if chr(byte).isdigit())
    stored.put(PREFIX + name, data[:digit] + (b"1" if data[digit] != ord("1") else b"2") + data[digit + 1 :])
    result = sync(URL, tmp_path / "copy")
    assert (result.code, result.kind) == (ExitCode.BAD_DATA, kind), result.err
    assert f"{URL}/{name}" in result.err
    assert not (tmp_path / "copy" / name).exists()
    assert not list((tmp_path / "copy").rglob(".tmp-*"))


def test_half_written_object_is_refused_and_sent_again(stored: Store, run: Path, tmp_path: Path) -> None:
    name = "step-00000/teacher/part-00001-of-00002.safetensors"
    data = stored.get(PREFIX + name)
    stored.put(PREFIX + name, data[: len(data) // 2])
    result = sync(URL, tmp_path / "copy")
    assert (result.code, result.kind) == (ExitCode.BAD_DATA, "corrupt_artifact")
    assert not (tmp_path / "copy" / name).exists()
    assert succeed(run, URL)["sent"]["files"] == 1
    assert stored.get(PREFIX + name) == data
    succeed(URL, tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(run)


def test_object_that_grows_is_not_written(stored: Store, tmp_path: Path) -> None:
    name = f"{PREFIX}metrics.jsonl"

    def fault(request: Request, forward: Callable[[], Answer]) -> Answer:
        answer = forward()
        return Answer(200, answer.headers, answer.body + b"x" * 100_000) if request.name == name else answer

    stored.proxy.set(fault)
    result = sync(URL, tmp_path / "copy")
    assert (result.code, result.kind) == (ExitCode.UNAVAILABLE, "failed_download")
    assert not (tmp_path / "copy/metrics.jsonl").exists()


def test_corrupt_part_is_not_sent(store: Store, run: Path) -> None:
    part = run / "step-00000/rollout/part-00000-of-00002.parquet"
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    result = sync(run, URL)
    assert (result.code, result.kind) == (ExitCode.BAD_DATA, "checksum_mismatch")
    assert f"opdctl run repair {run}" in result.err
    assert not [
        name
        for name in store.names()
        if name.endswith(("part-00000-of-00002.parquet", "rollout/manifest.json")) and "step-00000/rollout" in name
    ]


@pytest.mark.parametrize(
    "key",
    [
        "../../outside",
        "..",
        "/outside",
        "student/step-00001/../../../../outside",
        "student/step-00001/..\\..\\outside",
        "student/step-00001/.hidden",
        "step-00000/rollout/part-00000-of-00002.parquet/",
        "analysis/" + "n" * 300,
        "plugins/evil.py",
    ],
)
def test_object_with_another_name_is_ignored(key: str, stored: Store, run: Path, tmp_path: Path) -> None:
    stored.put(PREFIX + key, b"x")
    before = {path for path in tmp_path.rglob("*") if tmp_path / "copy" not in path.parents}
    succeed(URL, tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(run)
    assert {path for path in tmp_path.rglob("*") if tmp_path / "copy" not in path.parents} - before == {
        tmp_path / "copy"
    }


def test_object_in_the_place_of_a_directory_removes_nothing(stored: Store, run: Path) -> None:
    (run / "analysis/tables").mkdir(parents=True)
    (run / "analysis/tables/x.csv").write_text("x")
    stored.put(f"{PREFIX}analysis/tables", b"x")
    result = sync(URL, run)
    assert (result.code, result.kind) == (ExitCode.USAGE, "unusable_output")
    assert (run / "analysis/tables/x.csv").read_text() == "x"


def test_link_in_the_run_directory_is_not_followed(stored: Store, run: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    shutil.rmtree(run / "analysis", ignore_errors=True)
    (run / "analysis").symlink_to(tmp_path / "elsewhere")
    stored.put(f"{PREFIX}analysis/report.html", b"x")
    for words in ((URL, run), (run, URL)):
        assert (sync(*words).code, sync(*words).kind) == (ExitCode.BAD_DATA, "corrupt_artifact")
    assert not list((tmp_path / "elsewhere").iterdir())


# ── Two sides ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_finished_artifacts_of_two_sides_are_never_replaced(stored: Store, run: Path, tmp_path: Path) -> None:
    """Another version of a stage, with other bytes, as two GPUs may sample it."""
    copy = Path(shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns(".sync-*")))
    part = copy / "step-00001/rollout/part-00000-of-00002.parquet"
    part.write_bytes(b"x" * part.stat().st_size)
    manifest = json.loads((part.parent / "manifest.json").read_text())
    manifest["parts"][0]["sha256"] = hashlib.sha256(part.read_bytes()).hexdigest()
    rewrite_json(part.parent / "manifest.json", parts=manifest["parts"])
    (copy / "analysis").mkdir()
    (copy / "analysis/new.txt").write_text("new")
    before, objects = contents(copy), stored.contents(PREFIX)
    for words in ((copy, URL), (URL, copy), ("--follow", copy, URL)):
        result = sync(*words)
        assert (result.code, result.kind) == (ExitCode.RECIPE_MISMATCH, "source_mismatch"), result.err
        assert "step-00001/rollout/" in result.err
    assert contents(copy) == before
    assert stored.contents(PREFIX) == objects


def test_another_run_is_refused(stored: Store, finished_run_with_columns: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(finished_run_with_columns, tmp_path / "other"))
    rewrite_json(other / "run.json", models={})
    objects = stored.contents(PREFIX)
    for words in ((other, URL), (URL, other)):
        result = sync(*words)
        assert (result.code, result.kind) == (ExitCode.RECIPE_MISMATCH, "source_mismatch")
    assert stored.contents(PREFIX) == objects


def test_older_version_at_the_source_replaces_nothing(stored: Store, run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    succeed(URL, copy)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2}\n')
    succeed(run, URL)
    succeed(copy, URL)
    assert stored.get(f"{PREFIX}metrics.jsonl") == (run / "metrics.jsonl").read_bytes()
    succeed(URL, run)
    succeed(URL, copy)
    assert contents(copy) == contents(run)


# ── Usage ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (["RUN", f"s3://key:{SECRET}@bucket/x"], "invalid_usage"),
        (["RUN", f"s3://bucket/x?token={SECRET}"], "invalid_usage"),
        (["RUN", "nosuchscheme://bucket/x"], "invalid_usage"),
        (["RUN", "gs://bucket/x"], "missing_package"),
        (["RUN", "s3://no-such-bucket/x"], "missing_file"),
        (["RUN", "OTHER"], "invalid_usage"),
        ([URL, URL], "invalid_usage"),
        ([f"s3://{BUCKET}/none", "NEW"], "missing_run"),
        ([URL, "FOREIGN"], "unusable_output"),
    ],
)
def test_unusable_arguments(words: list[str], kind: str, store: Store, run: Path, tmp_path: Path) -> None:
    (tmp_path / "FOREIGN").mkdir()
    (tmp_path / "FOREIGN/thesis.tex").write_text("x")
    store.put(f"{PREFIX}run.json", (run / "run.json").read_bytes())
    result = sync(*[run if word == "RUN" else word if "://" in word else tmp_path / word for word in words])
    assert result.kind == kind, result.err
    assert not store.contents("x")


def test_denied_access_and_an_unreachable_endpoint(store: Store, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    denied = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
    store.proxy.set(lambda request, forward: Answer(403, [("Content-Type", "application/xml")], denied))
    result = sync(run, URL)
    assert (result.code, result.kind) == (ExitCode.UNAVAILABLE, "missing_token")
    monkeypatch.setattr(object_store, "ATTEMPTS", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    result = sync(run, URL)
    assert (result.code, result.kind) == (ExitCode.UNAVAILABLE, "unavailable_server")


def test_no_credentials_are_written(stored: Store, run: Path) -> None:
    written = b"".join(path.read_bytes() for path in run.rglob("*") if path.is_file())
    assert SECRET.encode() not in written
    assert SECRET.encode() not in b"".join(stored.contents("").values())
