#!/usr/bin/env bash
# No "set -u": the bash of older clusters (before 4.4) takes an empty array for an unset one.
set -eo pipefail

usage() {
    cat <<'END'
run_mpi.sh makes the Python environment (.venv) the first time, then starts a job in it:

  ./run_mpi.sh smoke [options]         train on two processes, with images that come along
  ./run_mpi.sh -n 4 smoke [options]    the same on four
  ./run_mpi.sh preflight [mpiexec options] [-- train.py options]
                                       check every host for that run, without training
  ./run_mpi.sh test [pytest options]   run the tests
  ./run_mpi.sh lint                    check style and types
  ./run_mpi.sh python [arguments]      the environment's Python, one process

  ./run_mpi.sh [mpiexec options] -- [options of reproduce/train.py]
  ./run_mpi.sh [mpiexec options] -- FILE.py [its options]        or: -- -m MODULE [its options]

The paper's run, on the 1,024 GPUs that hostfiles/mn1 names (see hostfiles/README.md):

  ./run_mpi.sh -n 1024 --hostfile hostfiles/mn1 -- --preset paper --train-root TRAIN --val-root VAL

Without -n and hosts it is one process. The mpiexec command is printed before it runs, and its exit status
is returned. "./run_mpi.sh -- --help" lists the options of train.py.

Environment variables:
  EXTRAS=gpu           install CuPy, cuDNN and NCCL too (2 GB); said once, .venv remembers it
  MPIEXEC=/path/mpiexec   a cluster's own MPI, instead of the Open MPI that pip installs
  PYTHON=/path/python  the Python to use, 3.9 to 3.13
  VENV=/path           the environment, instead of .venv
  OMP_NUM_THREADS, OPENBLAS_NUM_THREADS, MKL_NUM_THREADS   threads of one rank; 1 unless set
END
}

fail() {
    echo "error: $*" >&2
    exit 1
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
venv=${VENV:-$here/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv
stamp=$venv/installed # what .venv was made of; and EXTRAS, to be remembered
log=$venv.log

# ---------------------------------------------------------------- the environment

# Prints the hash of all that .venv depends on, and the real path of the Python that was asked. The folder is part of
# it: a copy of the project with its .venv would otherwise run the original's code.
fingerprint() {
    "$1" -ISc '
import glob, hashlib, os, sys
if not (3, 9) <= sys.version_info[:2] <= (3, 13):
    sys.exit(1)
here, *others = sys.argv[1:]
sources = [here + "/constraints.txt", here + "/setup.py", *sorted(glob.glob(here + "/extensions/*.[ch]"))]
parts = [open(path).read() for path in sources] + [here, *others, sys.version, sys.base_prefix]
print(hashlib.sha256(repr(parts).encode()).hexdigest(), os.path.realpath(sys.executable))
' "$here" "$EXTRAS" "$MPIEXEC $mpi_version" 2>/dev/null
}

# Is .venv complete and up to date? Sets `wanted` and `base`, the Python to make it with. Candidates are run, not only
# looked up: pyenv leaves commands on PATH that fail, and the Python below .venv may be gone.
is_installed() {
    local candidate without_venv=''
    local candidates=("$venv/bin/python" python3 python3.13 python3.12 python3.11 python3.10 python3.9)
    if [[ -n $PYTHON ]]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        read -r wanted base < <(fingerprint "$candidate") || continue
        if [[ -x $venv/bin/python && -r $stamp && $(head -n 1 "$stamp") == "$wanted" ]]; then return 0; fi
        if "$base" -c 'import ensurepip, venv' 2>/dev/null; then return 1; fi
        without_venv=$base
    done
    if [[ -n $without_venv ]]; then
        fail "$without_venv has no venv module: install it (Debian, Ubuntu: apt install python3-venv) or set PYTHON= to another Python"
    elif [[ -n $PYTHON ]]; then
        fail "PYTHON=$PYTHON is not a Python 3.9 to 3.13"
    fi
    fail 'no Python 3.9 to 3.13 found: install one (Debian, Ubuntu: apt install python3-venv) or set PYTHON=/path/to/python'
}

pip_install() {
    PIP_USER=0 "$venv/bin/python" -m pip --disable-pip-version-check --no-input install -c constraints.txt "$@" >>"$log" 2>&1
}

install() {
    # "venv --clear" empties the folder: only one that is ours.
    if [[ -n $(ls -A "$venv" 2>/dev/null) && ! -e $venv/pyvenv.cfg && ! -e $log ]]; then
        fail "$venv is not a virtual environment: set VENV= to a folder that may be overwritten"
    fi
    local extras='test,mpi' mpicc
    if [[ -n $MPIEXEC ]]; then
        extras='test' mpicc=$(dirname "$mpiexec")/mpicc
        [[ -x $mpicc ]] || fail "no mpicc beside $mpiexec: install that MPI's development package (Debian, Ubuntu: libopenmpi-dev)"
    fi
    echo "Setting up $venv (first time, or something changed; about a minute) ..." >&2
    : >"$log"
    # Always from scratch: pip cannot mend a package that a killed pip left half-written.
    if [[ -e $stamp ]]; then printf 'incomplete\n%s\n' "$EXTRAS" >"$stamp"; fi
    "$base" -m venv --clear "$venv" >>"$log" 2>&1 || fail "$base cannot make $venv; see $log"
    printf 'incomplete\n%s\n' "$EXTRAS" >"$stamp"
    # Chainer's setup.py imports pkg_resources, which the isolated builds of pip lack: hence setuptools first, and no
    # isolation. An mpi4py from pip's cache may be of another MPI.
    if ! (cd "$here" && pip_install setuptools wheel &&
        { [[ -z $MPIEXEC ]] || MPICC=$mpicc pip_install --no-cache-dir --no-binary mpi4py mpi4py; } &&
        pip_install --no-build-isolation -e ".[$extras${EXTRAS:+,$EXTRAS}]"); then
        fail "pip could not install the packages; it needs pypi.org, or a mirror in PIP_INDEX_URL. Its messages: $log"
    fi
    printf '%s\n%s\n' "$wanted" "$EXTRAS" >"$stamp"
}

ensure_installed() {
    if [[ -z ${EXTRAS+set} && -r $stamp ]]; then EXTRAS=$(sed -n 2p "$stamp"); fi
    if is_installed; then return; fi
    { mkdir -p "$(dirname "$venv")" && touch "$venv.lock"; } 2>/dev/null || fail "cannot write $venv: set VENV= to another folder"
    # A second start waits here, then finds the work done. So does one after a kill, as long as pip goes on alone.
    exec 9>"$venv.lock"
    if command -v flock >/dev/null; then flock 9; fi
    if ! is_installed; then install; fi
    exec 9>&-
}

# ---------------------------------------------------------------- the job

# Sets mpiexec and open_mpi, which stays empty for another MPI.
find_mpi() {
    mpiexec=$venv/bin/mpiexec open_mpi=1
    if [[ -z $MPIEXEC ]]; then return; fi
    mpiexec=$(type -P "$MPIEXEC") || fail "MPIEXEC=$MPIEXEC is not a command"
    [[ $mpiexec == /* ]] || mpiexec=$PWD/$mpiexec
    export MPIEXEC=$mpiexec
    mpi_version=$("$mpiexec" --version 2>&1) || fail "'$mpiexec --version' fails: set MPIEXEC= to an mpiexec that works"
    # Open MPI up to release 4 calls itself OpenRTE there.
    if [[ ! $mpi_version =~ Open\ ?MPI|OpenRTE ]]; then open_mpi=''; fi
}

set_environment() {
    local name folder
    settings=()
    # Ranks on one host would fight for its cores with one BLAS thread per core each.
    for name in OMP_NUM_THREADS OPENBLAS_NUM_THREADS MKL_NUM_THREADS; do
        if [[ -z ${!name} ]]; then settings+=("$name=1"); fi
    done
    # CUDA's libraries, where they came as wheels: nobody else looks there.
    local libraries=$LD_LIBRARY_PATH
    for folder in "$venv"/lib/python3.*/site-packages/nvidia/*/lib; do
        if [[ -d $folder ]]; then libraries=$folder${libraries:+:$libraries}; fi
    done
    if [[ $libraries != "$LD_LIBRARY_PATH" ]]; then settings+=("LD_LIBRARY_PATH=$libraries"); fi
    if ((${#settings[@]})); then export "${settings[@]}"; fi
    export PATH="$venv/bin:$PATH"
    # Open MPI ends a job whose host is cut off with status 0; later than train.py's --watchdog, which does better.
    if [[ -n $open_mpi && -z $PRTE_MCA_oob_tcp_keepalive_probes ]]; then export PRTE_MCA_oob_tcp_keepalive_probes=30; fi
    # The tests start mpiexec themselves.
    if [[ $(id -u) == 0 ]]; then export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1; fi
}

# Cores, as Open MPI counts them: not hardware threads, and only those that this process may use.
count_cores() {
    local cores threads
    threads=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    cores=$(lscpu -p=core,socket 2>/dev/null | grep -v '^#' | sort -u | grep -c . || true)
    echo $((cores > 0 && cores < threads ? cores : threads))
}

# start_job [mpiexec options] -- [train.py options]
start_job() {
    local name n='' hosts=${SLURM_JOB_ID:-$PBS_JOBID} places='' binding='' options=() program=()
    while (($#)) && [[ $1 != -- ]]; do
        case ${1%%=*} in
            -n | -np | --n | --np | -c) if [[ $1 == *=* ]]; then n=${1#*=}; else n=$2; fi ;;
            --hostfile | -hostfile | --machinefile | -machinefile | --host | -host | -H | -f | -hosts) hosts=given ;;
            --map-by | -map-by | --oversubscribe | -oversubscribe) places=given ;;
            --bind-to | -bind-to) binding=given ;;
        esac
        options+=("$1")
        shift
    done
    (($#)) || fail "what shall run? The options of train.py come after '--'; ./run_mpi.sh --help shows examples"
    shift
    if [[ $1 != -m && $1 != *.py ]]; then program=("$here/reproduce/train.py"); fi

    if [[ -z $hosts && -z $n ]]; then options=(-n 1 "${options[@]}"); fi
    if [[ -n $open_mpi ]]; then
        if [[ $(id -u) == 0 ]]; then options+=(--allow-run-as-root); fi
        if [[ -n $hosts ]]; then
            # Of the environment, ranks on other hosts get what is named here.
            for name in $(compgen -e); do
                case $name in
                    OMP_NUM_THREADS | OPENBLAS_NUM_THREADS | MKL_NUM_THREADS | PATH | LD_LIBRARY_PATH | PYTHONPATH | \
                        PYTHONUNBUFFERED | IMAGENET_ROOT | CHAINER* | NCCL_* | CUDA_* | CUPY_* | UCX_*) options+=(-x "$name") ;;
                esac
            done
        else
            # Open MPI refuses more ranks than cores.
            if [[ -z $places && $n =~ ^[0-9]+$ ]] && ((n > $(count_cores))); then options+=(--map-by :OVERSUBSCRIBE); fi
        fi
        # It ties one or two ranks to a core each, which a rank's image loaders would have to share.
        if [[ -z $binding && (-z $hosts || $n == [12]) ]]; then options+=(--bind-to none); fi
    fi
    local command=("$mpiexec" "${options[@]}" "$venv/bin/python" "${program[@]}" "$@")
    { printf '%q ' "${settings[@]}" "${command[@]}" && echo; } >&2
    exec "${command[@]}"
}

# ---------------------------------------------------------------- what was asked for

if [[ $# == 0 || $1 == -h || $1 == --help ]]; then
    usage
    exit
fi
find_mpi
ensure_installed
set_environment
python=$venv/bin/python
case $1 in
    python) exec "$python" "${@:2}" ;;
    test) cd "$here" && exec "$python" -m pytest "${@:2}" ;;
    lint)
        cd "$here"
        status=0
        for check in 'ruff check .' 'ruff format --check .' mypy; do
            # shellcheck disable=SC2086  # words of a command
            "$python" -m $check || status=1
        done
        exit $status
        ;;
esac
# "smoke" is short for its preset on two ranks; it may be repeated. "preflight" is a program of train.py's options.
for ((i = 1; i <= $#; i++)); do
    case ${!i} in
        --) break ;;
        preflight)
            before=("${@:1:i-1}") && shift "$i"
            while (($#)) && [[ $1 != -- ]]; do before+=("$1") && shift; done
            start_job "${before[@]}" -- -m reproduce.preflight "${@:2}"
            ;;
        smoke)
            before=("${@:1:i-1}")
            if ((i == 1)); then before=(-n 2); fi
            again=--overwrite
            case " $* " in *" --resume"*) again='' ;; esac
            start_job "${before[@]}" -- --preset smoke ${again:+"$again"} "${@:i+1}"
            ;;
    esac
done
start_job "$@"
