#!/usr/bin/env bash
# Runs the paper's training as a Slurm job. First set up .venv on a host of the same kind:
#     EXTRAS=gpu ./run_mpi.sh python --version
# Then submit the job from the folder that has run_mpi.sh:
#     IMAGENET_ROOT=/path/to/imagenet sbatch hostfiles/slurm.sh
# IMAGENET_ROOT has the folders train and val. Every host must be able to read it.
#SBATCH --job-name=resnet50-32k
#SBATCH --nodes=128
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=2
#SBATCH --exclusive
#SBATCH --time=01:00:00
#SBATCH --output=%x-%j.out
set -euo pipefail
: "${IMAGENET_ROOT:?is the folder with train and val; it must be readable on every host}"

hostfile=$(mktemp "$PWD/hosts-$SLURM_JOB_ID-XXXX")
trap 'rm -f "$hostfile"' EXIT
scontrol show hostnames "$SLURM_JOB_NODELIST" | sed 's/$/ slots=8/' >"$hostfile"

./run_mpi.sh train -n 1024 --hostfile "$hostfile" --map-by ppr:4:package --bind-to package -- \
    --out "results/paper-$SLURM_JOB_ID"
