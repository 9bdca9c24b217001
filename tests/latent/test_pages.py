"""The pages of docs/use/ run as written, on a tiny random model in place of the quickstart's."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from t5vae.latent.priors.flow import Flow

PAGES = sorted((Path(__file__).parents[2] / "docs" / "use").glob("*.md"))
DOWNLOADS = "molecules.md"


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if p.name != DOWNLOADS], ids=lambda p: p.stem)
def test_a_page_runs_as_written(page, used_run, tmp_path, monkeypatch):
    shutil.copytree(used_run, tmp_path / "runs" / "quickstart")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Flow, "STEPS", 20)
    bin = Path(sys.executable).parent
    blocks = re.findall(r"^```(bash|python)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    assert {language for language, _ in blocks} == {"bash", "python"}
    for language, block in blocks:
        # Nothing that a random model says is Python.
        block = block.replace("--check python", "--check regex:.*")
        if language == "python":
            exec(compile(block, str(page), "exec"), {})
            continue
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            env={**os.environ, "PATH": f"{bin}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
