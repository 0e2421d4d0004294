"""The fuzz harness: commands over damaged and forged files of a run, a model directory and a data set.

    PYTHONPATH=tests python -m helpers.fuzz                            # 2,000 mutations
    PYTHONPATH=tests python -m helpers.fuzz --mutations 300 --seed 1
    PYTHONPATH=tests python -m helpers.fuzz --only 17 --verbose        # mutation 17 and what its command prints

A mutation changes one file: flipped bytes, a cut, zeros, another file's content, another type or number in JSON with a
digest that fits, a bomb of depth, digits or rows, a claim of size, a chat template without an end, a link, a FIFO, a
directory, nothing. One command runs on it in a forked process. It must end by itself within MAX_CPU_SECONDS, with a
documented exit code, without a traceback, within MAX_BYTES of memory, and must change nothing outside of its own
directory.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from helpers.commands import QUICKSTART, invoke, sets

import opdctl.pipeline.loop
from opdctl.analysis import report
from opdctl.artifacts import files

MAX_CPU_SECONDS = 10.0
"""Processor time: it does not depend on what else runs on the machine."""
MAX_SECONDS = 60.0
"""A command that waits for something takes no processor time."""
MAX_BYTES = 2**30
"""Of memory, more than the process had when it was forked."""
SPARSE_BYTES = 2**38
DOCUMENTED_CODES = (0, 1, 2, 3, 4, 5)
BUILD = ("rollout.max_tokens=40", "eval.every_steps=1", "eval.limit=4", "eval.max_tokens=40", "train.keep_latest=9")
BAD_TEXT = re.compile(r"Traceback|Internal error|internal error")
Mutation = Callable[[Path, random.Random, "Corpus"], None]


# ── The corpus ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Corpus:
    """A finished run, a model directory, data sets, and a directory that nothing may change."""

    run: Path
    model: Path
    data: Path
    outside: Path


def make_corpus(folder: Path, run: Path | None = None) -> Corpus:
    """Return a corpus in `folder`. run: a finished run to use instead of a new one."""
    if run is None:
        run = folder / "run"
        result = invoke("train", "--recipe", QUICKSTART, *sets(*BUILD), "--output", run)
        assert result.code == 0, result.err
    copy = Path(shutil.copytree(run, folder / "base-run"))
    beat = {"stage": "rollout", "step": 1, "state": "running", "host": "node", "pid": 1, "time": "2026-01-01T00:00:00"}
    files.write_json(copy / "heartbeats" / "rollout-node-1.json", beat)
    interrupt_rollout(copy, 2)
    model = Path(shutil.copytree(next(Path(opdctl.__file__).parent.glob("data/toy/models/student")), folder / "model"))
    data, outside = folder / "data", folder / "outside"
    data.mkdir()
    rows = [{"problem": f"Sort {n} 3 1", "answer": str(n), "id": f"row-{n}"} for n in range(64)]
    (data / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (data / "rows.csv").write_text("problem,answer,id\n" + "".join(",".join(row.values()) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), data / "rows.parquet")
    outside.mkdir()
    (outside / "precious").write_text("keep")
    return Corpus(copy, model, data, outside)


def interrupt_rollout(run: Path, step: int) -> None:
    """Leave the rollout of a step as a worker does that is killed after its first part."""
    result = invoke("rollout", "--output", run, "--step", step)
    assert result.code == 0, result.err
    stage = run / f"step-{step:05d}" / "rollout"
    manifest = json.loads((stage / "manifest.json").read_text())
    first, *others = manifest.pop("parts")
    write_sealed(stage / "in_progress.json", manifest)
    files.write_json(stage / f"{first['name']}.receipt.json", first)
    for name in ("manifest.json", *(part["name"] for part in others)):
        (stage / name).unlink()


def outside_state(corpus: Corpus) -> list[tuple[str, int, bytes]]:
    return [
        (str(path), path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted([corpus.outside, *corpus.outside.rglob("*")])
    ]


# ── Mutations ────────────────────────────────────────────────────────────────────────────────────────────────────────


def flip(path: Path, chance: random.Random, corpus: Corpus) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(chance.choice((1, 1, 8)) if data else 0):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def cut(path: Path, chance: random.Random, corpus: Corpus) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: chance.randrange(len(data) + 1)])


def zeros(path: Path, chance: random.Random, corpus: Corpus) -> None:
    data = path.read_bytes()
    at = chance.randrange(len(data) + 1)
    path.write_bytes(data[:at] + bytes(len(data[at : at + 512])) + data[at + 512 :])


def lengthen(path: Path, chance: random.Random, corpus: Corpus) -> None:
    path.write_bytes(path.read_bytes() + chance.randbytes(chance.randrange(1, 64)))


def noise(path: Path, chance: random.Random, corpus: Corpus) -> None:
    path.write_bytes(chance.randbytes(chance.choice((1, 100, 10_000))))


def empty(path: Path, chance: random.Random, corpus: Corpus) -> None:
    path.write_bytes(b"")


def swap(path: Path, chance: random.Random, corpus: Corpus) -> None:
    """The content of another file, most often of the same kind."""
    others = [other for folder in (corpus.run, corpus.model, corpus.data) for other in folder.rglob("*")]
    others = [other for other in sorted(others) if other.is_file()]
    same = [other for other in others if other.suffix == path.suffix] or others
    path.write_bytes(chance.choice(same if chance.random() < 0.8 else others).read_bytes())


def link(path: Path, chance: random.Random, corpus: Corpus) -> None:
    path.unlink()
    path.symlink_to(chance.choice((corpus.outside / "precious", corpus.outside, path, "/dev/zero", "nowhere")))


def link_directory(path: Path, chance: random.Random, corpus: Corpus) -> None:
    """The directory of the file is a link to one outside with the same content."""
    target = corpus.outside / "moved"
    path.parent.rename(target)
    path.parent.symlink_to(target)


def fifo(path: Path, chance: random.Random, corpus: Corpus) -> None:
    path.unlink()
    os.mkfifo(path)


def make_socket(path: Path, chance: random.Random, corpus: Corpus) -> None:
    path.unlink()
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's path is short
    try:
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(path.name[:90])
    finally:
        os.chdir(here)
    if len(path.name) > 90:
        path.with_name(path.name[:90]).rename(path)


def directory(path: Path, chance: random.Random, corpus: Corpus) -> None:
    path.unlink()
    path.mkdir()
    if chance.random() < 0.5:
        (path / "inner").write_text("x")


def remove(path: Path, chance: random.Random, corpus: Corpus) -> None:
    path.unlink()


def sparse(path: Path, chance: random.Random, corpus: Corpus) -> None:
    """A file of 256 GiB that takes no space."""
    if path.suffix == ".distcp":
        return  # a trainer state may have any size
    with path.open("ab") as file, contextlib.suppress(OSError):  # the file system has a smaller limit
        file.truncate(SPARSE_BYTES)


BYTES: list[Mutation] = [flip, flip, flip, cut, cut, zeros, lengthen, noise, empty, swap, swap, remove, sparse]
KINDS: list[Mutation] = [link, link, fifo, make_socket, directory]

VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**40, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "x", "../../outside/precious", "/etc/passwd", "\0", "a\nb", "\ud800", "7" * 5000, "x" * 10**6, "step-00000"),
    *([], {}, [None], [[]], {"": None}, {"a": {"b": []}}, [0] * 10**5, ["x", 1, None]),
]


def change_value(value: Any, chance: random.Random) -> Any:
    """Return a JSON value in which one place has another value, is gone, or is doubled."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice(sorted(value))
        if chance.random() < 0.15:
            return {name: each for name, each in value.items() if name != key}
        return {**value, key: change_value(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.8:
        at = chance.randrange(len(value))
        if chance.random() < 0.2:
            return [*value, value[at]]
        return [*value[:at], change_value(value[at], chance), *value[at + 1 :]]
    return chance.choice(VALUES)


def forge_json(path: Path, chance: random.Random, corpus: Corpus) -> None:
    """Another value in JSON, with a digest that fits it."""
    value = json.loads(path.read_text())
    has_digest = "digest" in value and value.pop("digest")
    value = change_value(value, chance)
    if has_digest and isinstance(value, dict):
        value["digest"] = files.digest_of(value)
    path.write_text(json.dumps(value), encoding="utf-8", errors="surrogatepass")


JSON_BOMBS = (
    '{"a":' * 400 + "1" + "}" * 400,
    "[" * 10**6,
    '{"digest": ' + "7" * 10**6 + "}",
    '{"a": ' + "[" * 900 + "]" * 900 + "}",
    '{"a": 1e99999, "a": NaN}',
)


def bomb_json(path: Path, chance: random.Random, corpus: Corpus) -> None:
    path.write_text(chance.choice(JSON_BOMBS))


def bomb_key(path: Path, chance: random.Random, corpus: Corpus) -> None:
    """A deep value or a long number in one key of a JSON file."""
    text, bomb = path.read_text(), chance.choice(("[" * 500 + "]" * 500, "9" * 4000, "1" * 5000, "[" * 90 + "]" * 90))
    path.write_text(re.sub(r":\s*", f': {bomb}, "k": ', text, count=1))


TOML_VALUES = (
    *("-1", "0", "true", "nan", "inf", "1e400", '""', '"x"', "[]", "{}", "[[]]", '["a", 1]', "9223372036854775807"),
    *("[" * 500 + "]" * 500, "[" * 70 + "]" * 70, "7" * 5_000_00, "0x" + "f" * 9000, '"' + "x" * 10**5 + '"'),
    *('"../../outside"', '"/dev/zero"', '"toy:sort12"', "1979-05-27T07:32:00Z", "{a = {b = 1}}", '"\\u0000"'),
)


def forge_toml(path: Path, chance: random.Random, corpus: Corpus) -> None:
    """Another value of one key, a bomb at the start, or a key that is gone."""
    lines = path.read_text().splitlines()
    at = chance.choice([number for number, line in enumerate(lines) if "=" in line])
    key = lines[at].partition("=")[0]
    kind = chance.random()
    if kind < 0.1:
        lines[at] = ""
    elif kind < 0.2:
        lines.insert(
            0, chance.choice(('plugins = ["json.tool"]', ".".join("a" * 10**5) + " = 1", "[[x]]", "#" * 10**6))
        )
    else:
        lines[at] = f"{key}= {chance.choice(TOML_VALUES)}"
    path.write_text("\n".join(lines) + "\n")


def forge_parquet(path: Path, chance: random.Random, corpus: Corpus) -> None:
    """Other rows, types or columns, with the digest in the record."""
    table = pq.read_table(path)
    name = chance.choice(table.column_names)
    rows = max(table.num_rows, 1)
    kind = chance.randrange(7)
    if kind == 0:
        table = table.slice(0, chance.randrange(rows))
    elif kind == 1:
        table = pa.concat_tables([table] * chance.choice((2, 50)))
    elif kind == 2:
        table = table.drop_columns([name])
    elif kind == 3:
        table = table.append_column(chance.choice((name, "other")), pa.nulls(table.num_rows))
    elif kind == 4:
        value = chance.choice(
            (pa.nulls(rows), pa.array([1.5] * rows), pa.array(["\0" * 10] * rows), pa.array([[[1]]] * rows))
        )
        table = table.set_column(table.column_names.index(name), name, value[: table.num_rows])
    elif kind == 5:
        table = pa.table({each: pa.array(["x"]).take(pa.array([0] * 3_000_000)) for each in table.column_names[:3]})
    else:
        table = pa.table({name: pa.array([[7] * 20_000_000], pa.list_(pa.int32()))})
    pq.write_table(table, path, compression="zstd", write_page_checksum=True)
    seal(path, corpus)


def forge_tensors(path: Path, chance: random.Random, corpus: Corpus) -> None:
    """Other claims in the header of a safetensors file, with the digest in the record."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    kind = chance.randrange(3)
    if kind == 0:
        data = struct.pack("<Q", chance.choice((0, 2**63, 10**8, length - 1, length + 1))) + data[8:]
    else:
        name = chance.choice(sorted(header))
        if kind == 1 and isinstance(header[name], dict) and "shape" in header[name]:
            key = chance.choice(("shape", "dtype", "data_offsets"))
            values = ([10**12], [-1, -1], [2**62, 4], "F64", "I8", [0, 2**40], [8, 0], None, "x", [1.5], [True])
            header[name][key] = chance.choice(values)
        else:
            header = change_value(header, chance)
        text = json.dumps(header).encode(errors="surrogatepass")
        data = struct.pack("<Q", len(text)) + text + data[8 + length :]
    path.write_bytes(data)
    seal(path, corpus)


TEMPLATE_BOMBS = (
    "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3,
    *("{{ 10 ** (10 ** 9) }}", "{{ 'a' * 10 ** 11 }}", "{{ 'a' * 2 * 10 ** 6 }}", "{{ '%0999999999d' % 1 }}"),
    "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    *("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{" + "(" * 10**5 + "}}", "{% if", "{{ 1 // 0 }}"),
)


def forge_template(path: Path, chance: random.Random, corpus: Corpus) -> None:
    """A chat template that does not end, or takes memory, for each prompt or for some."""
    bomb, text = chance.choice(TEMPLATE_BOMBS), path.read_text()
    condition = chance.choice(("", "", "{% if '7' in messages[0].content %}"))
    path.write_text(condition + bomb + ("{% endif %}" if condition else "") + text)


def seal(path: Path, corpus: Corpus) -> None:
    """Put the digest and size of a changed file into the records of its run, so that only its form is wrong."""
    digest = files.sha256_file(path)
    manifest, run_record = path.parent / "manifest.json", path.parent / "run.json"
    if manifest.exists():
        value = json.loads(manifest.read_text())
        for part in value["parts"]:
            if part["name"] == path.name:
                part |= {"sha256": digest, "bytes": path.stat().st_size}
        write_sealed(manifest, value)
    elif run_record.exists():
        value = json.loads(run_record.read_text())
        value["prompts"]["sha256"] = digest
        write_sealed(run_record, value)


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    value.pop("digest", None)
    files.write_json(path, value)


FORMS: dict[str, list[Mutation]] = {
    ".json": [forge_json, forge_json, forge_json, bomb_json, bomb_key],
    ".toml": [forge_toml],
    ".parquet": [forge_parquet],
    ".safetensors": [forge_tensors],
    ".jinja": [forge_template],
}


# ── Commands ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def sample_of(run: Path) -> str:
    part = next(run.glob("step-00000/rollout/part-00000*.parquet"))
    return str(pq.read_table(part, columns=["sample_id"])["sample_id"][0])


def run_commands(run: Path, other: Path, sample: str) -> list[list[object]]:
    """Return the commands on a run: those that read it, and those that continue it, which find nothing to do."""
    return [
        *([["status", run]] * 2),
        *([["status", run, "--verify"]] * 4),
        *([["analyze-position", run]] * 2),
        ["analyze-position", run, "--dry-run"],
        ["run", "show", run, sample],
        ["run", "repair", run, "--dry-run"],
        ["run", "repair", run],
        ["run", "fork", run, run.parent / "fork", "--set", "weight.gamma=0.7"],
        ["compare", run / "eval" / "sort12" / "step-00000", run / "eval" / "sort12" / "step-00002"],
        ["compare", run, other, "--table"],
        ["train", "--output", run],
        ["train", "--output", run, "--dry-run"],
        ["rollout", "--output", run, "--step", "1"],
        ["rollout", "--output", run, "--step", "2"],
        ["score-teacher", "--output", run, "--step", "1"],
        ["eval", "--run", run],
        ["eval", "--run", run, "--dry-run"],
    ]


def model_commands(model: Path, output: Path) -> list[list[object]]:
    train = ["train", "--recipe", QUICKSTART, *sets(), "--output", output, "--dry-run"]
    return [
        [*train, "--set", f"student.model='{model}'"],
        [*train, "--set", f"teacher.model='{model}'"],
        [
            "eval",
            "--model",
            model,
            "--bench",
            "sort12",
            "--run",
            output,
            "--set",
            "rollout.engine='transformers'",
            "--set",
            "eval.limit=2",
            "--set",
            "eval.max_tokens=8",
        ],
    ]


def data_commands(data: Path, output: Path) -> list[list[object]]:
    columns = [word for name in ("problem", "answer", "id") for word in ("--set", f"eval.{name}_column='{name}'")]
    prompts = ["prompts.prompt_column='problem'", "prompts.answer_column='answer'", "prompts.id_column='id'"]
    train = [
        "train",
        "--recipe",
        QUICKSTART,
        *sets(f"prompts.source='{data}'", *prompts),
        "--output",
        output,
        "--dry-run",
    ]
    return [train, ["eval", "--model", "toy:student", "--bench", data, *columns, "--dry-run"]]


# ── Running ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Outcome:
    """The outcome of a command on a mutation.

    cpu_seconds: of processor time. extra_bytes: of memory. fault: what is wrong with it, "" for nothing.
    """

    number: int
    description: str
    code: int
    cpu_seconds: float
    extra_bytes: int
    fault: str
    output: str


def fuzz(corpus: Corpus, folder: Path, number: int, seed: int) -> Outcome:
    """Make the mutation of this number in a copy of a part of the corpus, and run a command on it."""
    chance = random.Random(f"{seed}/{number}")
    work = folder / f"mutation-{number}"
    shutil.rmtree(corpus.outside / "moved", ignore_errors=True)
    subject = chance.choice(("run", "run", "run", "run", "run", "run", "model", "model", "data"))
    original: Path = getattr(corpus, subject)
    copy = Path(shutil.copytree(original, work / subject))
    path = chance.choice(sorted(file for file in copy.rglob("*") if file.is_file()))
    forms = FORMS.get(path.suffix, BYTES)
    mutation = chance.choice(
        chance.choice((BYTES, forms, forms, KINDS, [link_directory] if subject == "run" else BYTES))
    )
    command = {
        "run": lambda: run_commands(copy, original, sample_of(original)),
        "model": lambda: model_commands(copy, work / "output"),
        "data": lambda: data_commands(path, work / "output"),
    }[subject]()
    words = chance.choice(command)
    description = f"{mutation.__name__} {path.relative_to(work)}: {' '.join(map(str, words[:4]))}"
    try:
        if mutation is link_directory and path.parent == copy:
            mutation = link
        mutation(path, chance, Corpus(copy, corpus.model, corpus.data, corpus.outside))
        before = outside_state(corpus)
        code, cpu_seconds, extra_bytes, output = call(words, work)
        changed = outside_state(corpus) != before
    finally:
        shutil.rmtree(work, ignore_errors=True)
    fault = judge(code, cpu_seconds, extra_bytes, output, changed)
    return Outcome(number, description, code, cpu_seconds, extra_bytes, fault, output)


def judge(code: int, cpu_seconds: float, extra_bytes: int, output: str, changed: bool) -> str:
    """Return what is wrong with an outcome."""
    faults = {
        "hang": code == -signal.SIGKILL or cpu_seconds > MAX_CPU_SECONDS,
        "crash": code not in DOCUMENTED_CODES or bool(BAD_TEXT.search(output)),
        "memory": extra_bytes > MAX_BYTES,
        "outside": changed,
        "unnamed": code in (2, 3) and "/" not in output,
    }
    return next((name for name, is_so in faults.items() if is_so), "")


def call(words: list[object], folder: Path) -> tuple[int, float, int, str]:
    """Run a command in a forked process. Return its exit code, or minus its signal, CPU seconds, memory and output."""
    output, deadline = folder / "printed", time.monotonic() + MAX_SECONDS
    child = os.fork()
    if not child:
        os.chdir(folder)
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os._exit(_run(words, folder))
    while not (ended := os.wait4(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            ended = os.wait4(child, 0)
            break
        time.sleep(0.005)
    _, status, usage = ended
    used = folder / "memory"
    return (
        os.waitstatus_to_exitcode(status),
        usage.ru_utime + usage.ru_stime,
        int(used.read_text()) if used.exists() else 0,
        output.read_text(errors="replace"),
    )


def _run(words: list[object], folder: Path) -> int:
    report.figures.figure_panels = lambda analysis: {}  # type: ignore[attr-defined] # the analysis without the drawing
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _peak_bytes()
    code = 99
    try:
        result = invoke(*words)
        code = result.code
        os.write(1, (result.out + result.err).encode(errors="replace"))
    finally:
        (folder / "memory").write_text(str(_peak_bytes() - before))
    return code


def _peak_bytes() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="*", help="the numbers of single mutations")
    parser.add_argument("--verbose", action="store_true", help="print what the commands print")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = make_corpus(folder)
        outcomes = []
        for number in options.only or range(options.mutations):
            outcome = fuzz(corpus, folder, number, options.seed)
            outcomes.append(outcome)
            if outcome.fault or options.verbose:
                print(
                    f"{number} {outcome.fault or 'ok'} {outcome.code} {outcome.cpu_seconds:.1f} s {outcome.description}"
                )
                print("   ", outcome.output if options.verbose else outcome.output.strip()[-300:], flush=True)
    print(f"{len(outcomes)} mutations; faults {dict(Counter(each.fault for each in outcomes if each.fault))}")
    print(f"exit codes {dict(sorted(Counter(each.code for each in outcomes).items()))}")
    seconds = [each.cpu_seconds for each in outcomes]
    print(f"processor time: longest {max(seconds):.1f} s, all {sum(seconds):.0f} s")
    print(f"greatest memory {max(each.extra_bytes for each in outcomes) / 2**20:.0f} MiB")
    sys.exit(any(each.fault for each in outcomes))


if __name__ == "__main__":
    main()
