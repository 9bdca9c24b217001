"""The ranges of pyproject.toml: the oldest and the newest that they allow, and other Pythons.

One package is changed at a time, beside the pinned torch, in an environment of its own; there the
wheel goes all its way, and the tests run that lean on the package.
"""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAST = "not soak and not cluster and not distributed and not slow"
LEAN_ON = {
    "transformers": ["model", "checkpoint", "latent", "evaluation"],
    "deepspeed": ["training", "cluster"],
    "webdataset": ["shards"],
    "submitit": ["launcher"],
    "pydantic": ["config", "test_config.py", "test_reference.py", "kinds", "launcher", "planning"],
}
TIED = {"transformers": "|tokenizers|huggingface_hub", "pydantic": "|pydantic_core"}

pytestmark = [pytest.mark.soak, pytest.mark.timeout(5400)]


def oldest(package: str) -> str:
    """The lower bound that pyproject.toml declares."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (bound,) = (found[1] for each in declared if (found := re.match(rf"{package}>=([\d.]+)", each)))
    return bound


def pinned(package: str) -> str:
    """The release of constraints.txt, which all other tests prove."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith(f"{package}=="))


def check(place, rooms: list[str]) -> None:
    """The fast tests of some rooms, in an environment."""
    tests = [ROOT / "tests" / room for room in rooms]
    how = ("-q", "-n", "auto", "-p", "no:cacheprovider", f"--rootdir={ROOT}", "-m", FAST, *tests)
    place.folder = ROOT
    place("python", "-m", "pytest", *how)


@pytest.mark.parametrize("age", ["oldest", "newest"])
@pytest.mark.parametrize("package", LEAN_ON)
def test_a_declared_version_does(package, age, install, travel):
    if age == "oldest" and oldest(package) == pinned(package):
        pytest.skip("the oldest is the pinned one")
    wanted = f"{package}=={oldest(package)}" if age == "oldest" else package
    place = install(wanted, free=package + TIED.get(package, ""), extras="[dev]")
    if f"{package}=={pinned(package)}" in place("pip", "list", "--format", "freeze").splitlines():
        pytest.skip("the newest is the pinned one")
    travel(place)
    check(place, LEAN_ON[package])


@pytest.mark.parametrize("python", ["python3.12", "python3.13"])
def test_another_python_does(python, install, travel):
    there = shutil.which(python)
    if not there or subprocess.run([there, "-c", ""], capture_output=True).returncode:
        pytest.skip(f"this machine has no {python}")
    place = install(python=there, extras="[dev]")
    travel(place)
    check(place, [""])
