"""A training as a job of many processes: errors, signals, logs, checkpoints, the watchdog."""

# Environment variables that limit the threads of BLAS. NumPy reads them when it is imported.
BLAS_THREADS = ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS')
