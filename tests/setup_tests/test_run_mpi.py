"""run_mpi.sh: the words of a command line, and what they start."""

import ast
import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import Tree, job, only_error

from reproduce.settings import Settings


def test_smoke(tree):
    done, words = job(tree, 'smoke', '--seed', '3')
    assert words[:2] == ['-n', '2']
    program = words.index(f'{tree.path}/reproduce/train.py')
    assert words[program - 2 : program] == [f'{tree.path}/.venv/bin/python', '-I']
    expected = ['--preset', 'smoke', '--seed', '3']
    assert words[program + 1 : program + 5] == expected
    assert words[-3:] == ['MKL_NUM_THREADS=1', 'OMP_NUM_THREADS=1', 'OPENBLAS_NUM_THREADS=1']
    printed = done.stderr.strip().splitlines()[-1]
    assert 'OMP_NUM_THREADS=1' in printed and printed.endswith('--preset smoke --seed 3')
    again = subprocess.run(['/bin/bash', '-c', printed], capture_output=True, text=True, check=True)
    assert again.stdout == done.stdout, 'the printed command does not do the same'


def test_smoke_takes_the_place_that_was_found_for_it(tree):
    _, words = job(
        tree, 'smoke', '--seed', '3', FAKE_FOUND='2 /x/smoke-2 --out smoke-2 --resume auto'
    )
    given = '--preset smoke --out smoke-2 --resume auto --seed 3'.split()
    program = words.index(f'{tree.path}/reproduce/train.py')
    assert words[program + 1 : program + 1 + len(given)] == given
    out, start = (tree.path.parent / 'log.launch').read_text().splitlines()
    assert out == '/x/smoke-2' and shlex.split(start) == [f'{tree.path}/run_mpi.sh', 'smoke']


@pytest.mark.parametrize(
    'words, out, start',
    [
        ('-n 3 smoke', '/x', '-n 3 smoke'),
        ('train -n 3 -- --epochs 4', '/x', 'train -n 3 --'),
        ('-n 3 -- --epochs 4', '/x', 'train -n 3 --'),
        ('preflight -n 3', '', 'preflight -n 3 --'),
        ('-n 3 -- my.py --epochs 4', '', 'train -n 3 --'),
    ],
)
def test_what_the_parent_of_mpiexec_gets_to_know(tree, words, out, start):
    assert tree.run(*words.split(), FAKE_FOUND='3 /x' if out else '').returncode == 0
    found, command = (tree.path.parent / 'log.launch').read_text().split('\n')[:2]
    assert found == out and shlex.split(command)[1:] == start.split()


def test_smoke_takes_the_number_of_processes_that_was_found_for_it(tree):
    for words, n in (('smoke', 1), ('-n 3 smoke', 3)):
        found = '1 /x --workers 2 --out /x'
        _, asked = job(tree, *words.split(), FAKE_FOUND=found)
        assert asked[asked.index('-n') + 1] == f'{n}' and asked.count('-n') == 1


def test_smoke_with_dashes(tree):
    plain = tree.run('smoke', '--epochs', '3', '--seed', '2').stdout
    for line in ('smoke -- --epochs 3 --seed 2', 'smoke --epochs 3 -- --seed 2'):
        assert tree.run(*line.split()).stdout == plain


def test_smoke_on_more_ranks_than_there_can_be_cores(tree):
    _, words = job(tree, '-n', '5000', 'smoke')
    assert words[:2] == ['-n', '5000'] and ':OVERSUBSCRIBE' in words
    assert ':OVERSUBSCRIBE' not in job(tree, '-n', '1', 'smoke')[1]


def test_threads_are_not_taken_for_cores(tree):
    tools = tree.path.parent / 'tools'
    tools.mkdir()
    tree.executable(tools / 'nproc', '#!/bin/bash\necho ${OMP_NUM_THREADS:-8}\n')
    tree.executable(
        tools / 'lscpu', '#!/bin/bash\nprintf "%s\\n" 0,0 0,0 1,0 1,0 2,0 2,0 3,0 3,0\n'
    )
    path = f'{tools}:/usr/bin:/bin'
    assert ':OVERSUBSCRIBE' not in job(tree, '-n', '4', 'smoke', PATH=path)[1]
    assert ':OVERSUBSCRIBE' in job(tree, '-n', '5', 'smoke', PATH=path)[1]


def test_binding(tree):
    """Open MPI's own for two ranks is one core each, which image loaders would have to share."""
    for arguments in ['-n 2 -- -h', '-n 4 -- -h', '-n 2 --host a,b -- -h']:
        assert '--bind-to\nnone' in tree.run(*arguments.split()).stdout, arguments
    words = job(tree, *'-n 2 --bind-to core -- -h'.split())[1]
    assert words.count('--bind-to') == 1 and 'none' not in words


def test_root(tree):
    is_root = os.getuid() == 0
    assert ('--allow-run-as-root' in job(tree, 'smoke')[1]) == is_root
    assert ('OMPI_ALLOW_RUN_AS_ROOT_CONFIRM' in tree.environment()) == is_root


def test_one_process_unless_said(tree):
    assert job(tree, '--', '--dry-run')[1][:2] == ['-n', '1']
    assert '-n' not in job(tree, '--host', 'a,b', '--', '--dry-run')[1]


def test_environment_of_the_job(tree):
    tree.run('smoke', LD_LIBRARY_PATH='/mine')
    environment = tree.environment()
    assert environment['PATH'].startswith(f'{tree.path}/.venv/bin:')
    assert environment['LD_LIBRARY_PATH'] == '/mine'


def test_the_papers_run(tree, root):
    hosts = str(root / 'hostfiles' / 'mn1')
    arguments = '-- --preset paper --train-root T --val-root'.split()
    _, words = job(
        tree,
        *('-n', '1024', '--hostfile', hosts, *arguments, 'a b'),
        NCCL_DEBUG='INFO',
        NVIDIA_TF32_OVERRIDE='1',
        SECRET='x',
        IMAGENET_ROOT='/i',
    )
    assert words[:4] == ['-n', '1024', '--hostfile', hosts]
    passed = {words[i + 1] for i, word in enumerate(words) if word == '-x'}
    assert {
        'NCCL_DEBUG',
        'NVIDIA_TF32_OVERRIDE',
        'IMAGENET_ROOT',
        'PATH',
        'OMP_NUM_THREADS',
    } <= passed
    assert 'SECRET' not in passed
    assert ':OVERSUBSCRIBE' not in words and '--bind-to' not in words
    program = words.index(f'{tree.path}/reproduce/train.py')
    assert words[
        program + 1 : program + 7
    ] == '--preset paper --train-root T --val-root'.split() + ['a b']


def test_threads_that_the_user_chose(tree):
    _, words = job(tree, 'smoke', OMP_NUM_THREADS='4')
    assert 'OMP_NUM_THREADS=4' in words and 'OPENBLAS_NUM_THREADS=1' in words


def test_open_mpi_gives_a_host_up_later_than_the_watchdog(tree):
    """On its own, Open MPI ends a job whose host is cut off, with status 0."""
    job(tree, 'smoke')
    name = 'PRTE_MCA_oob_tcp_keepalive_probes'
    ours = {name: tree.environment()[name]}
    prte_info = Path(sys.executable).with_name('prte_info')
    if not prte_info.exists():
        pytest.skip('needs the prte_info of Open MPI 5')
    said = subprocess.run(
        [prte_info, '--all'],
        env={**os.environ, **ours},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = re.findall(r'"oob_tcp_keepalive_(\w+)" \(current value: "(\d+)"', said)
    seconds = {what: int(value) for what, value in found}
    patience = seconds['time'] + seconds['intvl'] * seconds['probes']
    assert patience > 2 * Settings().watchdog, seconds
    job(tree, 'smoke', **{name: '7'})
    assert tree.environment()[name] == '7'  # the user's own


@pytest.mark.parametrize('status', ['0', '2', '37'])
def test_status_of_the_job_is_returned(tree, status):
    assert tree.run('smoke', FAKE_STATUS=status).returncode == int(status)


def test_another_mpi_gets_no_options_of_open_mpi(tmp_path, root):
    tree = Tree(tmp_path, root, version='HYDRA build details: Version: 4.2')
    _, words = job(tree, '-n', '5000', 'smoke')
    assert words[:3] == ['-n', '5000', f'{tree.path}/.venv/bin/python']


def table(root, name):
    """A table of run_mpi.sh: verb to text."""
    text = (root / 'run_mpi.sh').read_text()
    rows = re.search(rf'declare -A {name}=\(\n(.*?)\n\)', text, re.DOTALL).group(1)
    return {verb: words.strip("'") for verb, words in re.findall(r'\[(\w+)\]=(.*)', rows)}


def verbs(root, kinds=('jobs', 'programs')):
    text = (root / 'run_mpi.sh').read_text()
    return [
        verb
        for kind in kinds
        for verb in re.search(rf'^{kind}=\((.*)\)$', text, re.MULTILINE).group(1).split()
    ]


PROGRAMS = {
    'test -k a': ['-m pytest -k a'],
    'lint': ['-m ruff check .', '-m ruff format --check .', '-m mypy'],
    'benchmark update --repeat 3': ['-I -m reproduce.studies.speed update --repeat 3'],
    'figures runs A B': ['-I -m reproduce.studies.figures runs A B'],
    'cluster --cluster mn1': ['-I -m reproduce.studies.cluster --cluster mn1'],
    'miniature --seeds 1': ['-I -m reproduce.studies.miniature --seeds 1'],
    'images check DIR': ['-I -m reproduce.studies.image_commands check DIR'],
    'invariance': ['-I -m reproduce.studies.invariance'],
    'gpu-check --seconds 60': ['-I -m reproduce.studies.gpu_check --seconds 60'],
    'twin train --preset smoke': ['-I -m reproduce.twin train --preset smoke'],
    'twin compare --restart': ['-I -m reproduce.twin compare --restart'],
    'bundle DIR --python 3.12': ['-I -m reproduce.job.bundle DIR --python 3.12'],
    'python -c 1': ['-c 1'],
    # Their own help, not that of run_mpi.sh.
    'test --help': ['-m pytest --help'],
    'benchmark --help': ['-I -m reproduce.studies.speed --help'],
    'figures -h': ['-I -m reproduce.studies.figures -h'],
    'cluster --help': ['-I -m reproduce.studies.cluster --help'],
    'miniature --help': ['-I -m reproduce.studies.miniature --help'],
    'images --help': ['-I -m reproduce.studies.image_commands --help'],
    'images check --help': ['-I -m reproduce.studies.image_commands check --help'],
    'invariance --help': ['-I -m reproduce.studies.invariance --help'],
    'twin --help': ['-I -m reproduce.twin --help'],
    'twin train --help': ['-I -m reproduce.twin train --help'],
    'gpu-check --help': ['-I -m reproduce.studies.gpu_check --help'],
    'bundle --help': ['-I -m reproduce.job.bundle --help'],
    'python --help': ['--help'],
}
JOBS = {
    'smoke --epochs 3': ('-n 2', '-I train.py --preset smoke --epochs 3'),
    '-n 3 smoke': ('-n 3', '-I train.py --preset smoke'),
    '--oversubscribe smoke': ('-n 2 --oversubscribe', '-I train.py --preset smoke'),
    'smoke --help': ('-n 1', '-I train.py --preset smoke --help'),
    '-n 4 smoke --epochs 3 -h': (
        '-n 1',
        '-I train.py --preset smoke --epochs 3 --help',
    ),
    'train -- --epochs 3': ('-n 1', '-I train.py --epochs 3'),
    'train -n 3 -- --epochs 3': ('-n 3', '-I train.py --epochs 3'),
    '-n 3 train -- --epochs 3': ('-n 3', '-I train.py --epochs 3'),
    '-n 3 -- --epochs 3': ('-n 3', '-I train.py --epochs 3'),
    '-n 3 --': ('-n 3', '-I train.py'),
    'train --help': ('-n 1', '-I train.py --help'),
    'train -n 4 -h -- --epochs 3': ('-n 1', '-I train.py --epochs 3 --help'),
    '-- --help': ('-n 1', '-I train.py --help'),
    'train -n 2 -- FILE.py -n two': ('-n 2', 'FILE.py -n two'),
    '-n 2 -- -m MODULE --hostfile x': ('-n 2', '-m MODULE --hostfile x'),
    'preflight': ('-n 1', '-I -m reproduce.job.preflight'),
    'preflight -n 3': ('-n 3', '-I -m reproduce.job.preflight'),
    'preflight -n 3 -- --epochs 3': ('-n 3', '-I -m reproduce.job.preflight --epochs 3'),
    '-n 3 preflight --bind-to core -- --seed 3': (
        '-n 3 --bind-to core',
        '-I -m reproduce.job.preflight --seed 3',
    ),
    'preflight --help': ('-n 1', '-I -m reproduce.job.preflight --help'),
    # Values that look like verbs or like options of train.py, and options that only mpiexec knows.
    '-n 2 --host test -- --seed 1': ('-n 2 --host test', '-I train.py --seed 1'),
    '--host smoke --np=2 -- --seed 1': ('--host smoke --np=2', '-I train.py --seed 1'),
    '-n 2 --mca lint python -x cluster -- -h': (
        '-n 2 --mca lint python -x cluster',
        '-I train.py -h',
    ),
    '-n 2 --unheard-of test --other -- -h': ('-n 2 --unheard-of test --other', '-I train.py -h'),
}


@pytest.mark.parametrize('line', PROGRAMS)
def test_each_program_is_started_where_the_user_is(tree, line):
    assert tree.run(*line.split()).returncode == 0
    assert tree.calls()[5:] == PROGRAMS[line]
    environment = tree.environment()
    ours = line.split()[0] in ('test', 'lint')
    assert environment['PWD'] == (str(tree.path) if ours else '/')
    assert environment['OMP_NUM_THREADS'] == '1'
    assert environment['PATH'].startswith(f'{tree.path}/.venv/bin:')


@pytest.mark.parametrize('line', JOBS)
def test_each_job(tree, line):
    options, program = JOBS[line]
    done, words = job(tree, *line.split())
    assert done.returncode == 0
    assert words[: len(options.split())] == options.split()
    python = words.index(f'{tree.path}/.venv/bin/python')
    said = ' '.join(words[python + 1 : -3]).replace(f'{tree.path}/reproduce/', '')
    assert said == program


def test_no_verb_is_untested(root):
    started = {word for line in [*PROGRAMS, *JOBS] for word in line.split('--')[0].split()}
    assert set(verbs(root)) <= started


def test_modules_are_there(root):
    modules = {*table(root, 'module').values(), 'reproduce.job.preflight'}
    for path in (root / module.replace('.', '/') for module in modules):
        assert path.with_suffix('.py').exists() or (path / '__main__.py').exists(), path
    assert set(table(root, 'names')) < set(table(root, 'module')) < set(verbs(root))


def calls_in(tree, method):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, 'attr', '') == method:
            yield node


def test_names_are_those_of_the_modules(root):
    studies = root / 'reproduce' / 'studies'
    sources = {
        name: ast.parse((studies / name).read_text())
        for name in ('speed/__main__.py', 'figures.py', 'image_commands.py')
    }
    benchmarks = [
        name
        for node in sources['speed/__main__.py'].body
        if isinstance(node, ast.Assign) and node.targets[0].id in ('MODULES', 'STUDIES')
        for name in ast.literal_eval(node.value)
    ]
    figures = next(
        ast.literal_eval(keyword.value)
        for call in calls_in(sources['figures.py'], 'add_argument')
        for keyword in call.keywords
        if keyword.arg == 'choices' and not call.args[0].value.startswith('-')
    )
    images = [call.args[0].value for call in calls_in(sources['image_commands.py'], 'add_parser')]
    names = {verb: words.split() for verb, words in table(root, 'names').items()}
    text = (root / 'reproduce' / 'twin' / '__main__.py').read_text()
    twin = re.search(r'^NAMES = (.*)$', text, re.MULTILINE).group(1)
    expected = {'benchmark': benchmarks, 'figures': [*figures], 'images': images}
    assert names == {**expected, 'twin': [*ast.literal_eval(twin)]}


# What is typed, and what the one line says. {here} is a folder.
WRONG = {
    # The dashes were forgotten: the line has the whole command.
    '--preset smoke': 'come after "--": ./run_mpi.sh train -- --preset smoke$',
    '--epochs=3': 'come after "--": ./run_mpi.sh train -- --epochs=3$',
    '--dry-run': 'come after "--": ./run_mpi.sh train -- --dry-run$',
    'train --epochs 3': 'come after "--": ./run_mpi.sh train -- --epochs 3$',
    '-n 2 --preset smoke': 'come after "--": ./run_mpi.sh train -n 2 -- --preset smoke$',
    '--seed 3 -n 2': 'come after "--": ./run_mpi.sh train -n 2 -- --seed 3$',
    '--no-horizontal-flip -n 2': './run_mpi.sh train -n 2 -- --no-horizontal-flip$',
    'preflight --preset smoke': './run_mpi.sh preflight -- --preset smoke$',
    '-n 2 preflight --seed 3': './run_mpi.sh preflight -n 2 -- --seed 3$',
    '-n 2 --preset smoke -- --epochs 3': './run_mpi.sh train -n 2 -- --epochs 3 --preset smoke$',
    'train smoke --seed 3': './run_mpi.sh train -- --preset smoke --seed 3$',
    '-n 2 --seed 3 smoke --epochs 2': 'after "smoke": ./run_mpi.sh -n 2 smoke --seed 3 --epochs 2$',
    'smoke --seed 3 -n 4': 'of mpiexec come before "smoke": ./run_mpi.sh -n 4 smoke --seed 3$',
    'smoke -n 4 -- --seed 3': './run_mpi.sh -n 4 smoke --seed 3$',
    'train': 'nothing to run; .* as in ./run_mpi.sh train -- --preset smoke$',
    '-n 2': 'nothing to run; .* as in ./run_mpi.sh train -n 2 -- --preset smoke$',
    '--epoch 3': '"--epoch" .* come after "--"',
    '-n 2 my.py --x 3': 'comes after "--": ./run_mpi.sh train -n 2 -- my.py --x 3$',
    'my.py': 'comes after "--": ./run_mpi.sh train -- my.py$',
    '-n 2 -m MODULE -- 3': 'comes after "--": ./run_mpi.sh train -n 2 -- -m MODULE 3$',
    'train cifar10': '"cifar10" cannot stand there.* come after "--"',
    # The number of processes.
    '-n': '-n needs the number of processes, as in "-n 2"$',
    '-n -- --seed 3': '-n needs the number of processes, as in "-n 2"$',
    '-n --oversubscribe smoke': '-n needs the number of processes, as in "-n 2"$',
    '-n smoke': '-n needs the number .*, not "smoke"$',
    '-n two smoke': '-n needs the number .*, not "two"$',
    '-n=two smoke': '-n needs the number .*, not "two"$',
    '-n 0 smoke': '-n needs the number .*, not "0"$',
    '-n -1 -- --seed 3': '-n needs the number .*, not "-1"$',
    'preflight -np 2.5': '-np needs the number .*, not "2.5"$',
    '--np two -- --seed 3': '--np needs the number of processes, as in "--np 2", not "two"$',
    '--n= -- --seed 3': '--n needs the number of processes',
    'train -c x -- --seed 3': '-c needs the number .*, not "x"$',
    # The file of hosts.
    '--hostfile no/where -- --seed 3': '--hostfile no/where: no such file',
    '--hostfile={here}/hosts smoke': '--hostfile {here}/hosts: no such file',
    '-hostfile {here} smoke': '-hostfile {here}: no such file',
    'preflight --machinefile hosts': '--machinefile hosts: no such file',
    '--hostfile': '--hostfile needs a file',
    '--hostfile -- --seed 3': '--hostfile needs a file',
    'train -hostfile -n 2 -- --seed 3': '-hostfile needs a file',
    '--map-by': '--map-by needs a value$',
    # Names.
    'benchmark': 'benchmark needs a name first.* update .* accumulation$',
    'benchmark --repeat 3 update': 'benchmark needs a name first.* update .* accumulation$',
    'benchmark updat': 'has no "updat". Did you mean "update"?.* update .* accumulation$',
    'figures': 'figures needs a name first.*: schedules comparison mlperf runs .* iteration$',
    'figures run A': 'has no "run". Did you mean "runs"?.*: schedules .* iteration$',
    'images': 'images needs a name first.*: check arrange$',
    'twin': 'twin needs a name first.*: train compare$',
    'images xyz': 'images has no "xyz". ./run_mpi.sh images NAME.*: check arrange$',
    # Verbs.
    'smok': 'no verb "smok". Did you mean "smoke"\\? ./run_mpi.sh --help lists all verbs$',
    'bench': 'no verb "bench". Did you mean "benchmark"\\? ./run_mpi.sh --help lists all verbs$',
    'xyz': 'no verb "xyz". ./run_mpi.sh --help lists all verbs$',
    '-n 4 smok': 'no verb "smok". Did you mean "smoke"',
    '-n 4 test -k a': 'test takes no options before it: ./run_mpi.sh test -k a$',
    '-n 4 images check DIR': 'images takes no options before it: ./run_mpi.sh images check DIR$',
    '-n 4 python my.py 3': 'python starts one process.*: ./run_mpi.sh train -n 4 -- my.py 3$',
    'lint reproduce': 'lint takes no options: ./run_mpi.sh lint$',
    '--test': '"--test" .* Verbs have no dashes',
}


@pytest.mark.parametrize('line', WRONG)
def test_a_wrong_command_line_gets_one_line_before_anything_starts(tree, tmp_path, line):
    done = tree.run(*line.format(here=tmp_path).split())
    message = only_error(done)
    assert re.search(WRONG[line].format(here=re.escape(str(tmp_path))), message), message
    assert done.stdout == '' and tree.calls() == [] and not (tree.path / '.venv').exists()


def test_every_option_of_train_py_is_known(tree):
    """Their names are read from the source of the settings."""
    from reproduce.settings import Settings

    words = ['--dry-run']
    for field in dataclasses.fields(Settings):
        name = field.name.replace('_', '-')
        if isinstance(field.default, bool):
            words += [f'--{name}', f'--no-{name}']
        else:
            words += [f'--{name}', 'smoke']  # a value that would be a verb elsewhere
    message = only_error(tree.run('-n', '2', *words))
    assert message.endswith(f': ./run_mpi.sh train -n 2 -- {" ".join(words)}')


def test_commands_that_are_proposed_can_be_pasted(tree):
    message = only_error(tree.run('-n', '2', '--out', "Anna's run", '--seed', '3'))
    command = shlex.split(message.split(': ')[-1])
    assert command[1:] == ['train', '-n', '2', '--', '--out', "Anna's run", '--seed', '3']
    assert "Anna's run" in job(tree, *command[1:])[1]


def test_an_unknown_verb_and_a_real_python(tree):
    assert 'Did you mean "smoke"?' in only_error(tree.run('smok', PYTHON=sys.executable))


def test_an_unknown_verb_without_python(tree):
    message = only_error(tree.run('smok', PYTHON='/nowhere/python'))
    assert message == 'error: there is no verb "smok". ./run_mpi.sh --help lists all verbs'


HELP = [[], ['--help'], ['-h'], ['help'], ['-n', '4', '--help'], ['lint', '--help']]


@pytest.mark.parametrize('arguments', HELP)
def test_help_installs_nothing(tree, arguments):
    done = tree.run(*arguments)
    assert done.returncode == 0 and './run_mpi.sh smoke' in done.stdout and not done.stderr
    assert tree.calls() == [] and not (tree.path / '.venv').exists()


def test_help_has_one_line_for_each_verb(tree, root):
    lines = tree.run('--help').stdout.split('\nNames:')[0].splitlines()
    listed = [line.split()[0] for line in lines if re.match(r'  [\w-]+ +\w', line)]
    assert sorted(listed) == sorted([*verbs(root), 'help'])
    assert len(listed) >= 12 and max(map(len, lines)) <= 90


def test_hostfiles(root, tmp_path):
    hosts = [
        line.split()
        for line in (root / 'hostfiles' / 'mn1').read_text().splitlines()
        if line[0] != '#'
    ]
    assert len({name for name, _ in hosts}) == 128 and {slots for _, slots in hosts} == {'slots=8'}
    command = "sed -i 's/^mn1-/node/' hostfiles/mn1"
    assert command in (root / 'hostfiles' / 'README.md').read_text()
    (tmp_path / 'hostfiles').mkdir()
    shutil.copy(root / 'hostfiles' / 'mn1', tmp_path / 'hostfiles')
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert 'node001 slots=8' in (tmp_path / 'hostfiles' / 'mn1').read_text().splitlines()


@pytest.mark.parametrize(
    'words, checked',
    [
        ('smoke --seed 3', ' / smoke --seed 3'),
        ('train -n 3 -- --epochs 4', '3 / train --epochs 4'),
        ('-- --dry-run', '1 / train --dry-run'),
        ('preflight -n 5 -- --seed 1', '5 / preflight --seed 1'),
    ],
)
def test_options_are_checked_before_mpiexec_starts(tree, words, checked):
    done = tree.run(*words.split(), FAKE_OPTIONS_STATUS='2')
    assert done.returncode == 2 and done.stdout == ''
    # Isolated: in the user's folder there may be packages called as the project's are.
    assert (tree.path.parent / 'log.options').read_text() == f'{checked}\n'
    assert tree.run(*words.split()).stdout  # of mpiexec


@pytest.mark.parametrize('words', ['-n 2 -- my.py --epoch 3', '-n 2 -- -m mine', 'smoke --help'])
def test_nothing_else_is_checked(tree, words):
    assert tree.run(*words.split(), FAKE_OPTIONS_STATUS='2').returncode == 0
