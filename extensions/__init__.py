"""The method of Akiba, Suzuki and Fukuda, arXiv:1711.04325, as parts for Chainer and ChainerMN.

Each module is one part of the paper, with its equation beside the lines that compute it. Nothing
here knows of ImageNet. An equation has a tag with brackets, as [W1]. A letter in parentheses, as
(S), is a source: ``SOURCES`` is the legend of these letters.
"""

# First of all: Chainer cannot be imported on today's NumPy without it.
from extensions import numpy_compatibility  # noqa: F401  isort: skip

from extensions.batch_statistics import AllreduceBatchStatistics, MovingBatchStatistics
from extensions.cast_report import CastReport
from extensions.checkpoint import Checkpointer, CheckpointError, Stopped
from extensions.communicator_base import CommunicatorError, NonFiniteGradients
from extensions.evaluation import ExactEvaluator
from extensions.exact_mpi import HalfPrecisionMpiCommunicator
from extensions.half_precision import create_communicator
from extensions.nccl import HalfPrecisionNcclCommunicator, device_of
from extensions.rmsprop_warmup import RMSpropWarmup, RMSpropWarmupRule
from extensions.schedules import (
    AlphaSGDSchedule,
    StepLearningRate,
    alpha_rmsprop,
    alpha_sgd,
    base_learning_rate,
    learning_rate,
    slow_start_factor,
)
from extensions.timing import Timer, TimeReport
from extensions.virtual_workers import MeanTrainingLoss, VirtualWorkersUpdater

# Where a number or an equation is known from. The PDF of the paper was not at hand.
SOURCES = {
    'S': 'a published reading note of the paper that quotes its equations and schedule',
    'A': "the paper's abstract, and tables of later papers that quote it",
    'G': 'Goyal et al., arXiv:1706.02677, which the paper follows',
    'R': 'what public re-implementations by other Chainer users agree on',
    'D': 'arithmetic',
    'P': "this project's own choice",
    'B': "the authors' blog posts on the cluster",
    'T': "the authors' slides of December 2017 and January 2018",
    'U': 'unsourced recollection, for plots only',
}

__all__ = [
    'SOURCES',
    'AllreduceBatchStatistics',
    'AlphaSGDSchedule',
    'CastReport',
    'CheckpointError',
    'Checkpointer',
    'CommunicatorError',
    'ExactEvaluator',
    'HalfPrecisionMpiCommunicator',
    'HalfPrecisionNcclCommunicator',
    'MeanTrainingLoss',
    'MovingBatchStatistics',
    'NonFiniteGradients',
    'RMSpropWarmup',
    'RMSpropWarmupRule',
    'StepLearningRate',
    'Stopped',
    'TimeReport',
    'Timer',
    'VirtualWorkersUpdater',
    'alpha_rmsprop',
    'alpha_sgd',
    'base_learning_rate',
    'create_communicator',
    'device_of',
    'learning_rate',
    'slow_start_factor',
]
