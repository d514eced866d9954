#!/usr/bin/env bash
# Trains as a Slurm job, on the nodes, with the ranks and for the time that sbatch asks for. A rank is a GPU.
# First set up the environment on a node of the same kind:
#     EXTRAS=gpu ./run_mpi.sh python --version
# Then submit from the folder that has run_mpi.sh. The paper's run, and a run on one node with four GPUs:
#     sbatch --nodes=128 --ntasks-per-node=8 --gpus-per-node=8 --time=60 hostfiles/slurm.sh --train-root TRAIN --val-root VAL
#     sbatch --nodes=1 --ntasks-per-node=4 --gpus-per-node=4 --time=24:00:00 hostfiles/slurm.sh --train-root TRAIN --val-root VAL
# What follows "slurm.sh" are the options of train.py, or a program and its options. The options of sbatch, given on
# its command line, replace those below.
#SBATCH --job-name=resnet50
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
# A rank, and the two processes that decode its images:
#SBATCH --cpus-per-task=3
# Some minutes before the limit, the ranks write a checkpoint. Then the job is queued again, and goes on:
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
set -o pipefail

fail() {
    echo "error: $*" >&2
    exit 1
}

# ---------------------------------------------------------------- what the allocation is

python=${VENV:-.venv}/bin/python
[[ -n $SLURM_JOB_ID ]] || fail 'this is a Slurm job: sbatch --nodes=N --ntasks-per-node=GPUS --gpus-per-node=GPUS hostfiles/slurm.sh'
[[ -x run_mpi.sh ]] || fail "there is no run_mpi.sh in $PWD: submit from its folder, or with sbatch --chdir=FOLDER"
[[ -x $python ]] || fail "there is no environment ${VENV:-.venv}: set it up first, with ./run_mpi.sh python --version"

ranks=${SLURM_TASKS_PER_NODE%%[(,]*} # as in 8(x128)
gpus=${SLURM_GPUS_ON_NODE:-0}
if ((gpus && gpus != ranks)); then
    fail "a rank is a GPU, but a node has $gpus GPUs and $ranks ranks: give sbatch --ntasks-per-node=$gpus --gpus-per-node=$gpus"
fi

out='' previous=''
for word; do
    if [[ $previous == --out ]]; then out=$word; fi
    if [[ $word == --out=* ]]; then out=${word#*=}; fi
    previous=$word
done
output=()
if [[ -z $out ]]; then out=results/$SLURM_JOB_NAME-$SLURM_JOB_ID output=(--out "$out"); fi
newest() { find "$out/checkpoints" -name 'checkpoint-*.npz' 2>/dev/null | sort | tail -n 1; }

# ---------------------------------------------------------------- the training

# SIGUSR1 makes the ranks write a checkpoint and end. Slurm sends SIGTERM to every process of a job that is cancelled or
# preempted. mpiexec must not get it, nor its daemons on the other hosts, which are found like this only for our own MPI.
blocked=("$(readlink -f "$python")" "$PWD/hostfiles/block_sigterm.py")
if [[ -z $MPIEXEC && ${blocked[*]} != *' '*' '* ]]; then export PRTE_MCA_prte_launch_agent="${blocked[*]} prted"; fi
read -ra options <<<"${MPI_OPTIONS-$([[ $LAUNCHER == srun ]] || echo --bind-to none)}"
before=$(newest) reason=''
"${blocked[@]}" ./run_mpi.sh train "${options[@]}" -- "$@" "${output[@]}" --resume auto &
job=$!
trap 'reason=${reason:-limit}; kill -USR1 $job' USR1
trap 'reason=cancelled; kill -USR1 $job' TERM

wait "$job"
while kill -0 "$job" 2>/dev/null; do wait "$job"; done # a signal ends "wait", too
wait "$job"
status=$?

if ((status == 0)) || [[ $reason != limit ]]; then exit $status; fi
[[ $(newest) != "$before" ]] || fail 'no iteration ended before the time limit: give sbatch more --time, or less in --signal=B:USR1@SECONDS'
scontrol requeue "$SLURM_JOB_ID" || fail "the job cannot be queued again. To go on: sbatch, with the same options and --out $out"
exit $status
