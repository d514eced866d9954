import json
import subprocess
import sys

import pytest

from reproduce.studies.speed import __main__ as benchmark
from reproduce.studies.speed import side_by_side


def test_functions_take_turns_and_the_first_round_does_not_count():
    calls = []
    candidates = {name: lambda name=name: calls.append(name) for name in 'ab'}
    seconds = side_by_side.side_by_side(candidates, repeat=2)
    assert ''.join(calls) == 'ababab'
    assert {name: len(values) for name, values in seconds.items()} == {'a': 2, 'b': 2}


def test_ratio_is_the_median_of_the_rounds(capsys):
    result = side_by_side.table('title', {'ours': [1.0, 2.0, 9.0], 'peer': [2.0, 2.0, 3.0]}, 'ours')
    assert result['peer'] == {'median_seconds': 2.0, 'ratio_of_ours': 1.0}
    assert result['ours'] == {'median_seconds': 2.0, 'ratio_of_ours': 1.0}
    assert 'title' in capsys.readouterr().out


@pytest.mark.parametrize('of_the_user, expected', [(None, '1'), ('3', '3')])
def test_ranks_have_one_blas_thread_unless_the_user_says_otherwise(
    monkeypatch, of_the_user, expected
):
    """With another number of threads, BLAS gives other bits."""
    started = []
    monkeypatch.setattr(side_by_side.subprocess, 'run', lambda *a, **k: started.append(k['env']))
    names = ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS')
    for name in names:
        monkeypatch.delenv(name, raising=False)
        if of_the_user:
            monkeypatch.setenv(name, of_the_user)
    side_by_side.start_ranks(2, [])
    assert [started[0][name] for name in names] == [expected] * 3


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.parametrize(
    'what, peer',
    [
        ('update', 'RMSprop'),
        ('workers', 'StandardUpdater'),
        ('checkpoint', 'np.savez'),
        ('statistics', 'AllreducePersistent'),
        ('allreduce', 'MPI.Allreduce float32'),
        ('loader', 'Pillow: open'),
        ('listing', 'pickled'),
    ],
)
def test_commands_print_and_write_their_ratios(root, tmp_path, what, peer):
    file = tmp_path / 'figures.json'
    command = [sys.executable, '-m', 'reproduce.studies.speed', what, '--repeat', '1']
    if what in ('statistics', 'allreduce', 'listing'):
        command += ['--ranks', '2']
    done = subprocess.run(
        [*command, '--json', file],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    figures = json.loads(file.read_text())['figures']
    name = next(name for name in figures if peer in name)
    assert figures[name]['median_seconds'] > 0
    assert f'{figures[name]["ratio_of_ours"]:.3f}' in done.stdout
    assert (', 2 ranks on 1 host(s)' in done.stdout) == (what in ('statistics', 'allreduce'))


@pytest.mark.parametrize(
    'options, message',
    [
        ('--workers 8,none', '--workers'),
        ('--workers 0', '--workers'),
        ('--image-root nowhere', 'image folder nowhere'),
        ('--local-batch-size 1438', 'larger than the training set of 1437'),
        ('--out setup.py', 'setup.py'),
    ],
)
def test_precision_refuses_what_it_cannot_measure(root, monkeypatch, capsys, options, message):
    monkeypatch.chdir(root)
    with pytest.raises(SystemExit) as ended:
        benchmark.main(['precision', *options.split()])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
