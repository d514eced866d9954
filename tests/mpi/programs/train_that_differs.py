"""train.py, but the last rank differs in what the first argument names."""

import sys

from reproduce.job import start

start.before_mpi()

from extensions import kernels
from reproduce import train
from reproduce.job import agreement, ranks

what = sys.argv.pop(1)
is_last = train.MPI.COMM_WORLD.rank == train.MPI.COMM_WORLD.size - 1
items = agreement.items


def others(model, *rest):
    if what == 'parameters':
        next(model.params()).data.flat[0] += 1e-3
    found = items(model, *rest)
    if what == 'numpy':
        found['numpy'] = '1.0'
    if what == 'code':
        found['code'] = 'other'
    return found


if is_last:
    agreement.items = others
    if what == 'options':
        sys.argv += ['--epochs', '4']
    if what == 'images':
        agreement.os.path.getsize = lambda path: 7
    if what == 'library':
        kernels.compiled.clear()
        kernels.functions.clear()
    if what == 'folder':
        agreement.os.access = lambda path, mode: False
ranks.run(train.main)
