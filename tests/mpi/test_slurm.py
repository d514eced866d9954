"""hostfiles/slurm.sh on a real Slurm: two nodes on one machine, each with a name of its own.

slurmctld, two slurmd and munged run in a network namespace, as this test's own processes.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.usefixtures('leaves_nothing'),
    pytest.mark.skipif(
        not all(map(shutil.which, ('slurmctld', 'slurmd', 'munged', 'sbatch', 'srun', 'ip'))),
        reason='needs Slurm (Debian: slurmctld slurmd slurm-client munge iproute2)',
    ),
]
PROGRAM = 'tests/mpi/programs/train_slowly.py'
OPTIONS = (
    '--preset smoke --workers 4 --local-batch-size 32 --epochs 3 --width 4 --checkpoint-every 99'
)
LAUNCHERS = pytest.mark.parametrize('launcher', ['mpiexec', 'srun'])
_CONFIGURATION = """
ClusterName=test
SlurmctldHost=head(10.79.0.1)
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
TmpFS={folder}/tmp-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0
SchedulerType=sched/builtin
SlurmdParameters=config_overrides
GresTypes=gpu
OverTimeLimit=0
KillWait=30
ReturnToService=2
NodeName=n1 NodeAddr=10.79.0.1 NodeHostname=n1 Port=16818 CPUs=16 State=UNKNOWN
NodeName=n2 NodeAddr=10.79.0.1 NodeHostname=n2 Port=16819 CPUs=16 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    def __init__(self, folder, project):
        self.folder, self.project = folder, project
        self.network = f't{os.getpid() % 10000}s'
        # "ip netns exec" would hide the control groups, which slurmd needs.
        self.enter = ['nsenter', f'--net=/run/netns/{self.network}']
        self.configuration = folder / 'slurm.conf'
        self.daemons = []

    def up(self):
        for name in ('munge', 'state', 'spool-n1', 'spool-n2', 'tmp-n1', 'tmp-n2'):
            (self.folder / name).mkdir(mode=0o700)
        self.configuration.write_text(_CONFIGURATION.format(folder=self.folder))
        self.ip('netns', 'add', self.network)
        for words in (
            'link add one type veth peer name two',
            'addr add 10.79.0.1/24 dev one',
            *(f'link set {name} up' for name in ('lo', 'one', 'two')),
        ):
            self.ip('-n', self.network, *words.split())
        munge = self.folder / 'munge'
        (munge / 'key').write_bytes(os.urandom(1024))
        (munge / 'key').chmod(0o400)
        files = ('--key-file', '--socket', '--pid-file', '--log-file', '--seed-file')
        paths = [f'{name}={munge / name[2:].split("-")[0]}' for name in files]
        self.daemon('head', 'munged', '--foreground', '--force', *paths)
        self.daemon('head', 'slurmctld', '-D', '-f', self.configuration)
        for node in ('n1', 'n2'):
            self.daemon(node, 'slurmd', '-D', '-N', node, '-f', self.configuration)
        self.wait_for(self.ready)

    def ready(self):
        assert all(daemon.poll() is None for daemon in self.daemons), f'see {self.folder}/*.txt'
        return self('sinfo', '-h', '-o', '%D %t', check=False) == '2 idle'

    def sockets(self, job):
        """Those by which each node's ranks of a step that srun started speak PMIx."""
        nodes = [self.folder / f'spool-{node}' for node in ('n1', 'n2')]
        return [path for node in nodes for path in node.glob(f'stepd.slurm.pmix.{job}.*')]

    def down(self):
        if self.daemons:
            self('scancel', '--user=root', check=False)
            self.wait_for(lambda: not self('squeue', '-h', check=False), 60)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            daemon.wait(30)
        subprocess.run(['ip', 'netns', 'del', self.network], check=False, capture_output=True)

    @staticmethod
    def ip(*words):
        subprocess.run(['ip', *words], check=True, capture_output=True, text=True)

    def daemon(self, host, *command):
        inside = [*self.enter, 'unshare', '-u', 'sh', '-c', f'hostname {host}; exec "$@"', 'sh']
        with open(self.folder / f'{host}-{command[0]}.txt', 'w') as said:
            self.daemons.append(
                subprocess.Popen(
                    [*inside, *map(str, command)],
                    env={k: v for k, v in os.environ.items() if k != 'REPRODUCE_TEST'},
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=said,
                )
            )

    def __call__(self, *command, check=True, **variables):
        """Runs a command of Slurm; returns what it printed."""
        done = subprocess.run(
            [*self.enter, *map(str, command)],
            check=False,
            cwd=self.project,
            env={**os.environ, 'SLURM_CONF': str(self.configuration), **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert not check or done.returncode == 0, done
        return done.stdout.strip()

    def submit(self, out, *options, launcher='mpiexec', script=(), **variables):
        """Submits a job, slurm.sh on both nodes unless given. What it says is in OUT.txt."""
        training = ['hostfiles/slurm.sh', PROGRAM, out, *OPTIONS.split(), '--out', out]
        answer = self(
            *('sbatch', '--nodes=2', '--ntasks-per-node=1', f'--output={out}.txt'),
            *(option for each in options for option in each.split()),
            *(script or training),
            VENV=sys.prefix,
            PYTHONPATH=str(self.project),
            LAUNCHER=launcher.replace('mpiexec', ''),
            **variables,
        )
        return Job(self, int(answer.split()[-1]), out)

    @staticmethod
    def wait_for(condition, seconds=100):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.1)


class Job:
    def __init__(self, slurm, number, out):
        self.slurm, self.number, self.out = slurm, number, out

    def __getitem__(self, name):
        """A field of "scontrol show job"."""
        text = self.slurm('scontrol', 'show', 'job', self.number)
        return re.search(rf'(?:^|\s){name}=(\S+)', text)[1]

    def said(self):
        path = Path(f'{self.out}.txt')
        return path.read_text() if path.exists() else ''

    def wait_for_iterations(self):
        """Until iterations are under way. They are slow: see let_it_run()."""
        self.slurm.wait_for(lambda: 'alpha_sgd' in self.said())
        time.sleep(2)

    def let_it_run(self, state='PENDING'):
        """Once the job is in this state: without waiting in the queue, and at full speed."""
        self.slurm.wait_for(lambda: self['JobState'] == state)
        Path(f'{self.out}-slow').unlink()
        # In Slurm's queue a job waits for longer: its nodes end its first steps, whose sockets have
        # the names of the next ones', and take a second credential only if whole seconds have
        # passed since they revoked the first.
        self.slurm.wait_for(self.slurm.ready)
        self.slurm.wait_for(lambda: not self.slurm.sockets(self.number))
        time.sleep(2)
        self.slurm('scontrol', 'update', f'JobId={self.number}', 'StartTime=now')

    def stopped_with_a_checkpoint(self):
        """Whether it stopped once, with the newest checkpoint: each epoch may have left another."""
        found = re.findall(r'stopped after iteration \d+, with checkpoint (\S+)\. ', self.said())
        return found == [str(self.out / 'checkpoints' / checkpoints(self.out)[-1])]

    def end(self):
        """Returns the state that the job ends in."""
        running = ('PENDING', 'RUNNING', 'COMPLETING', 'REQUEUED')
        self.slurm.wait_for(lambda: self['JobState'] not in running)
        return self['JobState']


@pytest.fixture(scope='module')
def slurm(tmp_path_factory, root_of_project):
    made = Slurm(tmp_path_factory.mktemp('slurm'), root_of_project)
    try:
        try:
            made.up()
        except (subprocess.CalledProcessError, OSError) as error:
            pytest.skip(f'may not make network namespaces: {getattr(error, "stderr", error)}')
        yield made
    finally:
        made.down()


@pytest.fixture(scope='module')
def undisturbed(slurm, tmp_path_factory):
    """The digests of a run that nothing happened to."""
    out = tmp_path_factory.mktemp('run') / 'out'
    job = slurm.submit(out)
    assert job.end() == 'COMPLETED', job.said()
    assert '4 = 2 processes x 2, on 2 host(s)' in job.said()
    return digests_of(out)


@pytest.fixture
def out(tmp_path):
    """The output folder of a job whose iterations are slow at first."""
    (tmp_path / 'out-slow').touch()
    return tmp_path / 'out'


def digests_of(out):
    return json.loads((out / 'digests.json').read_text())


def checkpoints(out):
    return sorted(path.name for path in (out / 'checkpoints').glob('checkpoint-*'))


@LAUNCHERS
def test_before_its_limit_the_job_is_queued_again_and_goes_on(slurm, undisturbed, out, launcher):
    job = slurm.submit(out, '--time=30 --signal=B:USR1@60', launcher=launcher)
    job.wait_for_iterations()
    assert not checkpoints(out)
    slurm('scontrol', 'update', f'JobId={job.number}', 'TimeLimit=1')
    job.let_it_run()
    assert job.stopped_with_a_checkpoint(), job.said()
    slurm('scontrol', 'update', f'JobId={job.number}', 'TimeLimit=30')
    assert job.end() == 'COMPLETED', job.said()
    assert job['Restarts'] == '1'
    assert job.said().count('stopped after iteration') == 1
    assert f'goes on from {out}/checkpoints' in job.said()
    assert digests_of(out) == undisturbed


@LAUNCHERS
def test_scancel_loses_nothing(slurm, undisturbed, out, launcher):
    job = slurm.submit(out, launcher=launcher)
    job.wait_for_iterations()
    slurm('scancel', job.number)
    assert job.end() == 'CANCELLED', job.said()
    slurm.wait_for(lambda: not slurm('squeue', '-h'), 40)
    assert job.stopped_with_a_checkpoint(), job.said()
    Path(f'{out}-slow').unlink()
    job = slurm.submit(out, launcher=launcher)
    assert job.end() == 'COMPLETED', job.said()
    assert f'goes on from {out}/checkpoints' in job.said()
    assert digests_of(out) == undisturbed


def test_a_job_that_slurm_queues_again_goes_on(slurm, undisturbed, out):
    """As it does where another job needs the nodes, or where a node fails."""
    job = slurm.submit(out)
    job.wait_for_iterations()
    slurm('scontrol', 'requeue', job.number)
    job.let_it_run()
    assert job.stopped_with_a_checkpoint(), job.said()
    assert job.end() == 'COMPLETED', job.said()
    assert f'goes on from {out}/checkpoints' in job.said()
    assert digests_of(out) == undisturbed


@pytest.mark.parametrize('signal', ['USR1', 'TERM'])
def test_a_signal_to_the_script_alone(slurm, out, signal):
    job = slurm.submit(out, '--no-requeue')
    job.wait_for_iterations()
    slurm('scancel', '--batch', f'--signal={signal}', job.number)
    assert job.end() == 'FAILED', job.said()
    assert job.stopped_with_a_checkpoint(), job.said()
    assert ('cannot be queued again. To go on: sbatch' in job.said()) == (signal == 'USR1')


def test_ranks_that_srun_did_not_start(slurm, out):
    """srun ends with status 0, and Slurm would call the job completed."""
    job = slurm.submit(out, '--begin=now+1hour', launcher='srun')
    taken = [slurm.folder / f'spool-n{i}' / f'stepd.slurm.pmix.{job.number}.0' for i in (1, 2)]
    for path in taken:
        path.touch()
    slurm('scontrol', 'update', f'JobId={job.number}', 'StartTime=now')
    try:
        assert job.end() == 'FAILED', job.said()
    finally:
        for path in taken:
            path.unlink(missing_ok=True)
    assert job.said().count('task 0 launch failed: ') == 1, job.said()
    assert job.said().count('error: srun ended with status 0, but ranks did not start') == 1


def test_more_ranks_than_places(slurm, tmp_path):
    """Open MPI takes a job's tasks for its slots, here one."""
    out = tmp_path / 'out'
    job = slurm.submit(
        out,
        '--nodes=1 --ntasks=1 --cpus-per-task=2',
        script=('--wrap', f'./run_mpi.sh smoke --epochs 1 --width 4 --out {out}'),
    )
    assert job.end() == 'COMPLETED', job.said()
    assert '2 = 2 processes x 1, on 1 host(s)' in job.said()


def test_as_many_ranks_as_places(slurm, tmp_path):
    out = tmp_path / 'out'
    options = f'{PROGRAM} {out} {OPTIONS} --epochs 1'
    job = slurm.submit(
        out, '--ntasks-per-node=2', script=('--wrap', f'./run_mpi.sh train -- {options}')
    )
    assert job.end() == 'COMPLETED', job.said()
    assert '4 = 4 processes x 1, on 2 host(s)' in job.said()


@pytest.mark.parametrize(
    'command, message',
    [
        ('./run_mpi.sh smoke --out {out}', '2 copies of run_mpi.sh were started: start it once'),
        (
            '{python} reproduce/train.py --preset smoke --out {out}',
            'srun started 2 processes, but the MPI of this Python (Open MPI v5',
        ),
    ],
)
def test_srun_of_jobs_of_one_rank(slurm, tmp_path, command, message):
    out = tmp_path / 'out'
    command = command.format(python=sys.executable, out=out)
    job = slurm.submit(
        out,
        script=('--wrap', f'srun --mpi=none {command}'),
        # Where Open MPI leaves what no mpiexec removes.
        OMPI_MCA_btl_sm_backing_directory=str(tmp_path),
        TMPDIR=str(tmp_path),
    )
    assert job.end() == 'FAILED', job.said()
    assert job.said().count('error: ' + message) == 1, job.said()
    assert not out.exists()
