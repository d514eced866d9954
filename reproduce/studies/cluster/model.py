"""How long does the paper's run take on a cluster? Models an all-reduce, an iteration, 90 epochs.

./run_mpi.sh cluster prints the results. All results are predictions. Nothing is fitted to the
published time. The model leaves out GPUs that differ in speed, Python between the kernels, waiting
for images, and the start. Nothing overlaps: ChainerMN's pure_nccl communicator all-reduces after
the backward pass. Only the writing of a checkpoint does: the ranks wait for the copy of the state,
and a thread writes the copy.
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
    """The paper's training. ``JOB_SOURCES`` has the source of each number.

    Attributes:
        dtype (str): Type of the gradients in the all-reduce.
        local_batch (int): Images per GPU and iteration.
        algorithm (str): ``ring`` over all GPUs; or ``hierarchical``: a reduction in each host, a
            ring with one GPU per host, and a broadcast in each host.
        order (str): Order of the hosts in the ring, ``sorted`` or ``random``.
        parameters (int): Parameters of the model.
        statistics (int): Means and variances of batch normalization.
        images (int): Images of the training set.
        validation_images (int): Images of the validation set.
        epochs (int): Epochs. Each ends with a validation and a checkpoint.
        checkpoint_arrays (int): Arrays of all parameters' size in a checkpoint.
        pieces (int): Pieces of the gradients in the hierarchical all-reduce.
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
    checkpoint_arrays: int = 3
    pieces: int = 13


JOB_SOURCES = {
    'dtype': 'S: float16 on the wire',
    'local_batch': 'S',
    'algorithm': 'B: ring; S: NCCL 2.0.5',
    'order': 'assumption: ranks ordered by host, and hosts ordered by group',
    'parameters': 'D: reproduce/resnet50.py',
    'statistics': 'D: reproduce/resnet50.py, means and variances of BN; sent in float64',
    'images': 'G',
    'validation_images': 'G',
    'epochs': 'S',
    'checkpoint_arrays': 'D: parameters, m and delta (extensions/rmsprop_warmup.py), in float32',
    'pieces': 'assumption: 4 MB each; only in the hierarchical all-reduce',
}


def layout(cluster, job, processes) -> tuple[list, int]:
    """Places the processes on hosts.

    Args:
        cluster (Cluster): The cluster.
        job (Job): The training.
        processes (int): Processes, one per GPU.

    Returns:
        tuple: The hosts in the order of the ring, and the number of GPUs per host.

    Raises:
        ClusterError: The cluster has fewer GPUs, or a host would be used only in part.
    """
    gpus = min(processes, cluster.host.gpus)
    if not 1 <= processes <= cluster.gpus or processes % gpus:
        raise ClusterError(
            f'--processes {processes}: hosts are used as a whole; {cluster.name} can use 1 to '
            f'{cluster.host.gpus} GPUs, or a multiple of {cluster.host.gpus} up to {cluster.gpus:,}'
        )
    order = list(range(processes // gpus))
    if job.order == 'random':
        random.Random(0).shuffle(order)
    return order, gpus


def crossings(cluster, order) -> Counter:
    """Counts the hops of the ring that leave each group. As many hops enter the group."""
    groups = [host // cluster.hosts_per_group for host in order]
    return Counter(a for a, b in zip(groups, groups[1:] + groups[:1]) if a != b)


def ring_seconds(cluster, order, gpus, size) -> float:
    """Returns the seconds T of a ring all-reduce of S bytes over P GPUs, g in each of H hosts::

        T = 2 (P - 1) / P * (S / B + L)
        B = min(bus, rails * network, uplinks * uplink / crossings)
        L = H * latency_network + (P - H) * latency_bus + crossings * latency_uplink

    There are 2 (P - 1) steps, and each sends S / P bytes over every link. The slowest link sets the
    pace. A piece goes around the ring twice, and meets all latencies. This is NCCL's own estimate,
    in its src/graph/tuning.cc.

    In B, ``crossings`` counts the hops that leave the busiest group and share its uplinks. In L,
    ``crossings`` counts the hops that leave any group. With H = 1, B has no network, and L has no
    latency_network: L = P * latency_bus.
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
    """Returns the seconds T of a hierarchical all-reduce of S bytes in m pieces::

        T = 2 (g - 2 + m) (S / (m bus) + latency_bus) + T_ring(H hosts)

    The steps are a reduction in each host, a ring with one GPU per host, and a broadcast in each
    host. The g GPUs of a host form a chain. The first piece passes g - 1 links, and each later
    piece arrives one link's time after the piece before.
    """
    bus = cluster.host.bus
    inside = (gpus - 2 + pieces) * (size / (pieces * bus.bandwidth) + bus.latency)
    return (2 * inside if gpus > 1 else 0.0) + ring_seconds(cluster, order, 1, size)


def allreduce_seconds(cluster, job, processes, size=None) -> float:
    """Returns the seconds of an all-reduce by the job's algorithm.

    Args:
        cluster (Cluster): The cluster.
        job (Job): The training.
        processes (int): Processes, one per GPU.
        size (int): Bytes; None: the gradients.

    Raises:
        ClusterError: As in :func:`layout`.
    """
    order, gpus = layout(cluster, job, processes)
    size = job.parameters * BYTES[job.dtype] if size is None else size
    if job.algorithm == 'hierarchical':
        return hierarchical_seconds(cluster, order, gpus, size, job.pieces)
    return ring_seconds(cluster, order, gpus, size)


def predict(cluster, job, processes) -> dict:
    """Predicts the seconds of an iteration's parts, and of the whole training::

        compute     b / images_per_second
        pack        N (8 + 4 e) / memory_bandwidth
        update      N * 4 * 7 / memory_bandwidth
        training    ceil(epochs * images / (P b)) iterations
        validation  all-reduce of the BN statistics
                    + ceil(50,000 / P) * forward_share / images_per_second, per epoch
        checkpoint  4 (3 N + statistics) * (1 / to_host + 1 / copy), per epoch

    b is the local batch, P the number of processes, and N the number of parameters. In the
    all-reduce, each gradient has e bytes. To pack, a GPU reads 4 bytes and writes e. To divide by
    P, it reads and writes e. To unpack, it reads e and writes 4. With P = 1 there is nothing to
    pack. The update reads 4 arrays and writes 3. For a checkpoint, the state of rank 0 is copied
    from its GPU, and once more in the host's memory, while all ranks wait.

    Args:
        cluster (Cluster): The cluster.
        job (Job): The training.
        processes (int): Processes, one per GPU.

    Returns:
        dict: ``processes``; seconds per iteration: ``compute``, ``pack``, ``allreduce``,
            ``update`` and ``iteration``; the number of ``iterations``; seconds of all epochs:
            ``training``, ``validation``, ``checkpoints`` and ``total``.

    Raises:
        ClusterError: As in :func:`layout`, or the cluster has no rate for the local batch.
    """
    host = cluster.host
    if job.local_batch not in host.images_per_second:
        raise ClusterError(
            f'no images_per_second for a local batch of {job.local_batch} in {cluster.name}: add it'
        )
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
    state = 4 * (job.checkpoint_arrays * job.parameters + job.statistics)
    iteration = sum(parts.values())
    times = {
        'training': iterations * iteration,
        'validation': job.epochs * validation,
        'checkpoints': job.epochs * state * (1 / host.to_host + 1 / host.copy),
    }
    return {
        'processes': processes,
        **parts,
        'iteration': iteration,
        'iterations': iterations,
        **times,
        'total': sum(times.values()),
    }


def table(cluster, job, numbers) -> list[dict]:
    """Predicts each number of processes, with the efficiency against one GPU and one host.

    An efficiency is the iteration time on one GPU, or on one host, over the iteration time on all
    processes.

    Args:
        cluster (Cluster): The cluster.
        job (Job): The training.
        numbers (list of int): Numbers of processes.

    Returns:
        list of dict: The results of :func:`predict`, each with ``efficiency_to_one_gpu``, and from
            one whole host on with ``efficiency_to_one_host``.
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
    """Predicts the seconds of the whole training on all GPUs if one thing differs.

    Args:
        cluster (Cluster): The cluster.
        job (Job): The training.

    Returns:
        dict: ``as described``: the total. ``what if``: label to total. ``inputs``: path to the pair
            of totals with half the number and with twice the number. Counts of hosts and GPUs are
            left out.
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
        'random order on a fat tree': total(fat, order='random'),
    }
    if 2 * job.local_batch in cluster.host.images_per_second:
        label = f'{2 * job.local_batch} images per GPU'
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
