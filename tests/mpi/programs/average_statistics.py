"""All-reduces the BN statistics of a minibatch a rank, and saves them: OUT POOLED DTYPE."""

import sys

import extensions  # isort: skip
import chainer
import chainer.links as L
import numpy as np
from tests_common import images_of

out, pooled, dtype = sys.argv[1:4]
comm = extensions.create_communicator('mpi')
with chainer.using_config('dtype', np.dtype(dtype)):
    model = chainer.Chain()
    with model.init_scope():
        model.first = L.BatchNormalization(3, decay=0, dtype=dtype)
        model.second = chainer.ChainList(L.BatchNormalization(5, decay=0, dtype=dtype))
        model.other = L.Linear(2, 2)
    statistics = extensions.AllreduceBatchStatistics(
        model, comm, pooled_variance=pooled == 'pooled'
    )
    for step in range(2):  # only the last minibatch counts
        model.first(images_of(comm.rank, step, 3).astype(dtype))
        model.second[0](images_of(comm.rank, step, 5).astype(dtype))
statistics()
np.savez(
    f'{out}/{comm.rank}.npz',
    first_mean=model.first.avg_mean,
    first_var=model.first.avg_var,
    second_mean=model.second[0].avg_mean,
    second_var=model.second[0].avg_var,
)
