"""One training step of TRL's IWOPDTrainer compared with one of opdctl: seconds and peak memory.

Both have the same models, prompts and lengths, and run in separate processes. TRL needs a separate environment:

    python -m venv /tmp/trl && /tmp/trl/bin/pip install torch==2.13.0 trl==1.16.0
    python tests/bench/against_trl.py --trl /tmp/trl/bin/python
    python tests/bench/against_trl.py --trl /tmp/trl/bin/python --toy

The first step is a warm-up and is not counted. The part of a TRL step that is not generation is score and update.
"""

import argparse
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from processes import peak_bytes

SHAPES = {"student": (256, 4, 4, 768), "teacher": (384, 6, 6, 1152)}  # hidden, layers, heads, intermediate
TOY_MODELS = Path(__file__).parents[2] / "opdctl/data/toy/models"
PROMPT_WORDS = 32
LABELS = {"generation": "generation", "score and update": "rest", "complete step": "step"}
"""Of the rows of a table, with the names of their measurements."""


def make_models(folder: Path, vocab: int) -> None:
    """Write a random Qwen3 student and teacher, with one word per token in their tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"t{i}": i for i in range(3, vocab)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
    for seed, (name, (hidden, layers, heads, inner)) in enumerate(SHAPES.items()):
        torch.manual_seed(seed)
        config = Qwen3Config(
            vocab_size=vocab,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=2,
            head_dim=64,
            intermediate_size=inner,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        Qwen3ForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def make_prompts(path: Path, count: int, toy: bool) -> None:
    import numpy as np

    from opdctl.data.toy import sort12

    rng = np.random.default_rng(0)
    if toy:
        texts = [problem.prompt for problem in itertools.islice(sort12.problems("train", 0), count)]
    else:
        texts = [" ".join(f"t{i}" for i in rng.integers(3, 1000, PROMPT_WORDS)) for _ in range(count)]
    path.write_text("".join(json.dumps({"id": str(i), "prompt": text}) + "\n" for i, text in enumerate(texts)))


def run_trl(args: argparse.Namespace) -> dict[str, Any]:
    """Train with TRL and return the seconds of each step and of its generation."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.iw_opd import IWOPDConfig, IWOPDTrainer

    torch.set_num_threads(args.threads)
    steps: list[float] = []
    generations: list[float] = []

    class Timed(IWOPDTrainer):  # type: ignore[misc]
        def _fill_buffer(self, *positional: Any, **named: Any) -> Any:
            start = time.perf_counter()
            result = super()._fill_buffer(*positional, **named)
            generations.append(time.perf_counter() - start)
            return result

        def training_step(self, *positional: Any, **named: Any) -> Any:
            start = time.perf_counter()
            loss = super().training_step(*positional, **named)
            steps.append(time.perf_counter() - start)
            return loss

    prompts = [json.loads(line)["prompt"] for line in (args.models / "prompts.jsonl").read_text().splitlines()]
    answer = {"role": "assistant", "content": prompts[0].split()[0]}  # required, but unused on-policy
    rows = [{"messages": [{"role": "user", "content": prompt}, answer]} for prompt in prompts]
    dtypes = {"student": torch.float32, "teacher": getattr(torch, args.dtype)}
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(args.models / name, dtype=dtype) for name, dtype in dtypes.items()
    )
    settings = IWOPDConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=args.batch,
        max_steps=args.steps,
        max_prompt_length=args.prompt_tokens,
        max_length=args.prompt_tokens + args.completion,
        max_completion_length=args.completion,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        distillation_objective="iw_opd",
        iw_opd_gamma=0.5,
        temperature=1.0,
        top_p=1.0,
        gradient_checkpointing=False,
        bf16=args.dtype == "bfloat16",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Timed(
        model=student,
        teacher_model=teacher,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(args.models / "student"),
    )
    trainer.train()
    return {"step": steps, "generation": generations, "rest": [s - g for s, g in zip(steps, generations, strict=True)]}


Stages = Callable[[int], dict[str, Callable[[], Any]]]
"""step → the stages of a step by name, each of which is to be called in turn."""


@contextmanager
def open_opdctl(args: argparse.Namespace) -> Iterator[Stages]:
    """Yield the stages of opdctl's steps, in a new run. They write their artifacts as usual."""
    import torch

    from opdctl.engines.pool import open_engine_pool
    from opdctl.pipeline import rollout, score
    from opdctl.recipe.load import load_recipe
    from opdctl.runs.open import open_run
    from opdctl.training.trainer import Trainer

    torch.set_num_threads(args.threads)
    settings = {
        "name": "bench",
        "student.model": str(args.models / "student"),
        "student.dtype": args.dtype,
        "teacher.model": str(args.models / "teacher"),
        "teacher.dtype": args.dtype,
        "prompts.source": str(args.models / "prompts.jsonl"),
        "prompts.id_column": "id",
        "rollout.engine": "transformers",
        "rollout.prompts_per_step": args.batch,
        "rollout.num_parts": 1,
        "rollout.max_tokens": args.completion,
        "score.engine": "transformers",
        "score.tokens_per_batch": 4096,
        "weight.name": args.weight,
        "train.steps": args.steps,
        "train.learning_rate": 1e-5,
        "train.tokens_per_micro_batch": 4096,
        "train.save_every_steps": 1000,
    }
    recipe = load_recipe([], [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    with tempfile.TemporaryDirectory() as folder:
        run = open_run(recipe, Path(folder) / "run")
        trainer = Trainer(run, "cpu")
        with open_engine_pool(recipe, "cpu") as engines:
            yield lambda step: {
                "generation": lambda: rollout.run_rollout(run, step, engines),
                "score": lambda: score.run_scoring(run, step, engines),
                "update": lambda: trainer.train_step(step),
            }


def run_opdctl(args: argparse.Namespace) -> dict[str, Any]:
    """Train with opdctl and return the seconds of each step and of its stages."""
    seconds: dict[str, list[float]] = {"generation": [], "score": [], "update": []}
    with open_opdctl(args) as stages:
        for step in range(args.steps):
            for name, run_stage in stages(step).items():
                start = time.perf_counter()
                run_stage()
                seconds[name].append(time.perf_counter() - start)
    rest = [a + b for a, b in zip(seconds["score"], seconds["update"], strict=True)]
    return seconds | {"rest": rest, "step": [a + b for a, b in zip(seconds["generation"], rest, strict=True)]}


def measure(python: str, system: str, options: list[str]) -> dict[str, Any]:
    print(f"{system} …", file=sys.stderr)
    command = [python, __file__, "--system", system, *options]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode == -signal.SIGKILL:  # by the kernel
        return dict.fromkeys([*LABELS.values()], [math.inf] * 2) | {"peak_gib": math.inf}
    result.check_returncode()
    measurement: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return measurement


def compare(args: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Return what TRL and opdctl take for each part of a step: medians of seconds, and GiB; inf for lack of memory."""
    names = ("batch", "completion", "steps", "threads", "prompt_tokens", "models", "weight", "dtype")
    options = [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    make_prompts(args.models / "prompts.jsonl", args.batch * args.steps, args.toy)
    results = {"TRL": measure(args.trl, "trl", options), "opdctl": measure(sys.executable, "opdctl", options)}
    trl, opdctl = (
        {label: median(result[name][1:]) for label, name in LABELS.items()} | {"peak memory": result["peak_gib"]}
        for result in results.values()
    )
    return {label: (trl[label], opdctl[label]) for label in trl}


def print_table(args: argparse.Namespace, rows: dict[str, tuple[float, float]]) -> None:
    print(f"batch {args.batch} x {args.completion} tokens, {args.threads} threads; medians of {args.steps - 1} steps\n")
    print("| | TRL | opdctl | TRL / opdctl |\n|---|---|---|---|")
    for label, (trl, opdctl) in rows.items():
        unit = "GiB" if label == "peak memory" else "s"
        print(f"| {label} | {format_cell(trl, unit)} | {format_cell(opdctl, unit)} | {trl / opdctl:.2f} |")


def format_cell(value: float, unit: str) -> str:
    return f"{value:.2f} {unit}" if math.isfinite(value) else "out of memory"


@contextmanager
def models(args: argparse.Namespace) -> Iterator[None]:
    """Set `args.models` to a directory with the models, made if none is given."""
    with tempfile.TemporaryDirectory() as folder:
        args.models = args.models or Path(folder)
        if args.toy:
            for name in SHAPES:
                (args.models / name).symlink_to(TOY_MODELS / name)
        elif not (args.models / "student").is_dir():
            make_models(args.models, args.vocab)
        yield


def has_trl(python: str) -> bool:
    command = [python, "-c", "import trl.experimental.iw_opd"]
    return shutil.which(python) is not None and not subprocess.run(command, capture_output=True, check=False).returncode


def make_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", help="the Python of an environment with TRL")
    parser.add_argument("--toy", action="store_true", help="use the toy models and prompts")
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--completion", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=PROMPT_WORDS + 2)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--weight", default="iw_opd", help="opdctl's token weight; TRL has iw_opd only")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16"],
        help="of engines and teacher; trained weights are float32, and TRL computes with them by autocast",
    )
    return parser


def main() -> None:
    parser = make_parser(str(__doc__))
    parser.add_argument("--system", choices=["trl", "opdctl"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.system:
        seconds = {"trl": run_trl, "opdctl": run_opdctl}[args.system](args)
        print(json.dumps(seconds | {"peak_gib": peak_bytes() / 2**30}))
        return
    if args.trl is None or not has_trl(args.trl):
        parser.error("--trl must be the Python of an environment with TRL")
    with models(args):
        print_table(args, compare(args))


if __name__ == "__main__":
    main()
