"""Runs a command that does not get SIGTERM: python block_sigterm.py COMMAND [its options]

Slurm sends SIGTERM to every process of a job that it ends. Open MPI's mpiexec, and its daemons on
the other hosts, would then kill the ranks at once. The ranks themselves get the signal.
"""

import os
import signal
import sys

signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
os.execvp(sys.argv[1], sys.argv[1:])
