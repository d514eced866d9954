"""What the preflight predicts from the values of the ranks."""

import re

import pytest

from reproduce.job import preflight
from reproduce.job.options import parse

ROW = {'ranks': 2, 'cores': 2, 'minibatch': 3.0, 'all_reduce': 0.5, 'update': 0.25}


@pytest.mark.parametrize(
    'workers, loading, how, seconds',
    [
        (2, 2.0, 'serial', 3.0 + 0.75),
        (10, 2.0, 'serial', 5 * 3.0 + 0.75),
        (10, 4.0, 'serial', 5 * 4.0 + 0.75),
        (10, 2.0, 'processes:2', 5 * (3.0 + 2.0) + 0.75),  # six processes on two cores
    ],
)
def test_a_rank_pays_for_all_of_its_workers(workers, loading, how, seconds):
    settings, _ = parse(
        ['--preset', 'smoke', '--workers', str(workers), '--loader', how, '--epochs', '2'], 2
    )
    rows = [{**ROW, 'loading': loading}, {**ROW, 'loading': 0.1, 'minibatch': 0.2}]
    text = preflight._estimate(settings, 10 * settings.total_batch_size, rows)
    assert float(re.search(r'predicted: (\S+) s per iteration', text)[1]) == pytest.approx(
        seconds, rel=0.01
    )
    assert f' of {workers // 2} minibatch' in text and '; 20 iterations in ' in text
