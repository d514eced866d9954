"""How long does the paper's run take on a cluster? Predicts an iteration and 90 epochs.

./run_mpi.sh cluster                        predicts MN-1, the paper's cluster
./run_mpi.sh cluster --cluster dgx-h100     predicts 1,024 H100 GPUs
./run_mpi.sh cluster --cluster FILE.json    predicts a cluster of your own

To describe your own cluster, copy reproduce/studies/cluster/mn1.json and change its numbers. Each
number in the file has its source.

All results are predictions. Nothing is fitted to the published time.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np

from extensions import SOURCES
from reproduce.job.command_line import Parser, reason, run_program
from reproduce.job.plots import plt, save
from reproduce.studies.cluster.description import ClusterError, read, value_at
from reproduce.studies.cluster.model import (
    BYTES,
    JOB_SOURCES,
    Job,
    layout,
    predict,
    sensitivity,
    table,
)


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
    print('Letters:')
    print('\n'.join(f'  {letter}: {text}' for letter, text in SOURCES.items()))


def _minutes(seconds) -> str:
    return f'{seconds / 60:,.1f}' if seconds >= 600 else f'{seconds / 60:.2f}'


def print_table(dtype, rows):
    print(f'\nprediction for gradients in {dtype}')
    print('          iteration, all-reduce,   efficiency against   90 epochs,')
    print(' GPUs             ms         ms     1 GPU     1 host      minutes')
    for row in rows:
        milliseconds = f'{1000 * row["iteration"]:15.1f}{1000 * row["allreduce"]:11.2f}'
        host = f'{row["efficiency_to_one_host"]:.1%}' if 'efficiency_to_one_host' in row else '-'
        efficiency = f'{row["efficiency_to_one_gpu"]:10.1%}{host:>11}'
        print(f'{row["processes"]:5,}{milliseconds}{efficiency}{_minutes(row["total"]):>13}')


def print_sensitivity(cluster, found):
    base = found['as described']
    print(
        f'\n{_minutes(base)} minutes on {cluster.gpus:,} GPUs as described. If one thing differs:'
    )
    for label, seconds in found['what if'].items():
        print(f'  {label:32}{_minutes(seconds):>8}  {seconds / base - 1:+7.1%}')
    print(f'  {"":32}{"half":>17}  {"twice":>15}')
    for path, pair in sorted(found['inputs'].items(), key=lambda item: -_swing(item[1])):
        kind = 'assumption' if 'assumption' in cluster.sources[path] else ''
        cells = ''.join(f'{_minutes(s):>8}  {s / base - 1:+7.1%}' for s in pair)
        print(f'  {path:32}{cells}  {kind}')


def _swing(pair) -> float:
    return abs(pair[0] - pair[1])


def print_account(cluster, row):
    """Prints the published time beside the prediction, which does not depend on it."""
    published, total = cluster.published['seconds'], row['total']
    print(
        f'\npublished: {published / 60:.1f} minutes ({cluster.sources["published.seconds"]}); '
        f'predicted: {total / 60:.1f}, {total / published - 1:+.1%}'
    )
    missing = 1000 * (published - total) / row['iterations']
    print(f'not explained: {missing:+.0f} ms per iteration of {1000 * row["iteration"]:.0f} ms')


def report(cluster, dtypes, numbers, out) -> dict:
    """Prints all tables, draws the plots, and writes OUT/cluster.json.

    Args:
        cluster (Cluster): The cluster.
        dtypes (list of str): Types of the gradients in the all-reduce.
        numbers (list of int): Numbers of GPUs.
        out (str): The folder, which is made.

    Returns:
        dict: The content of OUT/cluster.json.

    Raises:
        ClusterError: The cluster cannot run the job.
        OSError: The folder cannot be made.
    """
    tables = {dtype: table(cluster, Job(dtype=dtype), numbers) for dtype in dtypes}
    found = sensitivity(cluster, Job(dtype=dtypes[0]))
    Path(out).mkdir(parents=True, exist_ok=True)
    print_inputs(cluster, Job(dtype=dtypes[0]))
    for dtype, rows in tables.items():
        print_table(dtype, rows)
    print_sensitivity(cluster, found)
    if 'seconds' in cluster.published_here:
        print_account(cluster, predict(cluster, Job(dtype=dtypes[0]), cluster.gpus))
    content = {
        'cluster': dataclasses.asdict(cluster),
        'job': {**dataclasses.asdict(Job()), 'sources': JOB_SOURCES},
        'predictions': tables,
        'sensitivity': found,
    }
    (Path(out) / 'cluster.json').write_text(json.dumps(content, indent=2) + '\n')
    plot(tables, cluster, out)
    plot_sensitivity(found, cluster.name, cluster.published_here, out)
    print(f'results in {out}')
    return content


def main():
    parser = Parser(prog='./run_mpi.sh cluster', description=__doc__)
    parser.add_argument(
        '--cluster',
        default='mn1',
        metavar='NAME',
        help='predict mn1, dgx-h100, or the cluster that a JSON file describes [%(default)s]',
    )
    parser.add_argument(
        '--processes',
        metavar='N,N',
        help='predict for each of these numbers of GPUs [1,2,4,... to all GPUs]',
    )
    parser.add_argument(
        '--dtype', choices=BYTES, help='type of the gradients in the all-reduce [both]'
    )
    parser.add_argument(
        '--out',
        default='results/cluster',
        metavar='FOLDER',
        help='write cluster.json, cluster.png and sensitivity.png to FOLDER [%(default)s]',
    )
    options = parser.parse_args()
    try:
        cluster = read(options.cluster)
        numbers = _numbers(options.processes, cluster)
        report(cluster, [options.dtype] if options.dtype else list(BYTES), numbers, options.out)
    except (ClusterError, OSError) as error:
        parser.refuse(reason(error))


def _numbers(text, cluster) -> list[int]:
    if text is None:
        doubled = [2**n for n in range(cluster.gpus.bit_length())]
        return [n for n in doubled if n % min(n, cluster.host.gpus) == 0]
    try:
        numbers = sorted({int(n) for n in text.split(',')})
    except ValueError as error:
        raise ClusterError(f'--processes takes integers, as in 8,1024, not {text}') from error
    for n in numbers:
        layout(cluster, Job(), n)
    return numbers


def plot(tables: dict, cluster, out: str):
    """Draws OUT/cluster.png: iteration, efficiency and the whole training by number of GPUs.

    Args:
        tables (dict): Type of the gradients to the rows of
            :func:`reproduce.studies.cluster.model.table`.
        cluster (Cluster): The cluster. Its published results are drawn if the rows have the number
            of GPUs to which they belong.
        out (str): The folder. The file is replaced as a whole.
    """
    figure, axes = plt.subplots(1, 3, figsize=(11, 4), constrained_layout=True)
    gpus = [row['processes'] for row in next(iter(tables.values()))]
    for dtype, rows in tables.items():
        marker = {'ms': 5, 'marker': 'o' if dtype == 'float16' else 's'}
        marker['mfc'] = 'k' if dtype == 'float16' else 'w'
        for key, style, label in (('iteration', 'k-', dtype), ('allreduce', 'k:', 'all-reduce')):
            label = label if label == dtype else f'{label}, {dtype}'
            drawn = [1000 * row[key] or np.nan for row in rows]  # one GPU has no all-reduce
            axes[0].plot(gpus, drawn, style, label=label, **marker)
        efficiency = [100 * row['efficiency_to_one_gpu'] for row in rows]
        axes[1].plot(gpus, efficiency, 'k-', **marker)
        axes[2].plot(gpus, [row['total'] / 60 for row in rows], 'k-', **marker)
    published = cluster.published_here if cluster.gpus in gpus else {}
    if 'efficiency_to_one_gpu' in published:
        share = 100 * published['efficiency_to_one_gpu']
        axes[1].plot([cluster.gpus], [share], 'k*', ms=10, label='the paper, unsourced')
        axes[1].legend(loc='lower left')
    if 'seconds' in published:
        minutes = published['seconds'] / 60
        axes[2].plot([cluster.gpus], [minutes], 'k*', ms=10, label=f'published: {minutes:g} min')
        axes[2].legend()
    axes[0].set_title('iteration, ms')
    axes[1].set_title('efficiency against one GPU, %')
    axes[1].set_ylim(0, 105)
    axes[2].set_title('90 epochs, minutes')
    for axis in axes:
        axis.set_xscale('log', base=2)
        axis.set_xticks(gpus[::2], [f'{n:,}' for n in gpus[::2]])
        axis.set_xlabel('GPUs, 32 images each')
        axis.grid(alpha=0.3)
    for axis in (axes[0], axes[2]):
        axis.set_yscale('log')
        axis.yaxis.set_major_formatter(lambda y, _: f'{y:,g}')
    figure.suptitle(f'{cluster.name}: predictions')
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=4)
    save(figure, os.path.join(out, 'cluster.png'))


def plot_sensitivity(found: dict, name: str, published: dict, out: str):
    """Draws OUT/sensitivity.png: the time of the whole training if one thing differs.

    Args:
        found (dict): The result of :func:`reproduce.studies.cluster.model.sensitivity`.
        name (str): The cluster's name.
        published (dict): Published results, drawn and not used. May be empty.
        out (str): The folder. The file is replaced as a whole.
    """
    base = found['as described'] / 60
    inputs = sorted(found['inputs'].items(), key=lambda item: abs(item[1][0] - item[1][1]))
    what_if = list(found['what if'].items())[::-1]
    figure, axis = plt.subplots(figsize=(9, 6.5), constrained_layout=True)
    for y, (_, (half, twice)) in enumerate(inputs):
        axis.plot([half / 60, base, twice / 60], [y, y, y], 'k-', lw=0.8)
        axis.plot(twice / 60, y, 'ks', ms=6)
        axis.plot(half / 60, y, 'ko', mfc='w', ms=6)
    for y, (_, value) in enumerate(what_if, len(inputs) + 1):
        axis.plot([base, value / 60], [y, y], 'k-', lw=0.8)
        axis.plot(value / 60, y, 'kD', ms=5)
    axis.plot([], [], 'kD', ms=5, label='what if')
    axis.plot([], [], 'ko', mfc='w', ms=6, label='half')
    axis.plot([], [], 'ks', ms=6, label='twice')
    axis.axvline(base, color='k', lw=1, label=f'as described: {base:.1f} min')
    if 'seconds' in published:
        minutes = published['seconds'] / 60
        axis.axvline(minutes, color='k', ls='--', lw=1, label=f'published: {minutes:g} min')
    axis.set_yticks(
        [*range(len(inputs)), *range(len(inputs) + 1, len(inputs) + 1 + len(what_if))],
        [label for label, _ in inputs + what_if],
    )
    axis.set_xscale('log')
    axis.xaxis.set_major_formatter(lambda x, _: f'{x:g}')
    axis.xaxis.set_minor_formatter(lambda x, _: f'{x:g}')
    axis.set_xlabel('90 epochs on all GPUs, minutes')
    axis.grid(alpha=0.3)
    axis.legend(loc='lower right')
    axis.set_title(f'{name}: if one thing differs (predictions)')
    save(figure, os.path.join(out, 'sensitivity.png'))


if __name__ == '__main__':
    run_program(main)
