"""Does the result depend on the number of processes? Trains 8 workers on 1, 2, 4 and 8 processes.

./run_mpi.sh invariance

It prints a row for each number of processes, with a digest of each part of the result. Then it
compares them with those of other machines: compiled functions have the same bits everywhere. The
exit status is 0 if all are equal, and 1 if any differs.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from reproduce.job.command_line import Parser, run_program
from reproduce.studies.speed.side_by_side import start_ranks

OPTIONS = '--preset smoke --epochs 2 --communicator mpi'  # 23 iterations of 8 workers x 16 images
# golden() of compiled functions, on every processor, with every Python and NumPy.
GOLDEN = '0c323457516d50f3b0f737636fa5746ad1a714784e0fee2d35a717f4f8d9ea15'


def golden(digests: dict) -> str:
    """Returns one digest of a run's digests."""
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def run(layouts=((1, 8), (2, 4), (4, 2), (8, 1))) -> bool:
    """Trains the same workers on several numbers of processes, and prints digests of the results.

    Each run has 23 iterations of 128 digits. The runs cross the border of an epoch, augment the
    images, and use loader processes.

    Args:
        layouts (tuple): Pairs of a number of processes and the workers per process.

    Returns:
        bool: Whether all runs gave the same bits.

    Raises:
        SystemExit: A run failed. The status is the run's.
    """
    found = []
    for processes, each in layouts:
        with tempfile.TemporaryDirectory() as out:
            options = f'{OPTIONS} --workers {processes * each} --local-batch-size 16'
            done = start_ranks(
                processes,
                [out, *options.split()],
                'reproduce.studies.invariance_program',
                stdout=subprocess.DEVNULL,
            )
            if done.returncode:
                sys.exit(done.returncode)
            found.append(json.loads((Path(out) / 'digests.json').read_text()))
            functions = json.loads((Path(out) / 'settings.json').read_text())['functions']
        if len(found) == 1:
            print(f'{"processes x workers each":26}' + ''.join(f'{n:18}' for n in found[0]))
        row = ''.join(f'{digest[:16]:18}' for digest in found[-1].values())
        print(f'{processes:9} x {each:<14}{row}', flush=True)
    same = all(digests == found[0] for digests in found)
    print('the same bits' if same else 'the bits differ')
    return same and _is_as_elsewhere(functions, golden(found[0]))


def _is_as_elsewhere(functions, digest) -> bool:
    if functions != 'compiled':
        print(f'not comparable to other machines: functions {functions}')
        return True
    same = digest == GOLDEN
    print(f'{digest[:16]}, {"as on other machines" if same else f"elsewhere {GOLDEN[:16]}"}')
    return same


if __name__ == '__main__':
    Parser(prog='./run_mpi.sh invariance', description=__doc__).parse_args()
    run_program(lambda: 0 if run() else 1)
