"""Trains three iterations of 4 workers on P processes, for both kinds of sum.

Program of test_virtual_workers.py, which also calls it in its own process.
"""

import sys

import numpy as np
import torch
import torch.nn.functional as F

from reproduce.twin.processes import Processes
from reproduce.twin.virtual_workers import VirtualWorkers


def play(exact):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(20, 30, bias=False),
        torch.nn.BatchNorm1d(30, momentum=1.0),
        torch.nn.Linear(30, 5),
    )
    workers = VirtualWorkers(model, 4, exact=exact)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for iteration in range(3):
        for worker in workers:
            rng = np.random.RandomState([iteration, worker])
            x = torch.from_numpy((1 + worker) * rng.normal(size=(16, 20)).astype('f'))
            F.cross_entropy(model(x), torch.from_numpy(rng.randint(5, size=16))).backward()
            workers.add_worker()
        workers.mean_grad()
        optimizer.step()
    workers.average_statistics()
    tensors = model.state_dict()
    return {name: t.numpy() for name, t in tensors.items() if t.dtype == torch.float32}


def both():
    return {
        f'{kind} {name}': array
        for kind in ('exact', 'rounded')
        for name, array in play(kind == 'exact').items()
    }


if __name__ == '__main__':
    job = Processes(seconds=0)
    np.savez(f'{sys.argv[1]}{job.rank}.npz', **both())
    job.close()
