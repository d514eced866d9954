"""Two hosts on one machine: network namespaces, each with an address and a host name of its own.

Open MPI starts its daemons there by an agent that enters the namespace instead of calling ssh.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.mpi, pytest.mark.slow, pytest.mark.usefixtures('leaves_nothing')]
SHALLOW = Path(__file__).resolve().parent / 'programs' / 'shallow.py'
OPTIONS = '--preset smoke --workers 4 --local-batch-size 32 --epochs 2 --width 4 --shallow'.split()
_AGENT = """#!/bin/sh
host={prefix}h${{1##*.}}
shift
exec ip netns exec $host unshare -u sh -c "hostname $host; $*"
"""


def sh(command, **keywords):
    return subprocess.run(
        command, shell=True, check=True, capture_output=True, text=True, **keywords
    )


class Hosts:
    """Hosts PREFIXh1 and PREFIXh2 on a bridge, in 10.77.0.0/24 of their own."""

    def __init__(self, folder):
        self.prefix = f't{os.getpid() % 10000}'
        self.names = [f'{self.prefix}h{i}' for i in (1, 2)]
        self.file = folder / 'hostfile'
        self.file.write_text('10.77.0.1 slots=2\n10.77.0.2 slots=2\n')
        self.agent = folder / 'agent'
        self.agent.write_text(_AGENT.format(prefix=self.prefix))
        self.agent.chmod(0o755)

    def up(self):
        sh(f'ip link add {self.prefix}b type bridge && ip link set {self.prefix}b up')
        for i, name in enumerate(self.names, 1):
            sh(f'ip netns add {name}')
            sh(f'ip link add {self.prefix}v{i} type veth peer name eth0 netns {name}')
            sh(f'ip link set {self.prefix}v{i} master {self.prefix}b up')
            sh(f'ip -n {name} addr add 10.77.0.{i}/24 dev eth0')
            sh(f'ip -n {name} link set eth0 up && ip -n {name} link set lo up')
        sh(f'ip netns exec {self.names[0]} unshare -u true')

    def down(self):
        for name in self.names:
            subprocess.run(['ip', 'netns', 'del', name], check=False, capture_output=True)
        subprocess.run(['ip', 'link', 'del', f'{self.prefix}b'], check=False, capture_output=True)

    def cut_off(self, i):
        sh(f'ip link set {self.prefix}v{i} down')

    def connect(self, i):
        sh(f'ip link set {self.prefix}v{i} up')

    def processes(self):
        return [sh(f'ip netns pids {name}').stdout.split() for name in self.names]


@pytest.fixture(scope='module')
def hosts(tmp_path_factory):
    made = Hosts(tmp_path_factory.mktemp('hosts'))
    try:
        try:
            made.up()
        except (subprocess.CalledProcessError, OSError) as error:
            pytest.skip(f'may not make network namespaces: {getattr(error, "stderr", error)}')
        yield made
    finally:
        made.down()


@pytest.fixture(scope='module')
def start(root_of_project, job_environment):
    """``start(host, out, *words)``: run_mpi.sh with these words on a host; says OUT.txt."""

    def run(hosts, out, *words):
        name = hosts.names[0]
        environment = {
            **job_environment,
            'VENV': sys.prefix,
            'PRTE_MCA_plm_ssh_agent': str(hosts.agent),
            'REPRODUCE_TEST': os.environ['REPRODUCE_TEST'],
        }
        del environment['PRTE_MCA_rmaps_default_mapping_policy']  # it would fill the first host
        command = ['ip', 'netns', 'exec', name, 'unshare', '-u', 'sh', '-c']
        command += [f'hostname {name}; exec "$@"', 'sh', str(root_of_project / 'run_mpi.sh')]
        with open(f'{out}.txt', 'a') as said:
            return subprocess.Popen(
                [*command, *map(str, words)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
            )

    return run


def train_on(hosts, out, *options, n=4):
    """Words for run_mpi.sh: on both hosts, or on the first alone."""
    where = ('--hostfile', hosts.file) if n == 4 else ()
    return ('-n', n, *where, '--', SHALLOW, out, *OPTIONS, *options)


def digests_of(out):
    return json.loads((out / 'digests.json').read_text())


def test_two_hosts_give_the_bits_of_one_and_a_host_cut_off_loses_nothing(hosts, start, tmp_path):
    one, two, out = (tmp_path / name for name in ('one', 'two', 'out'))
    assert start(hosts, one, *train_on(hosts, one, n=2)).wait(100) == 0
    assert start(hosts, two, *train_on(hosts, two)).wait(100) == 0, Path(f'{two}.txt').read_text()
    said = Path(f'{two}.txt').read_text()
    assert '4 processes x 1, on 2 host(s)' in said, said
    assert digests_of(two) == digests_of(one)

    seldom = ('--checkpoint-every', '0.01m', '--watchdog', '10')
    job = start(hosts, out, *train_on(hosts, out, *seldom))
    deadline = time.monotonic() + 60
    while not list((out / 'checkpoints').glob('checkpoint-*.npz')):
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.05)
    hosts.cut_off(2)
    cut = time.monotonic()
    # The watchdog's time, and the five seconds that Open MPI is given for its own way out.
    assert job.wait(30) not in (0, None)
    seconds = time.monotonic() - cut
    print(f'host cut off, --watchdog 10: ended after {seconds:.1f} s')
    assert seconds < 10 + 5 + 5
    said = Path(f'{out}.txt').read_text()
    second = hosts.names[1]
    named = (
        rf'^error: nothing has moved .*no sign of life .*: rank 2 on {second}, rank 3 on {second}'
    )
    assert re.search(named, said, re.MULTILINE), said
    while time.monotonic() < cut + 20 and any(hosts.processes()):
        time.sleep(0.2)
    assert hosts.processes() == [[], []]
    hosts.connect(2)

    assert start(hosts, out, *train_on(hosts, out, '--resume', 'auto', n=2)).wait(100) == 0
    assert digests_of(out) == digests_of(one)


def test_the_preflight_looks_at_every_host(hosts, start, tmp_path):
    out = tmp_path / 'out'
    words = ('-n', 4, '--hostfile', hosts.file, '--', *OPTIONS, '--out', out)
    assert start(hosts, out, 'preflight', *words).wait(60) == 0
    said = Path(f'{out}.txt').read_text()
    for name in hosts.names:
        assert re.search(rf'^ *{name}  +2  ', said, re.MULTILINE), said
    assert said.endswith('ready\n')


def test_a_rank_killed_on_the_other_host_ends_the_job(hosts, start, tmp_path):
    out = tmp_path / 'out'
    job = start(hosts, out, *train_on(hosts, out, '--checkpoint-every', '0.01m'))
    deadline = time.monotonic() + 60
    while not list((out / 'checkpoints').glob('checkpoint-*.npz')):
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.05)
    ranks = [
        process
        for process in hosts.processes()[1]
        if Path(f'/proc/{process}/cmdline').read_bytes().count(b'shallow.py')
        and b'OMPI_COMM_WORLD_RANK=3' in Path(f'/proc/{process}/environ').read_bytes()
    ]
    os.kill(int(ranks[0]), signal.SIGKILL)
    killed = time.monotonic()
    assert job.wait(20) != 0
    print(f'kill -9 on the other host: ended after {time.monotonic() - killed:.1f} s')
    assert time.monotonic() - killed < 10
