"""The import rules of CONTRIBUTING.md: downward only, the launcher and the shards apart."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("launcher", "shards", "t5vae")

FOUNDATION = {"shards", "t5vae.config"}
MODEL = {*FOUNDATION, "t5vae.model"}
LATENT = {*MODEL, "t5vae.objective", "t5vae.latent"}
EVALUATION = {*LATENT, "t5vae.curves", "t5vae.evaluation"}
TRAINING = {*EVALUATION, "t5vae.training"}
TOP = {*TRAINING, "t5vae", "t5vae.curves", "t5vae.explore", "t5vae.cli", "launcher"}
ALLOWED = {
    "shards": {"shards"},
    "t5vae": MODEL,  # registers the model with transformers
    "t5vae.config": FOUNDATION,
    "t5vae.curves": {"shards", "t5vae.curves"},
    "t5vae.model": MODEL,
    "t5vae.objective": {*FOUNDATION, "t5vae.objective"},
    "t5vae.latent": LATENT,
    "t5vae.evaluation": EVALUATION,
    "t5vae.training": TRAINING,
    "t5vae.explore": {*TRAINING, "t5vae.explore"},
    "t5vae.cli": TOP,
    "launcher": {*FOUNDATION, "launcher"},
}
# (file, function, imported): what a job runs on the compute node may start training there.
EXCEPTIONS = {
    ("launcher/task.py", "Training.__call__", "t5vae.training.exit_code_of"),
    ("launcher/task.py", "Training._train", "t5vae.training.UnhealthyError"),
    ("launcher/task.py", "Training._train", "t5vae.training.train"),
}


def modules() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def unit(name: str) -> str:
    """The part of the house that a dotted name lies in."""
    package, _, rest = name.partition(".")
    part = f"{package}.{rest.partition('.')[0]}"
    return part if part in ALLOWED else package


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
    assert unit("t5vae.model.noise.row_keys") == "t5vae.model"
    assert unit("t5vae.T5VAE") == "t5vae"
    assert unit("t5vae.common.errors.UserError") == "shards"


def test_every_module_lies_in_a_part_that_has_rules():
    assert modules()
    for path in modules():
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        known = unit(name) == name or (unit(name) in ALLOWED and unit(name) != "t5vae")
        assert known, f"{name} is in no part that the import rules name"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downward_only(path):
    file = path.relative_to(ROOT)
    package = ".".join(file.parent.parts)
    home = unit(".".join(file.with_suffix("").parts).removesuffix(".__init__"))
    forbidden = [
        f"{name} (in {function or 'the module'})"
        for function, name in imports(path.read_text(), package)
        if name.partition(".")[0] in PACKAGES
        and unit(name) not in ALLOWED[home]
        and (str(file), function, name) not in EXCEPTIONS
    ]
    assert not forbidden, f"{home} must not import {', '.join(forbidden)}"


def test_the_exceptions_are_still_there():
    for file, function, name in EXCEPTIONS:
        package = ".".join(Path(file).parent.parts)
        found = list(imports((ROOT / file).read_text(), package))
        assert (function, name) in found


@pytest.mark.parametrize("path", sorted((ROOT / "launcher").rglob("*.py")), ids=lambda p: p.name)
def test_the_launcher_touches_no_accelerator_and_no_process_group(path):
    heavy = {"torch", "deepspeed", "transformers"}
    found = imports(path.read_text(), "launcher")
    assert not [name for _, name in found if name.partition(".")[0] in heavy]


@pytest.mark.parametrize(
    "module",
    [
        *("launcher.cli", "t5vae.config", "shards", "shards.cli"),
        *("t5vae.metrics.listing", "t5vae.metrics.picture", "t5vae.metrics.terminal"),
    ],
)
def test_importing_on_a_login_node_does_not_load_torch(module):
    heavy = ("torch", "deepspeed", "transformers")
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
