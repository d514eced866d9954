"""How long does a checkpoint of ResNet-50 take? ./run_mpi.sh benchmark checkpoint"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np

from extensions.checkpoint import copy_of, write
from reproduce.resnet50 import ResNet50
from reproduce.studies.speed.side_by_side import side_by_side, table


class _State:
    def __init__(self, entries):
        self._entries = entries

    def serialize(self, serializer):
        for name, array in self._entries.items():
            serializer(name, array)


def run(repeat: int) -> dict:
    """Times a checkpoint against np.savez and against writing the bytes alone.

    The checkpoint is flushed to the disk, and compared with memory. A training waits for the copy
    alone; a thread writes it.

    Args:
        repeat (int): Rounds that are timed.

    Returns:
        dict: The table.
    """
    rng = np.random.RandomState(0)
    entries = {
        f'{name}/{kind}': rng.standard_normal(param.shape).astype(np.float32)
        for name, param in ResNet50(seed=0).namedparams()
        for kind in ('data', 'm', 'delta')
    }
    everything = np.concatenate([array.ravel() for array in entries.values()])
    with tempfile.TemporaryDirectory(dir='.') as folder:
        path = Path(folder)

        def save(name, function, flush):
            with open(path / 'new', 'wb') as file:
                function(file)
                file.flush()
                if flush:
                    os.fsync(file.fileno())
            os.replace(path / 'new', path / name)

        def savez(file):
            np.savez(file, **entries)

        state = _State(entries)
        copy = copy_of(state, {})

        ours = 'Checkpointer: flushed to the disk, verified'
        candidates = {
            ours: lambda: write(path / 'checkpoint.npz', entries, {}),
            'Checkpointer: the copy, for which the training waits': lambda: copy_of(state, copy),
            'np.savez, flushed to the disk': lambda: save('flushed', savez, True),
            'np.savez': lambda: save('plain', savez, False),
            'the bytes, flushed to the disk': lambda: save('bytes', everything.tofile, True),
            'the bytes': lambda: save('unflushed', everything.tofile, False),
        }
        title = f'{everything.nbytes / 2**20:,.0f} MiB: parameters, m and delta of ResNet-50'
        return table(title, side_by_side(candidates, repeat), ours)
