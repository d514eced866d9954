"""The parent of mpiexec: the command that goes on, and what is left out of its output."""

import subprocess
import sys

import pytest

from reproduce.job import launch


@pytest.mark.parametrize(
    ('words', 'start', 'expected'),
    [
        ('--preset smoke', 'S train --', 'S train -- --preset smoke --resume auto'),
        ('--preset smoke --out a --seed 3', 'S smoke', 'S smoke --out a --seed 3 --resume auto'),
        ('--overwrite --out b', 'S --', 'S -- --out b --resume auto'),
        ('--resume c --out b', 'S --', 'S -- --out b --resume auto'),
        ('--resume=c --out b', 'S --', 'S -- --out b --resume auto'),
        ('--out b --resume', 'S --', 'S -- --out b --resume auto'),
    ],
)
def test_the_command_that_goes_on(words, start, expected):
    assert launch.command_to_go_on(['train.py', *words.split()], start) == expected


def test_the_command_of_a_bare_mpiexec(monkeypatch):
    monkeypatch.delenv('REPRODUCE_GO_ON', raising=False)
    monkeypatch.setattr('sys.argv', ['reproduce/train.py', '--out', 'a b'])
    command = launch.command_to_go_on(n_processes=4)
    assert command.startswith('mpiexec -n 4 python')
    assert command.endswith(" reproduce/train.py --out 'a b' --resume auto")
    monkeypatch.setenv('REPRODUCE_GO_ON', './run_mpi.sh smoke')
    assert launch.command_to_go_on() == './run_mpi.sh smoke'


@pytest.mark.parametrize('size', [1, 7, 1000])
def test_mpiexecs_banners_are_left_out_however_the_output_is_cut(size):
    dashes = b'-' * 74 + b'\n'
    said = b'one\n' + dashes + b'prterun ...\n\nmore\n' + dashes + b'\0two\n-- no banner --\nthree'
    banners = launch._Banners()
    parts = [said[i : i + size] for i in range(0, len(said), size)]
    assert b''.join(map(banners.drop, [*parts, b''])) == b'one\ntwo\n-- no banner --\nthree\n'


def test_the_byte_of_zero_after_a_banner_is_left_out():
    said = 'import os; os.write(1, b"a\\0b\\n"); os.write(2, b"-" * 74 + b"\\n\\0error\\n\\0")'
    command = [sys.executable, '-I', launch.__file__, '', '', sys.executable, '-Ic', said]
    done = subprocess.run(command, capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b'a\0b\n', b'-' * 74 + b'\nerror\n')
