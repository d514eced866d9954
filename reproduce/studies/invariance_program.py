"""One set of bits, however n workers are spread over processes: a program of each rank.

python -m reproduce.studies.invariance_program OUT OPTIONS... trains as reproduce/train.py does with
these options, and writes OUT/digests.json: SHA-256 over names and bytes of each part.
"""

from __future__ import annotations

from reproduce.job import start

if __name__ == '__main__':
    start.before_mpi()

import hashlib
import json
import sys
from pathlib import Path

from reproduce import train
from reproduce.job import ranks


def digests(trainer, log) -> dict:
    """Digests of parameters, BN statistics, optimizer state, losses, and validation."""
    optimizer = trainer.updater.get_optimizer('main')
    params = dict(optimizer.target.namedparams())
    parts = {
        'parameters': {name: param.data for name, param in params.items()},
        'BN statistics': {
            f'{name}/{kind}': getattr(link, kind)
            for name, link in optimizer.target.namedlinks()
            if isinstance(link, train.chainer.links.BatchNormalization)
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
        sha.update(json.dumps(part).encode())  # floats in full, as repr writes them
    return sha.hexdigest()


def main(arguments):
    out, *options = arguments
    trainer = train.main([*options, '--out', out])
    if train.MPI.COMM_WORLD.rank == 0:
        log = json.loads((Path(out) / 'log').read_text())
        (Path(out) / 'digests.json').write_text(json.dumps(digests(trainer, log), indent=2))


if __name__ == '__main__':
    ranks.run(lambda: main(sys.argv[1:]))
