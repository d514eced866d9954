"""The method of Akiba, Suzuki and Fukuda (arXiv:1711.04325), as parts for Chainer and ChainerMN.

Each module implements one part of the paper and states its equation. Nothing here depends on
ImageNet. A tag in brackets, such as [W1], marks an equation and the lines that compute it. A letter
in parentheses, such as (S), marks the source of an equation or a number. ``SOURCES`` explains the
letters.
"""

# These imports come first: without them, Chainer finds no CUDA of NVIDIA's wheels, and cannot be
# imported on current NumPy.
from extensions import cupy_compatibility  # noqa: F401  isort: skip
from extensions import numpy_compatibility  # noqa: F401  isort: skip
from extensions import shared_memory  # noqa: F401  isort: skip

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

# The source of each equation and number. The PDF of the paper was not available.
SOURCES = {
    'S': 'a published reading note of the paper that quotes its equations and schedule',
    'A': "the paper's abstract, and tables of later papers that quote it",
    'G': 'Goyal et al., arXiv:1706.02677, which the paper follows',
    'R': 'agreement of public re-implementations by other Chainer users',
    'D': 'arithmetic',
    'P': "this project's own choice",
    'B': "the authors' blog posts on the cluster",
    'T': "the authors' slides of December 2017 and January 2018",
    'M': "MLPerf's reference convergence points (mlcommons/logging, training 4.0)",
    'O': "other teams' slides and abstracts",
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
