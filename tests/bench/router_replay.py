"""What router replay does to the mismatch of trainer and engine, and what it costs, for a random Qwen3-MoE in bfloat16.

    python tests/bench/router_replay.py

prints mismatch_kl and the largest difference of log-probs without and with replay, the seconds of a forward and
backward pass, and the bytes of the stored experts. The engine is transformers, whose batches differ from the trainer's.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers.commands import small_recipe
from helpers.engines import requests
from helpers.models import SMALL, save

from opdctl.artifacts.records import Response, ScoredResponse, TokenScores
from opdctl.artifacts.tables import write_rows
from opdctl.engines.transformers import TransformersEngine
from opdctl.models.batching import pad_batch
from opdctl.models.directory import ModelDir
from opdctl.models.logprobs import Chunk, map_vocab_chunks, output_head, response_states
from opdctl.models.routing import Routers
from opdctl.recipe.schema import RolloutColumns, Sampling
from opdctl.training.policy import load_policy
from opdctl.training.router_replay import given_experts, token_places

RESPONSES, TOKENS, LAYERS, EXPERTS, TOP_K = 16, 64, 12, 32, 4


def main() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "moe_intermediate_size": 64}
    experts = {"num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "norm_topk_prob": True, "head_dim": 32}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL | sizes, **experts, initializer_range=0.1))
    with tempfile.TemporaryDirectory() as folder:
        student = ModelDir(save(model, Path(folder) / "student"), "bfloat16")
        samples = sample(student)
        policy = load_policy(student, small_recipe("train.router_replay=true", "student.dtype=bfloat16"), "cpu")
        routers = Routers(policy)
        for name in ("without replay", "with replay"):
            measure(name, policy, routers, samples, is_replayed=name == "with replay")
        rows, part = [each.response for each in samples], Path(folder) / "part.parquet"
        write_rows(part, rows, Response)
        tokens = sum(len(row.prompt_ids) + len(row.response_ids) - 1 for row in rows)
        stored = sum(len(row.routed_experts) for row in rows if row.routed_experts is not None)
        print(f"{stored / tokens:.0f} bytes of experts a token, {part.stat().st_size / tokens:.0f} bytes of the part")


def sample(student: ModelDir) -> list[ScoredResponse]:
    wanted, columns = requests(RESPONSES, cut=6), RolloutColumns(routed_experts=True)
    engine = TransformersEngine(student, "cpu")
    found = engine.generate(wanted, Sampling(max_tokens=TOKENS), RESPONSES, lambda n: None, columns=columns)
    return [
        ScoredResponse(
            Response(
                response_ids=done.response_ids,
                logprobs=done.logprobs,
                finish_reason=done.finish_reason,
                routed_experts=done.routed_experts,
                sample_id=f"p/{number}",
                prompt_id="p",
                prompt_ids=request.prompt_ids,
                policy_version=0,
                source="",
                teacher="teacher",
                answer=None,
            ),
            TokenScores(done.logprobs),
        )
        for number, (request, done) in enumerate(zip(wanted, found, strict=True))
    ]


def measure(name: str, policy, routers: Routers, samples: list[ScoredResponse], *, is_replayed: bool) -> None:
    batch = pad_batch([(each.response.prompt_ids, each.response.response_ids) for each in samples], "cpu")
    engine_logp_N = torch.from_numpy(np.concatenate([each.response.logprobs for each in samples]))
    seconds = []
    for _ in range(3):
        logps: list[torch.Tensor] = []

        def keep(chunk: Chunk, logps: list[torch.Tensor] = logps) -> torch.Tensor:
            logps.append(chunk.selected_logp_CK[:, 0].detach().clone())
            return chunk.selected_logp_CK.sum()

        routers.reset_counts()
        start = time.monotonic()
        given = given_experts(samples, batch, routers) if is_replayed else None
        with routers.replay(given, token_places(samples, batch)):
            with torch.autocast("cpu", torch.bfloat16):
                hidden_ND, ids_N = response_states(policy, batch.input_ids_BT, batch.rows_N, batch.positions_N)
            map_vocab_chunks(output_head(policy, 56), hidden_ND, ids_N[:, None], keep).backward()
        seconds.append(time.monotonic() - start)
        policy.zero_grad()
    log_ratio_N = torch.cat(logps) - engine_logp_N
    kl, largest = float((log_ratio_N.expm1() - log_ratio_N).mean()), float(log_ratio_N.abs().max())
    metrics = " ".join(f"{key} {value:.3f}" for key, value in routers.metrics(routers.counts()).items())
    print(f"{name}: mismatch_kl {kl:.2e}, largest {largest:.3f} nats, {min(seconds):.2f} s; {metrics}")


if __name__ == "__main__":
    main()
