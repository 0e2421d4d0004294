"""The training script of the toy models: which tokens it trains, and responses with a tool."""

import random

import pytest
import torch

from opdctl.data.toy import calc, sort12
from opdctl.data.toy.calculating import calculate
from opdctl.data.toy.train_models import build_model, make_tokenizer, mask_tool_outputs, write_responses, wrong_calls


def test_outputs_of_a_tool_are_not_trained():
    pairs = [("37+48?", "37+48=85;>85"), ("10+11?", "10+11=21;>21")]
    tokenizer = make_tokenizer()
    labels = tokenizer([prompt + response + "<eos>" for prompt, response in pairs], return_tensors="pt")["input_ids"]
    masked, plain = labels.clone(), labels.clone()
    mask_tool_outputs(masked, pairs, calc)
    mask_tool_outputs(plain, pairs, sort12)
    assert torch.equal(plain, labels)
    texts = [tokenizer.decode(row[row >= 0]) for row in masked]
    assert texts == ["37+48?37+48=>85<eos>", "10+11?10+11=>21<eos>"]


def test_faulty_calls_get_the_output_of_what_they_ask():
    rng, prompt = random.Random(0), "37+48-15+20-66+51"
    traces = [wrong_calls(prompt, rng) for _ in range(400)]
    correct = sum(trace == calc.solve(prompt) for trace in traces) / len(traces)
    # Each call is untouched with 1 - 0.9 rate, because one random digit in ten is the old one.
    assert correct == pytest.approx(0.64 * 0.73 * 0.82 * 0.91 * 0.91, abs=0.08)
    for trace in traces:
        *calls, answer = trace.split(";")
        assert len(calls) == 5
        assert all(calculate(call.split("=")[0] + "=") == call.split("=")[1] + ";" for call in calls)
        assert answer == ">" + calls[-1].split("=")[1]


def test_responses_of_an_untrained_model_end():
    tokenizer = make_tokenizer()
    model = build_model("student", len(tokenizer), seed=0)
    torch.manual_seed(0)
    (text,) = write_responses(model, tokenizer, calc, ["37+48-15+20-66+51?"], do_sample=True, top_k=0)
    for call, output in zip(text.split("=")[:-1], text.split("=")[1:], strict=True):
        assert output.startswith(calculate(call.rpartition(";")[2] + "="))
