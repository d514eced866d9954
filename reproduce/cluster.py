"""What the paper's run costs on a cluster: the time of an iteration, an all-reduce, 90 epochs.

python -m reproduce.cluster                       MN-1, the paper's cluster
python -m reproduce.cluster --cluster dgx-h100    a cluster of today
python -m reproduce.cluster --cluster FILE.json   another: copy reproduce/data/mn1.json, in which
                                                  every number stands with its source
python -m reproduce.cluster --measured FILE.json  a check on one host: what was measured with 1 and
                                                  2 ranks predicts the others

All results but the last are predictions. Nothing is fitted to the published time. Not in the model:
GPUs that differ in speed, Python between the kernels, waiting for images, checkpoints, the start;
and nothing overlaps, for ChainerMN's pure_nccl communicator all-reduces after the backward pass.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from reproduce.topology import ClusterError, read, replaced, value_at

_BYTES = {'float16': 2, 'float32': 4}
_PARTS = ('iteration', 'data', 'compute', 'pack', 'allreduce', 'update', 'extensions')


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
    size = job.parameters * _BYTES[job.dtype] if size is None else size
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
    wire = 8 + 4 * _BYTES[job.dtype]
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


# ---------------------------------------------------------------- one host, measured


@dataclass(frozen=True)
class SharedHost:
    """One host whose ranks share its cores, as measured with 1 and 2 ranks.

    one and two are the seconds of each part of an iteration, ``rest`` included.
    """

    cores: int
    one: dict
    two: dict

    def predict(self, ranks) -> dict:
        """The parts of an iteration on more ranks::

            t(P) = (t(1) + s (min(P, c) - 1)) P / min(P, c)                         c cores
            allreduce(P) = (t(1) + s 2 (P - 1) / P) P / min(P, c)
            s = t(2) min(2, c) / 2 - t(1)

        With a core each, ranks slow each other down by what they share, the memory, as the second
        did the first: by s. With more ranks than cores they take turns. Of the all-reduce, t(1) is
        what a rank does alone, s the bytes that it moves, 2 (P - 1) / P of the buffer.
        """
        busy = min(ranks, self.cores)
        parts = {}
        for part, alone in self.one.items():
            shared = self.two[part] * min(2, self.cores) / 2 - alone
            moved = 2 * (ranks - 1) / ranks if part == 'allreduce' else busy - 1
            parts[part] = (alone + shared * moved) * ranks / busy
        return {**parts, 'iteration': sum(parts.values())}


def calibrate(measured, cores) -> SharedHost:
    """The description of a host from what was measured on it.

    Args:
        measured (dict): Number of ranks to the seconds of an iteration and its parts; 1 and 2 are
            used, and need not have all parts.
        cores (int): That the ranks may use.

    Raises:
        ClusterError: 1 or 2 ranks are missing, or were not measured alike.
    """
    if not {1, 2} <= set(measured):
        raise ClusterError('the measurement lacks a run of 1 rank, or of 2')
    one, two = ({**measured[ranks]} for ranks in (1, 2))
    for run in (one, two):
        run['rest'] = run.pop('iteration') - sum(run.values())
    if set(one) != set(two):
        raise ClusterError('the runs of 1 and of 2 ranks were not measured in the same parts')
    return SharedHost(cores, one, two)


def read_measured(path) -> tuple[dict, int]:
    """What ``reproduce.benchmark iteration`` measured on one host: number of ranks to the seconds
    of a run, and the cores of the host, this machine's where the file does not say.

    Raises:
        ClusterError: It cannot be read.
    """
    try:
        runs = [
            run
            for run in json.loads(Path(path).read_text())['figures']['runs']
            if run['hosts'] == 1 and run['workers'] == run['processes']
        ]
        measured = {run['processes']: {part: float(run[part]) for part in _PARTS} for run in runs}
        here = len(os.sched_getaffinity(0))
        return measured, min((run.get('cores_of_a_host', here) for run in runs), default=here)
    except OSError as error:
        raise ClusterError(f'{path}: {error.strerror}') from error
    except (ValueError, TypeError, KeyError) as error:
        raise ClusterError(f'{path} is not of reproduce.benchmark iteration') from error


def check_measured(path) -> dict:
    """Prints what 1 and 2 ranks predict of the others, beside what was measured."""
    measured, cores = read_measured(path)
    host = calibrate(measured, cores)
    print(f'one host of {cores} cores, calibrated on 1 and 2 ranks; milliseconds')
    print(f'{"ranks":>5}  {"":11}{"predicted":>10}{"measured":>10}{"error":>8}')
    result = {}
    for ranks in sorted(set(measured) - {1, 2}):
        predicted, run = host.predict(ranks), measured[ranks]
        for part in ('iteration', 'allreduce'):
            error = predicted[part] / run[part] - 1
            result[f'{ranks} {part}'] = {'predicted': predicted[part], 'error': error}
            print(
                f'{ranks:5}  {part:11}{1000 * predicted[part]:10.1f}{1000 * run[part]:10.1f}'
                f'{error:+8.1%}'
            )
    return result


# ---------------------------------------------------------------- the report


def print_inputs(cluster, job):
    print(
        f'{cluster.name}: {cluster.hosts} hosts, {cluster.gpus:,} GPUs. Inputs and their sources:'
    )
    for path, source in cluster.sources.items():
        if not path.startswith(('what_if.', 'published.')):
            print(f'  {path:32}{value_at(cluster, path):<12,.6g}{source}')
    for name, source in JOB_SOURCES.items():
        value = getattr(job, name)
        print(f'  {name:32}{value if isinstance(value, str) else f"{value:,}":<12}{source}')


def _minutes(seconds) -> str:
    return f'{seconds / 60:,.1f}' if seconds >= 600 else f'{seconds / 60:.2f}'


def print_table(dtype, rows):
    print(f'\n{dtype} on the wire; a prediction')
    print('            ms of an       all-   efficiency against   90 epochs,')
    print(' GPUs      iteration     reduce     1 GPU     1 host      minutes')
    for row in rows:
        milliseconds = f'{1000 * row["iteration"]:15.1f}{1000 * row["allreduce"]:11.2f}'
        host = f'{row["efficiency_to_one_host"]:.1%}' if 'efficiency_to_one_host' in row else '-'
        efficiency = f'{row["efficiency_to_one_gpu"]:10.1%}{host:>11}'
        print(f'{row["processes"]:5,}{milliseconds}{efficiency}{_minutes(row["total"]):>13}')


def print_sensitivity(cluster, found):
    base = found['as described']
    print(
        f'\nminutes on {cluster.gpus:,} GPUs: {_minutes(base)} as described; one thing otherwise:'
    )
    for label, seconds in found['what if'].items():
        print(f'  {label:32}{_minutes(seconds):>8}  {seconds / base - 1:+7.1%}')
    print(f'  {"":32}{"half of it":>17}  {"twice":>15}')
    for path, pair in sorted(found['inputs'].items(), key=lambda item: -_swing(item[1])):
        kind = 'assumption' if 'assumption' in cluster.sources[path] else ''
        cells = ''.join(f'{_minutes(s):>8}  {s / base - 1:+7.1%}' for s in pair)
        print(f'  {path:32}{cells}  {kind}')


def _swing(pair) -> float:
    return abs(pair[0] - pair[1])


def print_account(cluster, row):
    """What the published time would take, all else as described. It is said, and used nowhere."""
    published, total = cluster.published['seconds'], row['total']
    print(
        f'\npublished: {published / 60:.1f} minutes ({cluster.sources["published.seconds"]}); '
        f'predicted: {total / 60:.1f}, {total / published - 1:+.1%}'
    )
    missing = 1000 * (published - total) / row['iterations']
    print(f'missing: {missing:+.0f} ms an iteration, beside its {1000 * row["iteration"]:.0f} ms')


def report(cluster, dtypes, numbers, out) -> dict:
    """Prints everything, draws the plots, writes OUT/NAME.json, and returns its content."""
    from reproduce import figures

    tables = {dtype: table(cluster, Job(dtype=dtype), numbers) for dtype in dtypes}
    found = sensitivity(cluster, Job(dtype=dtypes[0]))
    print_inputs(cluster, Job(dtype=dtypes[0]))
    for dtype, rows in tables.items():
        print_table(dtype, rows)
    print_sensitivity(cluster, found)
    if 'seconds' in cluster.published:
        print_account(cluster, predict(cluster, Job(dtype=dtypes[0]), cluster.gpus))
    content = {
        'cluster': dataclasses.asdict(cluster),
        'job': {**dataclasses.asdict(Job()), 'sources': JOB_SOURCES},
        'predictions': tables,
        'sensitivity': found,
    }
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / 'cluster.json').write_text(json.dumps(content, indent=2) + '\n')
    figures.cluster(tables, cluster.name, cluster.published, out)
    figures.sensitivity(found, cluster.name, cluster.published, out)
    print(f'results in {out}')
    return content


def main():
    parser = argparse.ArgumentParser(
        prog='python -m reproduce.cluster',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--cluster', default='mn1', help='mn1, dgx-h100, or a file [mn1]')
    parser.add_argument('--processes', help='numbers of GPUs, as 8,1024 [1,2,4,... to all]')
    parser.add_argument('--dtype', choices=_BYTES, help='on the wire [both]')
    parser.add_argument('--out', default='results/cluster', help='folder [results/cluster]')
    parser.add_argument('--measured', metavar='FILE', help='iteration.json of reproduce.benchmark')
    options = parser.parse_args()
    try:
        if options.measured:
            check_measured(options.measured)
            return
        cluster = read(options.cluster)
        numbers = _numbers(options.processes, cluster)
        report(cluster, [options.dtype] if options.dtype else list(_BYTES), numbers, options.out)
    except (ClusterError, OSError) as error:
        parser.error(str(error))


def _numbers(text, cluster) -> list[int]:
    if text is None:
        doubled = [2**n for n in range(cluster.gpus.bit_length())]
        return [n for n in doubled if n % min(n, cluster.host.gpus) == 0]
    try:
        numbers = sorted({int(n) for n in text.split(',')})
    except ValueError as error:
        raise ClusterError('--processes takes integers, as 8,1024') from error
    for n in numbers:
        layout(cluster, Job(), n)
    return numbers


if __name__ == '__main__':
    main()
