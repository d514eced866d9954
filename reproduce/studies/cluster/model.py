"""A model of the paper's run on a cluster: the time of an iteration, an all-reduce, 90 epochs.

All results are predictions. Nothing is fitted to the published time. The model leaves out: GPUs
that differ in speed, Python between the kernels, waiting for images, checkpoints, the start. And
nothing overlaps, for ChainerMN's pure_nccl communicator all-reduces after the backward pass.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter
from dataclasses import dataclass

from reproduce.studies.cluster.description import ClusterError, replaced, value_at

BYTES = {'float16': 2, 'float32': 4}


@dataclass(frozen=True)
class Job:
    """The paper's training; see ``JOB_SOURCES``.

    algorithm is ``ring`` over all GPUs, or ``hierarchical``: a reduction in each host, a ring of
    one GPU a host, a broadcast. order is that of the hosts in the ring, ``sorted`` or ``random``.
    """

    dtype: str = 'float16'
    local_batch: int = 32
    algorithm: str = 'ring'
    order: str = 'sorted'
    parameters: int = 25_557_032
    statistics: int = 53_120
    images: int = 1_281_167
    validation_images: int = 50_000
    epochs: int = 90
    pieces: int = 13


JOB_SOURCES = {
    'dtype': 'S: float16 on the wire',
    'local_batch': 'S',
    'algorithm': 'B: ring; S: NCCL 2.0.5',
    'order': 'assumption: ranks in the order of the hosts, and hosts in that of their groups',
    'parameters': 'D: reproduce/resnet50.py',
    'statistics': 'D: reproduce/resnet50.py, means and variances of BN; sent in float64',
    'images': 'G',
    'validation_images': 'G',
    'epochs': 'S',
    'pieces': 'assumption: of 4 MB; of the hierarchical all-reduce only',
}


# ---------------------------------------------------------------- the model


def layout(cluster, job, processes) -> tuple[list, int]:
    """Which hosts, in the order of the ring, and how many GPUs of each.

    Raises:
        ClusterError: The cluster has fewer GPUs, or the last host would be used in part.
    """
    gpus = min(processes, cluster.host.gpus)
    if not 1 <= processes <= cluster.gpus or processes % gpus:
        raise ClusterError(
            f'{processes} processes: {cluster.name} has {cluster.gpus:,} GPUs, '
            f'{cluster.host.gpus} in a host, and hosts are used as a whole'
        )
    order = list(range(processes // gpus))
    if job.order == 'random':
        random.Random(0).shuffle(order)
    return order, gpus


def crossings(cluster, order) -> Counter:
    """How many hops of the ring leave each group: as many enter it."""
    groups = [host // cluster.hosts_per_group for host in order]
    return Counter(a for a, b in zip(groups, groups[1:] + groups[:1]) if a != b)


def ring_seconds(cluster, order, gpus, size) -> float:
    """A ring all-reduce of S bytes over P GPUs, g in each of H hosts::

        T = 2 (P - 1) / P * (S / B + L)
        B = min(bus, rails * network, uplinks * uplink / crossings)
        L = H * latency_network + (P - H) * latency_bus + crossings * latency_uplink

    2 (P - 1) steps of S / P bytes on every link; the slowest link sets the pace, and a piece's way,
    twice around, has all latencies: NCCL's own estimate, in its src/graph/tuning.cc. crossings are
    in B the hops that leave the busiest group and share its uplinks, in L those of all groups. B
    has no network where H is 1.
    """
    p, n_hosts = len(order) * gpus, len(order)
    if p == 1:
        return 0.0
    host, leaving = cluster.host, crossings(cluster, order)
    bandwidths, latency = [host.bus.bandwidth], (p - n_hosts) * host.bus.latency
    if n_hosts > 1:
        bandwidths.append(host.rails * host.network.bandwidth)
        latency += n_hosts * host.network.latency
    else:
        latency += host.bus.latency
    if leaving:
        shared = cluster.uplinks * cluster.uplink.bandwidth
        bandwidths.append(shared / max(leaving.values()))
        latency += sum(leaving.values()) * cluster.uplink.latency
    return 2 * (p - 1) / p * (size / min(bandwidths) + latency)


def hierarchical_seconds(cluster, order, gpus, size, pieces) -> float:
    """A reduction in each host, a ring of one GPU a host, a broadcast in each host::

        T = 2 (g - 2 + m) (S / (m bus) + latency_bus) + T_ring(H hosts)        m pieces

    In a host it is a chain: the first piece passes g - 1 links, the others follow at one each.
    """
    bus = cluster.host.bus
    inside = (gpus - 2 + pieces) * (size / (pieces * bus.bandwidth) + bus.latency)
    return (2 * inside if gpus > 1 else 0.0) + ring_seconds(cluster, order, 1, size)


def allreduce_seconds(cluster, job, processes, size=None) -> float:
    """The all-reduce of the gradients, or of SIZE bytes, by the job's algorithm."""
    order, gpus = layout(cluster, job, processes)
    size = job.parameters * BYTES[job.dtype] if size is None else size
    if job.algorithm == 'hierarchical':
        return hierarchical_seconds(cluster, order, gpus, size, job.pieces)
    return ring_seconds(cluster, order, gpus, size)


def predict(cluster, job, processes) -> dict:
    """Seconds of an iteration's parts, and of the whole training::

        compute   b / images_per_second
        pack      N (8 + 4 e) / memory_bandwidth    N parameters, e bytes each on the wire: read 4
                  and write e to pack, read and write e to divide by P, read e and write 4 to
                  unpack; nothing for P = 1
        update    N * 4 * 7 / memory_bandwidth      reads 4 arrays, writes 3
        training  ceil(epochs * images / (P b)) iterations
        validation  of each epoch: ceil(50,000 / P) * forward_share / images_per_second, after an
                  all-reduce of the BN statistics

    Raises:
        ClusterError: As of :func:`layout`, or there is no rate for the local batch.
    """
    host = cluster.host
    if job.local_batch not in host.images_per_second:
        raise ClusterError(f'no images_per_second for a local batch of {job.local_batch}')
    rate = host.images_per_second[job.local_batch]
    wire = 8 + 4 * BYTES[job.dtype]
    parts = {
        'compute': job.local_batch / rate,
        'pack': job.parameters * wire / host.memory_bandwidth if processes > 1 else 0.0,
        'allreduce': allreduce_seconds(cluster, job, processes),
        'update': job.parameters * 4 * 7 / host.memory_bandwidth,
    }
    iterations = math.ceil(job.epochs * job.images / (processes * job.local_batch))
    images = math.ceil(job.validation_images / processes)
    validation = images * host.forward_share / rate
    validation += allreduce_seconds(cluster, job, processes, job.statistics * 8)
    iteration = sum(parts.values())
    return {
        'processes': processes,
        **parts,
        'iteration': iteration,
        'iterations': iterations,
        'training': iterations * iteration,
        'validation': job.epochs * validation,
        'total': iterations * iteration + job.epochs * validation,
    }


def table(cluster, job, numbers) -> list[dict]:
    """predict() for each number of processes, with the efficiency against one GPU and one host.

    An efficiency is the time of an iteration of the one over that of the other.
    """
    one_gpu = predict(cluster, job, 1)['iteration']
    one_host = predict(cluster, job, cluster.host.gpus)['iteration']
    rows = [predict(cluster, job, processes) for processes in numbers]
    for row in rows:
        row['efficiency_to_one_gpu'] = one_gpu / row['iteration']
        if row['processes'] >= cluster.host.gpus:
            row['efficiency_to_one_host'] = one_host / row['iteration']
    return rows


def sensitivity(cluster, job) -> dict:
    """What the total of all GPUs becomes if one thing is otherwise; seconds.

    Returns:
        dict: ``as described``, the total; ``what if``, label to total; ``inputs``, path to the pair
        of totals with half and with twice the number. Inputs that are mere counts are left out.
    """

    def total(cluster, **changes):
        return predict(cluster, dataclasses.replace(job, **changes), cluster.gpus)['total']

    other = 'float32' if job.dtype == 'float16' else 'float16'
    fat = dataclasses.replace(cluster, uplinks=cluster.hosts_per_group * cluster.host.rails)
    what_if = {
        f'{other} on the wire': total(cluster, dtype=other),
        'a fat tree': total(fat),
        'hierarchical all-reduce': total(cluster, algorithm='hierarchical'),
        'hosts in random order': total(cluster, order='random'),
        'the same on a fat tree': total(fat, order='random'),
    }
    if 2 * job.local_batch in cluster.host.images_per_second:
        label = f'{2 * job.local_batch} images a GPU'
        what_if[label] = total(cluster, local_batch=2 * job.local_batch)
    for label, changes in cluster.what_if.items():
        changed = cluster
        for path, value in changes.items():
            changed = replaced(changed, path, value)
        what_if[label] = total(changed)
    counts = ('hosts', 'hosts_per_group', 'host.gpus')
    inputs = {}
    for path in cluster.sources:
        if path.startswith(('what_if.', 'published.')) or path in counts:
            continue
        if path.startswith('host.images_per_second.') and not path.endswith(f'.{job.local_batch}'):
            continue
        value = value_at(cluster, path)
        half = max(1, value // 2) if isinstance(value, int) else value / 2
        inputs[path] = [total(replaced(cluster, path, v)) for v in (half, 2 * value)]
    return {'as described': total(cluster), 'what if': what_if, 'inputs': inputs}
