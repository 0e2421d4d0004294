"""Train the toy teachers, the weak students and their tokenizer: `python -m opdctl.data.toy.train_models OUT`.

Everything is seeded and counted in steps, never in seconds, so the models are reproducible: bit for bit on the same
machine with the same number of threads. With `--threads 1` it takes about half an hour.

A teacher learns worked answers. A student first learns them too, because on-policy distillation selects a skill that
the student has and does not teach a new one in a few dozen steps. It is then degraded by a short training on faulty
answers:

    student          stops writing the remaining letters early on and guesses: its errors are at the start
    student-spread   makes an occasional wrong step and continues from it: its errors are spread out
    perm-student     the teacher of perm, degraded in the same way: a student of the teacher's size
    calc-student     the teacher of calc, degraded by calls with an incorrect digit, most of them early
"""

import argparse
import copy
import random
import string
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from opdctl.data.toy import calc, calculating, perm, perm4, perm8, sort12, swapping
from opdctl.data.toy.task import Task, ToyProblem

PUNCTUATION = "?:;>,.=+-*/()<[]| "
SHAPES = {  # hidden size, layers, heads, feed-forward size
    "teacher": (96, 3, 3, 288),
    "student": (64, 2, 2, 192),
}
MAX_CALLS = 8  # of a tool in one response when accuracy is measured
Trace = Callable[[str, random.Random], str]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per character. An unknown character is an error: there is no `<unk>`."""
    names = ["<pad>", "<eos>", *string.ascii_lowercase, *string.digits, *PUNCTUATION]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", model_max_length=256)
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return fast


def build_model(shape: str, vocab: int, seed: int) -> Qwen3ForCausalLM:
    hidden, layers, heads, feed_forward = SHAPES[shape]
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=32,
            intermediate_size=feed_forward,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
    )


def terse_drift(word: str, rng: random.Random) -> str:
    """Stop writing the remaining letters at one of the first passes, then pick a random one in two of five passes."""
    remaining, picked, passes, terse = list(word), [], [], False
    for number in range(len(word)):
        terse = terse or rng.random() < (0.35, 0.30, 0.25, *[0.01] * len(word))[number]
        letter = rng.choice(remaining) if terse and rng.random() < 0.4 else min(remaining)
        remaining.remove(letter)
        picked.append(letter)
        if remaining and rng.random() < 0.005:
            remaining[rng.randrange(len(remaining))] = rng.choice(string.ascii_lowercase)
        passes.append(f"{letter}:{'' if terse else ''.join(remaining)};")
    return f"{''.join(passes)}>{''.join(picked)}"


def spread_errors(word: str, rng: random.Random, rate: float = 0.16) -> str:
    """In each pass, with probability `rate`, take a random letter or miscopy one, and continue from there."""
    remaining, picked, passes = list(word), [], []
    for _ in word:
        wrong = rng.random() < rate
        letter = rng.choice(remaining) if wrong and rng.random() < 0.5 else min(remaining)
        remaining.remove(letter)
        picked.append(letter)
        if wrong and remaining and letter == min([letter, *remaining]):
            remaining[rng.randrange(len(remaining))] = rng.choice(string.ascii_lowercase)
        passes.append(f"{letter}:{''.join(remaining)};")
    return f"{''.join(passes)}>{''.join(picked)}"


def wrong_swaps(text: str, rng: random.Random, rate: float = 0.09) -> str:
    """At each swap, with probability `rate`, swap other cells or miscopy a letter, and continue from there."""
    cells, pairs = swapping.parse_prompt(text)
    passes = []
    for one, other in pairs:
        wrong = rng.random() < rate
        first, second = rng.sample(range(len(cells)), 2) if wrong and rng.random() < 0.5 else (one, other)
        cells[first], cells[second] = cells[second], cells[first]
        if wrong and {first, second} == {one, other}:
            cells[rng.randrange(len(cells))] = rng.choice(string.ascii_lowercase)
        passes.append(f"{one}{other}{''.join(cells)};")
    return f"{''.join(passes)}>{''.join(cells)}"


def wrong_calls(text: str, rng: random.Random) -> str:
    """In two of five calls at first, later in fewer, replace a digit by a random one, and continue from the output."""
    value, *others = calculating.parse_numbers(text)
    written = ""
    for number, rate in zip(others, (0.4, 0.3, 0.2, 0.1, 0.1), strict=True):
        call = f"{value}{number}="
        if rng.random() < rate:
            place = rng.choice([place for place, character in enumerate(call) if character.isdigit()])
            call = call[:place] + rng.choice(string.digits) + call[place + 1 :]
        output = calculating.calculate(call)
        value, written = output.removesuffix(";"), written + call + output
    return f"{written}>{value}"


@dataclass(frozen=True)
class TrainingStage:
    """Training on `steps` batches, one task after another, with AdamW (0.9, 0.98), a short warm-up, and cosine decay
    from `lr` to 0. The responses are worked answers, or those of `trace`."""

    tasks: tuple[Task, ...]
    steps: int
    lr: float
    batch: int
    trace: Trace | None = None

    def texts(self, streams: list[Iterator[ToyProblem]], step: int, rng: random.Random) -> list[tuple[str, str]]:
        """Return a batch of (prompt, response)."""
        turn = step % len(self.tasks)
        prompts = [next(streams[turn]).prompt for _ in range(self.batch)]
        if self.trace is None:
            return [(prompt, self.tasks[turn].solve(prompt)) for prompt in prompts]
        return [(prompt, self.trace(prompt.removesuffix("?"), rng)) for prompt in prompts]


def fit(model: Qwen3ForCausalLM, tok: PreTrainedTokenizerFast, stage: TrainingStage, seed: int) -> None:
    steps = stage.steps
    streams, rng = [task.problems("train", seed) for task in stage.tasks], random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=stage.lr, betas=(0.9, 0.98), weight_decay=0.01)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.02, total_iters=min(50, steps // 10))
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    start = time.monotonic()
    model.train()
    for step in range(steps):
        pairs = stage.texts(streams, step, rng)
        texts = [prompt + response + "<eos>" for prompt, response in pairs]
        ids = tok(texts, return_tensors="pt", padding=True, padding_side="right")
        labels = ids["input_ids"].masked_fill(ids["attention_mask"] == 0, -100)
        labels[:, : len(pairs[0][0])] = -100  # a task's prompts have one length
        mask_tool_outputs(labels, pairs, stage.tasks[step % len(stage.tasks)])
        loss = model(**ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        warm_up.step() if step < warm_up.total_iters else cosine.step()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            print(
                f"  step {step} ({step + 1} of {steps})  loss {loss.item():.4f}  {time.monotonic() - start:.0f} s",
                flush=True,
            )


def mask_tool_outputs(labels: torch.Tensor, pairs: list[tuple[str, str]], task: Task) -> None:
    """Remove the outputs of the task's tool from the labels: the model reads them and does not write them."""
    for row, (prompt, response) in zip(labels, pairs, strict=True):
        for span in task.tool.outputs(response) if task.tool else ():
            row[len(prompt) + span.start : len(prompt) + span.stop] = -100


@torch.inference_mode()
def write_responses(
    model: Qwen3ForCausalLM, tok: PreTrainedTokenizerFast, task: Task, prompts: list[str], **options: Any
) -> list[str]:
    """Return a response to each prompt. After each call of the task's tool comes its output."""
    texts, active = list(prompts), list(range(len(prompts)))
    stops = [tok.eos_token_id] + ([tok.convert_tokens_to_ids(task.tool.call_end)] if task.tool else [])
    for _ in range(1 + MAX_CALLS):
        inputs = tok([texts[i] for i in active], return_tensors="pt", padding=True, padding_side="left")
        out = model.generate(**inputs, max_new_tokens=160, eos_token_id=stops, **options)
        written = tok.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        turns, active = zip(active, written, strict=True), []
        for i, text in turns:
            texts[i] += text
            if task.tool and text.endswith(task.tool.call_end):
                texts[i] += task.tool.run(text)
                active.append(i)
        if not active:
            break
    return [text.removeprefix(prompt) for text, prompt in zip(texts, prompts, strict=True)]


def measure_accuracy(
    model: Qwen3ForCausalLM, tok: PreTrainedTokenizerFast, task: Task, *, sample: bool, count: int = 256
) -> float:
    """Return the fraction of `count` test problems answered correctly, sampled at temperature 1 or greedily."""
    stream = task.problems("test", 0)
    problems = [next(stream) for _ in range(count)]
    model.eval()
    torch.manual_seed(0)
    options: dict[str, Any] = {"do_sample": True, "top_k": 0} if sample else {"do_sample": False}
    texts = write_responses(model, tok, task, [p.prompt for p in problems], **options)
    return sum(task.extract(text) == p.answer for text, p in zip(texts, problems, strict=True)) / count


def train_stage(
    model: Qwen3ForCausalLM, tok: PreTrainedTokenizerFast, name: str, stage: TrainingStage, seed: int
) -> None:
    """Run one stage of training and print the accuracies."""
    fit(model, tok, stage, seed=seed)
    for task in stage.tasks:
        sampled, greedy = (measure_accuracy(model, tok, task, sample=sample) for sample in (True, False))
        print(f"{name}, {task.name}: sampled {sampled:.3f}, greedy {greedy:.3f}", flush=True)


def degrade(
    base_student: Qwen3ForCausalLM, tok: PreTrainedTokenizerFast, name: str, task: Task, trace: Trace, steps: int
) -> Qwen3ForCausalLM:
    """Return a copy of `base_student` after a short training on faulty answers."""
    student = copy.deepcopy(base_student)
    train_stage(student, tok, name, TrainingStage((task,), steps, lr=5e-4, batch=32, trace=trace), seed=3)
    return student


def make_sort12_models(tok: PreTrainedTokenizerFast) -> dict[str, Qwen3ForCausalLM]:
    """Train the models of sort12."""
    teacher = build_model("teacher", len(tok), seed=1)
    train_stage(teacher, tok, "teacher", TrainingStage((sort12,), steps=1000, lr=3e-3, batch=48), seed=1)
    base_student = build_model("student", len(tok), seed=2)
    train_stage(base_student, tok, "base student", TrainingStage((sort12,), steps=1500, lr=3e-3, batch=48), seed=2)
    students = (("student", terse_drift, 80), ("student-spread", spread_errors, 100))
    return {"teacher": teacher} | {
        name: degrade(base_student, tok, name, sort12, trace, steps) for name, trace, steps in students
    }


def make_perm_models(tok: PreTrainedTokenizerFast) -> dict[str, Qwen3ForCausalLM]:
    """Train the models of perm. The teacher learns shorter problems too."""
    teacher = build_model("teacher", len(tok), seed=1)
    train_stage(
        teacher, tok, "perm-teacher", TrainingStage((perm, perm4, perm8), steps=2400, lr=2e-3, batch=48), seed=1
    )
    return {
        "perm-teacher": teacher,
        "perm-student": degrade(teacher, tok, "perm-student", perm, wrong_swaps, steps=100),
    }


def make_calc_models(tok: PreTrainedTokenizerFast) -> dict[str, Qwen3ForCausalLM]:
    """Train the models of calc. A small teacher suffices, since the calculator does the arithmetic."""
    teacher = build_model("student", len(tok), seed=2)
    train_stage(teacher, tok, "calc-teacher", TrainingStage((calc,), steps=800, lr=3e-3, batch=48), seed=2)
    return {
        "calc-teacher": teacher,
        "calc-student": degrade(teacher, tok, "calc-student", calc, wrong_calls, steps=60),
    }


MAKERS = {"sort12": make_sort12_models, "perm": make_perm_models, "calc": make_calc_models}


def save_models(out: Path, make_models: Callable[[PreTrainedTokenizerFast], dict[str, Qwen3ForCausalLM]]) -> None:
    """Train models and save each under `out`, in a directory of its name."""
    for name, model in make_models(make_tokenizer()).items():
        model.save_pretrained(out / name)
        make_tokenizer().save_pretrained(out / name)  # a tokenizer saves the padding of its last call


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory for the model directories")
    parser.add_argument("--task", choices=MAKERS, nargs="+", default=list(MAKERS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for task in args.task:
        save_models(args.out, MAKERS[task])
