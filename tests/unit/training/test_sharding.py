"""A sharded student: what each rank holds and reads while it is loaded, and that it is the student of one process."""

import pytest
import torch
from helpers.commands import small_recipe
from helpers.export import make
from helpers.models import SMALL, edit_tensors, save
from helpers.ranks import in_ranks
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen3ForCausalLM

from opdctl import distributed
from opdctl.errors import OpdctlError
from opdctl.models import shards
from opdctl.models.directory import ModelDir
from opdctl.models.logprobs import map_vocab_chunks, output_head, response_states
from opdctl.training import policy, sharding
from opdctl.training.policy import load_policy

OFFLOAD = "train.cpu_offload=true"  # shards in one process, too
LORA = ("lora.rank=4", 'lora.modules_to_save=["lm_head"]', "student.dtype=bfloat16")
GROUPS_OF_TWO = "train.fsdp_size=2"


def loaded(student: ModelDir, *overrides: str) -> dict[str, tuple[bool, torch.dtype, list]]:
    """Return every parameter and buffer of the student in training, whole, and whether it is trained."""
    model = load_policy(student, small_recipe(*overrides), "cpu")
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        name: (value.requires_grad, value.dtype, distributed.full_tensor(value).double().tolist())
        for name, value in tensors
    }


@pytest.mark.parametrize(
    ("kind", "tied", "overrides", "worlds"),
    [
        ("qwen3", True, (), (1, 2, 4)),
        ("qwen3", False, LORA, (2, 4)),
        ("qwen3_moe", False, (), (2, 4)),
        ("qwen3_moe", True, ("lora.rank=4",), (2,)),
        ("gpt_oss", False, (), (2,)),  # stacked experts, with biases that other conversions make
        ("gemma2", True, ("train.gradient_checkpointing=true",), (4,)),
        ("nemotron_h", False, (), (2,)),  # parameters that are computed if they are not stored
        ("zamba2", True, (), (2,)),  # blocks that share weights
        ("bert-generation", True, (), (2,)),  # a tied head, whose bias another module has, too
        ("bart", True, (), (2,)),  # a base model that only wraps
    ],
)
def test_loaded_weights_are_bit_for_bit_those_of_one_process(tmp_path, kind, tied, overrides, worlds):
    student = ModelDir(save(make(kind, tied=tied), tmp_path), "float32")
    one = loaded(student, *overrides)
    for world_size in worlds:
        settings = [*overrides, *[OFFLOAD] * (world_size == 1), *[GROUPS_OF_TWO] * (world_size == 4)]
        for rank in in_ranks(world_size, lambda settings=settings: loaded(student, *settings)):
            assert rank == one


class LiveBytes(TorchDispatchMode):
    """The bytes of all tensors with memory that operations have made, at their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self._bound, self._storages = 0, 0, dict[int, tuple[StorageWeakRef, int]]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, DTensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self._bound += storage.nbytes()
        if self._bound > self.peak:
            self._storages = {key: value for key, value in self._storages.items() if not value[0].expired()}
            self._bound = sum(size for _, size in self._storages.values())
            self.peak = max(self.peak, self._bound)
        return result


def measure_load(student: ModelDir, *overrides: str) -> tuple[int, int]:
    """Return the peak of the bytes of this rank's tensors, and the bytes that it reads, until the self-checks."""
    read, read_bytes = shards._SliceReader.__call__, []

    def counted(*arguments: object) -> torch.Tensor:
        tensor = read(*arguments)
        read_bytes.append(tensor.untyped_storage().nbytes())
        return tensor

    shards._SliceReader.__call__ = counted  # type: ignore[method-assign]
    with LiveBytes() as live:
        policy._load_sharded(student, small_recipe(*overrides), "cpu", "float32")
    return live.peak, sum(read_bytes)


@pytest.mark.parametrize(
    ("kind", "overrides"), [("qwen3", ("lora.rank=2", 'lora.target_modules=["o_proj"]')), ("qwen3_moe", ())]
)
def test_a_rank_reads_its_own_rows_and_never_holds_the_student(tmp_path, kind, overrides):
    student = ModelDir(save(make(kind, num_hidden_layers=16), tmp_path), "float32")
    whole = 4 * student.weights.num_parameters
    for peak, read in in_ranks(4, lambda: measure_load(student, *overrides)):
        assert read <= 1.05 * whole / 4  # the others' rows of vectors whose length four does not divide
        assert whole / 4 < peak < 1.2 * whole / 4


def gradients(student: ModelDir, *overrides: str) -> tuple[float, float, dict[str, list]]:
    """Return the loss of four sequences, one or more on each rank, the norm of its gradient, and the gradient."""
    model = load_policy(student, small_recipe(*overrides), "cpu")
    ids_BT = torch.arange(6, 54).reshape(4, 12)[distributed.rank() :: distributed.world_size()]
    positions_BT = torch.arange(1, 12).expand(len(ids_BT), -1)
    rows_BT = torch.arange(len(ids_BT))[:, None].expand_as(positions_BT)
    hidden_ND, ids_N = response_states(model, ids_BT, rows_BT.flatten(), positions_BT.flatten())
    head = output_head(model, SMALL["vocab_size"])
    loss = map_vocab_chunks(head, hidden_ND, ids_N[:, None], lambda chunk: -chunk.selected_logp_CK.sum())
    loss.backward()
    trained = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    total = distributed.all_reduce_sum({"loss": loss.item()})["loss"]
    norm = float(distributed.full_tensor(torch.nn.utils.get_total_norm(trained.values())))
    return total, norm, {name: distributed.full_tensor(value).tolist() for name, value in trained.items()}


@pytest.mark.parametrize(
    ("kind", "tied", "rounding"), [("qwen3", True, 1e-5), ("qwen3", False, 1e-5), ("zamba2", True, 1e-4)]
)
def test_two_groups_of_two_ranks_have_loss_and_gradient_of_one_process(tmp_path, kind, tied, rounding):
    """Gradients are summed, not averaged, within a group and over the groups."""
    student = ModelDir(save(make(kind, tied=tied), tmp_path), "float32")
    loss, norm, one = gradients(student)
    for other_loss, other_norm, other in in_ranks(4, lambda: gradients(student, GROUPS_OF_TWO)):
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert other_norm == pytest.approx(norm, rel=rounding)
        for name, value in one.items():
            difference = torch.tensor(other[name]) - torch.tensor(value)
            assert difference.norm() <= rounding * torch.tensor(value).norm(), name


def test_groups_of_two_ranks_hold_half_of_the_student_each(tmp_path):
    student = ModelDir(save(make("qwen3"), tmp_path), "float32")

    def local_parameters() -> int:
        model = load_policy(student, small_recipe(GROUPS_OF_TWO), "cpu")
        return sum(parameter.to_local().numel() for parameter in model.parameters())

    counts = in_ranks(4, local_parameters)
    assert counts[:2] == counts[2:]
    assert sum(counts[:2]) == student.weights.num_parameters


def test_self_check_that_fails_leaves_the_shards_in_training(tmp_path, monkeypatch):
    """Gathered parameters, once the optimizer had them, would never change the student."""

    def fail_in_a_pass(model, tolerance):
        broken = RuntimeError("no such argument")
        hook = model.base_model.layers[-1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(broken))
        with pytest.raises(RuntimeError), torch.no_grad():
            model(input_ids=torch.arange(6, 18)[None])
        hook.remove()
        return "it fails"

    monkeypatch.setattr(policy, "enable_packing", fail_in_a_pass)
    student = ModelDir(save(make("qwen3", tied=True), tmp_path), "float32")
    model = load_policy(student, small_recipe(OFFLOAD), "cpu")
    assert all(isinstance(value, DTensor) for value in model.parameters())
    distributed.destroy_process_group()


def test_trained_parameter_that_is_not_sharded_is_refused(tmp_path):
    model = make("qwen3")
    with pytest.raises(OpdctlError, match=r"model\.embed_tokens\.weight") as caught:
        sharding.check_trained_shards(model, ModelDir(save(model, tmp_path), "float32"))
    assert caught.value.kind == "unsupported_model"


def test_groups_that_do_not_divide_the_processes_are_refused():
    errors = in_ranks(2, lambda: sharding.check_fsdp_size(small_recipe("train.fsdp_size=3")))
    assert [kind for kind, _ in errors] == ["unsupported_setting"] * 2
    assert all("train.fsdp_size" in detail for _, detail in errors)


def test_missing_weights_are_refused_in_every_rank_before_any_is_read(tmp_path):
    student = save(make("qwen3"), tmp_path)
    edit_tensors(student, lambda tensors: tensors.pop("model.norm.weight"))
    errors = in_ranks(2, lambda: load_policy(ModelDir(student, "float32"), small_recipe(), "cpu"))
    assert [kind for kind, _ in errors] == ["invalid_model"] * 2
    assert all("model.norm.weight" in detail for _, detail in errors)


def test_model_with_another_output_is_refused_as_in_one_process(tmp_path, monkeypatch):
    """Its logits are not those of its hidden states and its output matrix."""
    forward = Qwen3ForCausalLM.forward

    def with_offset(self, *arguments, **options):
        output = forward(self, *arguments, **options)
        output.logits = output.logits * torch.linspace(0.5, 1.5, output.logits.shape[-1])
        return output

    student = ModelDir(save(make("qwen3"), tmp_path), "float32")
    monkeypatch.setattr(Qwen3ForCausalLM, "forward", with_offset)
    for kind, _ in in_ranks(2, lambda: load_policy(student, small_recipe(), "cpu")):
        assert kind == "unsupported_model"
