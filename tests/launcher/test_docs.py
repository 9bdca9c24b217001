"""docs/cluster.md names every setting of the launcher and every command."""

from pathlib import Path

import pytest

from launcher.cli import app
from t5vae.config import Launcher

TEXT = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text()


@pytest.mark.parametrize("key", Launcher.model_fields)
def test_every_setting_is_explained(key):
    assert f"`{key}`" in TEXT


@pytest.mark.parametrize(
    "command", [command.callback.__name__ for command in app.registered_commands]
)
def test_every_command_is_explained(command):
    assert f"`{command} " in TEXT
