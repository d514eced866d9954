import dataclasses
import json
import sys
import types

import pytest
from chainer.backends import cuda
from mpi4py import MPI

from reproduce.job import countdown, mpi_library, report, supervise
from reproduce.settings import PRESETS


@pytest.fixture
def clock(monkeypatch):
    """``clock.now`` is what time.monotonic returns."""
    clock = types.SimpleNamespace(now=1000.0)
    monkeypatch.setattr(report.time, 'monotonic', lambda: clock.now)
    return clock


def test_the_versions_of_a_gpus_libraries(monkeypatch):
    cupy = types.SimpleNamespace(__version__='13.6.0')
    cupy.cuda = types.SimpleNamespace(
        runtime=types.SimpleNamespace(runtimeGetVersion=lambda: 12090)
    )
    libcudnn = types.SimpleNamespace(getVersion=lambda: 8907)
    for name, value in {'available': True, 'cupy': cupy, 'libcudnn': libcudnn}.items():
        monkeypatch.setattr(cuda, name, value, raising=False)
    monkeypatch.setattr(report.nccl, 'version', lambda: '2.28.9')
    for enabled, cudnn in ((True, '8907'), (False, 'none')):
        monkeypatch.setattr(cuda, 'cudnn_enabled', enabled)
        shown = report.in_words(report.versions.__wrapped__())  # it reads them once
        assert f'cupy 13.6.0, cuda 12090, cudnn {cudnn}, nccl 2.28.9' in shown


def test_progress_in_training_and_in_a_long_validation(clock, capsys):
    updater = types.SimpleNamespace(images_done=0, epoch_detail=0.0, after_worker=None)
    trainer = types.SimpleNamespace(updater=updater)
    evaluator = types.SimpleNamespace(minibatches_left=None, after_minibatch=None)
    progress = report.Progress(100, 50, evaluator)
    progress.initialize(trainer)

    def validate(n):
        """One minibatch a second."""
        for evaluator.minibatches_left in range(n, -1, -1):
            evaluator.after_minibatch()
            clock.now += evaluator.minibatches_left > 0

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
    validate(24)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        '  validation: 14 minibatches, 14 s left',
        '  validation: 4 minibatches, 4 s left',
    ]
    for _ in range(10):  # the validation's seconds do not count as training
        clock.now += 1
        updater.images_done += 10
        progress(trainer)
    assert '10 images/s, 7 min 40 s left' in capsys.readouterr().out
    for _ in range(4):  # short ones say nothing, and do not keep the training from it
        validate(3)
        for _ in range(4):
            clock.now += 1
            updater.images_done += 10
            progress(trainer)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and '10 images/s' in lines[0]
    evaluator.minibatches_left = 0  # of a rank without images
    evaluator.after_minibatch()
    assert capsys.readouterr().out == ''


def test_progress_after_a_wait_for_a_slower_rank(clock, capsys):
    """The line after a worker counts its images; after the iteration there is no further one."""
    updater = types.SimpleNamespace(images_done=0, epoch_detail=0.5, after_worker=None)
    updater.iteration = 0
    trainer = types.SimpleNamespace(updater=updater)
    evaluator = types.SimpleNamespace(minibatches_left=None, after_minibatch=None)
    progress = report.Progress(100, 50, evaluator)
    progress.initialize(trainer)
    clock.now += 20
    updater.images_done = 100
    updater.after_worker()
    assert ' 5 images/s, ' in capsys.readouterr().out
    clock.now += 30  # in the all-reduce
    progress(trainer)
    assert capsys.readouterr().out == ''
    clock.now += 20
    updater.images_done = 200
    progress(trainer)
    assert ' 2 images/s, 40 min 00 s left' in capsys.readouterr().out


@pytest.mark.parametrize(
    'text, name',
    [
        (
            'Open MPI v5.0.11, package: Open MPI, ident: 5.0.11, repo rev: v5.0.11',
            'Open MPI v5.0.11',
        ),
        (
            'MPICH Version:\t4.0.2\nMPICH Release date:\tThu Apr  7\nMPICH Device:\tch4',
            'MPICH 4.0.2',
        ),
        ('MVAPICH2 Version      :\t2.3.7\nMVAPICH2 Release date : 2022\n', 'MVAPICH2 2.3.7'),
        (
            'Intel(R) MPI Library 2021.10 for Linux* OS\n\0',
            'Intel(R) MPI Library 2021.10 for Linux* OS',
        ),
    ],
)
def test_the_name_of_an_mpi_is_one_line(text, name):
    assert mpi_library(text) == name


def test_the_header_of_the_papers_run_on_fewer_processes():
    class Folder(list):
        root, classes = '', ()

    def header(n):
        comm = types.SimpleNamespace(size=n, inter_size=n // 8, reason='')
        return report.header(PRESETS['paper'](), comm, Folder(), Folder(), 1, [('C', 'C')] * n)

    assert (
        'each process plays 32 workers, one after the other; --workers 32 would be one each, and '
        'a total batch of 1,024'
    ) in header(32)
    assert 'one after the other' not in header(1024)


def test_the_header_tells_what_each_rank_computes_by():
    class Folder(list):
        root, classes = '', ()

    comm = types.SimpleNamespace(size=3, inter_size=1, reason='')
    arithmetic = [('C', 'avx512'), ('NumPy', 'avx512'), ('C', 'avx2')]
    settings = dataclasses.replace(PRESETS['smoke'](), workers=3)
    header = report.header(settings, comm, Folder(), Folder(), 1, arithmetic)
    assert '\nupdate        RMSpropWarmup, C on 2 of 3 ranks; NumPy on 1 of 3 ranks\n' in header
    assert '\nfunctions     avx512 on 2 of 3 ranks; avx2 on 1 of 3 ranks\n' in header


def test_a_countdown_tells_the_time_left_every_ten_seconds(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(countdown.time, 'monotonic', lambda: now[0])
    done = countdown.Countdown('gradients', 2000)
    for now[0] in (4.0, 8.0, 12.0, 21.0, 23.0):
        done()
    assert capsys.readouterr().out.splitlines() == [
        '  3 of 2,000 gradients, 2 h 13 min left',
        '  5 of 2,000 gradients, 2 h 32 min left',
    ]


def test_plan_stretches_to_the_epochs_of_the_run():
    settings = dataclasses.replace(PRESETS['cifar10'](), epochs=30, workers=8)
    rows = [row.split() for row in report.plan(settings, 50_000).splitlines() if row.strip()]
    table = {
        row[0]: row[1:]
        for row in rows[
            rows.index(['epoch', 'of', '90', 'eta', 'alpha_sgd', 'alpha_rmsprop']) + 1 :
        ]
    }
    assert table['0'][:2] == ['0', '0.05'] and table['29'][:2] == ['87', '0.0001']
    assert table['3.75'][:3] == ['11.25', '0.05', '1.00000']
    assert table['<4.16667'][2] == '1.50000' and table['4.16667'][2] == '1.00000'


def test_the_summary_has_the_numbers_of_the_last_epoch(monkeypatch, tmp_path):
    from reproduce.job import plots

    drawn = []
    monkeypatch.setattr(plots, 'curves', lambda *arguments: drawn.append(arguments))
    settings = dataclasses.replace(
        PRESETS['smoke'](), workers=6, local_batch_size=5, epochs=2, out=str(tmp_path)
    )
    keys = (
        'main/loss',
        *(
            f'validation/{name}'
            for name in ('main/loss', 'main/accuracy', 'main/top5_accuracy', 'images')
        ),
    )
    log = [{key: 10 * epoch + i for i, key in enumerate(keys)} for epoch in (1, 2)]
    trainer = types.SimpleNamespace(updater=types.SimpleNamespace(iteration=8), elapsed_time=3.0)
    comm = types.SimpleNamespace(size=2)
    bad = {'a.png': 'a.png cannot be decoded', 'b.png': 'b.png cannot be read'}
    timing = {'iteration': 0.25, 'iterations': 5}
    summary = report.summarize(settings, comm, trainer, log, (1234, 0), bad, timing)
    assert json.loads((tmp_path / 'summary.json').read_text()) == summary
    assert summary.pop('versions') == report.versions()
    assert summary == {
        'training_loss': 20,
        'validation_loss': 21,
        'top1': 22,
        'top5': 23,
        'validation_images': 24,
        'epochs': 2,
        'iterations': 8,
        'workers': 6,
        'processes': 2,
        'total_batch_size': 30,
        'seconds': 3.0,
        'peak_memory_bytes': 1234,
        'peak_device_memory_bytes': 0,
        'bad_images': {'count': 2, 'messages': list(bad.values())},
        'images_per_second': 80.0,
        'timing': timing,
    }
    assert drawn == [(log, settings, str(tmp_path))]


def test_peak_memory_is_that_of_the_largest_process():
    def allreduce(kilobytes, operator):
        assert 10_000 < kilobytes < 100_000_000
        assert operator == MPI.MAX
        return max(kilobytes, 10**10)

    comm = types.SimpleNamespace(mpi_comm=types.SimpleNamespace(allreduce=allreduce))
    assert report.peak_memory(comm) == 1024 * 10**10


def test_the_line_with_the_parts_of_an_iteration():
    names = ('data', 'forward_backward', 'pack', 'allreduce', 'update', 'extensions')
    timing = {name: (i + 1) / 1000 for i, name in enumerate(names)}
    assert report.parts({**timing, 'iteration': 1.5, 'iterations': 4}) == (
        'iteration 1,500.0 ms, slowest ranks: data 1.0, forward + backward 2.0, pack 3.0, '
        'all-reduce 4.0, update 5.0, extensions 6.0'
    )
    assert report.parts({'iterations': 0}) == 'no timing: too few iterations'


def test_the_table_shows_what_the_last_update_used(capsys):
    optimizer = types.SimpleNamespace(lr=0.5, alpha_sgd=0.25, alpha_rmsprop=0.125)
    entry = {'epoch': 3, 'lr': 9.0, 'alpha_sgd': 9.0, 'main/loss': 2.0, 'elapsed_time': 7.0}
    entry.update({'validation/main/loss': 1.5, 'validation/main/accuracy': 0.75})
    supervise._last_hyperparameters(optimizer)(entry)
    table = report.EpochTable(types.SimpleNamespace(log=[{}, entry]))
    table.initialize(None)
    table(None)
    heads, cells = (line.split('  ') for line in capsys.readouterr().out.splitlines())
    heads, cells = ([word.strip() for word in line if word] for line in (heads, cells))
    assert dict(zip(heads, cells)) == {
        'epoch': '3',
        'lr': '0.50000',
        'alpha_sgd': '0.25000',
        'alpha_rmsprop': '1.250e-01',
        'train loss': '2.0000',
        'val loss': '1.5000',
        'top-1': '75.00%',
        'flushed': '-',  # float32 gradients
        'seconds': '7.0',
    }


@pytest.mark.parametrize(
    'seconds, text',
    [(12.4, '12 s'), (200, '3 min 20 s'), (3725, '1 h 02 min'), (59.7, '1 min 00 s')],
)
def test_duration(seconds, text):
    assert report.duration(seconds) == text


def test_versions_are_those_of_the_start(monkeypatch):
    """At the end, another environment may be on the disk, or none."""
    found = report.versions()
    monkeypatch.setattr(sys, 'path', [])
    assert report.versions() == found and {'simplejpeg', 'numpy', 'mpi'} < set(found)
