"""Which bits does a training end with? The program that invariance.py starts on each rank.

python -m reproduce.studies.invariance_program OUT OPTIONS...

It trains like reproduce/train.py with these options. Then it writes OUT/digests.json, with a
SHA-256 over the names and bytes of each part of the result.
"""

from __future__ import annotations

from reproduce.job import start

if __name__ == '__main__':
    start.before_mpi()

import hashlib
import json
import sys
from pathlib import Path

import extensions  # noqa: F401  isort: skip  (first: makes Chainer importable on NumPy 2)
import chainer
from mpi4py import MPI

from reproduce import train
from reproduce.job import ranks


def digests(trainer, log) -> dict:
    """Returns the digest of each part of the result.

    Args:
        trainer (~chainer.training.Trainer): The trainer after the training.
        log (list): Chainer's log.

    Returns:
        dict: ``parameters``, ``BN statistics``, ``optimizer``, ``training losses`` and
            ``validation`` to a SHA-256 in hexadecimal digits.
    """
    optimizer = trainer.updater.get_optimizer('main')
    params = dict(optimizer.target.namedparams())
    parts = {
        'parameters': {name: param.data for name, param in params.items()},
        'BN statistics': {
            f'{name}/{kind}': getattr(link, kind)
            for name, link in optimizer.target.namedlinks()
            if isinstance(link, chainer.links.BatchNormalization)
            for kind in ('avg_mean', 'avg_var')
        },
        'optimizer': {
            f'{name}/{kind}': param.update_rule.state[kind]
            for name, param in params.items()
            for kind in ('m', 'delta')
        },
        'training losses': [entry['main/loss'] for entry in log],
        'validation': [
            [value for key, value in sorted(entry.items()) if key.startswith('validation/')]
            for entry in log
        ],
    }
    return {name: _digest(part) for name, part in parts.items()}


def _digest(part) -> str:
    sha = hashlib.sha256()
    if isinstance(part, dict):
        for name, array in sorted(part.items()):
            sha.update(f'{name} {array.dtype} {array.shape} '.encode() + array.tobytes())
    else:
        sha.update(json.dumps(part).encode())  # floats have all their digits, as in repr
    return sha.hexdigest()


def main(arguments):
    out, *options = arguments
    trainer = train.main([*options, '--out', out])
    if MPI.COMM_WORLD.rank == 0:
        log = json.loads((Path(out) / 'log').read_text())
        (Path(out) / 'digests.json').write_text(json.dumps(digests(trainer, log), indent=2))


if __name__ == '__main__':
    ranks.run(lambda: main(sys.argv[1:]))
