"""run_mpi.sh and hostfiles/slurm.sh on clusters: what they make of an allocation, of host files and
of another MPI. mpiexec, srun and scontrol are fakes that print their arguments."""

import os
import shutil
import signal
import subprocess
import time

import pytest
from fakes import Tree, job, only_error

HYDRA = 'HYDRA build details: Version: 4.2'
SLURM = {'SLURM_JOB_ID': '7', 'SLURM_TASKS_PER_NODE': '8(x128)'}
NOTES = """#!/bin/bash
printf '%s\\n' "${0##*/}" "$@"
"""


@pytest.fixture
def hydra(tmp_path, root):
    return Tree(tmp_path, root, version=HYDRA)


@pytest.mark.parametrize(
    'tasks, n', [('8(x128)', 1024), ('4', 4), ('2(x3),1', 7), ('2,1,3(x2)', 9), ('1(x2)', 2)]
)
def test_as_many_ranks_as_the_allocation_has_places(tree, tasks, n):
    variables = {**SLURM, 'SLURM_TASKS_PER_NODE': tasks}
    words = job(tree, '--', '--dry-run', **variables)[1]
    assert words[:2] == ['-n', str(n)] and ':OVERSUBSCRIBE' not in words
    asked = (tree.path.parent / 'log.options').read_text()
    assert asked.startswith(f'{n} / train '), 'not checked for these ranks'


def test_as_many_ranks_as_pbs_has_places(tree, tmp_path):
    nodes = tmp_path / 'nodes'
    nodes.write_text('a\na\nb\n')
    variables = {'PBS_JOBID': '7', 'PBS_NODEFILE': str(nodes)}
    assert job(tree, '--', '--dry-run', **variables)[1][:2] == ['-n', '3']


def test_more_ranks_than_the_allocation_has_places(tree):
    """Open MPI takes Slurm's tasks for slots, however many cores there are."""
    variables = {**SLURM, 'SLURM_TASKS_PER_NODE': '1'}
    assert ':OVERSUBSCRIBE' in job(tree, 'smoke', **variables)[1]
    variables['SLURM_TASKS_PER_NODE'] = '64'
    assert ':OVERSUBSCRIBE' not in job(tree, '-n', '64', 'smoke', **variables)[1]


def test_copies_of_run_mpi_are_refused(tree):
    for variables in (
        {'SLURM_STEP_NUM_TASKS': '8', 'SLURM_PROCID': '0'},
        {'OMPI_COMM_WORLD_SIZE': '8', 'OMPI_COMM_WORLD_RANK': '0'},
        {'PMI_SIZE': '8', 'PMI_RANK': '0'},
    ):
        message = only_error(tree.run('smoke', **variables))
        assert message.startswith('error: 8 copies of run_mpi.sh were started: start it once')
    quiet = tree.run('smoke', SLURM_STEP_NUM_TASKS='8', SLURM_PROCID='3')
    assert quiet.returncode == 1 and quiet.stderr == ''
    assert tree.calls() == []
    shell = {'SLURM_STEP_NUM_TASKS': '8', 'SLURM_PROCID': '0', 'SLURM_PTY_PORT': '1'}
    assert tree.run('smoke', **shell).returncode == 0


def host_file(tmp_path, text):
    path = tmp_path / 'hosts'
    path.write_text(text)
    return str(path)


OPEN_MPIS = '# a comment: slots=9\na slots=8\n\n  b  max_slots=9 slots = 4 # more\nc\n'
HYDRAS = '# a comment\na:8\nb:4 binding=user:0 # more\nc\n'


@pytest.mark.parametrize('option', ['--hostfile', '-f', '--hostfile='])
def test_mpich_reads_host_files_of_open_mpi(hydra, tmp_path, option):
    path = host_file(tmp_path, OPEN_MPIS)
    given = [option + path] if option.endswith('=') else [option, path]
    words = job(hydra, '-n', '12', *given, '--', '--dry-run')[1]
    assert words[:5] == ['-n', '12', '-hosts', 'a:8,b:4,c', f'{hydra.path}/.venv/bin/python']
    own = host_file(tmp_path, HYDRAS)
    assert job(hydra, '-n', '12', *given, '--', '--dry-run')[1][2:3] == given[:1]
    assert own == path


def test_open_mpi_reads_host_files_of_mpich(tree, tmp_path):
    path = host_file(tmp_path, HYDRAS)
    words = job(tree, '-n', '12', '--hostfile', path, '--', '--dry-run')[1]
    assert words[:4] == ['-n', '12', '--host', 'a:8,b:4,c']
    host_file(tmp_path, OPEN_MPIS)
    words = job(tree, '-n', '12', '--hostfile', path, '--', '--dry-run')[1]
    assert words[:4] == ['-n', '12', '--hostfile', path]


def test_the_host_files_here_become_lists(hydra, root):
    words = job(hydra, '--hostfile', root / 'hostfiles' / 'mn1', '--', '--dry-run')[1]
    hosts = words[1].split(',')
    assert len(hosts) == 128 and hosts[0] == 'mn1-001:8' and hosts[-1] == 'mn1-128:8'


@pytest.mark.parametrize(
    'options', ['--map-by ppr:4:package', '-x NAME', '--oversubscribe', '--mca btl self']
)
def test_options_of_open_mpi_for_mpich(hydra, options):
    hydra.run('smoke')
    message = only_error(hydra.run('-n', '2', *options.split(), '--', '--dry-run'))
    assert 'is an option of Open MPI, which ' in message and 'hostfiles/README.md' in message


@pytest.mark.parametrize('options', ['-ppn 4', '-hosts a,b', '-genv A B'])
def test_options_of_mpich_for_open_mpi(tree, options):
    tree.run('smoke')
    message = only_error(tree.run('-n', '2', *options.split(), '--', '--dry-run'))
    assert 'is an option of MPICH, which ' in message


def srun_of(tree):
    return tree.executable(tree.path.parent / 'bin' / 'srun', NOTES)


def test_srun_as_the_launcher(tree):
    path = f'{srun_of(tree).parent}:/usr/bin:/bin'
    variables = {**SLURM, 'SLURM_CPUS_PER_TASK': '3', 'LAUNCHER': 'srun', 'PATH': path}
    words = job(tree, '--', '--dry-run', **variables)[1]
    assert words[:7] == [
        'srun',
        '--mpi=pmix',
        '--kill-on-bad-exit=1',
        '--cpu-bind=none',
        '--cpus-per-task=3',
        '-n',
        '1024',
    ]
    assert words[7] == f'{tree.path}/.venv/bin/python'
    assert '--mpi=pmix_v4' in job(tree, 'smoke', **variables, SLURM_MPI_TYPE='pmix_v4')[1]


def test_srun_speaks_pmi2_to_mpich(hydra):
    path = f'{srun_of(hydra).parent}:/usr/bin:/bin'
    words = job(hydra, '-n', '2', 'smoke', LAUNCHER='srun', PATH=path)[1]
    assert words[:2] == ['srun', '--mpi=pmi2'] and words[4:6] == ['-n', '2']


def test_a_launcher_that_is_none(tree):
    assert 'it can only be srun' in only_error(tree.run('smoke', LAUNCHER='mpirun'))
    message = only_error(tree.run('smoke', LAUNCHER='srun', PATH=path_without(tree, 'srun')))
    assert 'there is no command srun' in message
    srun_of(tree)
    message = only_error(tree.run('smoke', MPIEXEC=str(tree.path.parent / 'bin' / 'srun')))
    assert message == 'error: MPIEXEC=srun: srun has no MPI of its own: set LAUNCHER=srun instead'


def path_without(tree, name):
    """A PATH with all that /usr/bin has, but this."""
    folder = tree.path.parent / 'without'
    folder.mkdir()
    for path in os.scandir('/usr/bin'):
        if path.name != name:
            (folder / path.name).symlink_to(path.path)
    return str(folder)


COMPILER = """#!/bin/bash
echo '#define {macro} 1'
echo '#define MPI_VERSION 3'
"""


def mpicc_of(tree, **variables):
    """The compiler that mpi4py is built with."""
    text = tree.python.read_text()
    note = '[[ -z $MPICC ]] || echo "$MPICC" >"$FAKE_LOG.mpicc"\n'
    tree.executable(tree.python, text.replace('env >"$FAKE_LOG.env"\n', note, 1))
    tree.run('smoke', **variables)
    return (tree.path.parent / 'log.mpicc').read_text().strip()


@pytest.mark.parametrize('kind', ['mpich', 'openmpi'])
def test_mpi4py_is_built_for_the_mpi_of_mpiexec(tmp_path, root, kind):
    """Debian's mpicc belongs to one MPI, its mpiexec.mpich or mpiexec to another."""
    version = {'mpich': HYDRA, 'openmpi': 'mpiexec (OpenRTE) 4.1.4'}[kind]
    tree = Tree(tmp_path, root, version=version)
    folder = tree.mpiexec.parent
    macros = {'mpich': 'MPICH_NAME', 'openmpi': 'OPEN_MPI'}
    for name, macro in macros.items():
        tree.executable(folder / f'mpicc.{name}', COMPILER.format(macro=macro))
    other = 'openmpi' if kind == 'mpich' else 'mpich'
    shutil.copy(folder / f'mpicc.{other}', folder / 'mpicc')
    shutil.copy(tree.mpiexec, folder / f'mpiexec.{kind}')
    for name in ('mpiexec', f'mpiexec.{kind}'):
        shutil.rmtree(tree.path / '.venv', ignore_errors=True)
        assert mpicc_of(tree, MPIEXEC=str(folder / name)) == f'{folder}/mpicc.{kind}'
    (folder / f'mpicc.{kind}').unlink()
    shutil.rmtree(tree.path / '.venv')
    message = only_error(tree.run('smoke'))
    assert f'/mpiexec belongs to another MPI than {folder}/mpicc' in message
    assert 'libmpich-dev' in message


@pytest.mark.skipif(
    not all(map(shutil.which, ('mpicc.mpich', 'mpicc.openmpi', 'mpiexec.mpich'))),
    reason='needs two MPIs (Debian: libmpich-dev libopenmpi-dev)',
)
@pytest.mark.parametrize(
    'name', ['mpiexec.mpich', 'mpirun.mpich', 'mpiexec.hydra', 'mpiexec.openmpi']
)
def test_the_two_mpis_of_debian(tree, name):
    expected = 'openmpi' if 'openmpi' in name else 'mpich'
    found = mpicc_of(tree, MPIEXEC=f'/usr/bin/{name}')
    macros = subprocess.run(
        [found, '-E', '-dM', '-x', 'c', '-'],
        input='#include <mpi.h>',
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert (' OPEN_MPI ' in macros) == (expected == 'openmpi'), found


class Script:
    """hostfiles/slurm.sh in a folder with a run_mpi.sh that only notes its arguments."""

    def __init__(self, tree, root):
        self.tree = tree
        (tree.path / 'hostfiles').mkdir()
        for name in ('slurm.sh', 'block_sigterm.py'):
            shutil.copy(root / 'hostfiles' / name, tree.path / 'hostfiles')
        tree.run('smoke')  # makes .venv
        self.tree.executable(tree.path / '.venv' / 'bin' / 'python', '#!/bin/bash\nexec "${@:2}"\n')
        self.bin = tree.path.parent / 'bin'
        self.tree.executable(self.bin / 'scontrol', NOTES)

    def start(self, *arguments, run_mpi=NOTES, **variables):
        self.tree.executable(self.tree.path / 'run_mpi.sh', run_mpi)
        environment = {
            'PATH': f'{self.bin}:/usr/bin:/bin',
            'SLURM_JOB_ID': '7',
            'SLURM_JOB_NAME': 'resnet50',
            **variables,
        }
        return subprocess.Popen(
            ['/bin/bash', 'hostfiles/slurm.sh', *arguments],
            cwd=self.tree.path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments, **variables):
        process = self.start(*arguments, **variables)
        return process.communicate(timeout=60)[0].splitlines(), process.returncode


@pytest.fixture
def script(tree, root):
    return Script(tree, root)


@pytest.mark.parametrize('tasks, gpus', [('8(x128)', '8'), ('4', '4'), ('2(x2)', None)])
def test_slurm_sh_trains_on_any_allocation(script, tasks, gpus):
    variables = {'SLURM_TASKS_PER_NODE': tasks, **({'SLURM_GPUS_ON_NODE': gpus} if gpus else {})}
    words, status = script.run('--train-root', 'a b', **variables)
    assert status == 0
    assert words == [
        *('run_mpi.sh', 'train', '--bind-to', 'none', '--', '--train-root', 'a b'),
        *('--out', 'results/resnet50-7', '--resume', 'auto'),
    ]
    words, _ = script.run('--out', 'mine', **variables, MPI_OPTIONS='--map-by ppr:4:package')
    assert words[2:4] == ['--map-by', 'ppr:4:package'] and words.count('--out') == 1
    assert script.run('--out=mine', **variables, LAUNCHER='srun')[0][2:4] == ['--', '--out=mine']


def test_slurm_sh_wants_a_rank_for_each_gpu(script):
    words, status = script.run(SLURM_TASKS_PER_NODE='1', SLURM_GPUS_ON_NODE='4')
    assert status == 1 and len(words) == 1
    assert 'a node has 4 GPUs and 1 ranks: give sbatch --ntasks-per-node=4' in words[0]


def test_slurm_sh_outside_of_slurm_and_elsewhere(script):
    assert 'this is a Slurm job: sbatch' in script.run(SLURM_JOB_ID='')[0][0]
    (script.tree.path / '.venv' / 'bin' / 'python').unlink()
    assert 'set it up first' in script.run()[0][0]


TRAINING = """#!/bin/bash
trap 'mkdir -p results/resnet50-7/checkpoints; {write}; exit 138' USR1
echo training
while :; do sleep 0.1; done
"""


@pytest.mark.parametrize('write', [True, False])
def test_slurm_sh_at_its_limit(script, write):
    """Without an iteration before its limit, a job would be queued again for ever."""
    checkpoint = 'touch results/resnet50-7/checkpoints/checkpoint-000000012.npz'
    run_mpi = TRAINING.format(write=checkpoint if write else ':')
    process = script.start(run_mpi=run_mpi, SLURM_TASKS_PER_NODE='1')
    assert process.stdout.readline() == 'training\n'
    time.sleep(0.5)
    process.send_signal(signal.SIGUSR1)
    said = process.communicate(timeout=20)[0].splitlines()
    if write:
        assert said == ['scontrol', 'requeue', '7'] and process.returncode == 138
    else:
        assert len(said) == 1 and process.returncode == 1
        assert 'no iteration ended before the time limit: give sbatch more --time' in said[0]


def test_slurm_sh_that_is_cancelled(script):
    run_mpi = TRAINING.format(write=':')
    process = script.start(run_mpi=run_mpi, SLURM_TASKS_PER_NODE='1')
    assert process.stdout.readline() == 'training\n'
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == '' and process.returncode == 138
