"""Router replay: the trainer's log-probs with the experts that the rollout's engine chose."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import small_recipe
from helpers.engines import requests
from helpers.export import make
from helpers.models import SMALL, save
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from opdctl.artifacts.records import Completion, Response, ScoredResponse, TokenScores
from opdctl.artifacts.tables import read_rows, write_rows
from opdctl.engines.base import Request
from opdctl.engines.transformers import TransformersEngine
from opdctl.errors import OpdctlError
from opdctl.models.batching import pack_batch, pad_batch
from opdctl.models.directory import ModelDir
from opdctl.models.logprobs import Chunk, map_vocab_chunks, output_head, response_states
from opdctl.models.routing import Routers
from opdctl.recipe.schema import RolloutColumns, Sampling
from opdctl.training.policy import check_trainable, load_policy
from opdctl.training.router_replay import given_experts, token_places

REPLAY = ("train.router_replay=true", "rollout.routed_experts=true")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save(make("qwen3_moe"), tmp_path_factory.mktemp("students") / "qwen3_moe")


@pytest.fixture(scope="module")
def undecided(tmp_path_factory) -> Path:
    """A student whose routers score all experts nearly alike, so that rounding decides."""
    model = make("qwen3_moe")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight *= 1e-4
    return save(model, tmp_path_factory.mktemp("students") / "undecided")


def sampled(
    folder: Path, dtype: str = "float32", max_tokens: int = 12, **changed: object
) -> tuple[list[Request], list[Completion]]:
    """Sample responses of several lengths to prompts of several lengths, with their experts."""
    wanted = requests(6, cut=4)
    engine = TransformersEngine(ModelDir(folder, dtype), "cpu")
    if changed:
        engine._rules = dataclasses.replace(engine_rules(engine), **changed)
    columns = RolloutColumns(routed_experts=True)
    return wanted, engine.generate(wanted, Sampling(max_tokens=max_tokens), 4, lambda n: None, columns=columns)


def engine_rules(engine: TransformersEngine):
    engine.generate(requests(1), Sampling(max_tokens=1), 1, lambda n: None)
    return engine._rules


def scored(wanted: list[Request], completions: list[Completion]) -> list[ScoredResponse]:
    columns = {"policy_version": 0, "source": "", "teacher": "teacher", "answer": None}
    rows = [
        Response(**vars_of(done), sample_id=f"p/{n}", prompt_id="p", prompt_ids=request.prompt_ids, **columns)
        for n, (request, done) in enumerate(zip(wanted, completions, strict=True))
    ]
    return [ScoredResponse(row, TokenScores(row.logprobs)) for row in rows]


def vars_of(done: Completion) -> dict:
    return {field.name: getattr(done, field.name) for field in dataclasses.fields(done)}


@torch.no_grad()
def trainer_logp_N(policy, samples: list[ScoredResponse], *, is_replayed: bool, dtype: str = "float32") -> np.ndarray:
    batch = pad_batch([(each.response.prompt_ids, each.response.response_ids) for each in samples], "cpu")
    routers, found = Routers(policy), list[torch.Tensor]()
    given = given_experts(samples, batch, routers) if is_replayed else None

    def keep(chunk: Chunk) -> None:
        found.append(chunk.selected_logp_CK[:, 0].clone())

    with routers.replay(given), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        hidden_ND, ids_N = response_states(policy, batch.input_ids_BT, batch.rows_N, batch.positions_N)
    map_vocab_chunks(output_head(policy, 56), hidden_ND, ids_N[:, None], keep)
    return torch.cat(found).numpy()


def disturb_routers(policy) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for layer in policy.model.layers:
            layer.mlp.gate.weight += 1e-5 * torch.randn_like(layer.mlp.gate.weight)


@pytest.mark.parametrize(
    "changed", [{}, {"left_padding": False}, {"left_padding": False, "use_cache": False}, {"drop_rows": False}]
)
def test_engine_records_the_experts_of_a_pass_over_the_sequence(changed, folder):
    wanted, completions = sampled(folder, **changed)
    model = load_policy(ModelDir(folder, "float32"), small_recipe(), "cpu")
    routers = Routers(model)
    for request, done in zip(wanted, completions, strict=True):
        ids = torch.from_numpy(np.concatenate([request.prompt_ids, done.response_ids[:-1]])).long()[None]
        with torch.no_grad():
            _, expected_NLK = routers.record(lambda ids=ids: model(input_ids=ids, use_cache=False))
        np.testing.assert_array_equal(done.routed_experts, expected_NLK.flatten().numpy())


@pytest.mark.parametrize("overrides", [(), ("lora.rank=4",), ("train.gradient_checkpointing=true",)])
def test_replayed_logprobs_are_those_of_the_engine_although_the_routers_were_disturbed(overrides, undecided):
    """The disturbance changes weights of experts by about 1e-5, but also which experts are chosen."""
    samples = scored(*sampled(undecided))
    policy = load_policy(ModelDir(undecided, "float32"), small_recipe(*REPLAY, *overrides), "cpu")
    disturb_routers(policy)
    engine = np.concatenate([each.response.logprobs for each in samples])
    assert np.abs(trainer_logp_N(policy, samples, is_replayed=True) - engine).max() < 1e-3
    assert np.abs(trainer_logp_N(policy, samples, is_replayed=False) - engine).max() > 0.1


def test_replay_reduces_the_mismatch_in_bfloat16(tmp_path):
    torch.manual_seed(0)
    sizes = SMALL | {"num_hidden_layers": 6, "num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 32}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, head_dim=16, initializer_range=0.2))
    folder = save(model, tmp_path / "student")
    samples = scored(*sampled(folder, "bfloat16", max_tokens=40))
    recipe = small_recipe(*REPLAY, "student.dtype=bfloat16")
    policy = load_policy(ModelDir(folder, "bfloat16"), recipe, "cpu")
    engine = np.concatenate([each.response.logprobs for each in samples])
    kl = {}
    for is_replayed in (True, False):
        log_ratio = trainer_logp_N(policy, samples, is_replayed=is_replayed, dtype="bfloat16") - engine
        kl[is_replayed] = float(np.mean(np.expm1(log_ratio) - log_ratio))
    assert kl[True] < kl[False] / 2


def test_experts_are_stored_and_read_as_they_are(folder, tmp_path):
    responses = [each.response for each in scored(*sampled(folder))]
    without = dataclasses.replace(responses[0], sample_id="q", routed_experts=None)
    write_rows(tmp_path / "part.parquet", [*responses, without], Response)
    read = read_rows(tmp_path / "part.parquet", Response)
    assert read[-1].routed_experts is None
    for row, response in zip(read, responses, strict=False):
        np.testing.assert_array_equal(row.routed_experts, response.routed_experts)
        assert len(row.routed_experts) == (len(row.prompt_ids) + len(row.response_ids) - 1) * 2 * 2


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("join", [pad_batch, pack_batch])
def test_experts_lie_where_the_tokens_lie(join, is_masked, folder):
    samples = scored(*sampled(folder))[:3]
    pairs = [(each.response.prompt_ids, each.response.response_ids) for each in samples]
    masks = [np.arange(len(response)) > 1 for _, response in pairs] if is_masked else None  # not the first tokens
    batch, routers = join(pairs, "cpu", masks), Routers(make("qwen3_moe"))
    given_NLK, is_token_N = given_experts(samples, batch, routers), token_places(samples, batch)
    lengths = [len(prompt) + len(response) for prompt, response in pairs]
    starts = np.cumsum([0, *lengths]) if join is pack_batch else np.arange(4) * max(lengths)
    for each, length, start, end in zip(samples, lengths, starts, starts[1:], strict=False):
        stored = each.response.routed_experts.reshape(length - 1, 2, 2)
        np.testing.assert_array_equal(given_NLK[start : start + length - 1], stored)
        assert (given_NLK[start + length - 1 : end] == -1).all()
        assert is_token_N[start:end].tolist() == [n < length for n in range(end - start)]


def test_missing_experts_are_an_error_that_names_the_response(folder):
    (sample, *_) = scored(*sampled(folder))
    batch = pad_batch([(sample.response.prompt_ids, sample.response.response_ids)], "cpu")
    routers = Routers(make("qwen3_moe"))
    for experts in (None, sample.response.routed_experts[:-1], np.full_like(sample.response.routed_experts, 9)):
        wrong = dataclasses.replace(sample, response=dataclasses.replace(sample.response, routed_experts=experts))
        with pytest.raises(OpdctlError) as error:
            given_experts([wrong], batch, routers)
        assert error.value.kind == "invalid_data"
        assert "p/0" in error.value.message


def test_dense_student_is_refused_from_its_files(tmp_path):
    student = ModelDir(save(make("qwen3"), tmp_path / "dense"), "float32")
    for override in REPLAY:
        with pytest.raises(OpdctlError) as error:
            check_trainable(student, small_recipe(override))
        assert error.value.kind == "unsupported_setting"
