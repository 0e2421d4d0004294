"""The stages together: what lies in a GPU's memory at the same time, commands, remedies, times."""

import pytest
from helpers.commands import ROOT

from opdctl.pipeline import stage_plan
from opdctl.pipeline.stage_plan import ASLEEP_BYTES, StagePlan, plan_stages
from opdctl.recipe.library import find_recipe
from opdctl.recipe.load import load_recipe
from opdctl.recipe.schema import Recipe

PAPER = ROOT / "recipes" / "cross_scale.toml"
GIB = 2**30


def paper(*overrides: str, overlays: tuple[str, ...] = ()) -> Recipe:
    return load_recipe([PAPER, *map(find_recipe, overlays)], overrides)


def plan(*overrides: str, overlays: tuple[str, ...] = (), colocated: bool = True) -> StagePlan:
    recipe = paper(*overrides, overlays=overlays)
    shapes = {name: model.shape for name, model in recipe.models().items()}
    return plan_stages(recipe, shapes, colocated=colocated)


# ── Memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_memory_of_colocated_stages():
    """Beside the stage at work lie sleeping engines, and the trainer's weights and moments over 32 GPUs."""
    stages, budget = plan(), int(0.8 * 79 * GIB)
    idle = 12 * 4_022_468_096 // 32
    assert stages.memory("rollout") == {"student, vllm": budget, "teacher, vllm": ASLEEP_BYTES, "trainer": idle}
    prompt_logits = 2 * 4 * 1024 * 151_936
    assert stages.memory("score teacher") == {
        "teacher, vllm": budget + prompt_logits,
        "student, vllm": ASLEEP_BYTES,
        "trainer": idle,
    }
    update = stages.memory("update")
    assert update.keys() == {"trainer", "student, vllm", "teacher, vllm"}
    assert update["trainer"] > 10 * idle
    assert stages.memory("eval teacher")["teacher, vllm"] == budget


def test_engines_whose_shares_fit_together_stay_awake():
    """Until the update. In `train` they share the GPU with the trainer, which does not fit here."""
    stages, budget = plan("vllm.gpu_memory_utilization=0.5"), int(0.5 * 79 * GIB)
    assert stages.memory("rollout")["teacher, vllm"] == budget
    assert stages.memory("update")["teacher, vllm"] == ASLEEP_BYTES
    assert not stages.fits("rollout")


def test_engines_that_do_not_sleep_end_and_start_again():
    asleep, ended = plan(), plan("vllm.enable_sleep_mode=false")
    assert ended.memory("rollout").keys() == {"student, vllm", "trainer"}
    before, after = (each.stages[stage_plan.HAND_OVER].seconds for each in (asleep, ended))
    assert after == pytest.approx(before + 2 * 60 + 2 * 30_532_122_624 / 5e9)
    quick = plan("rollout.engine=transformers", "score.engine=transformers").stages[stage_plan.HAND_OVER].seconds
    assert quick == pytest.approx(before + 2 * 30_532_122_624 / 5e9)


def test_separate_allocations_hold_one_command_each():
    stages = plan(colocated=False)
    assert [list(stages.memory(name)) for name in ("rollout", "score teacher", "update", "eval student")] == [
        ["student, vllm"],
        ["teacher, vllm"],
        ["trainer"],
        ["student, vllm"],
    ]
    assert [stages.stages[name].gpus for name in ("rollout", "score teacher", "update")] == [16, 8, 32]
    several = plan(overlays=("variants/two_teachers",), colocated=False)
    assert several.memory("score teacher-math")["teacher-code, vllm"] == ASLEEP_BYTES  # of the same score-teacher


def test_reference_that_is_the_base_is_in_the_memory_of_the_trainer():
    """Its pass has no gradients; in separate allocations `score-teacher` has an engine for it."""
    settings = ("lora.rank=32", "train.extrapolation=1.25")
    colocated, apart = plan(*settings), plan(*settings, colocated=False)
    memory = colocated.memory("score reference")
    assert memory.keys() == {"trainer", "student, vllm", "teacher, vllm"}
    assert memory["trainer"] < colocated.memory("update")["trainer"]
    assert colocated.memory("rollout").keys() == {"student, vllm", "teacher, vllm", "trainer"}
    assert "reference, vllm" in apart.memory("score reference")
    assert apart.memory("score teacher")["reference, vllm"] == ASLEEP_BYTES
    passes = [each.stages["score reference"] for each in (colocated, apart)]
    assert [cost.gpus for cost in passes] == [32, 8]
    assert passes[0].seconds == pytest.approx(passes[1].seconds / 4)


def test_served_teacher_is_on_other_gpus():
    stages = plan("score.engine=server", "teacher.server=http://a:1")
    assert stages.memory("score teacher") == {}
    assert stages.stages["score teacher"].gpus == 8
    assert stages.memory("rollout").keys() == {"student, vllm", "teacher, vllm", "trainer"}  # the last one evaluates


def test_served_student_is_on_other_gpus():
    stages = plan("rollout.engine=server", "student.server=http://a:1")
    assert [stages.memory(name) for name in ("rollout", "eval student", stage_plan.HAND_OVER)] == [{}, {}, {}]
    assert stages.memory("score teacher").keys() == {"teacher, vllm", "trainer"}
    assert stages.stages["rollout"].seconds > 0
    assert plan().stages[stage_plan.HAND_OVER].bytes == 0  # engines beside it are not its memory


def test_trainer_keeps_a_teachers_output_matrix():
    settings = ("objective={name='reverse_kl',support='full'}", "score.hidden_states=true", "score.engine=transformers")
    held = [plan(*extra).memory("rollout")["trainer"] for extra in ((), settings)]
    assert held[1] - held[0] == 2 * 151_936 * 2048


def test_cpu_memory_of_a_node():
    """8 of 32 processes read their rows of the output matrix; 2 sleeping engines keep the teacher's weights."""
    student, teacher, matrix = 4_022_468_096, 30_532_122_624, 151_936 * 2560
    assert plan().node_bytes == 8 * 6 * matrix // 32 + 2 * 2 * teacher
    assert plan(colocated=False).node_bytes == 8 * 6 * matrix // 32
    offloaded = plan("train.cpu_offload=true", "train.fsdp_size=8", colocated=False).node_bytes
    assert offloaded == 6 * matrix + 16 * student


# ── What does not fit ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("stage", "overrides", "remedy"),
    [
        ("rollout", ("vllm.gpu_memory_utilization=0.92",), "vllm.gpu_memory_utilization = 0.85"),
        ("rollout", ("vllm.tensor_parallel_size=16",), "vllm.tensor_parallel_size = 1"),
        ("score teacher", ("vllm.gpu_memory_utilization=0.15",), "vllm.gpu_memory_utilization = 0.85"),
        ("update", ("train.gradient_checkpointing=false",), "train.gradient_checkpointing = true"),
        ("update", ("train.tokens_per_micro_batch=200_000",), "train.tokens_per_micro_batch = 73728"),
        ("update", ("hardware.train_gpus=1", "vllm.tensor_parallel_size=1"), "hardware.train_gpus = 2"),
        ("update", ("hardware.train_gpus=12",), "hardware.train_gpus = 16"),  # 2 nodes have 16 processes
        ("update", ("hardware.memory_gib=8",), ""),
    ],
)
def test_remedy_makes_a_stage_fit(stage, overrides, remedy):
    stages = plan(*overrides)
    assert not stages.fits(stage)
    assert stages.remedies[stage] == remedy
    if remedy:
        assert plan(*overrides, remedy.replace(" ", "")).fits(stage)


def test_92_percent_of_the_memory_may_be_planned():
    """The 30B student on 8 GPUs takes 78 GiB of the 79 of an H100, and CUDA and NCCL take more."""
    stages = plan("hardware.train_gpus=8", overlays=("pairs/235b-to-30b",), colocated=False)
    needed = sum(stages.memory("update").values())
    assert 0.92 * 79 * GIB < needed < 79 * GIB
    assert not stages.fits("update")
    assert stages.excess_bytes("update") == needed - int(0.92 * 79 * GIB)
    assert stages.remedies["update"] == "hardware.train_gpus = 16"


# ── Commands and times ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("gpus", "command"),
    [
        (1, "opdctl train"),
        (8, "torchrun --nproc-per-node 8 -m opdctl train"),
        (
            32,
            "torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint $HEAD:29500 -m opdctl train",
        ),
    ],
)
def test_command_starts_a_process_for_each_gpu(gpus, command):
    assert list(plan(f"hardware.train_gpus={gpus}").commands.values()) == [command]


def test_commands_of_separate_allocations():
    assert plan("hardware.train_gpus=8", colocated=False).commands == {
        "rollout, 4 × 4 GPUs": "opdctl rollout --follow",
        "score-teacher, 2 × 4 GPUs": "opdctl score-teacher --follow",
        "train, 8 GPUs": "torchrun --nproc-per-node 8 -m opdctl train --follow",
        "eval, 4 × 4 GPUs": "opdctl eval --step N",
    }
    assert "eval" not in str(plan("eval.every_steps=0", colocated=False).commands)
    served = plan("score.engine=server", "teacher.server=http://a:1", colocated=False).commands
    assert served["score-teacher, no GPU"] == "opdctl score-teacher --follow"


def test_separate_allocations_wait_for_each_other():
    """They are held until the end. Evaluations do not delay the run."""
    stages = plan("hardware.train_gpus=8", colocated=False)
    total = {name: cost.seconds * stages.repetitions(name) for name, cost in stages.stages.items()}
    steps = [total[name] for name in ("rollout", "score teacher", "update", stage_plan.HAND_OVER)]
    evaluations = [total[name] for name in ("eval student", "eval teacher")]
    assert stages.seconds() == pytest.approx(sum(steps))
    assert stages.gpu_hours() == pytest.approx((sum(steps) * (16 + 8 + 8) + sum(evaluations) * 16) / 3600)
    asynchronous = plan("hardware.train_gpus=8", "pipeline.max_staleness=1", colocated=False)
    assert asynchronous.seconds() == pytest.approx(max(max(steps), sum(steps) / 2))
    assert plan().seconds() == pytest.approx(sum(map(plan().seconds_of, plan().stages)))
