"""Checkpoint files: what is written is what is read, or is refused."""

import os
import pickle
import resource
import signal
import zipfile

import numpy as np
import pytest

from extensions import CheckpointError, checkpoint, checkpoint_files

IDENTITY = {'seed': 0, 'workers': 8}


@pytest.fixture
def entries():
    rng = np.random.RandomState(0)
    return {
        'updater/model:main/W': rng.standard_normal((7, 11)).astype(np.float32),
        'updater/iteration': np.array(41),
        'extensions/LogReport/_log': np.array('[{"epoch": 1}]'),
        'empty': np.zeros((0, 3), np.float32),
        'nothing': np.array(None),
    }


@pytest.fixture
def saved(tmp_path, entries):
    path = tmp_path / 'checkpoint-000000041.npz'
    checkpoint.write(path, entries, IDENTITY)
    return path


def assert_same(actual, expected):
    assert set(actual) == set(expected)
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype and actual[name].shape == array.shape
        assert actual[name].tolist() == array.tolist()


def test_what_was_written_is_read(saved, entries, tmp_path):
    found, identity = checkpoint.read(saved)
    assert_same(found, entries)
    assert identity == IDENTITY
    assert os.listdir(tmp_path) == [saved.name]


def test_no_damage_goes_unnoticed(saved, entries):
    """Each byte in turn with one bit flipped, and each length that is too short."""
    good = saved.read_bytes()
    refused = 0
    for position in range(len(good)):
        damaged = bytearray(good)
        damaged[position] ^= 1 << (position % 8)
        saved.write_bytes(damaged)
        try:
            found, identity = checkpoint.read(saved)
        except CheckpointError as error:
            assert saved.name in str(error)
            refused += 1
        else:  # a time stamp, say, which nobody reads
            assert_same(found, entries)
            assert identity == IDENTITY
    assert refused > 0.8 * len(good)
    for length in range(0, len(good), 7):
        saved.write_bytes(good[:length])
        with pytest.raises(CheckpointError, match='is damaged or not a checkpoint'):
            checkpoint.read(saved)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_file_is_executed(tmp_path):
    trace, path = tmp_path / 'trace', tmp_path / 'checkpoint-000000001.npz'
    np.savez(path, manifest=np.array(Hostile(trace), dtype=object))
    with pytest.raises(CheckpointError):
        checkpoint.read(path)
    path.write_bytes(pickle.dumps(Hostile(trace)))
    with pytest.raises(CheckpointError):
        checkpoint.read(path)
    assert not trace.exists()
    pickle.loads(path.read_bytes())
    assert trace.exists()  # it would have been


def test_other_archives_are_refused(tmp_path):
    for name, arrays in (('a', {'x': np.ones(3)}), ('b', {'manifest': np.array('{"names": 3}')})):
        np.savez(tmp_path / name, **arrays)
        with pytest.raises(CheckpointError):
            checkpoint.read(tmp_path / f'{name}.npz')
    np.save(tmp_path / 'c.npy', np.ones(3))
    for name in ('c.npy', 'none.npz'):
        with pytest.raises(CheckpointError, match=name):
            checkpoint.read(tmp_path / name)


def test_an_entry_that_was_taken_out_is_missed(saved):
    with zipfile.ZipFile(saved) as archive:
        kept = {n: archive.read(n) for n in archive.namelist() if 'iteration' not in n}
    with zipfile.ZipFile(saved, 'w') as archive:
        for name, content in kept.items():
            archive.writestr(name, content)
    with pytest.raises(CheckpointError, match='entries are missing'):
        checkpoint.read(saved)


def test_it_is_on_the_disk_and_verified_before_it_has_its_name(entries, tmp_path, monkeypatch):
    path, calls = tmp_path / 'checkpoint-000000007.npz', []

    def note(module, name, function):
        def noted(*arguments):
            calls.append((name, path.exists()))
            return function(*arguments)

        monkeypatch.setattr(module, name, noted)

    note(os, 'fsync', os.fsync)
    note(os, 'replace', os.replace)
    note(checkpoint_files, '_reads_as', checkpoint_files._reads_as)
    checkpoint.write(path, entries, IDENTITY)
    before = [('fsync', False), ('_reads_as', False), ('replace', False)]
    assert calls == [*before, ('fsync', True)]
    monkeypatch.setattr(checkpoint_files, '_reads_as', lambda *_: False)
    with pytest.raises(OSError, match='does not read back'):
        checkpoint.write(tmp_path / 'checkpoint-000000008.npz', entries, IDENTITY)
    assert os.listdir(tmp_path) == [path.name]


def test_what_reads_otherwise_is_noticed(saved, entries):
    arrays = {name: array for name, array in entries.items() if array.dtype != object}
    assert checkpoint_files._reads_as(saved, arrays)
    assert not checkpoint_files._reads_as(saved, {**arrays, 'more': np.zeros(1)})
    for name in ('updater/model:main/W', 'updater/iteration'):
        other = arrays[name].copy()
        other.reshape(-1)[-1] += 1
        assert not checkpoint_files._reads_as(saved, {**arrays, name: other})


def test_no_space_left_loses_nothing(saved, entries, tmp_path):
    entries['large'] = np.ones(100_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        for path in (tmp_path / 'checkpoint-000000042.npz', saved):
            with pytest.raises(OSError, match='File too large'):
                checkpoint.write(path, entries, IDENTITY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == [saved.name]
    assert 'large' not in checkpoint.read(saved)[0]


def test_the_newest_that_can_be_read_is_taken(saved, entries, tmp_path, capsys):
    newer = tmp_path / 'checkpoint-000000100.npz'
    checkpoint.write(newer, {**entries, 'updater/iteration': np.array(100)}, IDENTITY)
    path, found = checkpoint.newest(tmp_path, IDENTITY)
    assert path == newer and found['updater/iteration'] == 100
    newer.write_bytes(newer.read_bytes()[:-30])
    path, found = checkpoint.newest(tmp_path, IDENTITY)
    assert path == saved and found['updater/iteration'] == 41
    assert f'{newer} is damaged' in capsys.readouterr().err
    assert checkpoint.newest(saved, IDENTITY)[0] == saved
    saved.write_bytes(b'')
    with pytest.raises(CheckpointError, match=f'{newer} is damaged.*; {saved} is damaged'):
        checkpoint.newest(tmp_path, IDENTITY)
    (tmp_path / 'empty').mkdir()
    assert checkpoint.newest(tmp_path / 'empty', IDENTITY) is None


def test_another_identity_is_refused_by_name(saved, tmp_path):
    with pytest.raises(CheckpointError, match=r'was made with seed 0 \(now 1\)$'):
        checkpoint.newest(tmp_path, {**IDENTITY, 'seed': 1})
    with pytest.raises(CheckpointError, match=r'workers 8 \(now None\)'):
        checkpoint.newest(tmp_path, {'seed': 0})
    with pytest.raises(CheckpointError, match=r'mu1 None \(now 0.9\)'):
        checkpoint.newest(tmp_path, {**IDENTITY, 'mu1': 0.9})


def test_intervals():
    assert checkpoint.interval('2') == (2, 0)
    assert checkpoint.interval('10m') == (0, 600)
    assert checkpoint.interval('0.5m') == (0, 30)
    for every in ('', '0', '-1', 'm', '0m', '1.5', '3h', 'nanm', 'infm'):
        with pytest.raises(ValueError, match='neither a number of epochs'):
            checkpoint.interval(every)
