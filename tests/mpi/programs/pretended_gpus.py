"""train.py on ranks that pretend to see GPUs: pretended_gpus.py WHAT, mixed, shared or old."""

import sys

from extensions import gpus
from reproduce import train  # first: it starts the loader's server before MPI

what = sys.argv.pop(1)


def look(rank):
    host = f'node{rank}' if what == 'mixed' else 'node0'
    if what == 'mixed' and rank == 1:
        return gpus.Sight(rank, host, obstacle='sees no GPU')
    return gpus.Sight(rank, host, ('0000:3b:00.0',), 1304 if what == 'old' else 22304)


gpus.look = look
train.job.run(train.main)
