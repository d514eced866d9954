"""Reports what the cast to float16 loses."""

from __future__ import annotations

import numpy as np
from chainer import reporter, training
from chainer.training import extension
from mpi4py import MPI


class CastReport(training.Extension):
    """Reports what the cast to the wire's dtype did to the gradients of all workers since the last
    call: ``cast/inf`` and ``cast/nan``, the numbers of elements that are infinite and NaN
    afterwards, and ``cast/flushed``, the share of the non-zero ones that became zero.

    One message per call. What was not reported yet can be saved after :meth:`gather`.

    Args:
        comm (HalfPrecisionMpiCommunicator): Its ``cast_counts`` are set to zero.
    """

    trigger = (1, 'epoch')
    priority = extension.PRIORITY_WRITER

    def __init__(self, comm):
        self._comm = comm
        self._counts = np.zeros(4, np.int64)  # of all processes

    def __call__(self, trainer=None):
        self.gather()
        before, after, n_inf, n_nan = map(int, self._counts)
        self._counts[...] = 0
        share = (before - after) / max(before, 1)
        reporter.report({'cast/flushed': share, 'cast/inf': n_inf, 'cast/nan': n_nan})

    def gather(self):
        """Gives every process the counts of all. Collective; to be called before it is saved."""
        counts = np.empty_like(self._counts)
        self._comm.mpi_comm.Allreduce(self._comm.cast_counts, counts, MPI.SUM)
        self._comm.cast_counts[...] = 0
        self._counts += counts

    def serialize(self, serializer):
        self._counts = serializer('counts', self._counts)
