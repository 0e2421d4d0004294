"""The wheel: complete, and usable in an empty directory without the repository."""

import json
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from helpers.commands import ROOT

pytest.importorskip("build", reason="needs the package build, which the extra `dev` installs")
DATA = ("recipes", "opdctl/data/toy/models")


def run(*words: object, cwd: Path) -> str:
    """Run a command, check that it succeeds, and return its stdout."""
    result = subprocess.run(list(map(str, words)), cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{words}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tracked files, so that the build writes nothing into the repository."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs the git repository")
    files = run("git", "ls-files", "-z", "--cached", cwd=ROOT).split("\0")
    directory = tmp_path_factory.mktemp("sources")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes((ROOT / name).read_bytes())
    return directory


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", directory, cwd=sources)
    (path,) = directory.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel alone; it borrows the dependencies of this environment."""
    directory = tmp_path_factory.mktemp("environment") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", directory, cwd=directory.parent)
    install = ["pip", "--python", directory / "bin" / "python", "install", "--no-deps", "--no-index", "--quiet"]
    run(sys.executable, "-m", *install, wheel, cwd=directory.parent)
    (own_packages,) = directory.glob("lib/python*/site-packages")
    # The .pth files of the borrowed directory, such as that of an editable opdctl, have no effect.
    (own_packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return directory


def test_the_wheel_has_every_module_and_data_file(wheel, sources):
    shipped = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(sources).as_posix() for path in (sources / "opdctl").rglob("*.py")}
    data = {path for name in DATA for path in (sources / name).rglob("*") if path.is_file()}
    names = {path.relative_to(sources).as_posix() for path in data}
    assert modules <= shipped
    assert {name if name.startswith("opdctl/") else f"opdctl/{name}" for name in names} <= shipped
    assert {f"opdctl/analysis/report.{kind}" for kind in ("css", "html", "js")} <= shipped


def test_the_source_distribution_has_every_tracked_file(sources, tmp_path):
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, cwd=sources)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        shipped = {name.partition("/")[2] for name in archive.getnames()}
    tracked = {path.relative_to(sources).as_posix() for path in sources.rglob("*") if path.is_file()}
    built = {name for name in tracked if ".egg-info/" in name or name.startswith("build/")}
    assert tracked - built - shipped <= {".gitignore"}


def test_it_is_imported_from_the_environment(environment, tmp_path):
    where = run(environment / "bin" / "python", "-c", "import opdctl; print(opdctl.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(environment)
    version = run(environment / "bin" / "opdctl", "--version", cwd=tmp_path)
    assert version.split()[1] in next(environment.glob("lib/python*/site-packages/opdctl-*.dist-info")).name


def test_recipes_are_found_by_name(environment, tmp_path):
    text = run(environment / "bin" / "opdctl", "list", "recipes", "--json", cwd=tmp_path)
    assert {"quickstart", "cross_scale", "variants/perm"} <= {row["recipe"] for row in json.loads(text)["recipes"]}


def test_the_quickstart_runs_in_an_empty_directory(environment, tmp_path):
    sizes = ("train.steps=2", "prompts.limit=16", "rollout.prompts_per_step=8", "eval.limit=8", "pipeline.threads=1")
    settings = [word for size in sizes for word in ("--set", size)]
    run(environment / "bin" / "opdctl", "train", "--recipe", "quickstart", *settings, cwd=tmp_path)
    run(environment / "bin" / "opdctl", "analyze-position", "runs/quickstart", cwd=tmp_path)
    assert (tmp_path / "runs" / "quickstart" / "student" / "step-00002").is_dir()
    assert (tmp_path / "runs" / "quickstart" / "analysis" / "report.html").is_file()
