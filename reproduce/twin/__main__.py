"""The same training in PyTorch.

./run_mpi.sh twin train OPTIONS     trains, in processes that torchrun starts on this machine
./run_mpi.sh twin compare OPTIONS   compares it with the training in Chainer, iteration by iteration

The options of "train" are those of reproduce/train.py, and -n N, the number of processes: by
default one per GPU, or two without a GPU. What the twin does not have is an error.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from reproduce.job import command_line

NAMES = ('train', 'compare')


def train(words):
    """Replaces this process by torchrun. Before that, a wrong command line gets one line."""
    import torch

    from reproduce.settings import InputError
    from reproduce.twin import records
    from reproduce.twin import train as program

    parser = command_line.Parser(prog='./run_mpi.sh twin train', add_help=False)
    parser.add_argument('-n', type=int, default=torch.cuda.device_count() or 2)
    own, options = parser.parse_known_args(words)
    if own.n < 1:
        parser.refuse(f'-n must be at least 1, not {own.n}')
    try:
        records.parse(options, own.n, program.__doc__)
    except InputError as error:
        parser.refuse(error)
    start = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(own.n)]
    place = str(Path(program.__file__))
    os.execv(sys.executable, [sys.executable, *start, place, *options])


def main(argv):
    parser = command_line.Parser(prog='./run_mpi.sh twin', description=__doc__)
    parser.add_argument('name', choices=NAMES, metavar='NAME', help='one of the names above')
    name = parser.parse_args(argv[:1]).name
    if importlib.util.find_spec('torch') is None:
        parser.refuse(
            f'{sys.executable} has no package torch: start with EXTRAS=twin, or install it by hand '
            '(hostfiles/README.md)'
        )
    if name == 'train':
        train(argv[1:])
    from reproduce.twin import compare

    return compare.main(argv[1:])


if __name__ == '__main__':
    os.environ.setdefault('OMP_NUM_THREADS', '1')  # before NumPy and PyTorch are imported
    command_line.run_program(main, sys.argv[1:])
