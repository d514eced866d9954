"""The output folder: what is gone on with, refused, or deleted, and that this is said."""

import dataclasses
import fcntl

import numpy as np
import pytest

from extensions import checkpoint
from reproduce.job import options, output
from reproduce.job.report import write_settings
from reproduce.settings import InputError

PRESET = ['--preset', 'smoke']


@pytest.fixture
def settings(tmp_path):
    def of(*words, out=tmp_path / 'out'):
        return options.parse([*PRESET, '--out', str(out), *words], 2)[0]

    return of


@pytest.fixture(autouse=True)
def unlocked():
    yield
    while output._locks:
        output._locks.pop().close()


def run(settings, finished=False):
    """Leaves what a run of these settings leaves."""
    folder = output.checkpoints_of(settings.out)
    folder.mkdir(parents=True)
    path = folder / 'checkpoint-000000005.npz'
    checkpoint.write(path, {'x': np.ones(2)}, {**settings.identity, 'training images': 'digest'})
    (folder / 'best.npz').write_bytes(path.read_bytes())
    write_settings(settings, settings.out)
    if finished:
        (folder.parent / 'summary.json').write_text('{}')


def test_a_finished_run_goes_on_with_its_own_settings_only(settings, capsys):
    run(settings(), finished=True)
    with pytest.raises(SystemExit) as end:
        output.prepare(settings('--resume', 'auto', '--watchdog', '9'))
    assert not end.value.code
    assert 'is finished' in capsys.readouterr().out


def test_no_setting_of_a_finished_run_may_change(settings):
    run(settings(), finished=True)
    resumed = settings('--resume', 'auto')
    for name, value in resumed.identity.items():
        other = dataclasses.replace(resumed, **{name: 'other' if isinstance(value, str) else 7})
        with pytest.raises(InputError, match=rf'was made with {name} .* \(now (other|7)\)'):
            output.prepare(other)
        output._locks.pop().close()


@pytest.mark.parametrize('finished', [True, False])
def test_why_a_run_cannot_be_made_longer(settings, finished):
    run(settings(), finished)
    longer = settings('--resume', 'auto', '--epochs', '30')
    with pytest.raises(InputError, match=r'epochs 15 \(now 30\).*cannot be made longer, since'):
        output.prepare(longer)
        output.find_checkpoint(longer, {**longer.identity, 'training images': 'digest'})


def test_overwrite_deletes_what_the_run_wrote_and_says_so(settings, tmp_path, capsys):
    run(settings(), finished=True)
    notes = [tmp_path / 'out/notes.txt', tmp_path / 'out/checkpoints/checkpoint-good.npz']
    for note in notes:
        note.write_text('mine')
    output.prepare(settings('--overwrite'))
    said = capsys.readouterr().out
    left = {path for path in (tmp_path / 'out').rglob('*') if path.is_file()}
    assert left == {*notes, tmp_path / 'out/.lock'}
    for name in ('settings.json', 'summary.json', 'best.npz', 'checkpoint-000000005.npz'):
        assert name in said


def test_smoke_goes_on_or_takes_a_fresh_folder(settings, tmp_path):
    def place(*words):
        return output.for_smoke(settings(*words, out='out'), tmp_path)

    assert place() == ('out', ['--out', 'out'])
    run(settings('--functions', 'compiled'))  # what auto stands for
    own = ['--resume', 'auto', '--functions', 'compiled']
    assert place() == place('--functions', 'compiled') == ('out', ['--out', 'out', *own])
    assert place('--functions', 'numpy') == ('out-2', ['--out', 'out-2'])
    assert place('--seed', '3') == ('out-2', ['--out', 'out-2'])
    (tmp_path / 'out/summary.json').write_text('{}')
    assert place() == ('out-2', ['--out', 'out-2'])
    run(settings('--functions', 'compiled', out=tmp_path / 'out-2'))
    assert place() == ('out-2', ['--out', 'out-2', *own])
    with open(tmp_path / 'out-2/.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert place() == ('out-3', ['--out', 'out-3'])
    assert place() == ('out-2', ['--out', 'out-2', *own])


@pytest.mark.parametrize(
    ('words', 'expected'),
    [
        ('2 {} smoke', '2 {}/results/smoke --out results/smoke'),
        ('2 {} smoke --out there', '2 {}/there'),
        ('2 {} smoke --overwrite', '2 {}/results/smoke'),
        ('2 {} smoke --resume=auto', '2 {}/results/smoke'),
        ('2 {} train --preset smoke --out /x/y', '2 /x/y'),
        ('2 {} train --preset smoke --dry-run', ''),
        ('2 {} preflight --preset smoke', ''),
    ],
)
def test_what_run_mpi_gets_to_know(words, expected, tmp_path, capsys):
    options.main(words.format(tmp_path).split())
    assert capsys.readouterr().out.split() == expected.format(tmp_path).split()


@pytest.mark.parametrize(
    ('n_gpus', 'words', 'expected'),
    [
        (0, [], ['2']),
        (1, [], ['1', '--workers', '2']),
        (1, ['--workers=8'], ['1']),
        (1, ['--communicator', 'mpi'], ['2']),
        (1, ['--communicator=naive'], ['2']),
        (1, ['--communicator', 'pure_nccl'], ['1', '--workers', '2']),
        (2, [], ['2']),
    ],
)
def test_on_one_gpu_one_process_of_smoke_plays_two_workers(
    n_gpus, words, expected, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(options.cupy_compatibility, 'has_cupy', lambda: True)
    monkeypatch.setattr(options.cupy_compatibility, 'count_gpus', lambda: n_gpus)
    options.main(['', str(tmp_path), 'smoke', *words])
    n, _, *added = capsys.readouterr().out.split()
    assert ([n, *added[:-2]], added[-2:]) == (expected, ['--out', 'results/smoke'])
