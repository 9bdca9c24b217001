"""A run with a tiny random model."""

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
