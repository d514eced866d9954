"""Measures a part beside its peer: quote the ratios, not the milliseconds.

./run_mpi.sh benchmark NAME

update        the update rule on ResNet-50's parameters, one core
statistics    the all-reduce of BN statistics, on 16 ranks
allreduce     the all-reduce of ResNet-50's gradients, on 4 ranks
workers       8 virtual workers beside Chainer's StandardUpdater
checkpoint    a checkpoint of ResNet-50 beside a plain np.savez
loader        decoding and augmentation beside plain Pillow; two loader processes beside one
listing       1,281,167 names from their manifest, on 4 ranks
iteration     an iteration by number of workers, and beside ChainerMN's own way
precision     the cost of float16 in the mean of ResNet-50's gradients, for 8 to 1,024 workers
accumulation  8 workers beside gradient accumulation, and beside one large batch

The last three have options of their own: ./run_mpi.sh benchmark iteration --help
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import sys
from pathlib import Path

import numpy as np

from reproduce.job.command_line import Parser
from reproduce.studies.speed.side_by_side import THREADS, start_ranks

# Name to module; "run" of it takes the number of rounds.
MODULES = {
    'update': 'update',
    'statistics': 'statistics',
    'allreduce': 'allreduce',
    'workers': 'workers',
    'checkpoint': 'checkpoint',
    'loader': 'decoding',
    'listing': 'listing',
}
# Name to module with a command line of its own; "main" of it takes the words.
STUDIES = {
    'iteration': 'reproduce.studies.speed.iteration',
    'precision': 'reproduce.studies.precision',
    'accumulation': 'reproduce.studies.precision',
}
_RANKS = {'statistics': 16, 'allreduce': 4, 'listing': 4}


def parse(argv):
    parser = Parser(prog='./run_mpi.sh benchmark', description=__doc__)
    parser.add_argument('name', choices=[*MODULES, *STUDIES], metavar='NAME', help='see above')
    parser.add_argument('--ranks', type=int, help=f'processes {_RANKS}'.replace('{', '[', 1))
    parser.add_argument('--repeat', type=int, default=15, help='rounds that count [15]')
    parser.add_argument('--json', metavar='FILE', help='write the figures there, too')
    options = parser.parse_args(argv)
    if options.repeat < 1 or (options.ranks is not None and options.ranks < 1):
        parser.error('--repeat and --ranks must be at least 1')
    if options.ranks and options.name not in _RANKS:
        parser.error(f'--ranks is for {", ".join(_RANKS)}, not for {options.name}')
    return options


def main(argv):
    if argv and argv[0] in STUDIES:
        importlib.import_module(STUDIES[argv[0]]).main(argv)
        return
    options = parse(argv)
    for name in THREADS:
        os.environ.setdefault(name, '1')
    is_rank = any(name in os.environ for name in ('OMPI_COMM_WORLD_SIZE', 'PMI_SIZE'))
    if options.name in _RANKS and not is_rank:
        n = options.ranks or _RANKS[options.name]
        sys.exit(start_ranks(n, argv).returncode)
    module = importlib.import_module(f'reproduce.studies.speed.{MODULES[options.name]}')
    result = module.run(options.repeat)
    if result is not None and options.json:
        content = {'benchmark': options.name, 'machine': platform.platform(), 'figures': result}
        content['python'], content['numpy'] = platform.python_version(), np.__version__
        Path(options.json).write_text(json.dumps(content, indent=2) + '\n')


if __name__ == '__main__':
    main(sys.argv[1:])
