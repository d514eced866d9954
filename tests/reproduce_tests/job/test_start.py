"""The first lines of a rank: what it needs, and what it leaves behind."""

import io
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from reproduce.job import start


def python(*words, **options):
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, check=False, **options
    )


@pytest.fixture
def plan(root):
    """``plan(folder, environment)`` is what ``train.py --dry-run`` prints there."""
    words = (root / 'reproduce' / 'train.py', '--dry-run', '--preset', 'smoke', '--epochs', '1')
    return lambda folder, **variables: python(*words, cwd=folder, env={**os.environ, **variables})


def test_a_folder_for_temporary_files_with_a_long_name(plan, tmp_path):
    folder = tmp_path / ('x' * 200)
    folder.mkdir()
    done = plan(tmp_path, TMPDIR=str(folder))
    assert done.returncode == 0 and 'eta_base' in done.stdout, done
    assert not [path for path in folder.iterdir() if path.name[:5] != 'ompi.']


def test_other_packages_of_the_same_names(plan, tmp_path, root):
    for package in ('extensions', 'reproduce', 'images'):
        (tmp_path / 'modules' / package).mkdir(parents=True)
        (tmp_path / 'modules' / package / '__init__.py').write_text('raise ImportError')
    done = plan(tmp_path / 'modules', PYTHONPATH=str(tmp_path / 'modules'))
    assert done.returncode == 0 and 'eta_base' in done.stdout, done


def test_an_empty_folder_of_the_same_name(tmp_path):
    """As the project is installed, "python -m" finds it beside empty folders of its names."""
    for package in ('extensions', 'reproduce'):
        (tmp_path / package).mkdir()
    done = python('-m', 'reproduce.job.options', *'1 . train --epoch 3'.split(), cwd=tmp_path)
    assert 'there is no option --epoch' in done.stderr, done


def test_whatever_chainers_default_dtype_is(tmp_path):
    environment = {**os.environ, 'CHAINER_DTYPE': 'mixed16'}
    program = (
        'from reproduce.job import start; start.before_mpi(); import extensions, chainer; '
        'print(chainer.config.dtype)'
    )
    done = python('-c', program, env=environment, cwd=tmp_path)
    assert done.stdout == 'float32\n', done


def test_without_a_home(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != 'HOME'}
    program = 'from reproduce.job import start; start.before_mpi(); import extensions'
    done = python('-c', program, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done


@pytest.mark.parametrize('missing', ['chainer', 'mpi4py', 'numpy', 'matplotlib'])
def test_a_missing_package_is_named_in_one_line(root, tmp_path, missing):
    [packages] = {Path(path) for path in sys.path if path.endswith('site-packages')}
    for entry in packages.iterdir():
        if entry.name != missing:
            (tmp_path / entry.name).symlink_to(entry)
    words = ('-S', root / 'reproduce' / 'train.py', '--dry-run')
    done = python(*words, env={'PYTHONPATH': str(tmp_path)}, cwd='/')
    assert done.returncode == 1 and done.stdout == ''
    [line] = done.stderr.splitlines()
    assert f"has no package '{missing}': start with ./run_mpi.sh" in line


def test_an_mpi_that_does_not_load_is_named_in_one_line(plan, tmp_path):
    done = plan(tmp_path, MPI4PY_LIBMPI='/nowhere/libmpi.so')
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert 'has a package that fails: cannot load MPI library /nowhere/libmpi.so' in line


@pytest.mark.parametrize('program', ['import extensions', 'import reproduce.train'])
def test_a_process_without_mpiexec_leaves_nothing(tmp_path, program):
    """16 MiB each, which nobody would remove."""
    # In a folder of its own, as other jobs have theirs in /dev/shm.
    environment = {**os.environ, 'OMPI_MCA_btl_sm_backing_directory': str(tmp_path)}
    maps = '; import os; print(open("/proc/self/maps").read()); os.kill(os.getpid(), 9)'
    done = python('-c', program + maps, cwd=tmp_path, env=environment)
    assert done.returncode == -9, done
    assert f'{tmp_path}/sm_segment' in done.stdout  # it was there
    assert not list(tmp_path.glob('sm_segment*'))


def test_the_limit_of_open_files():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
        assert 'a rank may open 200 files' in start.lack_of_files(1024)
        assert not start.lack_of_files(8)
        start._raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(hard, 1 << 16)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_words_before_an_abort_are_read_before_it(monkeypatch, capfd):
    """By the launcher; but a launcher that does not read is not waited for."""
    pipe, end = os.pipe()
    own = os.dup(2)
    os.dup2(end, 2)
    try:
        monkeypatch.setattr('sys.stderr', io.TextIOWrapper(io.FileIO(2, 'w', closefd=False)))
        read = []
        thread = threading.Thread(target=lambda: time.sleep(0.3) or read.append(os.read(pipe, 99)))
        thread.start()
        start.print_before_abort('error: one')
        thread.join(0.1)
        assert read == [b'error: one\n']
        began = time.monotonic()
        start.print_before_abort('error: two')
        assert 0.9 < time.monotonic() - began < 5
    finally:
        os.dup2(own, 2)
