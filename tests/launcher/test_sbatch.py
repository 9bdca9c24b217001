"""`t5vae-launch script`: slurm/train.sh with a configuration's options. Run in tests/wheel."""

import os
import subprocess
import sys

from launcher.sbatch import FILLED_IN, TEMPLATE


def test_the_script_is_train_sh_with_the_options_of_the_configuration(config_file, launch):
    code, script, _ = launch(
        *("script", config_file, "run.name=two words", "launcher.nodes=2"),
        *("launcher.gpus_per_node=4", "launcher.time=1-12", "launcher.partition=my gpus"),
        *("launcher.slurm={reservation: friday, exclusive: true}", "launcher.signal_delay=300"),
        *("launcher.setup=[module load cuda]", "launcher.srun_args=[--container-image=a b.sqsh]"),
        "launcher.python=apptainer exec --nv t5vae.sif python",
    )
    assert code == 0
    lines = script.splitlines()
    for line in (
        "#!/bin/bash",
        "#SBATCH --job-name='two words'",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=4",
        "#SBATCH --gpus-per-node=4",
        "#SBATCH --time=2160",
        "#SBATCH --partition='my gpus'",
        "#SBATCH --reservation=friday",
        "#SBATCH --exclusive",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "#SBATCH --signal=USR2@300",
        f"T5VAE_ENV=${{T5VAE_ENV:-{sys.prefix}}}",
        "module load cuda",
        "options=(--kill-on-bad-exit=1 '--container-image=a b.sqsh')",
    ):
        assert line in lines
    (command,) = (line for line in lines if line.startswith("command="))
    python = "apptainer exec --nv t5vae.sif python -u -P -m t5vae train"
    assert command.startswith(f"command=({python} {config_file} 'run.name=two words' launcher")
    assert "warning=300" in lines
    body = TEMPLATE.read_text().partition(FILLED_IN)[2]
    assert script.endswith(body)
    assert max(i for i, line in enumerate(lines) if "#SBATCH" in line) < lines.index("")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_a_preset_needs_no_shards_yet_and_what_is_wrong_is_refused(launch, config_file):
    assert "train quickstart)" in launch("script", "quickstart")[1]
    code, out, err = launch("script", "quickstart", "launcher.node=3")
    assert (code, out) == (2, "")
    assert "launcher.nodes?" in err


def test_nothing_that_is_typed_is_run(launch, config_file, tmp_path):
    """Under a srun that tells its arguments, in an environment that has nothing to source."""
    typed = "eval.check=regex:a\ntouch ran; $(touch ran) `touch ran`"
    script = launch("script", config_file, typed)[1]
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch(0o755)
    (tmp_path / "bin" / "srun").write_text('#!/bin/bash\nprintf "%s\\0" "$@"\n')
    (tmp_path / "bin" / "srun").chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_CPUS_PER_NODE": "2"}
    done = subprocess.run(
        ["bash"],
        input=script,
        env={"PATH": os.environ["PATH"], "T5VAE_ENV": str(tmp_path), **job},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\0")[-3:] == [str(config_file), typed, ""]
    assert not (tmp_path / "ran").exists()
