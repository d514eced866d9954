"""The plots of a run, whatever the user's shell says of matplotlib."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
from reproduce.job import plots
from reproduce.job.options import parse
keys = 'main/loss validation/main/loss validation/main/accuracy lr alpha_sgd'.split()
log = [{'epoch': i, **dict.fromkeys(keys, 0.5)} for i in (1, 2)]
plots.curves(log, parse(['--preset', 'smoke'], 2)[0], '.')
"""


def curves(root, folder, **variables):
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, 'PYTHONPATH': str(root), **variables}
    subprocess.run([sys.executable, '-c', PROGRAM], cwd=folder, env=environment, check=True)
    return (folder / 'curves.png').read_bytes()


@pytest.fixture(scope='module')
def plain(root_of_project, tmp_path_factory):
    return curves(root_of_project, tmp_path_factory.mktemp('plain'))


@pytest.mark.parametrize(
    'backend', ['module://matplotlib_inline.backend_inline', 'of an older release', 'TkAgg']
)
def test_curves_are_the_same_in_every_shell(root, tmp_path, plain, backend):
    (tmp_path / 'matplotlibrc').write_text('text.usetex: True\nfont.size: 30\nbackend: TkAgg\n')
    assert curves(root, tmp_path, MPLBACKEND=backend) == plain
