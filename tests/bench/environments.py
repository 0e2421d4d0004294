"""How much of an engine's throughput remains when its requests come from the episodes of an environment.

    python tests/bench/environments.py transformers
    python tests/bench/environments.py vllm

32 episodes of the embedded task run at once. Each calls the model for 112 tokens in several responses, and appends a
letter after each. Then the engine gets the same requests at once, without an environment, and samples the same tokens.
Prints tokens per second of either side over pairs of measurements, and the median of their ratios.
"""

import argparse
import json
import os
import statistics
import time
import urllib.request
from collections.abc import Generator, Iterable, Iterator
from typing import Any

from helpers.commands import small_recipe
from helpers.engines import directory

from opdctl.agents.episodes import EpisodeRequest, EpisodeRunner, EpisodeSettings
from opdctl.agents.gateway import open_gateway
from opdctl.agents.student import Student
from opdctl.artifacts.records import Completion
from opdctl.data.rendering import PromptFormat, PromptRenderer
from opdctl.data.toy import TASKS
from opdctl.engines.base import Engine, EngineContext, Request
from opdctl.recipe.schema import Sampling
from opdctl.registry import ENGINES

AT_ONCE, EPISODES, TOKENS = 32, 128, 112
SAMPLING = Sampling(max_tokens=200)


def play(row: dict[str, Any], base_url: str) -> None:
    text = ""
    for _ in range(TOKENS // row["tokens"]):
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": text}]
        body = json.dumps({"messages": messages[: 2 if text else 1], "max_tokens": row["tokens"]}).encode()
        request = urllib.request.Request(f"{base_url}/chat/completions", body)
        with urllib.request.urlopen(request, timeout=600) as answer:
            text += json.load(answer)["choices"][0]["message"]["content"] + "a"


class Recorder:
    """Passes requests to an engine, and keeps them."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.requests: list[Request] = []
        self.tokens = 0

    def __call__(self, requests: Iterable[Request | None]) -> Generator[tuple[int, Completion]]:
        def kept() -> Iterator[Request | None]:
            for request in requests:
                self.requests += [request] * (request is not None)
                yield request

        for number, completion in self.engine.stream_completions(kept(), SAMPLING, AT_ONCE):
            self.tokens += len(completion.response_ids)
            yield number, completion


def measure_episodes(engine: Engine, student: Student, tokens: int) -> tuple[float, list[Request]]:
    """Return tokens per second, and the requests of the episodes. tokens: of each response."""
    recorder = Recorder(engine)
    problems = zip(range(EPISODES), TASKS["sort12"].problems("train", seed=0), strict=False)
    rows = {f"{problem.id}/00000/0": {"prompt": problem.prompt, "tokens": tokens} for _, problem in problems}
    episodes = [EpisodeRequest(name, row) for name, row in rows.items()]
    settings = EpisodeSettings(0, 600, AT_ONCE, engine.batches_across_parts)
    start = time.perf_counter()
    with open_gateway() as gateway:
        results = list(EpisodeRunner(play, gateway, student, recorder, settings).run(episodes))
    seconds = time.perf_counter() - start
    assert not [result.failure for _, result in results if result.failure]
    return recorder.tokens / seconds, recorder.requests


def measure_plain(engine: Engine, requests: list[Request]) -> float:
    recorder = Recorder(engine)
    start = time.perf_counter()
    list(recorder(requests))
    return recorder.tokens / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=["transformers", "vllm"])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--model", default="toy:teacher")
    parser.add_argument("--tokens", type=int, default=56, help="of a response")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    model = directory(arguments.model)
    recipe = small_recipe("pipeline.device=cpu", f"rollout.engine={arguments.engine}", "vllm.enforce_eager=true")
    engine = ENGINES.get(arguments.engine)(model, EngineContext(recipe, recipe.student, "cpu"))
    renderer = PromptRenderer(model.tokenizer, model.vocab_size, PromptFormat())
    student = Student(model.tokenizer, renderer, model.vocab_size, SAMPLING, 256)
    ratios = []
    for pair in range(arguments.pairs + 1):  # the first one is for warm-up
        with_environment, requests = measure_episodes(engine, student, arguments.tokens)
        plain = measure_plain(engine, requests)
        if pair:
            ratios.append(with_environment / plain)
            print(f"{with_environment:,.0f} and {plain:,.0f} tokens/s, ratio {ratios[-1]:.3f}", flush=True)
    engine.close()
    print(f"{arguments.engine}: {AT_ONCE} environments keep {statistics.median(ratios):.1%} of the throughput")


if __name__ == "__main__":
    main()
