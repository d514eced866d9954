"""One run of the miniature: reproduce/train.py, and more about the run.

python -m reproduce.studies.miniature.program [--part PART] OPTIONS...

OPTIONS are those of reproduce/train.py. PART is one of parts.py. Images are decoded once, not once
per epoch. When the training ends, OUT/run.json gets the options, the training losses of the first
updates, and a digest of each part of the result.
"""

from __future__ import annotations

from reproduce.job import start

if __name__ == '__main__':
    start.before_mpi()

import functools
import json
import os
import sys
from pathlib import Path

import extensions  # noqa: F401  isort: skip  (first: makes Chainer importable on NumPy 2)
import chainer
import numpy as np
from chainer import training
from chainer.training import extension

from reproduce import images, train
from reproduce.job import ranks
from reproduce.studies.invariance_program import digests
from reproduce.studies.miniature import parts

EARLY = 0.05  # of the updates


class FirstLosses(training.Extension):
    """Keeps the training loss of each of the first updates, averaged over the workers.

    Args:
        n (int): Number of updates.

    Attributes:
        losses (list of float): The losses so far. A checkpoint has them.
    """

    trigger = (1, 'iteration')
    priority = extension.PRIORITY_WRITER + 1  # before the losses are gathered for the log

    def __init__(self, n: int):
        self._n = n
        self.losses: list = []

    def __call__(self, trainer):
        if len(self.losses) < self._n:
            self.losses.append(float(np.mean(trainer.updater.losses[-1], dtype=np.float64)))

    def serialize(self, serializer):
        if isinstance(serializer, chainer.Serializer):
            serializer('losses', np.array(self.losses, np.float64))
        else:  # None: an array would have to have the size of the saved one
            self.losses = serializer('losses', None).tolist()


def main(arguments):
    part = ''
    if arguments[:1] == ['--part']:
        _, part, *arguments = arguments
    images.decode = functools.cache(images.decode)
    experiment, first = train.experiment, []

    def with_first_losses(settings, comm, train_images, val_images):
        trainer, batches = experiment(settings, comm, train_images, val_images)
        first.append(FirstLosses(max(1, round(EARLY * settings.iterations(len(train_images))))))
        trainer.extend(first[0], name='first losses')
        return trainer, batches

    train.experiment = with_first_losses
    with parts.put(part):
        trainer = train.main(arguments)
    out = Path(trainer.out)
    log = json.loads((out / 'log').read_text())
    found = {
        'part': part,
        'first losses': first[0].losses,
        'digests': digests(trainer, log),
    }
    (out / 'run.json.tmp').write_text(json.dumps(found, indent=1) + '\n')
    os.replace(out / 'run.json.tmp', out / 'run.json')


if __name__ == '__main__':
    ranks.run(lambda: main(sys.argv[1:]))
