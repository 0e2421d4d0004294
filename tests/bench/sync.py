"""Throughput of `opdctl run sync` beside `aws s3 sync` on one S3 server on this machine (moto's), in one run.

    PYTHONPATH=tests python tests/bench/sync.py --gib 1 --aws /path/to/aws

The run consists of random files with true manifests: parts of 4 MiB in steps of 16, and one student of 256 MiB. Each
program makes an upload into an empty prefix, a second sync, a download into an empty directory, and a second one.
The programs take turns, `--rounds` times. Seconds are those of whole processes, with the start of Python.
"""

import argparse
import hashlib
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from helpers.object_stores import BUCKET, serve_s3

from opdctl.artifacts import files
from opdctl.artifacts.versions import versioned
from opdctl.runs.layout import step_name

PART_BYTES, PARTS, STUDENT_BYTES = 4 * 2**20, 16, 256 * 2**20
DIGEST = "0" * 64


def write(path: Path, size: int, source: random.Random) -> str:
    """Write random bytes and return their SHA-256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for start in range(0, size, 2**20):
            block = source.randbytes(min(2**20, size - start))
            digest.update(block)
            file.write(block)
    return digest.hexdigest()


def make_run(path: Path, total: int) -> None:
    source = random.Random(0)
    steps = max((total - STUDENT_BYTES) // (PARTS * PART_BYTES), 1)
    student = write(path / f"student/{step_name(steps)}/model.safetensors", STUDENT_BYTES, source)
    for step in range(steps):
        directory, parts = path / step_name(step) / "rollout", []
        for index in range(PARTS):
            name = f"part-{index:05d}-of-{PARTS:05d}.parquet"
            digest = write(directory / name, PART_BYTES, source)
            parts.append({"name": name, "rows": 1, "tokens": 1, "bytes": PART_BYTES, "sha256": digest})
        header = {"fingerprint": DIGEST, "settings": {}, "inputs": {}, "logprob_metadata": {}}
        files.write_json(directory / "manifest.json", versioned("rollout") | header | {"parts": parts})
    update = {"step": steps - 1, "settings": {}, "inputs": {}, "student": {"model.safetensors": student}, "metrics": {}}
    files.write_json(path / step_name(steps - 1) / "update.json", versioned("update") | update)
    prompts = {"rows": 1, "dropped": 0, "sha256": write(path / "prompts.parquet", 1000, source)}
    model = {"path": "model", "digest": DIGEST, "tokenizer": DIGEST, "file_stats": {}}
    record = {"libraries": {}, "models": {"student": model, "teacher": model}, "prompts": prompts}
    files.write_json(path / "run.json", versioned("run") | record)
    shutil.copyfile(Path(__file__).parents[2] / "recipes/quickstart.toml", path / "recipe.toml")


def measure(command: list[str], environment: dict[str, str]) -> float:
    start = time.monotonic()
    subprocess.run(command, env={**os.environ, **environment}, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gib", type=float, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--aws", help="the program `aws`; without it opdctl alone is measured")
    parser.add_argument("--folder", type=Path, help="a folder on the disk to measure")
    args = parser.parse_args()
    programs = {"opdctl": [sys.executable, "-m", "opdctl", "run", "sync", "-q"]}
    if args.aws:
        programs["aws"] = [args.aws, "s3", "sync", "--quiet"]
    url = f"s3://{BUCKET}/run"
    seconds: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        run, copy = Path(folder, "run"), Path(folder, "copy")
        make_run(run, int(args.gib * 2**30))
        size = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
        for number in range(args.rounds):
            for name in sorted(programs, reverse=bool(number % 2)):
                with serve_s3() as store:
                    store.empty()
                    environment = {**store.environment, "AWS_ENDPOINT_URL": store.direct_url}
                    for what, source, target in (("upload", str(run), url), ("download", url, str(copy))):
                        for again in ("", ", second"):
                            taken = measure([*programs[name], source, target], environment)
                            seconds.setdefault((what + again, name), []).append(taken)
                shutil.rmtree(copy)
                for journal in run.glob(".sync-*"):
                    journal.unlink()
    for (what, name), values in sorted(seconds.items()):
        taken = statistics.median(values)
        speed = f", {size / taken / 2**20:6.1f} MiB/s" if "second" not in what else ""
        ratio = f", {taken / statistics.median(seconds[what, 'aws']):.2f} of aws" if args.aws and name != "aws" else ""
        print(f"{what:<17} {name:<7} {taken:6.1f} s{speed}{ratio}")


if __name__ == "__main__":
    main()
