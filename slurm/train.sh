#!/bin/bash
# Train on a SLURM cluster. From the root of a checkout:
#
#     sbatch slurm/train.sh [CONFIG] [key=value ...]
#
# sbatch's own options go before the script and win over the lines below:
#
#     sbatch --nodes=4 --gpus-per-node=8 --cpus-per-task=64 --time=24:00:00 --partition=gpu \
#         slurm/train.sh configs/large.yaml
#
# One rank runs on every GPU of the allocation; without GPUs, one on every node. The log is
# slurm-JOB.out in the folder you submit from. T5VAE_ENV names the environment: its folder, or a
# script to source; without it, the .venv of the folder you submit from. Without a checkout,
# `t5vae-launch script CONFIG` prints this file, with the configuration's own options.
#
# USR2 reaches the ranks 120 seconds before the time limit: they save, and the job is queued again.
#SBATCH --job-name=t5vae
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=01:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR2@120

if [[ -z ${SLURM_JOB_ID:-} ]]; then
    echo "$0 runs inside a job: sbatch $0 [CONFIG] [key=value ...]" >&2
    exit 2
fi

options=(--kill-on-bad-exit=1)
command=(python -u -P -m t5vae train)
warning=120

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

# What SLURM itself says of this job, of an array's tasks this one alone: a variable may be left over
# from the job that this one was submitted in.
record=$(scontrol -d show job "$SLURM_JOB_ID" 2>/dev/null |
    awk -v RS= -v job="JobId=$SLURM_JOB_ID" '$1 == job') || record=

if [[ $record =~ \ TimeLimit=(([0-9]+)-)?([0-9]+):([0-9]+):([0-9]+) ]]; then
    part=("${BASH_REMATCH[@]}")
    limit=$(((10#${part[2]:-0} * 24 + 10#${part[3]}) * 3600 + 10#${part[4]} * 60 + 10#${part[5]}))
    if ((limit <= warning)); then
        echo "the time limit of $limit s is no longer than its warning, which comes $warning s before" \
            "it: give sbatch a longer --time" >&2
        exit 2
    fi
fi

# The GPUs of the node with the fewest: of GRES=gpu:a:2(IDX:0,3),gpu:b:1(IDX:1) three.
gpus=$(awk 'sub(/^ *Nodes=.* GRES=/, "") {
    gsub(/\([^)]*\)/, "")
    count = 0
    for (i = split($0, kinds, ","); i > 0; i--)
        if (kinds[i] ~ /^gpu:/) { sub(/.*:/, "", kinds[i]); count += kinds[i] }
    print count
}' <<<"$record" | sort -n | head -n 1)
gpus=${gpus:-${SLURM_GPUS_ON_NODE:-0}}
ranks=$((gpus > 0 ? gpus : ${SLURM_NTASKS_PER_NODE:-1}))
# The node with the fewest CPUs decides; SLURM writes 16(x3),8 for four nodes.
cpus=$(tr ',' '\n' <<<"$SLURM_JOB_CPUS_PER_NODE" | sed 's/(.*//' | sort -n | head -n 1)
if ((cpus >= ranks)); then
    # srun does not take sbatch's --cpus-per-task over, and it may have meant one task for all GPUs.
    options+=(--cpus-per-task="$((cpus / ranks))")
else
    options+=(--overcommit)
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus >= ranks ? cpus / ranks : 1))}

# What srun would take for its options, left over from another job or twice over (it refuses memory
# a CPU beside memory a node): the step takes what the job has. And what would pass for the ranks of
# a launcher. The launcher's own scripts take these lines over.
unset "${!SLURM_MEM_PER_@}" "${!SLURM_CPUS_PER_@}" "${!SLURM_GPUS@}" "${!SLURM_TRES_PER_@}"
unset "${!SLURM_CPU_BIND@}" "${!SLURM_MEM_BIND@}" SLURM_DISTRIBUTION SLURM_DIST_PLANESIZE
unset SLURM_NTASKS_PER_CORE SLURM_NTASKS_PER_GPU SLURM_NTASKS_PER_SOCKET SLURM_NTASKS_PER_TRES
unset SLURM_EXPORT_ENV # sbatch --export=NONE keeps the login's variables out, not this script's
unset RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT
if [[ -n $record && $record != *" ArrayJobId="* ]]; then
    unset "${!SLURM_ARRAY_@}"
fi

trap : TERM USR2 # for srun and its tasks, which save and end
code=0
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$((SLURM_JOB_NUM_NODES * ranks))" \
    --ntasks-per-node="$ranks" "${options[@]}" "${command[@]}" "$@" || code=$?

# A container lacks SLURM's commands: training then asks by this code to be queued again.
if ((code == 75)); then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
