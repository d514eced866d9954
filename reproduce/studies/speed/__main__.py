"""How fast is each part of this program, compared with the usual alternative?

./run_mpi.sh benchmark NAME

NAME          what is measured
update        the update rule on ResNet-50's parameters, on one core
statistics    the all-reduce of BN statistics, on 16 ranks
allreduce     the all-reduce of ResNet-50's gradients, on 4 ranks
workers       8 virtual workers, against Chainer's StandardUpdater
checkpoint    a checkpoint of ResNet-50, against a plain np.savez
loader        decoding and augmentation, against plain Pillow; two loader processes, against one
listing       a list of 1,281,167 images from its manifest, on 4 ranks
iteration     an iteration by number of workers, or against ChainerMN's own way
functions     forward and backward of ResNet-50 on one core, by C, NumPy, PyTorch and Chainer
systems       ours, ChainerMN's own way and PyTorch, on one platform
precision     the error that float16 adds to ResNet-50's mean gradient, for 8 to 1,024 workers
accumulation  8 workers, against gradient accumulation and against one large batch

Quote the ratios. They depend less on the machine than the milliseconds do.

The last five names have their own options: ./run_mpi.sh benchmark iteration --help
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import sys
from pathlib import Path

from reproduce.job import BLAS_THREADS

if __name__ == '__main__':  # NumPy reads these variables when it is imported
    for variable in BLAS_THREADS:
        os.environ.setdefault(variable, '1')

import numpy as np

from reproduce.job.command_line import Parser, reason, run_program
from reproduce.studies.speed.side_by_side import start_ranks

# Name to module. The module's run() takes the number of rounds.
MODULES = {
    'update': 'update',
    'statistics': 'statistics',
    'allreduce': 'allreduce',
    'workers': 'workers',
    'checkpoint': 'checkpoint',
    'loader': 'decoding',
    'listing': 'listing',
}
# Name to a module that has its own command line. The module's main() takes the words.
STUDIES = {
    'iteration': 'reproduce.studies.speed.iteration',
    'functions': 'reproduce.studies.speed.functions',
    'systems': 'reproduce.studies.speed.systems',
    'precision': 'reproduce.studies.precision',
    'accumulation': 'reproduce.studies.precision',
}
_RANKS = {'statistics': 16, 'allreduce': 4, 'listing': 4}


def parse(argv):
    """Returns the options of one of ``MODULES``. A wrong command line ends the program."""
    parser = Parser(prog='./run_mpi.sh benchmark', description=__doc__)
    parser.add_argument(
        'name', choices=[*MODULES, *STUDIES], metavar='NAME', help='one of the names above'
    )
    defaults = ', '.join(f'{name} {n}' for name, n in _RANKS.items())
    parser.add_argument(
        '--ranks', type=int, metavar='N', help=f'start N processes with mpiexec [{defaults}]'
    )
    parser.add_argument(
        '--repeat',
        type=int,
        default=15,
        metavar='N',
        help='time N rounds, after one that does not count [%(default)s]',
    )
    parser.add_argument(
        '--json', metavar='FILE', help='write the results to FILE, too, as JSON [no file]'
    )
    options = parser.parse_args(argv)
    if options.name in STUDIES:
        parser.refuse(
            f'{options.name} must be the first word: ./run_mpi.sh benchmark {options.name} OPTIONS'
        )
    for name in ('repeat', 'ranks'):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.refuse(f'--{name} must be at least 1, not {value}')
    if options.ranks and options.name not in _RANKS:
        parser.refuse(
            f'--ranks {options.ranks} does not apply to {options.name}, only to '
            f'{", ".join(_RANKS)}: leave it out'
        )
    if options.json:
        try:
            Path(options.json).touch()  # so that it fails before the work, not after it
        except OSError as error:
            parser.refuse(f'--json {reason(error)}')
    return options


def main(argv):
    if argv and argv[0] in STUDIES:
        importlib.import_module(STUDIES[argv[0]]).main(argv)
        return
    options = parse(argv)
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
    run_program(main, sys.argv[1:])
