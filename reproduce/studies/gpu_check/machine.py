"""What this machine has for a GPU. python -m reproduce.studies.gpu_check.machine FILE

FILE gets it in JSON. ``obstacle`` says why no GPU can be used.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import sys
from pathlib import Path

import extensions  # noqa: F401  isort: skip  (first: makes Chainer importable on NumPy 2)

from extensions import nccl
from reproduce.job import report


def about() -> dict:
    """Returns the GPU, all versions, and the cuDNN of a PyTorch for GPUs; None without one."""
    obstacle = nccl.inspect(0).obstacle
    if obstacle:
        return {'obstacle': obstacle}
    cudnn = _cudnn_of_torch()
    return {
        'obstacle': None,
        'gpu': report.gpu(),
        'cudnn of torch': cudnn,
        'versions': report.versions(),
        'words': report.in_words(report.versions()),
        'cores': os.cpu_count(),
        'system': platform.platform(),
    }


def _cudnn_of_torch():
    if importlib.util.find_spec('torch') is None:
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    from extensions import torch_functions  # noqa: F401  (so that the versions have Torch's)

    return torch.backends.cudnn.version()


if __name__ == '__main__':
    Path(sys.argv[1]).write_text(json.dumps(about()))
