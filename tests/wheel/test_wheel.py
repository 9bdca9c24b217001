"""The wheel does all of it without a checkout, in an environment with nothing else."""

import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PRESETS = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def place(install):
    return install()


def test_the_distributions_hold_presets_and_the_job_script_as_files_and_no_tests(distributions):
    (wheel,), (source,) = (distributions.glob(each) for each in ("*.whl", "*.tar.gz"))
    in_wheel = zipfile.ZipFile(wheel).namelist()
    with tarfile.open(source) as archive:
        assert not [member.name for member in archive if member.issym() or member.islnk()]
        in_source = [name.partition("/")[2] for name in archive.getnames()]
    for names in (in_wheel, in_source):
        held = [Path(name).name for name in names if name.startswith("t5vae/config/presets/")]
        assert sorted(filter(None, held)) == PRESETS
        assert "launcher/scripts/train.sh" in names
        assert not [name for name in names if name.startswith(("tests", "benchmarks"))]


def test_it_says_what_it_is_and_what_the_machine_is(place):
    said = place("t5vae", "--version").splitlines()
    assert [line.split()[0] for line in said[:3]] == ["t5vae", "python", "torch"]
    assert place("python", "-P", "-m", "t5vae", "--version").splitlines() == said
    assert place("t5vae", "doctor").endswith("training can start here\n")


def test_a_preset_is_listed_shown_and_copied(place):
    assert [f"{line.split()[0]}.yaml" for line in place("t5vae", "config", "ls").splitlines()] == (
        PRESETS
    )
    shown = place("t5vae", "config", "show", "large", "--json")
    assert '"zero_stage": 3' in shown
    place("t5vae", "config", "copy", "quickstart", "mine.yaml")
    copied = (place.folder / "mine.yaml").read_text()
    assert copied == (ROOT / "configs/quickstart.yaml").read_text()


def test_a_mistake_is_one_line_that_names_the_presets(place):
    done = place.run("t5vae", "train", "configs/quickstart.yaml", "--ranks", 2)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no configuration at configs/quickstart.yaml" in done.stderr
    assert "quickstart, vae" in done.stderr
    assert done.stderr.count("\n") == 1


def test_from_lines_of_text_to_samples_and_a_job(place, travel):
    travel(place)
    folder = place.folder
    script = place("t5vae-launch", "script", "own.yaml", "run.output_dir=runs/a job")
    (folder / "job.sh").write_text(script)
    (folder / "srun").write_text('#!/bin/bash\nwhile [[ $1 == -* ]]; do shift; done\n"$@"\n')
    (folder / "srun").chmod(0o755)
    allocation = {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_CPUS_PER_NODE": "2", "SLURM_JOB_ID": "7"}
    path = f"{folder}:/usr/bin:/bin"
    place("bash", "job.sh", "train.steps=2", PATH=path, **allocation)
    config = yaml.safe_load((folder / "runs/a job/config.yaml").read_text())
    assert config["train"]["steps"] == 2
    assert (folder / "runs/a job/checkpoints/step-00000002").is_dir()
