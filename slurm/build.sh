#!/bin/bash
# Build a dataset in parts, one to each task of an array, and join them:
#
#     job=$(sbatch --parsable --array=1-16 slurm/build.sh SOURCE OUT --tokenizer FOLDER --max-length 64)
#     sbatch --dependency="afterok:$job" slurm/build.sh --join OUT
#
# SOURCE and OUT lie where all nodes see them; what follows OUT goes to `t5vae shards build`, and of
# --join to `t5vae shards join`. The array begins at 1. A task that was halted is queued again, or
# may be submitted again (--array=1-16 makes all that are missing): done parts are left as they are.
#
# sbatch's own options go before the script. T5VAE_ENV names the environment, as for train.sh.
#SBATCH --job-name=t5vae-build
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append

if [[ -z ${SLURM_JOB_ID:-} ]]; then
    echo "$0 runs inside a job: sbatch --array=1-N $0 SOURCE OUT [OPTIONS]" >&2
    exit 2
fi

environment=${T5VAE_ENV:-$PWD/.venv}
environment=${environment/#\~\//$HOME/}
[[ -f $environment/bin/activate ]] && environment=$environment/bin/activate
if [[ -f $environment ]]; then
    # shellcheck source=/dev/null
    source "$environment" || exit
elif [[ -x $environment/bin/python ]]; then # conda's have nothing to source
    PATH=$environment/bin:$PATH
else
    echo "no environment at $environment: run make setup, or set T5VAE_ENV" >&2
    exit 2
fi
set -euo pipefail

if [[ ${1:-} == --join ]]; then
    shift
    exec python -u -P -m t5vae shards join "$@"
fi
if [[ $# -lt 2 || -z ${SLURM_ARRAY_TASK_ID:-} || ${SLURM_ARRAY_TASK_MIN:-1} != 1 && -z ${PARTS:-} ]]; then
    echo "give sbatch --array=1-N, then the script, SOURCE and OUT" >&2
    exit 2
fi
# Of how many parts: PARTS, for an array of some of them alone (PARTS=16 sbatch --array=3,7 ...).
parts=${PARTS:-$SLURM_ARRAY_TASK_MAX}
source=$1
out=$2
shift 2
exec python -u -P -m t5vae shards build "$source" --out "$out" --part "$SLURM_ARRAY_TASK_ID/$parts" "$@"
