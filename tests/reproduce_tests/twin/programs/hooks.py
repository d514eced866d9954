"""Averages gradients by each hook; on every process. Program of test_half_precision.py."""

import sys

import numpy as np
import torch
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from reproduce.twin import half_precision
from reproduce.twin.processes import Processes


def averaged(rank, state, hook):
    """Returns what the hook makes of gradients in two buckets."""
    gradients = np.load(sys.argv[1])['gradients'][rank]
    model = torch.nn.Module()
    model.a = torch.nn.Parameter(torch.zeros(gradients[:300_000].size))
    model.b = torch.nn.Parameter(torch.zeros(gradients[300_000:].size))
    first, second = (torch.from_numpy(g.copy()) for g in np.split(gradients, [300_000]))
    model.forward = lambda: (model.a * first).sum() + (model.b * second).sum()
    network = DistributedDataParallel(model, bucket_cap_mb=1)
    network.register_comm_hook(state, hook)
    network().backward()
    return torch.cat([model.a.grad, model.b.grad]).numpy()


job = Processes(seconds=0)
found = {
    f'{hook.__name__}-{name}': averaged(job.rank, getattr(torch, name), hook)
    for hook in (
        half_precision.exact_sum,
        half_precision.cast_sum_divide,
        half_precision.divide_first,
    )
    for name in ('float16', 'float32')
}
found['torch'] = averaged(job.rank, None, default_hooks.fp16_compress_hook)
np.savez(f'{sys.argv[2]}{job.rank}.npz', **found)
job.close()
