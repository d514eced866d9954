"""A training as a job of many processes: errors, signals, logs, checkpoints, the watchdog."""

# Environment variables that limit the threads of BLAS. NumPy reads them when it is imported.
BLAS_THREADS = ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS')


def mpi_library(text: str) -> str:
    """Returns name and version of an MPI from its own text: ``'MPICH 4.0.2'``.

    Args:
        text (str): Result of ``MPI.Get_library_version()``. MPICH's has several lines.
    """
    first = text.strip('\0 \n').splitlines()[0].partition(',')[0]
    return ' '.join(first.replace('Version', '').replace(':', '').split())
