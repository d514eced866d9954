"""Do the bits depend on who computes? Trains 8 workers on 1, 2, 4 and 8 processes.

./run_mpi.sh invariance    prints a digest of each part of the result, a row for each layout

Ends with status 0 if all rows are equal, else 1.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from reproduce.job.command_line import Parser
from reproduce.studies.speed.side_by_side import start_ranks


def run(layouts=((1, 8), (2, 4), (4, 2), (8, 1))) -> bool:
    """Trains with 8 workers on several numbers of processes, and prints digests of the results.

    Each run is 23 iterations of 128 digits, over the border of an epoch, augmented, with loader
    processes.

    Args:
        layouts (tuple): Pairs of processes and workers each.

    Returns:
        bool: Whether all runs gave the same bits.
    """
    found = []
    for processes, each in layouts:
        with tempfile.TemporaryDirectory() as out:
            options = (
                f'--preset smoke --workers {processes * each} --local-batch-size 16 --epochs 2'
            )
            done = start_ranks(
                processes,
                [out, *options.split(), '--width', '8', '--communicator', 'mpi'],
                'reproduce.studies.invariance_program',
                stdout=subprocess.DEVNULL,
            )
            if done.returncode:
                sys.exit(done.returncode)
            found.append(json.loads((Path(out) / 'digests.json').read_text()))
        if len(found) == 1:
            print(f'{"processes x workers each":26}' + ''.join(f'{n:18}' for n in found[0]))
        row = ''.join(f'{digest[:16]:18}' for digest in found[-1].values())
        print(f'{processes:9} x {each:<14}{row}', flush=True)
    same = all(digests == found[0] for digests in found)
    print('the same bits' if same else 'the bits differ')
    return same


if __name__ == '__main__':
    Parser(prog='./run_mpi.sh invariance', description=__doc__).parse_args()
    sys.exit(0 if run() else 1)
