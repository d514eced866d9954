"""The method of Akiba, Suzuki and Fukuda, arXiv:1711.04325, as parts for Chainer and ChainerMN.

Each module is one part of the paper, with its equation beside the lines that compute it. Nothing
here knows of ImageNet.
"""

# First of all: Chainer cannot be imported on today's NumPy without it.
from extensions import numpy_compatibility  # noqa: F401  isort: skip

from extensions.batch_statistics import AllreduceBatchStatistics, MovingBatchStatistics
from extensions.checkpoint import Checkpointer, CheckpointError, Stopped
from extensions.evaluation import ExactEvaluator
from extensions.gpus import CommunicatorError
from extensions.half_precision import (
    CastReport,
    HalfPrecisionMpiCommunicator,
    HalfPrecisionNcclCommunicator,
    NonFiniteGradients,
    create_communicator,
    device_of,
)
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

__all__ = [
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
