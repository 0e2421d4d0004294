"""What the process of an engine costs, and what streaming across parts saves.

    python tests/bench/engine_hosts.py calls                     # vLLM in a host and in this process, in turns
    python tests/bench/engine_hosts.py stream                    # parts together and one after another, in turns
    python tests/bench/engine_hosts.py start --other CHECKOUT    # to the first response, with this and another checkout
    python tests/bench/engine_hosts.py adapters                  # merged students and adapters alone, in turns

Each prints the median time of either side and the median of their ratios, over pairs of measurements.

The model is a random Qwen3 of 5 million parameters with 256 ids, which it samples with nearly the same probability. So
the lengths of responses are geometric with a mean of 256 tokens, up to 1,024. Prompts have 4 to 256 tokens.
Students with adapters have 193 million parameters, in bfloat16, and adapters of rank 32.
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import qwen3
from helpers.export import train_and_export

from opdctl.artifacts.records import sample_seed
from opdctl.engines.base import Engine, EngineContext, Request, ScoreRequest
from opdctl.models.directory import ModelDir
from opdctl.recipe.load import load_recipe
from opdctl.recipe.schema import Sampling, Score
from opdctl.registry import ENGINES

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "quickstart.toml"
MAX_PROMPT_TOKENS, MAX_RESPONSE_TOKENS = 256, 1024
SETTINGS = (
    f"prompts.max_tokens={MAX_PROMPT_TOKENS}",
    f"rollout.max_tokens={MAX_RESPONSE_TOKENS}",
    f"eval.max_tokens={MAX_RESPONSE_TOKENS}",
    "vllm.enforce_eager=true",
)
SHAPE = qwen3.SMALL_SHAPE.model_copy(update={"vocab_size": 256})
ADAPTED_SHAPE = qwen3.SMALL_SHAPE.model_copy(
    update={"num_hidden_layers": 14, "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8}
    | {"intermediate_size": 3072}
)
LORA = ("lora.rank=32",)


def requests(count: int) -> list[Request]:
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.uniform(np.log(4), np.log(MAX_PROMPT_TOKENS), count)).astype(int)
    prompts = [rng.integers(2, SHAPE.vocab_size, length).astype(np.int32) for length in lengths]
    return [Request(prompt, sample_seed(0, str(index))) for index, prompt in enumerate(prompts)]


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(title: str, first: Callable[[], object], second: Callable[[], object], pairs: int) -> None:
    """Print the medians of two calls, after one call of each for warm-up. The order changes from pair to pair."""
    first(), second()
    times = []
    for pair in range(pairs):
        if pair % 2:
            b, a = seconds(second), seconds(first)
        else:
            a, b = seconds(first), seconds(second)
        times.append((a, b))
        print(f"{title}: {a:.2f} s, {b:.2f} s", file=sys.stderr, flush=True)
    medians = [statistics.median(each) for each in zip(*times, strict=True)]
    ratios = sorted(a / b for a, b in times)
    low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
    print(f"{title}: median {medians[0]:.2f} s and {medians[1]:.2f} s, ratio {statistics.median(ratios):.3f}", end="")
    print(f" (10 % to 90 %: {low:.3f} to {high:.3f}; {pairs} pairs)", flush=True)


def open_engines(folder: Path, *names: str) -> list[Engine]:
    """Return engines with the random model: `host` is vLLM in its process, `vllm` is vLLM in this one."""
    model, recipe = ModelDir(qwen3.save_model(SHAPE, folder / "model"), "float32"), load_recipe([RECIPE], [*SETTINGS])
    context = EngineContext(recipe, recipe.student, "cpu")
    engines: list[Engine] = []
    for name in names:
        if name == "host":
            engines.append(ENGINES.get("vllm")(model, context))
        else:
            from opdctl.engines.vllm import VllmEngine

            engines.append(VllmEngine(model, context))
    return engines


def measure_calls(folder: Path, args: argparse.Namespace) -> None:
    host, local = open_engines(folder, "host", "vllm")
    wanted, sampling = requests(args.responses), Sampling(max_tokens=MAX_RESPONSE_TOKENS)
    scored = [ScoreRequest(r.prompt_ids, np.resize(r.prompt_ids, MAX_PROMPT_TOKENS)) for r in wanted]

    def generate(engine: Engine) -> object:
        return engine.generate(wanted, sampling, args.batch, lambda n: None)

    def score(engine: Engine) -> object:
        return engine.score(scored, Score(top_k=args.top_k), lambda n: None)

    compare("generate: host, this process", lambda: generate(host), lambda: generate(local), args.pairs)
    compare("score: host, this process", lambda: score(host), lambda: score(local), args.pairs)
    host.close()
    local.close()


def measure_stream(folder: Path, args: argparse.Namespace) -> None:
    (engine,) = open_engines(folder, "host")
    wanted, sampling = requests(args.responses), Sampling(max_tokens=MAX_RESPONSE_TOKENS)
    scored = [ScoreRequest(r.prompt_ids, np.resize(r.prompt_ids, MAX_PROMPT_TOKENS)) for r in wanted]

    def together() -> None:
        for _ in engine.stream_completions(wanted, sampling, args.batch):
            pass

    def in_parts() -> None:
        for start in range(0, len(wanted), args.part):
            engine.generate(wanted[start : start + args.part], sampling, args.batch, lambda n: None)

    def score_together() -> None:
        for _ in engine.stream_scores(scored, Score()):
            pass

    def score_in_parts() -> None:
        for start in range(0, len(scored), args.part):
            engine.score(scored[start : start + args.part], Score(), lambda n: None)

    compare("generate: streamed, part after part", together, in_parts, args.pairs)
    compare("score: streamed, part after part", score_together, score_in_parts, args.pairs)
    engine.close()


def measure_start(folder: Path, args: argparse.Namespace) -> None:
    """Time `opdctl rollout` with vLLM and one response of one token, from the command to its end."""
    settings = ("rollout.engine=vllm", "rollout.prompts_per_step=1", "rollout.num_parts=1", "rollout.max_tokens=1")
    overrides = [word for setting in (*SETTINGS, *settings) for word in ("--set", setting)]
    count = 0

    def rollout(checkout: Path) -> None:
        nonlocal count
        count += 1
        command = [sys.executable, "-m", "opdctl", "rollout", "--recipe", str(RECIPE), *overrides]
        environment = os.environ | {"PYTHONPATH": str(checkout)}
        output = ["--output", str(folder / str(count))]
        subprocess.run([*command, *output], env=environment, cwd=folder, check=True, capture_output=True)

    other = Path(args.other or ROOT).resolve()
    compare("start: this checkout, the other", lambda: rollout(ROOT), lambda: rollout(other), args.pairs)


def measure_adapters(folder: Path, args: argparse.Namespace) -> None:
    """Time the load of the next student with LoRA, and sampling with it: merged, and by its adapter alone."""
    base = ModelDir(qwen3.save_model(ADAPTED_SHAPE, folder / "base"), "bfloat16")
    students = []
    for alpha in ("32", "64"):
        settings = (*LORA, f"lora.alpha={alpha}")
        _, path = train_and_export(base.path, *settings, dtype=base.dtype, exported=folder / alpha)
        students.append(base.with_path(path, has_adapter=True))
    engines = []
    for setting in ("vllm.enable_lora=false", "vllm.enable_lora=true"):
        recipe = load_recipe([RECIPE], [*SETTINGS, *LORA, "student.dtype=bfloat16", setting])
        engines.append(ENGINES.get("vllm")(base, EngineContext(recipe, recipe.student, "cpu")))
    turns = [itertools.cycle(students) for _ in engines]
    wanted, sampling = requests(args.responses), Sampling(max_tokens=32)

    def load(index: int) -> object:
        engines[index].load_weights(next(turns[index]))
        return engines[index].logprob_metadata

    def generate(index: int) -> object:
        return engines[index].generate(wanted, sampling, args.batch, lambda n: None)

    load(0)  # after its first load a new instance begins, which compares
    compare("load a student: merged, adapter alone", lambda: load(0), lambda: load(1), args.pairs)
    compare("generate: merged, adapter alone", lambda: generate(0), lambda: generate(1), args.pairs)
    for engine in engines:
        engine.close()


MEASUREMENTS = {
    "calls": measure_calls,
    "stream": measure_stream,
    "start": measure_start,
    "adapters": measure_adapters,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurement", choices=MEASUREMENTS)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--responses", type=int, default=64)
    parser.add_argument("--part", type=int, default=16, help="responses of a part")
    parser.add_argument("--batch", type=int, default=16, help="responses in work at a time")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--other", help="another checkout of opdctl, for `start`")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        MEASUREMENTS[args.measurement](Path(folder), args)


if __name__ == "__main__":
    main()
