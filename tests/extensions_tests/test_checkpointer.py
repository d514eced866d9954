"""Checkpointer in one process: what it keeps, what it removes, and when it writes."""

import errno
import os
import signal
import threading
import time

import numpy as np
import pytest

import extensions  # isort: skip  (first: makes Chainer importable on NumPy 2)
import chainer
from chainer import training

from extensions import Checkpointer, CheckpointError, Stopped, checkpoint, checkpoint_files


@pytest.fixture(scope='module')
def comm():
    return extensions.create_communicator()


class Counter(training.Updater):
    """Counts iterations; an epoch has two of them unless told otherwise."""

    def __init__(self, per_epoch=2.0):
        self.model = chainer.Link()
        with self.model.init_scope():
            self.model.W = chainer.Parameter(np.zeros((4, 3), np.float32))
        self.iteration, self.per_epoch = 0, per_epoch

        self.optimizer = chainer.optimizers.SGD().setup(self.model)

    epoch = property(lambda self: int(self.iteration / self.per_epoch))
    epoch_detail = property(lambda self: self.iteration / self.per_epoch)
    is_new_epoch = property(lambda self: self.epoch > int((self.iteration - 1) / self.per_epoch))

    def connect_trainer(self, trainer):
        pass

    def finalize(self):
        pass

    def get_all_optimizers(self):
        return {'main': self.optimizer}

    def update(self):
        self.iteration += 1
        self.model.W.array[...] = self.iteration

    def serialize(self, serializer):
        self.iteration = serializer('iteration', self.iteration)
        self.model.serialize(serializer['model'])


class Validation(training.Extension):
    """Reports the accuracy that belongs to each epoch."""

    trigger = (1, 'epoch')

    def __init__(self, top1):
        self.top1 = top1

    def __call__(self, trainer):
        epoch = trainer.updater.epoch
        chainer.reporter.report({'validation/main/accuracy': self.top1[epoch - 1]})


@pytest.fixture
def train(comm, tmp_path):
    """``train(iterations, ...)`` trains in tmp_path/OUT, from a checkpoint if one is given."""

    def run(iterations, start=None, out='out', top1=(), before=None, updater=None, **options):
        updater = updater or Counter()
        trainer = training.Trainer(updater, (iterations, 'iteration'), str(tmp_path))
        checkpointer = Checkpointer(comm, tmp_path / out, {}, **options)
        trainer.extend(checkpointer)
        if top1:
            trainer.extend(Validation(top1))
        if start:
            checkpoint.resume(trainer, checkpoint.read(start)[0])
        if before:
            trainer.extend(before, name='before', trigger=(1, 'iteration'))
        trainer.run(show_loop_exception_msg=False)
        return trainer

    return run


def iterations(folder):
    return [int(path.stem[-9:]) for path in checkpoint.checkpoints(folder)]


def iteration_of(path):
    return int(checkpoint.read(path)[0]['updater/iteration'])


def test_the_last_are_kept(train, tmp_path):
    train(12)
    assert iterations(tmp_path / 'out') == [12, 10]
    train(16, start=tmp_path / 'out/checkpoint-000000012.npz')
    assert iterations(tmp_path / 'out') == [16, 14]


def test_a_branch_keeps_its_own_and_the_abandoned(train, tmp_path):
    """A run that goes on from an older checkpoint, into a folder that holds later ones."""
    folder = tmp_path / 'out'
    train(10, keep=4)  # 4, 6, 8, 10
    train(7, start=folder / 'checkpoint-000000004.npz', every='1', keep=1)
    assert set(iterations(folder)) == {6, 8, 10}
    assert iterations(folder)[0] == 6  # --resume auto takes the branch
    assert iteration_of(folder / 'checkpoint-000000006-before.npz') == 6
    train(9, start=folder / 'checkpoint-000000006.npz', keep=1)
    assert iterations(folder)[0] == 8 and 10 in iterations(folder)
    train(20, start=folder / 'checkpoint-000000008.npz', keep=1)
    assert iterations(folder)[0] == 20
    assert (folder / 'checkpoint-000000010-before.npz').exists()


def test_a_kill_before_the_name_leaves_the_branch(train, tmp_path, monkeypatch):
    folder = tmp_path / 'out'
    train(10, keep=4)
    train(6, start=folder / 'checkpoint-000000004.npz')

    def killed(source, target):
        if target.name == 'checkpoint-000000012.npz':
            raise KeyboardInterrupt
        rename(source, target)

    rename = os.replace
    monkeypatch.setattr(threading, 'excepthook', lambda _: None)
    monkeypatch.setattr(os, 'replace', killed)
    train(12, start=folder / 'checkpoint-000000006.npz', every='3')
    assert iterations(folder)[0] == 6 and 12 not in iterations(folder)


def test_files_of_others_stay(train, tmp_path):
    folder = tmp_path / 'out'
    train(6)
    others = ('checkpoint-good.npz', 'checkpoint-paper.npz', 'checkpoint-000000002.npz')
    for name in others:
        (folder / name).write_bytes((folder / 'checkpoint-000000006.npz').read_bytes())
    train(6, out='another', keep=3)
    (folder / 'checkpoint-000000004.npz').write_bytes(
        (tmp_path / 'another/checkpoint-000000004.npz').read_bytes()
    )
    train(12, start=folder / 'checkpoint-000000006.npz', keep=1)
    left = sorted(path.name for path in folder.glob('checkpoint-*'))
    assert left == sorted([*others, 'checkpoint-000000004.npz', 'checkpoint-000000012.npz'])


@pytest.mark.parametrize('top1', [(0.1, 0.9, 0.3), (0.9, float('nan'), 0.1, 0.2), (0.2, 0.9, 0.9)])
@pytest.mark.parametrize('every', ['1', '2', '10m'])
def test_the_best_is_kept(train, tmp_path, top1, every):
    train(2 * len(top1), top1=top1, every=every)
    assert iteration_of(tmp_path / 'out/best.npz') == 2 * (1 + top1.index(0.9))


def test_the_best_is_that_of_the_folder(train, tmp_path):
    folder = tmp_path / 'out'
    train(6, top1=(0.1, 0.9, 0.3), keep=3)
    train(4, start=folder / 'checkpoint-000000002.npz', top1=(0.1, 0.45))
    assert iteration_of(folder / 'best.npz') == 4
    assert checkpoint_files.properties_of(folder / 'best.npz')['top1'] == 0.9
    # In a folder of its own, the best is one that the folder holds.
    train(8, start=folder / 'checkpoint-000000006.npz', top1=(0, 0, 0, 0.2), out='elsewhere')
    assert iteration_of(tmp_path / 'elsewhere/best.npz') == 8


def test_the_best_that_failed_does_not_hide_the_next(train, tmp_path, monkeypatch, capsys):
    def full(path, *rest):
        if path.name == 'checkpoint-000000004.npz':
            raise OSError(errno.ENOSPC, 'No space left on device')
        write(path, *rest)

    write = checkpoint.write
    monkeypatch.setattr(checkpoint, 'write', full)
    train(8, top1=(0.3, 0.8, 0.6, 0.5))
    assert iteration_of(tmp_path / 'out/best.npz') == 6
    error = capsys.readouterr().err
    assert error.count('warning: checkpoint ') == 1 and 'No space left on device' in error


@pytest.mark.parametrize('number', [errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EIO])
def test_a_folder_that_cannot_be_flushed_is_no_error(train, tmp_path, monkeypatch, capsys, number):
    def fsync(descriptor):
        if os.path.isdir(f'/proc/self/fd/{descriptor}'):
            raise OSError(number, os.strerror(number))
        flush(descriptor)

    flush = os.fsync
    monkeypatch.setattr(os, 'fsync', fsync)
    train(8, top1=(0.1, 0.4, 0.3, 0.2))
    assert iterations(tmp_path / 'out') == [8, 6]
    assert iteration_of(tmp_path / 'out/best.npz') == 4
    assert capsys.readouterr().err == ''


def test_a_file_that_cannot_be_flushed_is_written_all_the_same(train, tmp_path, monkeypatch):
    def fsync(_):
        raise OSError(errno.EINVAL, 'Invalid argument')

    monkeypatch.setattr(os, 'fsync', fsync)
    train(2)
    assert iterations(tmp_path / 'out') == [2]


@pytest.mark.parametrize(
    'array',
    [
        np.arange(12, dtype=np.float32).reshape(3, 4).T,
        np.arange(24, dtype=np.float32).reshape(4, 6)[:, ::2],
        np.lib.stride_tricks.as_strided(np.ones(3, np.float32), (4, 3), (0, 4)),
    ],
    ids=['Fortran', 'strided', 'broadcast'],
)
def test_arrays_of_any_layout(train, tmp_path, array, capsys):
    updater = Counter()
    updater.update = lambda: setattr(updater, 'iteration', updater.iteration + 1)
    updater.model.W.array = array
    train(2, updater=updater)
    saved = checkpoint.read(tmp_path / 'out/checkpoint-000000002.npz')[0]['updater/model/W']
    assert saved.tolist() == array.tolist()
    assert capsys.readouterr().err == ''


def test_the_training_goes_on_while_a_checkpoint_is_written(train, tmp_path, monkeypatch):
    """And what is written is the state of its own iteration, not of a later one."""
    release = threading.Event()

    def slow(*arguments):
        assert release.wait(10)
        write(*arguments)

    def before(trainer):
        if trainer.updater.iteration == 3:
            assert not iterations(tmp_path / 'out')  # that of iteration 2 is under way
            release.set()

    write = checkpoint.write
    monkeypatch.setattr(checkpoint, 'write', slow)
    train(4, before=before)
    for iteration in (2, 4):
        entries, _ = checkpoint.read(tmp_path / f'out/checkpoint-{iteration:09d}.npz')
        assert np.all(entries['updater/model/W'] == iteration)


def test_one_copy_serves_all_checkpoints(train):
    copies = []

    def before(trainer):
        checkpointer = trainer.get_extension('Checkpointer')
        copies.append(checkpointer._copy.get('updater/model/W'))

    train(8, before=before)
    assert copies[:2] == [None, None] and all(copy is copies[3] for copy in copies[3:])


@pytest.mark.parametrize('signum', [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_stops_with_a_complete_checkpoint(train, tmp_path, monkeypatch, signum):
    def slow(*arguments):
        time.sleep(0.2)
        write(*arguments)

    write = checkpoint.write
    monkeypatch.setattr(checkpoint, 'write', slow)
    at_three = lambda t: t.updater.iteration == 3 and signal.raise_signal(signum)
    handler = signal.getsignal(signum)
    with pytest.raises(Stopped, match='after iteration 3, with checkpoint .*000000003.npz') as stop:
        train(9, before=at_three)
    assert stop.value.signum == signum
    assert iterations(tmp_path / 'out') == [3, 2]
    assert signal.getsignal(signum) == handler


def test_a_stop_whose_checkpoint_fails_says_so(train, monkeypatch, capsys):
    def full(*_):
        time.sleep(0.2)
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(checkpoint, 'write', full)
    with pytest.raises(Stopped, match='after iteration 1, but no checkpoint could be written'):
        train(9, before=lambda trainer: signal.raise_signal(signal.SIGTERM))
    assert 'No space left on device' in capsys.readouterr().err


def test_a_signal_stops_one_run_only(comm, tmp_path):
    """In a notebook, the same objects serve the next run."""
    updater, checkpointer = Counter(), Checkpointer(comm, tmp_path, {})

    def run(before=lambda trainer: None):
        trainer = training.Trainer(updater, (8, 'iteration'), str(tmp_path))
        trainer.extend(checkpointer)
        trainer.extend(before, name='before', trigger=(1, 'iteration'))
        trainer.run(show_loop_exception_msg=False)

    with pytest.raises(Stopped):
        run(lambda trainer: signal.raise_signal(signal.SIGINT))
    run()
    assert updater.iteration == 8


def test_nohup_holds(train, monkeypatch):
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        train(4, before=lambda trainer: signal.raise_signal(signal.SIGHUP))
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, handler)


def test_outside_the_main_thread(train, tmp_path):
    thread = threading.Thread(target=train, args=(4,))
    thread.start()
    thread.join()
    assert iterations(tmp_path / 'out') == [4, 2]


def test_a_relative_folder_stays(train, comm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(4, out='here', before=lambda trainer: os.chdir('/'))
    assert iterations(tmp_path / 'here') == [4, 2]


def test_epochs_that_are_jumped_over_count(train, tmp_path):
    """With 3 epochs in an iteration, ``every='4'`` is due after 2, 3, 4, 6, 7 ... iterations."""
    train(8, updater=Counter(per_epoch=1 / 3), every='4', keep=9)
    assert iterations(tmp_path / 'out') == [8, 7, 6, 4, 3, 2]


def test_identities_of_json(comm, train, tmp_path):
    one = {'a': np.float32(0.5), 'b': (1, 2), 'c': float('nan'), 'd': np.int64(3), 'e': np.ones(2)}
    path = tmp_path / 'checkpoint-000000001.npz'
    checkpoint.write(path, {'x': np.ones(2)}, one)
    assert checkpoint.newest(path, one)[0] == path
    with pytest.raises(CheckpointError, match=r'b \[1, 2\] \(now \[1, 3\]\)'):
        checkpoint.newest(path, {**one, 'b': (1, 3)})
    with pytest.raises(ValueError, match='must have JSON values'):
        Checkpointer(comm, tmp_path, {'a': object()})


@pytest.mark.parametrize('keep', [0, -1])
def test_at_least_one_is_kept(comm, tmp_path, keep):
    with pytest.raises(ValueError, match='must be at least 1'):
        Checkpointer(comm, tmp_path, {}, keep=keep)


def test_an_entry_that_is_missing_is_named(train, tmp_path):
    train(2)
    path = tmp_path / 'out/checkpoint-000000002.npz'
    entries, _ = checkpoint.read(path)
    del entries['updater/model/W']
    trainer = training.Trainer(Counter(), (1, 'iteration'), str(tmp_path))
    with pytest.raises(CheckpointError, match="no entry 'updater/model/W'"):
        checkpoint.resume(trainer, entries)


def test_a_manifest_without_its_parts_is_refused(tmp_path):
    for manifest in ('{}', '{"names": ["x"]}', '{"names": ["x"], "none": []}', '3'):
        path = tmp_path / 'checkpoint-000000001.npz'
        np.savez(path, x=np.ones(2), manifest=np.array(manifest))
        with pytest.raises(CheckpointError, match='damaged or not a checkpoint'):
            checkpoint.read(path)
