"""Tiny models, quantized teachers and tokenizers of every kind, taken through opdctl; transformers judges each number.

python tests/sweep --write                  everything, into docs/models.md: ten minutes on one core
python tests/sweep llama qwen3_next         some models; prints what became of them
python tests/sweep --write --vllm llama     a model with vLLM, too; the other rows of the page stay
"""

import argparse
import json
import os
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/

from sweep import page
from sweep.findings import CATEGORIES, examine_all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="what to examine; everything if none is given")
    parser.add_argument("--write", action="store_true", help="write the findings into the tables of docs/models.md")
    parser.add_argument("--json", type=Path, help="write the findings into this file")
    parser.add_argument("--workers", type=int, default=1, help="number of processes, with one thread each")
    parser.add_argument("--vllm", action="store_true", help="also sample with vLLM")
    args = parser.parse_args()
    items = [(key, name) for key, names in CATEGORIES.items() for name in names if not args.names or name in args.names]
    if unknown := set(args.names) - {name for _, name in items}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    uses = ("training", "lora", "vllm") if args.vllm else ("training", "lora")
    findings = []
    for finding in examine_all(items, uses, args.workers):
        findings.append(finding)
        cells = [f"{use} {each.kind} {each.detail[:200]}" for use, each in finding.outcomes.items()]
        print(f"{finding.name:28} {finding.seconds:4.1f} s", *cells, sep=" | ", flush=True)
    counts = Counter((each.category, use, o.kind) for each in findings for use, o in each.outcomes.items())
    print(*(f"{' '.join(key)}: {count}" for key, count in sorted(counts.items())), sep="\n")
    if args.json:
        args.json.write_text(json.dumps([asdict(finding) for finding in findings], indent=1))
    if args.write:
        page.write(page.PATH, findings)


if __name__ == "__main__":
    main()
