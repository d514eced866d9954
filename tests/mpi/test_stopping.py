"""A person stops a job of run_mpi.sh: at the keyboard, by a signal, or by closing what reads it."""

import contextlib
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

pytestmark = [pytest.mark.mpi, pytest.mark.slow, pytest.mark.usefixtures('leaves_nothing')]
OPTIONS = (
    '--preset smoke --workers 2 --local-batch-size 64 --epochs 2 --width 4 --shallow '
    '--checkpoint-every 0.003m'
).split()
STOPS = 'stops after the iteration under way, with a checkpoint.'


@pytest.fixture(scope='module')
def command(root_of_project, job_environment, mpiexec):
    """``command(out)`` is what run_mpi.sh becomes, and how its run was started."""

    def words(out, *options):
        start = shlex.join([mpiexec, '-n', '2', sys.executable, 'reproduce/train.py'])
        launch = [sys.executable, '-I', 'reproduce/job/launch.py', str(out), start]
        train = [sys.executable, str(root_of_project / 'reproduce/train.py')]
        return [*launch, mpiexec, '-n', '2', *train, *OPTIONS, '--out', str(out), *options]

    return words


@pytest.fixture(scope='module')
def environment(job_environment):
    return lambda: {**job_environment, 'REPRODUCE_TEST': os.environ.get('REPRODUCE_TEST', '')}


@pytest.fixture
def start(command, environment, root_of_project):
    def run(out, *options, before=(), stdout=None, **keywords):
        with open(f'{out}.txt', 'a') as said:
            return subprocess.Popen(
                [*before, *command(out, *options)],
                cwd=root_of_project,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=stdout or said,
                stderr=said,
                start_new_session=True,
                **keywords,
            )

    return run


@pytest.fixture(scope='module')
def uninterrupted(command, environment, root_of_project, tmp_path_factory):
    out = tmp_path_factory.mktemp('run') / 'out'
    subprocess.run(command(out), cwd=root_of_project, env=environment(), check=True, timeout=200)
    return parameters_of(out)


def parameters_of(out):
    with np.load(out / 'model.npz') as model:
        return {name: model[name].tobytes() for name in model.files}


def wait_for(condition, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def has_checkpoint(out):
    return lambda: any((out / 'checkpoints').glob('checkpoint-*.npz'))


def newest(out):
    return max(int(path.stem[-9:]) for path in (out / 'checkpoints').glob('checkpoint-*.npz'))


def ended(job, what, limit=20):
    begin = time.monotonic()
    status = job.wait(limit)
    print(f'{what}: ended after {time.monotonic() - begin:.1f} s with status {status}')
    return status


def goes_on(said, out, environment, root, expected):
    """Runs the command that the job named; its results must be those of an undisturbed run."""
    line = r'^stopped after iteration ([\d,]+), .*To go on: (.*)$'
    ((iteration, command),) = re.findall(line, said, re.MULTILINE)
    assert int(iteration.replace(',', '')) == newest(out)
    words = shlex.split(command)
    subprocess.run(
        words, cwd=root, env=environment(), check=True, timeout=200, stdout=subprocess.DEVNULL
    )
    assert parameters_of(out) == expected


class Terminal:
    """A job at a terminal."""

    def __init__(self, words, folder, environment):
        self.said, self.closed = b'', threading.Event()
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            os.execvpe(words[0], words, environment)
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self):
        with contextlib.suppress(OSError):
            while not self.closed.wait(0.01):
                if select.select([self.master], [], [], 0)[0]:
                    self.said += os.read(self.master, 4096)

    def close(self):
        self.closed.set()
        self.reader.join()
        os.close(self.master)

    def wait(self, limit=None):
        _, status = os.waitpid(self.pid, 0)
        self.reader.join(5)
        return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)

    def text(self):
        return self.said.decode().replace('\r\n', '\n').replace('^C', '')


def test_ctrl_c_in_a_terminal(command, environment, root_of_project, uninterrupted, tmp_path):
    out = tmp_path / 'out'
    job = Terminal(command(out), root_of_project, environment())
    wait_for(has_checkpoint(out))
    os.write(job.master, b'\x03')
    assert ended(job, 'Ctrl-C in a terminal') == -signal.SIGINT
    said = job.text()
    assert said.count(STOPS) == 1 and 'Ctrl-C again' in said
    assert '------' not in said  # mpiexec's report of the end that was asked for
    goes_on(said, out, environment, root_of_project, uninterrupted)


def test_a_second_ctrl_c_ends_at_once(command, environment, root_of_project, tmp_path):
    out = tmp_path / 'out'
    job = Terminal(command(out), root_of_project, environment())
    wait_for(has_checkpoint(out))
    hanging = ranks_of(out)[1]
    os.kill(hanging, signal.SIGSTOP)  # so that no iteration ends
    os.write(job.master, b'\x03')
    wait_for(lambda: STOPS.encode() in job.said)
    time.sleep(1.2)
    os.write(job.master, b'\x03')
    assert ended(job, 'Ctrl-C twice') == -signal.SIGINT
    kept = f'ended at once. The checkpoints in {out}/checkpoints are kept. To go on: '
    assert kept in job.text()


def ranks_of(out):
    found = []
    for process in Path('/proc').glob('[0-9]*'):
        with contextlib.suppress(OSError):
            words = (process / 'cmdline').read_bytes().split(b'\0')
            if str(out).encode() in words and b'-n' not in words:
                found.append(int(process.name))
    return sorted(found)


def test_a_terminal_that_is_closed(command, environment, root_of_project, uninterrupted, tmp_path):
    out = tmp_path / 'out'
    job = Terminal(command(out), root_of_project, environment())
    wait_for(has_checkpoint(out))
    before = newest(out)
    job.close()
    assert ended(job, 'terminal closed') == -signal.SIGHUP
    assert newest(out) > before and not (out / 'summary.json').exists()
    again = command(out, '--resume', 'auto')
    subprocess.run(again, cwd=root_of_project, env=environment(), check=True, timeout=200)
    assert parameters_of(out) == uninterrupted


@pytest.mark.parametrize(
    'to, signum',
    [
        ('process', signal.SIGTERM),
        ('process', signal.SIGHUP),
        ('process', signal.SIGUSR1),
        ('group', signal.SIGINT),
    ],
)
def test_a_signal(start, tmp_path, signum, to):
    out = tmp_path / 'out'
    job = start(out)
    wait_for(has_checkpoint(out))
    (os.kill if to == 'process' else os.killpg)(job.pid, signum)
    assert ended(job, f'{signum.name} to the {to}') == -signum
    said = Path(f'{out}.txt').read_text()
    assert f'stopped after iteration {newest(out)}, with checkpoint {out}/checkpoints/' in said


def test_a_signal_that_comes_twice(start, environment, root_of_project, uninterrupted, tmp_path):
    """timeout(1) signals its child, and then its group."""
    out = tmp_path / 'out'
    job = start(out, before=('timeout', '-s', 'INT', '100'))
    wait_for(has_checkpoint(out))
    job.send_signal(signal.SIGALRM)  # its time is over
    assert ended(job, 'timeout -s INT') == 124
    goes_on(Path(f'{out}.txt').read_text(), out, environment, root_of_project, uninterrupted)


def test_a_reader_that_goes_away(start, environment, root_of_project, uninterrupted, tmp_path):
    """As in ./run_mpi.sh ... | head"""
    out = tmp_path / 'out'
    job = start(out, '--watchdog', '60', stdout=subprocess.PIPE)
    wait_for(has_checkpoint(out))
    job.stdout.close()
    assert ended(job, '| head') == 128 + signal.SIGPIPE
    said = Path(f'{out}.txt').read_text()
    assert 'the output cannot be written (Broken pipe): the job stops with a checkpoint' in said
    goes_on(said, out, environment, root_of_project, uninterrupted)


def test_a_full_disk_below_the_output(start, environment, root_of_project, uninterrupted, tmp_path):
    out, small = tmp_path / 'out', tmp_path / 'small'
    small.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=64k', 'none', str(small)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip('may not mount a tmpfs')
    try:
        with open(small / 'said', 'ab', buffering=0) as file:
            job = start(out, stdout=file)
            wait_for(has_checkpoint(out))
            with contextlib.suppress(OSError):
                while file.write(b'.'):
                    pass
        assert ended(job, 'full disk below the output') == 1
    finally:
        subprocess.run(['umount', '-l', str(small)], check=True)
    said = Path(f'{out}.txt').read_text()
    assert 'the output cannot be written (No space left on device)' in said
    goes_on(said, out, environment, root_of_project, uninterrupted)


def test_before_the_first_iteration(start, tmp_path):
    out = tmp_path / 'out'
    job = start(out)
    wait_for(lambda: len(ranks_of(out)) == 2)
    job.send_signal(signal.SIGINT)
    assert ended(job, 'SIGINT before the first iteration') == -signal.SIGINT
    said = Path(f'{out}.txt').read_text()
    assert said.splitlines()[-1] == 'There is no checkpoint yet.', said


def test_a_run_that_is_refused_gets_its_own_error_only(start, tmp_path):
    out = tmp_path / 'out'
    job = start(out)
    wait_for(has_checkpoint(out))
    job.send_signal(signal.SIGTERM)
    ended(job, 'SIGTERM')
    Path(f'{out}.txt').unlink()
    assert start(out).wait(60) == 2
    said = Path(f'{out}.txt').read_text()
    assert said.count('error: ') == 1 and 'which --resume auto goes on from' in said
    assert 'To go on: ' not in said and '------' not in said  # nor mpiexec's own report


def test_nohup_holds(start, uninterrupted, tmp_path):
    out = tmp_path / 'out'
    job = start(out, before=('nohup',))
    wait_for(has_checkpoint(out))
    job.send_signal(signal.SIGHUP)
    assert job.wait(200) == 0
    assert parameters_of(out) == uninterrupted


def test_a_job_that_is_suspended_goes_on(start, uninterrupted, tmp_path):
    """As by Ctrl-Z and fg."""
    out = tmp_path / 'out'
    job = start(out, '--watchdog', '10')
    wait_for(has_checkpoint(out))
    job.send_signal(signal.SIGTSTP)
    wait_for(lambda: state_of(job.pid) == 'T' and {*map(state_of, ranks_of(out))} == {'T'})
    time.sleep(11)
    job.send_signal(signal.SIGCONT)
    assert job.wait(200) == 0
    assert parameters_of(out) == uninterrupted


def state_of(process):
    try:
        return Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()[0]
    except OSError:
        return ''


def test_a_killed_parent_ends_the_job(start, uninterrupted, tmp_path):
    out = tmp_path / 'out'
    job = start(out)
    wait_for(has_checkpoint(out))
    ranks = ranks_of(out)
    job.kill()
    job.wait()
    wait_for(lambda: {*map(state_of, ranks)} <= {'', 'Z'}, 10)
    assert start(out, '--resume', 'auto').wait(200) == 0
    assert parameters_of(out) == uninterrupted


def test_smoke_after_ctrl_c_goes_on_to_the_same_bits(root_of_project, environment, tmp_path):
    """./run_mpi.sh smoke, Ctrl-C in its middle, and ./run_mpi.sh smoke again."""
    if not (Path(sys.prefix) / 'installed').exists():
        pytest.skip('run_mpi.sh has not made this environment')
    words = [str(root_of_project / 'run_mpi.sh'), 'smoke', *OPTIONS[2:]]
    variables = {**environment(), 'VENV': sys.prefix}
    variables.pop('PYTHONPATH')
    folders = [tmp_path / 'disturbed', tmp_path / 'undisturbed']
    outs = [folder / 'results/smoke' for folder in folders]
    for folder in folders:
        folder.mkdir()
    job = Terminal(words, folders[0], variables)
    wait_for(has_checkpoint(outs[0]))
    os.write(job.master, b'\x03')
    assert ended(job, 'Ctrl-C in ./run_mpi.sh smoke') == -signal.SIGINT
    stopped_at = newest(outs[0])
    for folder in folders:
        # In a shell's loop, standard input holds what comes next.
        loop = f'while read -r _; do {shlex.join(words)} || exit; done'
        again = subprocess.run(
            ['bash', '-c', loop],
            check=False,
            cwd=folder,
            env=variables,
            input='once\n' + 'twice\n' * (folder == folders[1]),
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert again.returncode == 0, again
        if folder == folders[0]:
            assert (
                f'goes on from results/smoke/checkpoints/checkpoint-{stopped_at:09d}'
                in again.stdout
            )
    assert parameters_of(outs[0]) == parameters_of(outs[1])
    # A finished run stays as it is. The second one had a folder of its own.
    assert parameters_of(folders[1] / 'results/smoke-2') == parameters_of(outs[1])
