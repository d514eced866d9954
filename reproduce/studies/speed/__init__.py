"""How fast is each part, compared with its peer? One comparison per file.

``THREADS`` names the environment variables that limit the threads of BLAS. NumPy reads them when it
is imported, so this module does not import NumPy.
"""

THREADS = ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS')
