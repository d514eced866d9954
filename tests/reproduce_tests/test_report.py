import types

import pytest

from reproduce import report


@pytest.fixture
def clock(monkeypatch):
    """``clock.now`` is what time.monotonic returns."""
    clock = types.SimpleNamespace(now=1000.0)
    monkeypatch.setattr(report.time, 'monotonic', lambda: clock.now)
    return clock


def test_progress_in_training_and_in_a_long_validation(clock, capsys):
    updater = types.SimpleNamespace(images_done=0, epoch_detail=0.0, after_worker=None)
    trainer = types.SimpleNamespace(updater=updater)
    evaluator = types.SimpleNamespace(minibatches_left=None, after_minibatch=None)
    progress = report.Progress(100, 50, evaluator)
    progress.initialize(trainer)
    for _ in range(30):  # 10 images a second
        clock.now += 1
        updater.images_done += 10
        progress(trainer)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(',')[0].strip() for line in lines] == [
        'iteration 1 of 50',
        'iteration 2 of 50',
        'iteration 3 of 50',
    ]
    assert lines[-1].endswith('10 images/s, 7 min 50 s left')
    for evaluator.minibatches_left in range(24, -1, -1):  # one a second
        clock.now += 1
        evaluator.after_minibatch()
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        '  validation: 15 minibatches, 15 s left',
        '  validation: 5 minibatches, 5 s left',
    ]
    for _ in range(10):  # the validation's seconds do not count as training
        clock.now += 1
        updater.images_done += 10
        progress(trainer)
    assert '10 images/s, 7 min 40 s left' in capsys.readouterr().out
    for evaluator.minibatches_left in range(5, -1, -1):  # a short one says nothing
        clock.now += 1
        evaluator.after_minibatch()
    assert capsys.readouterr().out == ''
