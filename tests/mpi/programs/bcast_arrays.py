"""Sends arrays of many kinds from rank 0, in parts of 100 bytes."""

import extensions  # noqa: F401  isort: skip  (first: makes Chainer importable on NumPy 2)
import numpy as np
from mpi4py import MPI

from reproduce.job import ranks

ranks._PART = 100
comm = MPI.COMM_WORLD
rng = np.random.RandomState(0)
arrays = {
    'float32': rng.standard_normal((7, 11)).astype(np.float32),
    'Fortran': np.asfortranarray(rng.standard_normal((5, 6))),
    'zero-dimensional': np.array(3),
    'empty': np.zeros((0, 3), np.float16),
    'text': np.array('[{"epoch": 1}]'),
    'none': np.array(None),
}
received = ranks.bcast_arrays(comm, arrays if comm.rank == 0 else None)
assert list(received) == list(arrays)
for name, array in arrays.items():
    assert received[name].dtype == array.dtype and received[name].shape == array.shape, name
    assert received[name].tolist() == array.tolist(), name
assert ranks.bcast_arrays(comm, None) == {}
