"""Who may import whom, what must import without torch, and that the project file names all there is."""

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
ROOMS = ("conf", "kernels", "parallel", "train", "serve", "slurm")

ALLOWED = {
    "conf": ("conf",),
    "kernels": ("kernels",),
    "parallel": ("parallel", "kernels", "conf.schema"),
    "train": ("train", "parallel", "kernels", "conf"),
    "serve": ("serve", "parallel", "kernels", "conf"),
    "slurm": ("slurm", "conf", "parallel.model.source"),
}
"""Room -> what of the project its files import."""

EXCEPTIONS = {
    "parallel/pipeline/show.py": ("conf.load",),  # a command of its own
    "parallel/checkpoint/contents.py": ("conf.load", "conf.layout"),  # of another
    "train/evaluate.py": ("serve.engine",),
}

PEERS = "train/compare/peer"
"""Files that run other projects' trainers, with those projects' own process groups."""

WITHOUT_TORCH = (
    "conf",
    "serve/request.py",
    "serve/blocks.py",
    "serve/scheduler.py",
    "parallel/pipeline/plan.py",
    "parallel/context/plan.py",
    "parallel/pipeline/choose.py",
    "parallel/pipeline/text.py",
    "parallel/pipeline/trace.py",
)


def files(*places: str) -> list[str]:
    """Python files below the places, as paths relative to the checkout."""
    found: list[str] = []
    for place in places:
        path = ROOT / place
        found += [str(f.relative_to(ROOT)) for f in (path.rglob("*.py") if path.is_dir() else [path])]
    return sorted(found)


def imports(path: str, source: str | None = None) -> Iterator[str]:
    """Full name of every module or member that a file imports, wherever in it, and of `torch.<name>`."""
    package = Path(path).parent.parts
    for node in ast.walk(ast.parse(source if source is not None else (ROOT / path).read_text(), path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            yield f"torch.{node.attr}"


def within(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def violations(path: str, source: str | None = None) -> list[str]:
    room = path.split("/")[0]
    allowed = ALLOWED[room] + EXCEPTIONS.get(path, ())
    names = sorted(set(imports(path, source)))
    wrong = [name for name in names if name.split(".")[0] in ROOMS and not within(name, allowed)]
    if path not in ("parallel/comm.py", "parallel/network.py") and not path.startswith(PEERS):
        wrong += [name for name in names if within(name, ("torch.distributed",))]
    if room == "conf":
        wrong += [name for name in names if within(name, ("torch",))]
    return wrong


@pytest.mark.parametrize("path", files(*ROOMS))
def test_rooms_import_only_what_they_may(path: str) -> None:
    assert violations(path) == []


@pytest.mark.parametrize(
    ("path", "source", "wrong"),
    [
        ("conf/x.py", "import torch", ["torch"]),
        ("conf/x.py", "from parallel import mesh", ["parallel.mesh"]),
        ("kernels/x.py", "def f():\n    from conf.schema import Config", ["conf.schema.Config"]),
        ("parallel/x.py", "from conf.load import load", ["conf.load.load"]),
        ("parallel/x.py", "from conf.schema import Config", []),
        ("parallel/pipeline/show.py", "from conf.load import load", []),
        ("serve/x.py", "import train.data", ["train.data"]),
        ("train/x.py", "from serve.engine import Engine", ["serve.engine.Engine"]),
        ("train/evaluate.py", "from serve.engine import Engine", []),
        ("train/evaluate.py", "from serve.api import app", ["serve.api.app"]),
        ("parallel/model/x.py", "from ..comm import Group\nfrom . import hf", []),
        ("parallel/x.py", "import torch.distributed as dist", ["torch.distributed"]),
        ("train/x.py", "from torch import distributed", ["torch.distributed"]),
        ("train/x.py", "import torch\ntorch.distributed.barrier()", ["torch.distributed"]),
        (
            "train/x.py",
            "from torch.distributed.checkpoint import save",
            ["torch.distributed.checkpoint.save"],
        ),
        ("parallel/comm.py", "import torch.distributed as dist", []),
        ("train/compare/peer_torch.py", "import torch.distributed as dist", []),
        ("train/compare/launch.py", "import torch.distributed as dist", ["torch.distributed"]),
    ],
)
def test_the_rules_catch_what_they_should(path: str, source: str, wrong: list[str]) -> None:
    assert violations(path, source) == wrong


def test_config_schedules_and_scheduler_import_without_torch() -> None:
    modules = [path.removesuffix(".py").replace("/", ".") for path in files(*WITHOUT_TORCH)]
    code = f"import sys; sys.modules['torch'] = None\nfor name in {modules}: __import__(name)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_transformers_imports_beside_our_kernels() -> None:
    code = "import kernels; from transformers import LlamaForCausalLM; print(kernels.__file__)"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(ROOT / "kernels" / "__init__.py")


class TestProjectFile:
    def test_every_room_is_packaged(self) -> None:
        assert set(project()["tool"]["scikit-build"]["wheel"]["packages"]) == set(ROOMS)
        packages = {Path(path).parent for path in files(*ROOMS)}
        assert all((ROOT / package / "__init__.py").is_file() for package in packages)

    def test_every_direct_dependency_is_pinned_within_its_range(self) -> None:
        pins = {
            requirement.name.lower().replace("_", "-"): str(requirement.specifier)
            for line in (ROOT / "constraints.txt").read_text().splitlines()
            if line and not line.startswith("#")
            for requirement in [Requirement(line)]
        }
        about = project()["project"]
        extras = [line for lines in about["optional-dependencies"].values() for line in lines]
        build = project()["build-system"]["requires"]
        ranges = {r.name.lower().replace("_", "-"): r for r in map(Requirement, about["dependencies"] + extras + build)}
        assert set(pins) == set(ranges)
        for name, requirement in ranges.items():
            assert pins[name].startswith("==")
            assert requirement.specifier.contains(pins[name].removeprefix("==")), name


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())
