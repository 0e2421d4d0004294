"""The rules of the code itself: which file may know which, and what stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "opdctl"
ORDER = [  # a file imports from lines above its own only
    ["opdctl"],
    ["errors", "answers", "sandbox"],
    ["hub"],
    ["registry"],
    ["weights"],
    ["objectives"],
    ["config"],
    ["records", "manifests"],
    ["claims"],
    ["store"],
    [
        "positions",
        "dist",
        "log",
        "logprobs",
        "stats",
        "contamination",
        "grading",
        "checkpoint",
        "batches",
        "tasks.task",
    ],
    ["tasks.sorting", "tasks.swapping"],
    ["tasks"],
    ["completion", "tasks.train_models", "prompts", "model"],
    ["sizes"],
    ["execution"],
    ["benchmarks", "card", "engines", "engines.http", "policy", "tracking"],
    ["engines.hf", "engines.vllm", "engines.server", "run"],
    ["parity", "scored", "plan", "follow", "evaluations", "verdict"],
    ["change", "status"],
    ["microbatches", "samples", "comparison"],
    ["analysis"],
    ["figures", "sentences"],
    ["report"],
    ["stages.rollout", "stages.score", "stages.train", "stages.evaluate", "stages.analyze", "stages.continuations"],
    ["stages"],
    ["online"],
    ["cli"],
    ["__main__"],
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__") or "opdctl": path
    for path in PACKAGE.rglob("*.py")
}
MODULES["opdctl"] = MODULES.pop("__init__")


def imports(path: Path) -> set[str]:
    """Return the modules of the package that a file imports, at its top or within a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "opdctl":
            module = (node.module or "").removeprefix("opdctl").removeprefix(".")
            for alias in node.names:
                inside = f"{module}.{alias.name}" if module else alias.name
                found.add(inside if inside in MODULES else module or "opdctl")
    return found


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_one_way(name):
    made_here = (
        {"engines.hf", "engines.vllm", "engines.server"} if name == "engines" else set()
    )  # an engine is loaded by its factory, when asked for
    for other in imports(MODULES[name]) - {name} - made_here:
        assert LEVEL[other] < LEVEL[name], f"{name} imports {other}"


def test_every_file_has_its_place():
    assert set(MODULES) == set(LEVEL)


@pytest.mark.parametrize("stage", ["rollout", "score", "train", "evaluate", "analyze", "continuations"])
def test_stages_do_not_import_one_another(stage):
    assert not [other for other in imports(MODULES[f"stages.{stage}"]) if other.startswith("stages")]


@pytest.mark.parametrize(
    "module",
    [
        "cli",
        "completion",
        "config",
        "hub",
        "records",
        "store",
        "registry",
        "weights",
        "objectives",
        "run",
        "stages.analyze",
        "report",
    ],
)
def test_light_modules_import_no_torch(module):
    code = f"import sys, opdctl.{module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_only_the_store_opens_artifacts():
    for name, path in MODULES.items():
        if name not in ("store", "prompts"):  # prompts reads the user's own data
            assert "pyarrow.parquet" not in path.read_text(), name
        assert "import pickle" not in path.read_text(), name
        assert "torch.load" not in path.read_text(), name


def test_no_function_is_longer_than_a_screen():
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{name}.{node.name}"
