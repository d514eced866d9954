"""train.py on ranks that pretend to see GPUs: pretended_gpus.py WHAT, mixed, shared or old."""

import sys

from reproduce.job import start

start.before_mpi()

from extensions import nccl
from reproduce import train
from reproduce.job import ranks

what = sys.argv.pop(1)


def inspect(rank):
    host = f'node{rank}' if what == 'mixed' else 'node0'
    if what == 'mixed' and rank == 1:
        return nccl.Gpus(rank, host, obstacle='sees no GPU')
    return nccl.Gpus(rank, host, ('0000:3b:00.0',), 1304 if what == 'old' else 22304)


nccl.inspect = inspect
ranks.run(train.main)
