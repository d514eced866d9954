"""What the plots show, read back from their lines, and the command that draws them."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from reproduce.studies import figures


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """``drawn(function, *arguments)`` returns the axes; the file is written, too."""
    saved = []

    def spy(save):
        def saving(figure, path, *alt):
            saved.append(figure.axes)
            save(figure, path, *alt)

        return saving

    monkeypatch.setattr(figures, 'save', spy(figures.save))
    monkeypatch.setattr(figures.style, 'save', spy(figures.style.save))

    def draw(function, *arguments):
        function(*arguments, str(tmp_path))
        [path] = tmp_path.glob('*.png')
        assert Image.open(path).size[0] > 800
        return saved[-1]

    return draw


def line(axis, label):
    [found] = [line for line in axis.lines if line.get_label() == label]
    return lambda x: np.interp(x, *found.get_data())


def test_schedules_of_the_paper(drawn):
    axes = {
        axis.get_title(loc='left').partition(': ')[2]: axis
        for axis in drawn(figures.paper_schedules)
    }
    alpha, alpha_rmsprop = axes['weight of SGD'], axes['weight of RMSprop']
    lr = axes['learning rate, batch 32,768']
    for form, at_12 in (('printed', 1.3), ('continuous', 0.9)):
        assert line(alpha, form)(10) == pytest.approx(0.5, abs=1e-3)
        assert line(alpha, form)(12) == pytest.approx(at_12, abs=1e-3)
        expected = 1e5 * max(0, 1 - at_12) * 3e-4 / 6.4
        assert line(alpha_rmsprop, form)(12) == pytest.approx(expected, abs=1e-3)
    steps, goyal, ours = (line(lr, found.get_label()) for found in lr.lines)
    np.testing.assert_allclose(ours([1, 41, 71, 86]), [6.4, 0.96, 0.128, 0.0128], rtol=1e-6)
    np.testing.assert_allclose(
        goyal([0, 2.5, 29, 31, 61, 81]), [0.1, 6.45, 12.8, 1.28, 0.128, 0.0128]
    )
    np.testing.assert_allclose(steps([0, 31]), [12.8, 1.28])
    assert lr.get_yscale() == 'log'


def test_published_results(drawn):
    [axis] = drawn(figures.comparison)
    points = {}
    for point in axis.lines:
        if len(point.get_xdata()) == 1:
            points[point.get_ydata()[0]] = (point.get_xdata()[0], point.get_marker())
    texts = {text.xy[1]: text.get_text() for text in axis.texts}
    drawn_rows = {
        label.get_text(): (texts[y], *points[y])
        for y, label in zip(axis.get_yticks(), axis.get_yticklabels())
    }
    assert len(drawn_rows) == len(points) == len(texts) == 11
    for label, expected in {
        'He et al.: 256, P100 x 8': ('29 h, 75.3 % (A, T)', 29 * 60, 's'),
        'Goyal et al.: 8,192, P100 x 256': ('60 min, 76.3 % (A, T)', 60, 's'),
        'Codreanu et al.: 11,520, KNL 7250 x 720': ('62 min, 75.0 % (T)', 62, 's'),
        'You et al.: 16,000, Xeon 8160 x 1,600': ('31 min, 75.3 % (T)', 31, 's'),
        'Akiba et al.: 32,768, P100 x 1,024': ('15 min, 74.9 % (A, T)', 15, '*'),
        'Jia et al.: 65,536, P40 x 2,048': ('6.6 min, 75.8 % (O)', 6.6, 'o'),
        'Yamazaki et al.: 81,920, V100 x 2,048': ('1.25 min, 75.08 % (O)', 74.7 / 60, 'o'),
    }.items():
        text, minutes, marker = drawn_rows[label]
        assert (text, marker) == (expected[0], expected[2])
        assert minutes == pytest.approx(expected[1])
    assert axis.get_xlabel() == 'training time, minutes'
    assert all('h' not in tick.get_text() for tick in axis.get_xticklabels())


def rows_of(text, title):
    """The cells of the table below a heading of reproduce/results/README.md."""
    lines = text.split(f'\n## {title}\n')[1].split('\n## ')[0].splitlines()
    rows = [line.strip('|').split('|') for line in lines if line.startswith('|')]
    return [[cell.strip(' *') for cell in row] for row in rows]


def minutes_of(text):
    number, unit = text.split()
    return float(number) * {'h': 60, 'min': 1, 's': 1 / 60}[unit]


def test_the_data_are_those_of_the_table(root):
    text = (root / 'reproduce' / 'results' / 'README.md').read_text()
    rows = rows_of(text, 'Published results')
    told = [
        (*row[:4], minutes_of(row[4]), float(row[5].strip(' %')), row[6])
        for row in rows
        if len(row) == 7 and row[4] != 'time' and not row[0].startswith('-')
    ]
    assert told == [*figures.PUBLISHED, *figures.LATER]
    batches, epochs = (row[1:] for row in rows if row[0] in ('total batch', 'epochs'))
    points = {int(b.replace(',', '')): float(e) for b, e in zip(batches, epochs)}
    assert points == figures.MLPERF


def log_of(losses, top1):
    return [
        {'epoch': epoch, 'main/loss': loss, 'validation/main/accuracy': accuracy}
        for epoch, (loss, accuracy) in enumerate(zip(losses, top1), start=1)
    ]


def test_runs_are_drawn_as_their_mean_with_a_band(drawn):
    several = [log_of([2, 1], [0.1, 0.4]), log_of([4, 2], [0.3, 0.5])]
    loss, top1 = drawn(figures.runs, {'two seeds': several, 'one': several[:1]})
    np.testing.assert_allclose(line(loss, 'two seeds')([1, 2]), [3, 1.5])
    np.testing.assert_allclose(line(top1, 'two seeds')([1, 2]), [20, 45])
    np.testing.assert_allclose(line(top1, 'one')([1, 2]), [10, 40])
    box = top1.collections[0].get_paths()[0].get_extents()
    np.testing.assert_allclose([box.ymin, box.ymax], [10, 50])
    unequal = [log_of([2, 1, 0.5], [0.1, 0.4, 0.6]), log_of([4, 2], [0.3, 0.5])]  # one still trains
    loss, _ = drawn(figures.runs, {'two seeds': unequal, 'one': several[:1]})
    np.testing.assert_allclose(loss.lines[0].get_xydata(), [[1, 3], [2, 1.5]])
    styles = {(found.get_linestyle(), found.get_marker()) for found in loss.lines}
    assert len(styles) == 2  # told apart without colours


@pytest.mark.slow
def test_the_start_of_runs_is_drawn_by_the_share_of_the_training(drawn):
    few = [[2.0, 1.0], [4.0, 2.0]]
    many = [list(np.arange(54.0))]  # in 27 groups of 2
    [axis] = drawn(figures.first_losses, {'large': few, 'small': many})
    large, small = axis.lines
    np.testing.assert_allclose(large.get_data(), [[1.25, 3.75], [3.0, 1.5]])
    np.testing.assert_allclose(small.get_ydata(), np.arange(27) * 2 + 0.5)
    np.testing.assert_allclose(small.get_xdata(), 5 * (np.arange(27) * 2 + 1) / 54)
    assert large.get_linestyle() != small.get_linestyle()
    assert large.get_marker() != small.get_marker()


def test_the_command(root, tmp_path):
    run = tmp_path / 'a run'
    run.mkdir()
    (run / 'log').write_text(json.dumps(log_of([2, 1], [0.1, 0.4])))
    done = subprocess.run(
        [sys.executable, '-m', 'reproduce.studies.figures', 'runs', run, '--out', tmp_path / 'out'],
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout == f'{tmp_path / "out" / "runs.png"}\n'
    assert (tmp_path / 'out' / 'runs.png').exists()


@pytest.mark.parametrize(
    'arguments, message',
    [
        (
            ['runs'],
            "figures runs needs at least one run's folder: ./run_mpi.sh figures runs RUN ...",
        ),
        (['comparison', 'stray'], 'comparison takes no folder, but got stray'),
        (
            ['runs', 'nowhere'],
            'nowhere is not the --out of a run of train.py: nowhere/log: No such',
        ),
    ],
)
def test_wrong_input(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, 'argv', ['figures', *arguments])
    with pytest.raises(SystemExit) as ended:
        figures.main()
    told = capsys.readouterr()
    assert ended.value.code == 2 and message in told.err and not told.out


def test_data_that_are_not_there(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(figures, 'RESULTS', tmp_path)
    monkeypatch.setattr(sys, 'argv', ['figures', 'step', '--out', str(tmp_path / 'out')])
    with pytest.raises(SystemExit) as ended:
        figures.main()
    told = capsys.readouterr()
    expected = f'no data: {tmp_path}/figures/first_updates.json: No such file or directory'
    assert ended.value.code == 2 and expected in told.err and not told.out


def test_runs_that_are_not_there(monkeypatch, tmp_path):
    monkeypatch.setattr('reproduce.studies.pictures.start.RUNS', tmp_path)
    with pytest.raises(figures.DataError, match=f'no data: {tmp_path}/b-seed0/run.json: No such'):
        figures.picture('start', False, None, str(tmp_path))


def test_measured_data_are_drawn_and_written(monkeypatch, tmp_path):
    measured = json.loads((figures.RESULTS / 'figures' / 'rounding.json').read_text())
    measured['8']['errors']['tree'] = 0.5
    monkeypatch.setattr('reproduce.studies.pictures.rounding.measure', lambda: measured)
    axes = []
    monkeypatch.setattr(figures.style, 'save', lambda figure, path, alt: axes.extend(figure.axes))
    figures.picture('rounding', True, None, str(tmp_path))
    assert json.loads((tmp_path / 'rounding.json').read_text()) == measured
    assert line(axes[0], 'tree')(8) == 50
