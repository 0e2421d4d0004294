"""Training that scales: many processes, adapters, saved states, schedules, collapse, trackers."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from helpers.commands import QUICKSTART, invoke, sets, small_recipe
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from opdctl.engines.base import ScoreRequest
from opdctl.engines.pool import open_engine_pool
from opdctl.engines.transformers import TransformersEngine
from opdctl.errors import ExitCode, OpdctlError
from opdctl.models.batching import by_token_budget
from opdctl.models.directory import ModelDir
from opdctl.models.loading import load_model
from opdctl.pipeline import loop, progress, rollout, score
from opdctl.recipe.schema import Score, Train
from opdctl.runs.open import open_run
from opdctl.runs.run import load_run
from opdctl.runs.scored_responses import read_scored
from opdctl.training import checkpoint, policy
from opdctl.training.microbatches import micro_batches_of_rank
from opdctl.training.optimizer import learning_rate
from opdctl.training.trainer import Trainer

FIVE = ("train.steps=5", "train.keep_latest=9", "train.tokens_per_micro_batch=400")
LORA = ("lora.rank=4", "lora.alpha=8.0")


def train(output: Path, *overrides: str):
    return invoke("train", "--recipe", QUICKSTART, *sets(*overrides), "--output", output, "--json")


def torchrun(output: Path, *overrides: str, processes: int = 2, check: bool = True):
    """Train with several processes, as a user would."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    words = ["-m", "opdctl", "train", "--recipe", QUICKSTART, *sets(*overrides), "--output", output, "--json"]
    done = subprocess.run([*command, *map(str, words)], capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, done.stderr
    return done


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / f"student/step-{step:05d}/model.safetensors")


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """Five steps by one process."""
    path = tmp_path_factory.mktemp("alone") / "run"
    result = train(path, *FIVE)
    assert result.code == 0, result.err
    return path


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> Path:
    """The same five steps by two."""
    path = tmp_path_factory.mktemp("together") / "run"
    torchrun(path, *FIVE)
    return path


# ── Many processes ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_two_processes_make_the_student_of_one(alone, together):
    """Five steps later no parameter is 1e-5 away; but for the order of float32 sums they do the same."""
    for step in range(1, 6):
        assert furthest(weights(alone, step), weights(together, step)) < 1e-5
    moved = furthest(weights(alone, 1), weights(alone, 5))
    assert moved > 1e-4


def test_two_processes_report_what_one_does(alone, together):
    ours, theirs = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (alone, together)
    )
    assert len(ours) == len(theirs) == 5
    for mine, yours in zip(ours, theirs, strict=True):
        assert mine.keys() == yours.keys()
        for name in mine:
            if not name.endswith(("_seconds", "_per_second", "_gib")):
                assert mine[name] == pytest.approx(yours[name], rel=1e-3, abs=1e-5), name


def test_both_processes_make_parts_and_save_shards_and_one_speaks(together, tmp_path):
    done = torchrun(tmp_path / "run", "train.steps=1")
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr.count("step 1/1") == 1
    states = [path.name[:11] for path in (together / "trainer/step-00005").iterdir()]
    assert set(states) == {"shard-00001", "shard-00002"}
    assert invoke("status", together, "--verify").code == 0


def test_what_two_began_one_goes_on_with(alone, tmp_path):
    torchrun(tmp_path / "run", *FIVE, "train.steps=3")
    result = train(tmp_path / "run", *FIVE)
    assert result.code == 0, result.err
    assert furthest(weights(alone, 5), weights(tmp_path / "run", 5)) < 1e-5
    assert all(path.name.startswith("shard-00001") for path in (tmp_path / "run/trainer/step-00005").iterdir())


def test_what_one_began_two_go_on_with(alone, tmp_path):
    shutil.copytree(alone, tmp_path / "run")
    assert train(tmp_path / "run", *FIVE, "train.steps=6").code == 0
    shutil.copytree(alone, tmp_path / "other")
    torchrun(tmp_path / "other", *FIVE, "train.steps=6")
    assert furthest(weights(tmp_path / "run", 6), weights(tmp_path / "other", 6)) < 1e-5


def test_a_process_that_fails_takes_the_other_down_and_says_why_once(together, tmp_path):
    run = Path(shutil.copytree(together, tmp_path / "run"))
    student = run / "student/step-00005/model.safetensors"
    student.write_bytes(student.read_bytes()[:-1])
    done = torchrun(run, *FIVE, "train.steps=6", check=False)
    assert done.returncode != 0
    assert "student/step-00005" in done.stderr
    assert done.stderr.count("Traceback (most recent call last)") == 1  # torchrun's own
    assert not (run / "step-00005/update.json").exists()


def test_an_error_before_the_work_is_said_once(tmp_path):
    done = torchrun(tmp_path / "run", "student.model=toy:nobody", check=False)
    assert done.returncode != 0
    assert done.stderr.count("no embedded model") == 1


@pytest.mark.parametrize(("batches", "world"), [(1, 2), (2, 2), (5, 2), (5, 3), (3, 8)])
def test_every_micro_batch_counts_once_and_all_ranks_have_as_many(batches, world, scored_run):
    trainer = Trainer(scored_run, "cpu")
    whole = (trainer.micro_batches(0, list(read_scored(scored_run, 0))) * batches)[:batches]
    shares = [micro_batches_of_rank(whole, rank, world) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    counted = [batch for share in shares for batch in share if batch.counts]
    assert sorted(map(id, counted)) == sorted(map(id, whole))
    assert not any(batch.loss_scale_N.any() for share in shares for batch in share if not batch.counts)


def test_offloaded_to_the_cpu_it_is_the_same(alone, tmp_path):
    """A process of its own: it makes a process group."""
    torchrun(tmp_path / "run", *FIVE, "train.cpu_offload=true", processes=1)
    assert furthest(weights(alone, 5), weights(tmp_path / "run", 5)) < 1e-5


# ── Saved states ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def scored_run(tmp_path_factory):
    """A run whose first step is rolled out and scored."""
    run = open_run(small_recipe(), tmp_path_factory.mktemp("scored") / "run")
    with open_engine_pool(run.recipe, "cpu") as engines:
        rollout.run_rollout(run, 0, engines)
        score.run_scoring(run, 0, engines)
    return run


def test_a_state_comes_back_bit_for_bit_and_another_model_s_is_refused(tmp_path, scored_run):
    def fresh(*overrides):
        model = policy.load_policy(scored_run.student, small_recipe(*overrides), "cpu")
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    model, optimizer = fresh()
    for _ in range(2):
        sum(parameter.square().sum() for parameter in model.parameters()).backward()
        optimizer.step()
    checkpoint.save(tmp_path, model, optimizer)
    other, restored = fresh()
    checkpoint.restore(tmp_path, other, restored)
    for mine, yours in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, yours)
        for key, value in optimizer.state[mine].items():
            assert torch.equal(value, restored.state[yours][key]), key
    assert all(path.suffix == ".safetensors" for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match="not the state of this model"):
        checkpoint.restore(tmp_path, *fresh(*LORA))


def test_updates_since_the_last_saved_state_are_made_once_more(alone, tmp_path):
    """With a state every third step a run that ended after the fifth goes on with the very same bits."""
    run = tmp_path / "run"
    assert train(run, *FIVE, "train.save_every_steps=3", "train.steps=6").code == 0
    assert [p.name for p in sorted((run / "trainer").iterdir())] == ["step-00003", "step-00006"]
    (run / "step-00005/update.json").unlink()  # as if killed before the sixth update
    shutil.rmtree(run / "trainer/step-00006")
    shutil.rmtree(run / "student/step-00006")
    assert invoke("status", run, "--verify").code == 0
    result = train(run, *FIVE, "train.save_every_steps=3", "train.steps=6")
    assert result.code == 0
    assert "making the updates from step 3 on once more" in result.err
    assert "came out otherwise" not in result.err
    assert furthest(weights(alone, 5), weights(run, 5)) == 0
    whole = tmp_path / "whole"
    assert train(whole, *FIVE, "train.steps=6").code == 0
    assert furthest(weights(whole, 6), weights(run, 6)) == 0


def test_of_damaged_states_each_is_named_and_the_one_before_is_taken(alone, tmp_path):
    run = tmp_path / "run"
    assert train(run, *FIVE, "train.steps=4").code == 0
    (run / "trainer/step-00004/intruder").touch()
    damaged = next((run / "trainer/step-00003").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-8] + bytes(8))
    shown = invoke("status", run, "--verify")
    assert shown.code == ExitCode.BAD_DATA
    assert "train takes the state before it" in shown.err
    result = train(run, *FIVE)
    assert result.code == 0, result.err
    for name in ("step-00004/intruder", f"step-00003/{damaged.name}"):
        (line,) = (line for line in result.err.splitlines() if name in line)
        assert "taking the state before it" in line
    assert "making the updates from step 2 on once more" in result.err
    assert furthest(weights(alone, 5), weights(run, 5)) == 0


def test_with_no_whole_state_every_update_is_made_once_more(alone, tmp_path):
    run = tmp_path / "run"
    assert train(run, *FIVE, "train.steps=2").code == 0
    for step in (1, 2):
        (run / f"trainer/step-0000{step}/intruder").touch()
    result = train(run, *FIVE, "train.steps=3")
    assert "making the updates from step 0 on once more" in result.err
    assert furthest(weights(alone, 3), weights(run, 3)) == 0


@pytest.mark.parametrize("damage", [shutil.rmtree, lambda path: (path / "model.safetensors").write_bytes(b"")])
def test_a_damaged_newest_student_is_made_again_from_its_state(alone, tmp_path, damage):
    run, student = tmp_path / "run", tmp_path / "run/student/step-00002"
    assert train(run, *FIVE, "train.steps=2").code == 0
    damage(student)
    shown = invoke("status", run, "--verify", "--json")
    assert shown.code == ExitCode.BAD_DATA
    assert shown.json()["next"] == f"opdctl train --output {run} --repair"
    refused = invoke("eval", "--output", run)
    assert refused.code == ExitCode.BAD_DATA
    assert f"opdctl train --output {run} --repair" in refused.err
    assert invoke("train", "--output", run, "--repair").code == 0
    assert invoke("status", run, "--verify").code == 0
    assert train(run, *FIVE, "train.steps=3").code == 0
    assert furthest(weights(alone, 3), weights(run, 3)) == 0


def test_killed_at_random_moments_it_ends_with_the_same_bits(alone, tmp_path):
    words = ["train", "--recipe", QUICKSTART, *sets(*FIVE), "--output", tmp_path / "run"]
    command = [sys.executable, "-m", "opdctl", *map(str, words)]
    moments = np.random.default_rng(0).uniform(5, 12, 3)
    for moment in moments:
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert furthest(weights(alone, 5), weights(tmp_path / "run", 5)) == 0


# ── Adapters ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def adapted(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("adapted") / "run"
    result = train(path, *FIVE, *LORA)
    assert result.code == 0, result.err
    return path


def test_only_the_adapter_is_trained_and_the_merged_export_is_a_plain_model(adapted):
    run = load_run(adapted)
    before = load_model(run.student, device="cpu").state_dict()
    step = adapted / "student/step-00005"
    after = AutoModelForCausalLM.from_pretrained(step, dtype=torch.float32).state_dict()
    assert before.keys() == after.keys()
    targets = {name for name in before if "_proj." in name}
    assert {name for name in before if not torch.equal(before[name], after[name])} == targets
    assert sorted(p.name for p in (step / "adapter").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    states = [name for path in (adapted / "trainer/step-00005").iterdir() for name in load_file(path)]
    assert len(states) > 50
    assert all("lora_" in name for name in states)


def test_merged_and_unmerged_log_probs_agree(adapted):
    """peft puts the adapter on the model that training began with; the merged directory says the same to 1e-5 nats.

    In float64, since float32 alone is 1e-5 off for tokens of small probability.
    """
    run, step = load_run(adapted), adapted / "student/step-00005"
    base = AutoModelForCausalLM.from_pretrained(run.student.path, dtype=torch.float32)
    unmerged = peft.PeftModel.from_pretrained(base, step / "adapter").double()
    merged = AutoModelForCausalLM.from_pretrained(step, dtype=torch.float64)
    plain = load_model(run.student, device="cpu").double()
    furthest_apart, moved = 0.0, 0.0
    for sample in read_scored(run, 4):
        ids_1T = torch.from_numpy(np.concatenate([sample.response.prompt_ids, sample.response.response_ids]))[
            None
        ].long()
        with torch.no_grad():
            a, b, c = (
                model(ids_1T).logits[0, :-1].log_softmax(-1).gather(-1, ids_1T[0, 1:, None])
                for model in (unmerged, merged, plain)
            )
        responses = slice(len(sample.response.prompt_ids) - 1, None)
        furthest_apart = max(furthest_apart, float((a - b)[responses].abs().max()))
        moved = max(moved, float((a - c)[responses].abs().max()))
    assert furthest_apart < 1e-5
    assert moved > 1e-2


def test_two_processes_train_an_adapter_as_one_does(adapted, tmp_path):
    torchrun(tmp_path / "run", *FIVE, *LORA)
    assert furthest(weights(adapted, 5), weights(tmp_path / "run", 5)) < 1e-5


def test_an_adapter_goes_on_from_its_state(adapted, tmp_path):
    assert train(tmp_path / "run", *FIVE, *LORA, "train.steps=3").code == 0
    assert train(tmp_path / "run", *FIVE, *LORA).code == 0
    assert furthest(weights(adapted, 5), weights(tmp_path / "run", 5)) == 0


def test_dropout_and_whole_modules_are_trained_the_same_each_time(tmp_path):
    extra = (*LORA, "lora.dropout=0.3", 'lora.modules_to_save=["norm"]', "train.steps=2", "train.keep_latest=9")
    for name in "ab":
        assert train(tmp_path / name, *extra).code == 0
    assert furthest(weights(tmp_path / "a", 2), weights(tmp_path / "b", 2)) == 0
    assert train(tmp_path / "c", *extra, "lora.dropout=0.0").code == 0
    assert furthest(weights(tmp_path / "a", 2), weights(tmp_path / "c", 2)) > 0
    before = load_model(load_run(tmp_path / "a").student, device="cpu").state_dict()
    after = weights(tmp_path / "a", 2)
    assert not torch.equal(before["model.norm.weight"], after["model.norm.weight"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ('lora.target_modules=["no_such_layer"]', "no_such_layer"),
        ('lora.target_modules=["q_proj", "lm_head"]', "this model's output matrix is its embedding"),
        ('lora.modules_to_save=["embed_tokens"]', "this model's output matrix is its embedding"),
    ],
)
def test_an_adapter_that_cannot_be_is_refused(override, said, scored_run):
    with pytest.raises(OpdctlError, match=said):
        policy.load_policy(scored_run.student, small_recipe(*LORA, override), "cpu")


# ── Schedule, batches, collapse ──────────────────────────────────────────────────────────────────────────────────────


def test_the_learning_rate_by_hand():
    def rates(schedule, **settings):
        train = Train(steps=9, learning_rate=8.0, lr_scheduler_type=schedule, **settings)
        return [learning_rate(train, step) for step in range(8)]

    assert rates("constant", warmup_steps=4) == [2, 4, 6, 8, 8, 8, 8, 8]
    assert rates("linear", warmup_steps=2, decay_steps=6) == [4, 8, 8, 6, 4, 2, 0, 0]
    cosine = [8 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(5)]
    assert rates("cosine", warmup_steps=2, decay_steps=6) == pytest.approx([4, 8, *cosine, 0])


def test_a_fall_without_an_end_is_refused(tmp_path):
    result = train(tmp_path / "run", "train.lr_scheduler_type=cosine")
    assert result.code == ExitCode.USAGE
    assert "train.decay_steps" in result.err


def test_padding_is_small():
    """Sorted by length, long-tailed lengths lose little: less than a twentieth of what is computed is padding."""
    lengths = np.random.default_rng(0).lognormal(7, 0.8, 1024).astype(int).clip(16, 16384).tolist()
    batches = by_token_budget(lengths, 16384)
    computed = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    assert sorted(i for batch in batches for i in batch) == list(range(1024))
    assert sum(lengths) / computed > 0.95


def test_a_collapse_stops_the_run_and_says_why(tmp_path):
    cut = ("train.steps=6", "rollout.max_tokens=4", "train.max_truncated_fraction=0.9")
    result = train(tmp_path / "run", *cut)
    assert result.code == ExitCode.FAILED
    assert "collapse: in steps 1 to 3 100%, 100%, 100% of the responses ran into rollout.max_tokens" in result.err
    assert load_run(tmp_path / "run").current_step() == 3
    assert train(tmp_path / "run", *cut).code == ExitCode.FAILED  # it stays so
    assert train(tmp_path / "run", *cut, "train.max_truncated_fraction=1.0", "train.steps=4").code == 0


def test_a_policy_without_entropy_stops_the_run(tmp_path):
    result = train(tmp_path / "run", "train.steps=4", "train.min_entropy=50.0")
    assert result.code == ExitCode.FAILED
    assert "the policy's entropy was" in result.err


# ── Metrics, trackers, the export ────────────────────────────────────────────────────────────────────────────────────


def test_every_metric_has_its_meaning_in_the_docs(alone):
    docs = (QUICKSTART.parent.parent / "docs/metrics.md").read_text()
    metrics = json.loads((alone / "metrics.jsonl").read_text().splitlines()[-1])
    assert len(metrics) > 25
    for name in metrics:
        assert f"`{name}`" in docs, name


def test_quantiles_of_the_advantage_are_those_of_the_stored_log_probs(alone):
    metrics = json.loads((alone / "metrics.jsonl").read_text().splitlines()[0])
    samples = list(read_scored(load_run(alone), 0))
    gaps = np.concatenate([np.abs(s.teacher.logprobs - s.response.logprobs) for s in samples])
    for share in (50, 90, 99):
        assert metrics[f"abs_advantage_p{share}"] == pytest.approx(np.percentile(gaps, share), rel=1e-6)
    assert metrics["abs_advantage"] == pytest.approx(gaps.mean(), rel=1e-4)


def test_a_tracker_that_fails_stops_nothing(tmp_path, monkeypatch):
    from opdctl.training import tracking

    def broken(recipe, path):
        raise ConnectionError("no network here")

    monkeypatch.setitem(tracking.KINDS, "wandb", broken)
    monkeypatch.setitem(tracking.KINDS, "trackio", lambda recipe, path: tracking.Tracker(broken, broken))
    result = train(tmp_path / "run", "train.steps=1", 'tracking.report_to=["wandb", "trackio"]')
    assert result.code == 0
    assert result.err.count("the run goes on without it") == 2
    assert "no network here" in result.err


def test_tensorboard_gets_every_metric(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train(tmp_path / "run", "train.steps=2", 'tracking.report_to=["tensorboard"]').code == 0
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == set(metrics[0]) - {"step"}
    assert [event.value for event in events.Scalars("k1")] == pytest.approx([m["k1"] for m in metrics])


def test_the_export_is_a_model_that_others_load_and_says_what_it_is(alone):
    step = alone / "student/step-00005"
    card = (step / "README.md").read_text()
    for said in ("step 5", "toy:teacher", "iw_opd", "sort12", "reverse KL", "gamma = 0.5", "learning_rate"):
        assert said in card, said
    tokenizer = AutoTokenizer.from_pretrained(step)
    model = AutoModelForCausalLM.from_pretrained(step, dtype=torch.float32)
    assert tokenizer.decode(model.generate(torch.arange(2, 12)[None], max_new_tokens=4)[0])
    engine = TransformersEngine(ModelDir(step, "float32"), "cpu")
    answered = ScoreRequest(np.arange(2, 8, dtype=np.int32), np.arange(8, 14, dtype=np.int32))
    assert np.isfinite(engine.score([answered], Score(), lambda _: None)[0].logprobs).all()


def test_the_best_student_is_named(tmp_path):
    result = train(tmp_path / "run", "train.steps=2", "eval.every_steps=1")
    assert result.code == 0
    run = load_run(tmp_path / "run")
    step, accuracy = progress.best(run)
    assert accuracy == max(progress.accuracies(run).values())
    assert f"step {step}" in result.err


def test_a_row_has_the_newest_accuracy_whoever_measured_it_and_looks_at_no_step_without_one(tmp_path, monkeypatch):
    run, asked = open_run(small_recipe(), tmp_path / "run"), []
    measured = {0: {"avg": 0.25}, 8: {"avg": 0.5}, 16: None, 2000: {"avg": 0.75}}  # 16: under another protocol

    def stored(run, bench, subject):
        asked.append(int(subject.removeprefix("step-")))
        return measured[asked[-1]]

    monkeypatch.setattr(loop.evaluate, "stored_summary", stored)
    metrics = dict.fromkeys(("loss", "abs_advantage", "truncated_fraction", "tokens", "update_seconds"), 1.0)

    def shown(step):
        return progress.format_row(run, metrics | {"step": step}, 0.0)[progress.COLUMNS.index("accuracy")]

    assert (shown(999), asked) == ("", [])
    for name in ("step-00016", "step-00000", "step-02000", "step-00008", "step-00008 (copy)", "teacher"):
        run.evaluation_path("sort12", name).mkdir(parents=True)
        (run.evaluation_path("sort12", name) / "summary.json").touch()
    assert (shown(999), asked) == ("50.0% @8", [16, 8])
    assert shown(1999) == "75.0% @2000"
