"""Ranks under a watchdog of 2 seconds: watched.py HOW. Under 20 in turn: watched.py often."""

import os
import signal
import sys
import time

from mpi4py import MPI

from reproduce.job import ranks
from reproduce.job.watchdog import Watchdog

how = sys.argv[1]
mpi = MPI.COMM_WORLD
done = 0


def often():
    start = time.monotonic()
    for _ in range(20):
        with Watchdog(mpi, 300):
            time.sleep(0.01)
    print(f'20 took {time.monotonic() - start}', flush=True)


def position():
    if how == 'position' and mpi.rank == 1:
        raise RuntimeError('no position')
    return done, None, f'iteration {done}'


def main():
    global done
    mpi.barrier()  # their imports end at other times
    if how == 'late':
        time.sleep(1.4 * mpi.rank)
    with Watchdog(mpi, 0 if how == 'off' else 2) as watchdog:
        watchdog.enter(position)
        mpi.barrier()
        print(f'started {time.time()}', flush=True)
        if how == 'slow':  # one rank, for longer than 2 seconds, but it moves
            for _ in range(8 * (mpi.rank == 1)):
                time.sleep(0.7)
                done += 1
        elif how == 'behind':
            done = int(mpi.rank != 1)
            time.sleep(60 * (mpi.rank == 1))
        elif how.startswith('silent'):  # one rank alone, while the others move
            time.sleep(0.5)  # the ranks learn where the others are
            if mpi.rank == int(how[-1]):
                os.kill(os.getpid(), signal.SIGSTOP)
            for _ in range(40):
                time.sleep(0.5)
                done += 1
        elif how == 'stands still':
            time.sleep(60)
        elif how == 'agreed':
            raise ranks.AgreedExit(3)
        elif how != 'late':
            time.sleep(3)
        mpi.barrier()
    print(f'rank {mpi.rank} ended', flush=True)


ranks.run(often if how == 'often' else main)
