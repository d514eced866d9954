"""Times compiled functions of which one is wrong: the gradients of 3x3 filters lack a channel.

The processes of the implementations import this file, too, and so have the wrong function.
"""

import extensions  # noqa: F401  isort: skip  (makes Chainer importable on NumPy 2)
from chainer.functions.connection.convolution_2d import Convolution2DFunction

from extensions import cpu_functions
from reproduce.studies.speed import functions

_backward = cpu_functions._METHODS[Convolution2DFunction, 'backward']


def _wrong_backward(node, indexes, grad_outputs):
    gradients = _backward(node, indexes, grad_outputs)
    gW = gradients[-1].array
    if gW.ndim == 4 and gW.shape[2:] == (3, 3) and 1 in indexes:
        gW[-1] = 0
    return gradients


cpu_functions._METHODS[Convolution2DFunction, 'backward'] = _wrong_backward

if __name__ == '__main__':
    functions.measure('wrong', functions.Network(4, 'cifar', 16, 4, 10), 1, False)
