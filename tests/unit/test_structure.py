"""Structural rules of the package: layers of imports, light modules, where libraries are used, names."""

import ast
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "opdctl"
LAYERS = [  # a module imports from lines above its own only; modules on one line do not import one another
    {"errors"},
    {"console", "distributed", "environment", "garbage_collection", "registry", "signals"},
    {"losses", "artifacts"},
    {"recipe"},
    {"models", "data"},
    {"engines", "runs"},
    {"cluster"},
    {"training", "evaluation", "agents"},
    {"analysis", "pipeline"},
    {"cli", "plugins"},
]
LEVELS = {subject: level for level, subjects in enumerate(LAYERS) for subject in subjects}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
    if path.parent != PACKAGE or path.name not in ("__init__.py", "__main__.py")
}
LIGHT_MODULES = ("cli.main", "recipe.load", "runs.status", "analysis.report", "plugins")


def imported_modules(path: Path) -> set[str]:
    """Return the modules of the package that a file imports, at its top or within a function."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "opdctl":
            module = (node.module or "").removeprefix("opdctl").removeprefix(".")
            for alias in node.names:
                name = f"{module}.{alias.name}" if module else alias.name
                modules.add(name if name in MODULES else module)
        elif isinstance(node, ast.Import):
            modules |= {alias.name.removeprefix("opdctl.") for alias in node.names if alias.name.startswith("opdctl.")}
    return modules


IMPORTS = {name: imported_modules(path) for name, path in MODULES.items()}


def test_every_module_belongs_to_a_layer():
    assert {name.split(".")[0] for name in MODULES} == set(LEVELS)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_down_the_layers(name):
    subject = name.split(".")[0]
    for other in IMPORTS[name]:
        other_subject = other.split(".")[0]
        assert other_subject == subject or LEVELS[other_subject] < LEVELS[subject], f"{name} imports {other}"


def test_no_import_cycle():
    remaining = {name: others & MODULES.keys() - {name} for name, others in IMPORTS.items()}
    while leaves := [name for name, others in remaining.items() if not others & remaining.keys()]:
        for name in leaves:
            del remaining[name]
    assert not remaining, f"a cycle among {sorted(remaining)}"


def importers(*modules: str) -> set[str]:
    """Return the modules that import one of these, at the top or within a function."""
    importing = set()
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            if any(each == module or each.startswith(f"{module}.") for each in names for module in modules):
                importing.add(name)
    return importing


@pytest.mark.parametrize(
    ("libraries", "modules"),
    [
        (["pyarrow"], ("artifacts.", "data.tables")),
        (["safetensors"], ("artifacts.", "models.", "training.adapters", "training.export", "engines.vllm")),
        (["vllm"], ("engines.vllm",)),
        (["rich"], ("console", "cli.")),
        (["typer"], ("cli.",)),
        (["matplotlib"], ("analysis.figures", "analysis.comparison_figures", "analysis.plotting")),
        (["fsspec", "s3fs", "gcsfs", "adlfs"], ("artifacts.object_store",)),
        (["ray"], ("cluster.",)),
        (["pickle"], ()),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_library_is_imported_in_its_modules_only(libraries, modules):
    assert not {name for name in importers(*libraries) if not name.startswith(modules)}


def test_nothing_is_unpickled():
    assert not [name for name, path in MODULES.items() if "torch.load" in path.read_text()]


def test_light_modules_import_no_torch():
    code = (
        "import importlib, json, sys\n"
        "heavy = {}\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(f'opdctl.{name}')\n"
        "    heavy[name] = sorted({'torch', 'transformers'} & set(sys.modules))\n"
        "print(json.dumps(heavy))\n"
    )
    result = subprocess.run([sys.executable, "-c", code, *LIGHT_MODULES], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == {name: [] for name in LIGHT_MODULES}


def test_no_function_is_longer_than_a_screen():
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{name}.{node.name}"


def test_a_public_name_is_defined_once():
    """Names that a package defines on purpose in several modules stand in SHARED."""
    definitions = []
    for name, path in MODULES.items():
        for node in ast.parse(path.read_text()).body:
            names = [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)]
            definitions += [(each, name) for each in names if not each.startswith("_")]
    definitions.sort()
    grouped = {key: [module for _, module in group] for key, group in itertools.groupby(definitions, lambda d: d[0])}
    assert {key: modules for key, modules in grouped.items() if len(modules) > 1} == {}


def test_shape_suffixes_are_in_the_legend():
    """One letter has one meaning: the table under Notation in CONTRIBUTING.md."""
    notation = (PACKAGE.parent / "CONTRIBUTING.md").read_text().partition("## Notation")[2].partition("\n## ")[0]
    legend = {
        letter for row in notation.splitlines() if row.startswith("|") for letter in re.findall(r"\b[A-Z]\b", row)
    }
    unknown = set()
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            identifier = getattr(node, "id", None) or getattr(node, "arg", None) or getattr(node, "attr", None)
            suffix = re.search(r"[a-z0-9]_([A-Z]{1,4})$", identifier or "")
            if suffix and not {*suffix[1]} <= legend:
                unknown.add(f"{name}: {identifier}")
    assert unknown <= {"models.logprobs: lora_A"}  # the name in peft
