"""A run with a tiny random model."""

import json
import shutil

import pytest

from t5vae.latent import LatentSpace
from tests.latent import tiny


@pytest.fixture(scope="session")
def made_run(tmp_path_factory):
    """Not to be changed."""
    return tiny.run_folder(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="session")
def used_run(made_run, tmp_path_factory):
    """One that keeps its training codes and the property "length". Not to be changed."""
    run = shutil.copytree(made_run, tmp_path_factory.mktemp("used") / "run")
    LatentSpace.load(run, device="cpu").get_property("length")
    return run


@pytest.fixture
def ok(t5vae):
    """Runs `t5vae ...` that must succeed; returns standard output and error."""

    def run(*arguments, **how) -> tuple[str, str]:
        code, out, err = t5vae(*arguments, "--device", "cpu", **how)
        assert code == 0, out + err
        return out, err

    return run


@pytest.fixture
def document(ok):
    """Runs `t5vae ... --json`; returns the document."""

    def run(*arguments, **how):
        return json.loads(ok(*arguments, "--json", **how)[0])

    return run
