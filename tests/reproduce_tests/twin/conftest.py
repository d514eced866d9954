"""Starts the twin's programs on real processes of torch.distributed."""

import subprocess
import sys

import pytest


@pytest.fixture
def torchrun(job_environment):
    """``torchrun(n, program, *words)`` starts a program of PyTorch on n processes."""

    def run(n, program, *words, timeout=200):
        command = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(n)]
        return subprocess.run(
            [sys.executable, *command, str(program), *map(str, words)],
            check=False,
            env=job_environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )

    return run
