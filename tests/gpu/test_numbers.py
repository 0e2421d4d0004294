"""Engine and trainer on a GPU: the numbers are those of the CPU. The same functions run on a pretend GPU elsewhere."""

import shutil

import pytest
import torch
from helpers.on_device import TRAINING, assert_same_columns, sample_and_score, score_first_step, train_step
from torch.distributed.device_mesh import init_device_mesh

from opdctl import distributed
from opdctl.models.cuda_graphs import CapturedPass
from opdctl.models.logprobs import Head, map_vocab_chunks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU on this machine")
ROUNDING = 1e-4
"""Relative, of float32 sums in another order."""
COMPILED = "compiled blocks"


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    return score_first_step(tmp_path_factory.mktemp("scored") / "run")


def test_engine_gives_the_numbers_of_the_cpu():
    arguments = ("float32", {"temperature": 0.7}, {}, {"entropy": True, "top_k": 3, "hidden_states": True})
    completions, scores = sample_and_score("cuda", *arguments)
    expected_completions, expected_scores = sample_and_score("cpu", *arguments)
    assert_same_columns(completions, expected_completions, ROUNDING)
    assert_same_columns(scores, expected_scores, ROUNDING)


def test_engine_gives_these_numbers_by_cuda_graphs(monkeypatch):
    replays, run = [], CapturedPass.run
    monkeypatch.setattr(CapturedPass, "run", lambda *arguments: replays.append(None) or run(*arguments))
    test_engine_gives_the_numbers_of_the_cpu()
    assert replays


@pytest.mark.parametrize("name", [*TRAINING, COMPILED])
def test_training_step_gives_the_numbers_of_the_cpu(scored, tmp_path, name):
    overrides = TRAINING.get(name, ())
    if "lora.dropout=0.1" in overrides:
        pytest.skip("a GPU draws other random numbers")
    for device in ("cpu", "cuda"):
        shutil.copytree(scored, tmp_path / device)
    metrics, _ = train_step("cuda", tmp_path / "cuda", *overrides, f"train.compile={str(name == COMPILED).lower()}")
    expected, _ = train_step("cpu", tmp_path / "cpu", *overrides)
    for name, value in expected.items():
        if not name.endswith(("seconds", "per_second", "memory_gib")):
            assert metrics[name] == pytest.approx(value, rel=ROUNDING, abs=ROUNDING), name


def test_selected_device_remains_selected_in_a_mesh(monkeypatch):
    """Of a rank that sees one GPU, `LOCAL_RANK` is no index. A mesh respects a device that was selected before."""
    monkeypatch.setenv("LOCAL_RANK", "99")
    distributed.destroy_process_group()  # of the tests before
    torch.cuda.set_device(0)
    assert torch.cuda.is_initialized()
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    try:
        init_device_mesh("cuda", (1,))
    finally:
        torch.distributed.destroy_process_group()
    assert torch.cuda.current_device() == 0


def test_output_matrix_on_tensor_cores_gives_the_numbers_of_float64():
    """Log-probs and gradients of bfloat16 operands, at the size of Qwen3's vocabulary, in several chunks."""
    rows, vocabulary, tokens, size = 151_936, 151_669, 2000, 1024
    torch.manual_seed(0)
    hidden_ND = torch.randn(tokens, size, device="cuda").bfloat16().requires_grad_()
    master_VD = (torch.randn(rows, size, device="cuda") * 0.05).bfloat16().float().requires_grad_()
    ids_NK, advantage_N = torch.randint(0, vocabulary, (tokens, 1), device="cuda"), torch.randn(tokens, device="cuda")
    logps = []

    def loss(chunk):
        logps.append(chunk.selected_logp_CK[:, 0].detach())
        return (chunk.selected_logp_CK[:, 0] * advantage_N[chunk.rows]).sum()

    map_vocab_chunks(Head(master_VD, vocabulary, dtype=torch.bfloat16), hidden_ND, ids_NK, loss).backward()
    assert len(logps) > 1
    exact_ND, exact_VD = (value.detach().double().requires_grad_() for value in (hidden_ND, master_VD))
    expected = []
    for start in range(0, tokens, 100):
        part = slice(start, start + 100)
        logp_CV = (exact_ND[part] @ exact_VD[:vocabulary].T).log_softmax(-1)
        expected.append(logp_CV.gather(-1, ids_NK[part])[:, 0])
        (expected[-1] * advantage_N[part]).sum().backward()
    assert (torch.cat(logps) - torch.cat(expected)).abs().max() < 1e-4
    for value, exact in ((hidden_ND, exact_ND), (master_VD, exact_VD)):
        assert float((value.grad.double() - exact.grad).norm()) < 2**-7 * float(exact.grad.norm())
    assert (master_VD.grad[vocabulary:] == 0).all()
