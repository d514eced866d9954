"""run_mpi.sh: how it sets up the environment, in all kinds of shells; real installations."""

import mmap
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from fakes import FAKE_MPIEXEC, job, only_error


def test_no_python(tree, tmp_path):
    tools = tmp_path / 'tools'
    tools.mkdir()
    for name in ('dirname', 'readlink', 'sed', 'head', 'ls', 'mkdir', 'touch', 'cat'):
        (tools / name).symlink_to(shutil.which(name))
    done = tree.run('smoke', PATH=str(tools), PYTHON=None, MPIEXEC=None)
    assert 'no Python 3.9 to 3.13 found: install one' in only_error(done)
    assert not (tree.path / '.venv').exists()


@pytest.mark.parametrize('version', ['3, 8', '3, 14'])
def test_python_of_another_version(tree, version):
    done = tree.run('smoke', FAKE_VERSION=version)
    assert f'PYTHON={tree.python} is not a Python 3.9 to 3.13' in only_error(done)


@pytest.mark.parametrize('version', ['3, 9', '3, 13'])
def test_oldest_and_newest_python(tree, version):
    assert tree.run('smoke', FAKE_VERSION=version).returncode == 0


def test_python_without_venv(tree):
    assert 'has no venv module: install it' in only_error(tree.run('smoke', FAKE_NO_VENV='1'))
    assert tree.calls() == []


def test_a_failed_installation(tree):
    done = tree.run('smoke', FAKE_PIP_STATUS='1')
    [line] = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    assert 'pip could not install the packages' in line and f'{tree.path}/.venv.log' in line
    assert "\n    pip's words\n" in done.stderr and done.returncode == 1
    assert len(tree.calls()) == 2  # venv, and pip once
    tree.run('smoke')
    assert len(tree.calls()) > 4, 'a failed installation was taken for a complete one'


def test_installs_once_and_again_when_something_changed(tree):
    first = tree.run('smoke')
    assert first.returncode == 0 and 'Setting up' in first.stderr
    installation = tree.calls()
    assert installation[0].startswith('-m venv')
    assert 'setuptools wheel' in installation[1] and '-c constraints.txt' in installation[1]
    assert '--no-binary mpi4py' in installation[2]
    assert '--no-build-isolation -e .[test,lint]' in installation[3]
    assert 'import extensions' in installation[4] and len(installation) == 5
    again = tree.run('smoke')
    assert tree.calls() == installation and 'Setting up' not in again.stderr
    for name in ('constraints.txt', 'setup.py'):
        with (tree.path / name).open('a') as file:
            file.write('# changed\n')
        assert 'Setting up' in tree.run('smoke').stderr
    assert len(tree.calls()) == 3 * len(installation)


def test_without_mpiexec_the_wheel_brings_it(tree):
    tree.run('python', MPIEXEC=None)
    installs = [call for call in tree.calls() if ' install ' in call]
    assert '.[test,lint,mpi]' in installs[1] and not any('mpi4py' in call for call in installs)


def test_broken_environment_is_made_anew(tree):
    tree.run('smoke')
    (tree.path / '.venv' / 'bin' / 'python').unlink()
    assert 'Setting up' in tree.run('smoke').stderr


def test_a_copy_of_the_folder_does_not_run_the_originals_code(tree, tmp_path):
    tree.run('smoke')
    shutil.copytree(tree.path, tmp_path / 'copy')
    tree.path = tmp_path / 'copy'
    assert 'Setting up' in tree.run('smoke').stderr


def test_another_mpi_is_another_environment(tree):
    tree.run('smoke')
    tree.mpiexec.write_text(FAKE_MPIEXEC.format(version='mpiexec (OpenRTE) 4.1.4'))
    assert 'Setting up' in tree.run('smoke').stderr


def test_extras_are_remembered(tree):
    tree.run('smoke', EXTRAS='gpu')
    assert tree.calls()[-2].endswith('-e .[test,lint,gpu]')
    assert 'Setting up' not in tree.run('smoke').stderr
    (tree.path / 'setup.py').write_text('')
    tree.run('smoke', FAKE_PIP_STATUS='1')
    tree.run('smoke')
    assert tree.calls()[-2].endswith('-e .[test,lint,gpu]'), (
        'a failed installation forgot the extras'
    )
    tree.run('smoke', EXTRAS='')
    assert tree.calls()[-2].endswith('-e .[test,lint]')


def test_a_changed_c_source_is_compiled_again(tree):
    source = tree.path / 'extensions' / 'kernels' / 'kernels.c'
    source.parent.mkdir(parents=True)
    for text in ('', 'int changed;'):
        source.write_text(text)
        assert 'Setting up' in tree.run('smoke').stderr
        assert 'Setting up' not in tree.run('smoke').stderr


def test_the_c_sources_are_where_they_are_looked_for(root):
    assert list(root.glob('extensions/**/*.c')) and list(root.glob('extensions/**/*.h'))


@pytest.mark.parametrize('name', ['environment', 'environment/', 'environment//'])
def test_an_environment_elsewhere(tree, tmp_path, name):
    variables = {'VENV': f'{tmp_path}/{name}'}
    assert 'Setting up' in tree.run('smoke', **variables).stderr
    assert (tmp_path / 'environment.log').exists() and not (tree.path / '.venv').exists()
    assert not (tmp_path / 'environment' / '.lock').exists()
    done, words = job(tree, 'smoke', **variables)
    assert 'Setting up' not in done.stderr and f'{tmp_path}/environment/bin/python' in words


def test_through_a_symbolic_link(tree, tmp_path):
    there = tree.path
    tree.path = tmp_path / 'bin'
    (tree.path / 'run_mpi.sh').symlink_to('../a folder/run_mpi.sh')
    assert f'{there}/reproduce/train.py' in job(tree, 'smoke')[1]


@pytest.mark.skipif(not shutil.which('flock'), reason='needs flock')
def test_two_starts_install_once(tree):
    both = [tree.start('smoke', FAKE_PIP_SECONDS='0.3') for _ in range(2)]
    done = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum('Setting up' in stderr for _, stderr in done) == 1 and len(tree.calls()) == 5


def test_a_folder_that_is_something_else_is_not_emptied(tree, tmp_path):
    mine = tmp_path / 'mine'
    mine.mkdir()
    (mine / 'thesis').write_text('')
    assert 'is not a virtual environment' in only_error(tree.run('smoke', VENV=str(mine)))
    assert (mine / 'thesis').exists()


def test_mpiexec_that_is_none(tree):
    message = only_error(tree.run('smoke', MPIEXEC='/nowhere/mpiexec'))
    assert 'MPIEXEC=/nowhere/mpiexec is not a command' in message


def test_mpicc_is_needed_to_install_only(tree):
    mpicc = tree.mpiexec.parent / 'mpicc'
    mpicc.rename(tree.mpiexec.parent / 'away')
    assert 'no mpicc beside' in only_error(tree.run('smoke'))
    (tree.mpiexec.parent / 'away').rename(mpicc)
    assert tree.run('smoke').returncode == 0
    mpicc.unlink()
    assert tree.run('smoke').returncode == 0


def test_a_checkout_with_line_ends_of_windows_works(tmp_path, root):
    files = [tmp_path / 'here' / name for name in ('run_mpi.sh', '.gitattributes', 'setup.py')]
    files[0].parent.mkdir()
    for path in files:
        shutil.copy(root / path.name, path)
    git = ['git', '-c', 'user.name=a', '-c', 'user.email=a', '-C', str(tmp_path / 'here')]
    try:
        subprocess.run([*git, 'init', '-q'], check=True)
    except OSError:
        pytest.skip('needs git')
    subprocess.run([*git, 'add', '-A'], check=True)
    subprocess.run([*git, 'commit', '-q', '-m', 'a'], check=True)
    clone = ['git', 'clone', '-q', '-c', 'core.autocrlf=true', 'here', 'there']
    subprocess.run(clone, cwd=tmp_path, check=True)
    done = subprocess.run([tmp_path / 'there' / 'run_mpi.sh', '--help'], check=False)
    assert done.returncode == 0
    for path in files:
        assert (tmp_path / 'there' / path.name).read_bytes() == path.read_bytes()


def test_a_file_system_without_locks(tree, tmp_path):
    source, library = tmp_path / 'flock.c', tmp_path / 'flock.so'
    source.write_text(
        '#include <errno.h>\nint flock(int f, int how) { errno = ENOSYS; return -1; }\n'
    )
    try:
        subprocess.run(['cc', '-shared', '-fPIC', source, '-o', library], check=True)
    except OSError:
        pytest.skip('needs a C compiler')
    for said in (True, False):
        done = tree.run('smoke', LD_PRELOAD=str(library))
        assert done.returncode == 0 and ('Setting up' in done.stderr) == said, done
        assert 'flock' not in done.stderr


def test_an_environment_of_somebody_else_is_not_emptied(tree, tmp_path):
    venv = tmp_path / 'by hand'
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', venv], check=True)
    before = sorted(venv.rglob('*'))
    message = only_error(tree.run('smoke', VENV=str(venv)))
    assert 'not a virtual environment that run_mpi.sh made' in message
    assert sorted(venv.rglob('*')) == before


def test_an_environment_of_somebody_else_is_used_if_it_has_the_project(tree, tmp_path):
    venv = tmp_path / 'by hand'
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', venv], check=True)
    [packages] = venv.glob('lib/python3*/site-packages')
    (packages / 'project.pth').write_text(f'{tree.path}\n')
    (tree.path / 'reproduce' / '__init__.py').touch()
    before = sorted(venv.rglob('*'))
    done = tree.run('python', '-c', 'import sys; print(sys.prefix)', VENV=str(venv))
    assert (done.stdout, done.stderr) == (f'{venv}\n', '')
    without = only_error(tree.run('train', '--', 'my.py', VENV=str(venv), MPIEXEC=None))
    assert f'there is no {venv}/bin/mpiexec: set MPIEXEC=' in without
    assert sorted(venv.rglob('*')) == before and tree.calls() == []


@pytest.mark.skipif(not shutil.which('flock'), reason='needs flock')
def test_the_environment_of_a_running_job_is_left_alone(tree):
    tree.run('smoke')
    job = tree.start('smoke', FAKE_SECONDS='4')
    assert job.stdout.readline() == '-n\n'
    with (tree.path / 'constraints.txt').open('a') as file:
        file.write('# changed\n')
    marker = tree.path / '.venv' / 'marker'
    marker.touch()
    assert 'but a running program uses it: wait' in only_error(tree.run('smoke'))
    assert marker.exists() and job.poll() is None
    job.communicate(timeout=60)
    assert 'Setting up' in tree.run('smoke').stderr and not marker.exists()


def test_the_environment_of_a_job_that_was_started_by_hand_is_left_alone(tree):
    tree.run('smoke')
    library = tree.path / '.venv' / 'library.so'
    library.write_bytes(bytes(100))
    (tree.path / 'setup.py').write_text('')
    with library.open() as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
        assert f'but process {os.getpid()} uses it: wait' in only_error(tree.run('smoke'))
        assert library.exists()
    assert 'Setting up' in tree.run('smoke').stderr


def test_a_terminal_shows_what_the_set_up_does(tree):
    master, slave = pty.openpty()
    done = tree.start('smoke', stderr=slave, FAKE_PIP_SECONDS='2.2')
    os.close(slave)
    done.communicate(timeout=60)
    said = os.read(master, 10000).decode()
    os.close(master)
    assert re.search(r"  [1-9] s  pip's words\x1b\[K\r", said), said


def test_files_for_many_ranks(tree):
    """mpiexec and every rank keep a connection to each rank."""
    tree.run('smoke')
    tree.mpiexec.write_text(tree.mpiexec.read_text().replace('exit $', 'ulimit -Sn\nexit $'))
    words = f'"{tree.path}/run_mpi.sh" smoke | tail -n 1'
    done = subprocess.run(
        ['/bin/bash', '-c', f'ulimit -Sn 200; ulimit -Hn 400; bash {words}'],
        env={'PATH': '/usr/bin:/bin', 'PYTHON': str(tree.python), 'MPIEXEC': str(tree.mpiexec)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == '400\n', done


@pytest.mark.parametrize(
    'variables, says, silent',
    [
        (
            {'PIP_INDEX_URL': 'http://127.0.0.1:9/', 'PIP_RETRIES': '1'},
            'check the network',
            'install',
        ),
        ({'PIP_NO_INDEX': '1'}, 'pip could not install the packages', 'network'),
    ],
)
def test_what_is_blamed_for_a_failed_installation(tree, variables, says, silent):
    """With the real pip."""
    real = {'PYTHON': sys.executable, 'MPIEXEC': None, 'PIP_CONFIG_FILE': '/dev/null'}
    done = tree.run('smoke', **real, **variables)
    [line] = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    assert says in line and silent not in line, done
    assert '\n    ERROR: ' in done.stderr
    assert done.returncode == 1


HOSTILE = {
    'PIP_TARGET': '/nowhere',
    'PIP_PREFIX': '/nowhere',
    'PIP_CONSTRAINT': '/nowhere/constraints.txt',
    'PIP_ONLY_BINARY': ':all:',
    'PIP_NO_DEPS': '1',
    'PIP_REQUIRE_HASHES': '1',
    'PIP_USER': '1',
    'PYTHONHOME': '/nowhere',
    'PYTHONSTARTUP': '/nowhere/start.py',
    'PYTHONNOUSERSITE': '',
    'PYTHONWARNINGS': 'error',
    'PYTHONINSPECT': '1',
    'MPLBACKEND': 'module://matplotlib_inline.backend_inline',
    'CHAINER_DTYPE': 'mixed16',
    'OPAL_PREFIX': '/nowhere',
    'MPI4PY_LIBMPI': '/nowhere/libmpi.so',
    'MPI4PY_MPIABI': 'mpich',
    'CC': 'false',
}


@pytest.fixture
def hostile(tmp_path, root):
    """``hostile(*words)``: a command that starts run_mpi.sh, and the shell and folder of a user in
    which nothing is as it should be; with a read-only project, where that can be had."""
    here, away = tmp_path / 'a folder', tmp_path / 'away'
    shutil.copytree(
        root,
        here,
        ignore=shutil.ignore_patterns(
            '__pycache__', '*.so', '.venv*', '.git', '.ci*', '*.egg-info', 'results', '.*_cache'
        ),
    )
    for package in ('extensions', 'reproduce', 'numpy', 'mpi4py', 'pip'):
        (away / package).mkdir(parents=True)
        (away / package / '__init__.py').write_text(f'raise ImportError("another {package}")\n')
    for library in (
        'mpi.so',
        'mpi.so.40',
        'mpi.so.12',
        'prrte.so.3',
        'pmix.so.2',
        'open-pal.so.80',
    ):
        (away / f'lib{library}').write_text('of another MPI')
    temporary = tmp_path / ('long' * 30)
    temporary.mkdir()
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ('HOME', 'MPIEXEC')},
        **HOSTILE,
        'VENV': str(tmp_path / 'environment'),
        'PYTHON': sys.executable,
        'PYTHONPATH': str(away),
        'LD_LIBRARY_PATH': str(away),
        'TMPDIR': str(temporary),
        'EXTRAS': '',
    }
    read_only = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" || exit 99; exec "$@"'
    command = ['unshare', '--mount', 'sh', '-c', read_only, str(here)]
    try:
        if subprocess.run([*command, 'true'], capture_output=True, check=False).returncode:
            raise OSError
    except OSError:
        command = []
    words = [*command, '/bin/bash', str(here / 'run_mpi.sh')]
    return lambda *more: {
        'args': [*words, *map(str, more)],
        'cwd': away,
        'env': environment,
        'stdout': subprocess.PIPE,
        'stderr': subprocess.PIPE,
        'text': True,
    }


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_interrupted_installation_is_done_again_in_the_worst_of_shells(hostile, tmp_path):
    """Really installs, is killed twice with all its children, and really installs again; without a
    C compiler, which whoever runs the tests mostly has. Then it really trains."""
    program = 'import sys; sys.path.pop(0); from extensions import kernels as k; print(k.compiled)'
    start = hostile('python', '-Ic', program)
    for seconds in (1, 3):
        first = subprocess.Popen(**start, start_new_session=True)
        time.sleep(seconds)
        os.killpg(first.pid, signal.SIGKILL)
        assert first.communicate()[0] == '', 'installed before it could be interrupted'
    second = subprocess.run(**start, timeout=280, check=False)
    assert second.returncode == 0 and second.stdout == '{}\n', second
    assert re.search(r'^ +\d+ s  \S', second.stderr, re.MULTILINE), 'no sign of life'
    third = subprocess.run(**start, check=False)
    assert third.stderr == '' and third.stdout == '{}\n'
    wrong = subprocess.run(**hostile('smoke', '--epoch', '3'), check=False)
    assert wrong.returncode == 2 and wrong.stdout == ''
    assert wrong.stderr == 'error: there is no option --epoch; did you mean --epochs?\n'

    hosts = tmp_path / 'hosts'  # as in "while read host; do ./run_mpi.sh ...; done < hosts"
    hosts.write_text('one\ntwo\n')
    options = '--epochs 1 --width 4 --shallow --loader processes:1 --out'.split()
    with hosts.open() as rest:
        smoke = hostile('smoke', *options, tmp_path / 'out')
        done = subprocess.run(**smoke, stdin=rest, timeout=200, check=False)
        assert os.lseek(rest.fileno(), 0, os.SEEK_CUR) == 0
    assert done.returncode == 0 and '\ntop-1 ' in done.stdout, done
    assert (tmp_path / 'out' / 'curves.png').exists()
    ready = subprocess.run(
        **hostile('preflight', '--', '--preset', 'smoke', *options, tmp_path / 'other'),
        stdin=subprocess.DEVNULL,
        timeout=200,
        check=False,
    )
    assert ready.returncode == 0 and ready.stdout.endswith('\nready\n'), ready
