"""Reports the losses of the cast to float16."""

from __future__ import annotations

import chainer
import numpy as np
from chainer import reporter, training
from chainer.training import extension
from mpi4py import MPI


class CastReport(training.Extension):
    """Reports the effects of the cast to the wire's dtype on the gradients of all workers.

    ``cast/inf`` and ``cast/nan`` are the numbers of infinite and NaN elements after the cast.
    ``cast/flushed`` is the share of the nonzero elements that became zero. All three cover the
    time since the last call. Each call sends one message. Counts that were not reported yet can be
    saved after :meth:`gather`.

    Args:
        comm (HalfPrecisionMpiCommunicator): Its ``cast_counts`` are read and set to zero.

    Raises:
        TypeError: ``comm`` counts nothing, as on GPUs.
    """

    trigger = (1, 'epoch')
    priority = extension.PRIORITY_WRITER

    def __init__(self, comm):
        if not hasattr(comm, 'cast_counts'):
            raise TypeError(
                f'CastReport needs the communicator mpi: {type(comm).__name__} does not count what '
                'the cast loses'
            )
        self._comm = comm
        self._counts = np.zeros(4, np.int64)  # summed over all processes

    def __call__(self, trainer=None):
        self.gather()
        before, after, n_inf, n_nan = map(int, self._counts)
        self._counts[...] = 0
        share = (before - after) / max(before, 1)
        reporter.report({'cast/flushed': share, 'cast/inf': n_inf, 'cast/nan': n_nan})

    def gather(self):
        """Gives every process the counts of all processes. Collective; call it before saving."""
        counts = np.empty_like(self._counts)
        self._comm.mpi_comm.Allreduce(self._comm.cast_counts, counts, MPI.SUM)
        self._comm.cast_counts[...] = 0
        self._counts += counts

    def serialize(self, serializer):
        self._counts = serializer('counts', self._counts)
        if isinstance(serializer, chainer.Deserializer):
            self._comm.cast_counts[...] = 0  # of iterations after the saved one
