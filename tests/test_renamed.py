"""Modules that were moved: old names import, and warn, for one release."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import shards.storage.kinds
import shards.storage.local
import shards.storage.store
from t5vae.common.renamed import RENAMED

ROOT = Path(__file__).parents[1]
IMPORT_ALL = """
import json, warnings
from importlib import import_module
from t5vae.common.renamed import RENAMED

said = {}
for old in RENAMED:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import_module(old)
    said[old] = [str(warning.message) for warning in caught]
print(json.dumps(said))
"""


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=ROOT)


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def test_old_names_are_free_and_new_ones_are_modules():
    assert not [old for old in RENAMED if is_module(old)]
    assert not [new for homes in RENAMED.values() for new in homes.split() if not is_module(new)]


def test_every_old_name_imports_with_a_warning_that_says_the_new_one():
    done = run("-c", IMPORT_ALL)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    for old, homes in RENAMED.items():
        expected = f"{old} is {' and '.join(homes.split())} now: this name goes after t5vae 0.2"
        assert said[old].count(expected) == 1


def test_the_attributes_are_those_of_the_new_modules(monkeypatch):
    monkeypatch.delitem(sys.modules, "shards.store", raising=False)
    with pytest.warns(DeprecationWarning, match=r"shards\.store is ") as warned:
        from shards.store import LocalStore, Manifest, open_store
    assert warned[0].filename == __file__
    assert Manifest is shards.storage.store.Manifest
    assert LocalStore is shards.storage.local.LocalStore
    assert open_store is shards.storage.kinds.open_store
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        from shards.store import nothing  # noqa: F401


@pytest.mark.filterwarnings("ignore:shards.errors is")
@pytest.mark.parametrize("name", ["shards.nothing", "t5vae.training.nothing", "shards.errors.more"])
def test_a_module_that_never_was_is_not_found(name):
    with pytest.raises(ModuleNotFoundError, match=name):
        __import__(name)


def test_nothing_of_ours_imports_an_old_name():
    done = run("-W", "error::DeprecationWarning", "-c", "import t5vae, shards, launcher.cli")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
