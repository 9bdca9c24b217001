"""The import rules of CONTRIBUTING.md: downward only, no circles, and where torch is not loaded."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("launcher", "shards", "t5vae")

# From the ground up: a room imports itself and what lies on floors below, not its neighbours.
FLOORS = (
    ("t5vae.common",),
    ("shards.storage",),
    ("shards.format",),
    ("shards.read",),
    ("shards.write",),
    ("shards",),
    ("t5vae.objective",),
    ("t5vae.config", "t5vae.cluster"),
    ("t5vae.model", "t5vae.metrics"),
    ("t5vae",),  # registers the model with transformers
    ("t5vae.latent",),
    ("t5vae.evaluation",),
    ("t5vae.checkpoint",),
    ("t5vae.training",),
    ("t5vae.planning", "t5vae.explore"),
    ("launcher",),
    ("t5vae.cli",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# What submits jobs reads configurations and shards' indexes alone; on a login node that is quick.
LAUNCHER = {"launcher", "t5vae.common", "t5vae.config", "t5vae.cluster", "shards"}
# (file, function, imported): what a job runs on the compute node may start training there; and
# `python -m t5vae` is the command.
EXCEPTIONS = {
    ("t5vae/__main__.py", "", "t5vae.cli.main"),
    ("launcher/task.py", "Training.__call__", "t5vae.training.exit_code_of"),
    ("launcher/task.py", "Training._train", "t5vae.training.UnhealthyError"),
    ("launcher/task.py", "Training._train", "t5vae.training.train"),
}


def modules() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def dotted(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def room(name: str) -> str:
    """The room that a dotted name lies in."""
    package, _, rest = name.partition(".")
    part = f"{package}.{rest.partition('.')[0]}"
    return part if part in FLOOR else package


def may_import(home: str, other: str) -> bool:
    if home == "launcher":
        return other in LAUNCHER
    return other == home or FLOOR[other] < FLOOR[home]


def imports(source: str, package: str) -> Iterator[tuple[str, str]]:
    """Each (enclosing function, dotted name) that a module imports, inside functions too."""

    def visit(node: ast.AST, scope: tuple[str, ...]) -> Iterator[tuple[str, str]]:
        inside = ".".join(scope)
        if isinstance(node, ast.Import):
            yield from ((inside, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, *base.split(".")]).rstrip(".")
            yield from ((inside, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "__import__"):
                yield inside, str(node.args[0].value)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            scope = (*scope, node.name)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, scope)

    yield from visit(ast.parse(source), ())


@cache
def imported(path: Path) -> list[tuple[str, str]]:
    """What a file of ours imports of ours."""
    found = imports(path.read_text(), ".".join(path.relative_to(ROOT).parent.parts))
    return [(inside, name) for inside, name in found if name.partition(".")[0] in PACKAGES]


def test_every_form_of_import_is_seen():
    source = """
import a.b, c as d
from . import near
from ..up import two
from t5vae import model
class C:
    def f(self):
        from e import g
        import_module("h.i")
if TYPE_CHECKING:
    import j
"""
    assert list(imports(source, "t5vae.latent")) == [
        ("", "a.b"),
        ("", "c"),
        ("", "t5vae.latent.near"),
        ("", "t5vae.up.two"),
        ("", "t5vae.model"),
        ("C.f", "e.g"),
        ("C.f", "h.i"),
        ("", "j"),
    ]
    assert room("t5vae.model.noise.row_keys") == "t5vae.model"
    assert room("t5vae.T5VAE") == "t5vae"
    assert room("shards.read.order") == "shards.read"
    assert room("shards.cli") == "shards"


def test_every_folder_of_modules_is_a_room_on_a_floor():
    folders = {".".join(dotted(path.parent / "__init__.py").split(".")[:2]) for path in modules()}
    assert folders - {"t5vae.explore"} == set(FLOOR) - {"t5vae.explore"}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downward_only(path):
    file, home = str(path.relative_to(ROOT)), room(dotted(path))
    forbidden = [
        f"{name} (in {function or 'the module'})"
        for function, name in imported(path)
        if not may_import(home, room(name)) and (file, function, name) not in EXCEPTIONS
    ]
    assert not forbidden, f"{home} must not import {', '.join(forbidden)}"


def test_no_files_import_each_other_in_a_circle():
    files = {dotted(path): path for path in modules()}

    def file_of(name: str) -> str:
        return name if name in files else file_of(name.rpartition(".")[0])

    graph = {
        name: {file_of(other) for _, other in imported(path)} - {name}
        for name, path in files.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' <- '.join(error.args[1])}")


def test_the_exceptions_are_still_there():
    for file, function, name in EXCEPTIONS:
        assert (function, name) in imported(ROOT / file)


@pytest.mark.parametrize("path", sorted((ROOT / "launcher").rglob("*.py")), ids=lambda p: p.name)
def test_the_launcher_touches_no_accelerator_and_no_process_group(path):
    heavy = {"torch", "deepspeed", "transformers"}
    found = imports(path.read_text(), "launcher")
    assert not [name for _, name in found if name.partition(".")[0] in heavy]


@pytest.mark.parametrize(
    "module",
    [
        *("launcher.cli", "t5vae.common.errors", "t5vae.config", "shards", "shards.cli"),
        *("t5vae.metrics.listing", "t5vae.metrics.picture", "t5vae.metrics.terminal"),
        *("t5vae.cluster.scheduler", "t5vae.objective.terms.mmd"),
    ],
)
def test_importing_on_a_login_node_does_not_load_torch(module):
    heavy = ("torch", "deepspeed", "transformers")
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
