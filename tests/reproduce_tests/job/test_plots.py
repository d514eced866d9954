"""What curves.png shows, in every shell, read back from its lines; what it leaves in memory."""

import gc
import os
import subprocess
import sys
import types

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from reproduce.job import plots, report
from reproduce.settings import Settings

LOG = [
    {
        'epoch': epoch,
        'main/loss': 5.0 - epoch,
        'main/accuracy': epoch / 7,
        'validation/main/loss': 7.0 - 2 * epoch,
        'validation/main/accuracy': epoch / 10,
        'validation/main/top5_accuracy': epoch / 5,
        'lr': 0.1 * epoch,
        'alpha_sgd': epoch / 4,
        'alpha_rmsprop': epoch / 8,
    }
    for epoch in (1, 2, 3)
]
SETTINGS = Settings(epochs=3)


def test_the_curves_are_those_of_the_log_and_of_the_schedules(monkeypatch, tmp_path):
    drawn = []
    save = plots.save
    monkeypatch.setattr(
        plots, 'save', lambda figure, path: (drawn.extend(figure.axes), save(figure, path))
    )
    plots.curves(LOG, SETTINGS, str(tmp_path))
    assert Image.open(tmp_path / 'curves.png').size == (1350, 900)
    loss, top1, lr, alpha = drawn
    points = {line.get_label(): line.get_xydata().tolist() for line in loss.lines}
    assert points == {
        'training': [[1, 4], [2, 3], [3, 2]],
        'validation': [[1, 5], [2, 3], [3, 1]],
    }
    [line] = top1.lines
    np.testing.assert_allclose(line.get_xydata(), [[1, 10], [2, 20], [3, 30]])
    assert top1.get_title() == 'validation top-1 (%), last 30.00'
    for axis, used, moments in (
        (lr, [0.1, 0.2, 0.3], {0.5: 6.4, 1.5: 0.96, 2.5: 0.128}),
        (alpha, [0.25, 0.5, 0.75], {0.0: np.exp(-4) / 2, 1 / 3: 0.5, 1: 1.0}),
    ):
        schedule, dots = axis.lines
        np.testing.assert_allclose(dots.get_ydata(), used)
        for epoch, value in moments.items():
            found = np.interp(epoch, *schedule.get_data())
            assert found == pytest.approx(value, abs=2e-3), (axis.get_title(), epoch)


def test_figures_do_not_gather_in_memory(tmp_path):
    """A run of days draws thousands, of 9 MB each. Matplotlib itself keeps the last one."""
    curves = report.Curves(SETTINGS, types.SimpleNamespace(log=LOG))
    gc.disable()  # whenever Python would look for cycles
    try:
        for _ in range(3):
            curves(types.SimpleNamespace(out=str(tmp_path)))
        assert (tmp_path / 'curves.png').exists()
        assert sum(isinstance(thing, Figure) for thing in gc.get_objects()) <= 1
    finally:
        gc.enable()


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
