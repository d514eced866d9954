"""Starts mpiexec for run_mpi.sh, and stays its parent: what would kill the job stops it instead.

    python launch.py OUT START COMMAND OF MPIEXEC...

OUT is the folder of a training's results, and START the beginning of the command that goes on with
it; both are empty for other programs.

A launcher kills the ranks a moment after Ctrl-C, SIGTERM or SIGHUP, before they can write a
checkpoint. But it passes SIGUSR1 on to them. So mpiexec runs in a session of its own, where a
terminal's signals do not reach it, and this process turns the first of them into SIGUSR1. It also
passes on what the job prints, and stops the job in the same way when nobody reads this any more.

This file runs outside the package and must import the standard library alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

_GO_ON = 'REPRODUCE_GO_ON'  # environment variable: the command with which a stopped run goes on
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_REPEAT = 1.0  # seconds; timeout(1) and schedulers send a signal twice
_GRACE = 5.0  # seconds from the second Ctrl-C until mpiexec is killed
_DASHES = b'-' * 70  # a line of at least so many begins and ends what mpiexec adds to an error
_NOT_STARTED = b' launch failed: '  # srun says it of each rank, and may end with status 0
_END = b'\0'  # Open MPI's mpiexec writes it after that; the next line would begin with it


def command_to_go_on(argv=None, start=None, n_processes=1) -> str:
    """Returns the command with which a stopped run goes on.

    Args:
        argv (list of str): Program and options of the run; those of this process by default.
        start (str): What comes before the options; by default a mpiexec that starts the program.
            The verb smoke stands for ``--preset smoke``.
        n_processes (int): Number of processes of that mpiexec.
    """
    if argv is None and _GO_ON in os.environ:
        return os.environ[_GO_ON]
    program, *words = sys.argv if argv is None else argv
    kept: list[str] = []
    while words:
        word = words.pop(0)
        if word == '--resume':
            words[:1] = []
        elif word != '--overwrite' and not word.startswith('--resume='):
            kept.append(word)
    if start is None:
        python = Path(sys.executable).name
        start = shlex.join(['mpiexec', '-n', str(n_processes), python, program])
    elif start.endswith(' smoke') and kept[:2] == ['--preset', 'smoke']:
        kept = kept[2:]
    return f'{start} {shlex.join([*kept, "--resume", "auto"])}'


class Job:
    """A running mpiexec, what it prints, and the signals that this process gets.

    Args:
        out (str): Folder of the run's results; empty for a program that is not ours.
        go_on (str): The command with which a stopped run goes on.
        command (list of str): mpiexec and its arguments.
    """

    def __init__(self, out, go_on, command):
        self._out, self._go_on = out, go_on
        self._signum, self._since = 0, 0.0  # the first signal, and its time
        self._ends_at_once = False
        self._reader_gone: OSError | None = None
        self._has_said_how_to_go_on = self._has_said_error = self._has_said_not_started = False
        self._is_srun = Path(command[0]).name == 'srun'
        self._process: Any = None
        for signum in _STOPS:
            if signal.getsignal(signum) != signal.SIG_IGN:  # as nohup does
                signal.signal(signum, self._stop)
        signal.signal(signal.SIGTSTP, self._suspend)
        self._process = subprocess.Popen(
            command,
            env={**os.environ, **({_GO_ON: go_on} if go_on else {})},
            stdin=subprocess.DEVNULL if os.isatty(0) else None,  # not of its session
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=_end_with_parent,  # noqa: PLW1509  (there is no thread yet)
        )
        if self._signum:  # it came before there was a job
            self._process.send_signal(signal.SIGUSR1)

    def wait(self) -> int:
        """Waits for the end of the job. Returns the exit status of this process."""
        threads = [
            threading.Thread(target=self._pass_on, args=(pipe, descriptor), daemon=True)
            for pipe, descriptor in ((self._process.stdout, 1), (self._process.stderr, 2))
        ]
        for thread in threads:
            thread.start()
        status = self._process.wait()
        for thread in threads:
            thread.join(_GRACE)
        if status == 0 and self._has_said_not_started:
            _say('error: srun ended with status 0, but ranks did not start: see its lines above')
            status = 1
        # Status 2 is of a run that was refused; its error has the remedy.
        if status not in (0, 2) and self._out and not self._has_said_how_to_go_on:
            self._say_what_is_kept()
        if self._signum and status:
            # A shell's loop ends only if a signal is seen to have ended the command.
            signal.signal(self._signum, signal.SIG_DFL)
            signal.raise_signal(self._signum)
        if self._reader_gone:
            return 128 + signal.SIGPIPE if self._reader_gone.errno == errno.EPIPE else 1
        return 128 - status if status < 0 else status

    def _stop(self, signum, frame):
        first, self._since = self._since, self._since or time.monotonic()
        if not first:
            self._signum = signum
            if self._out:
                again = ' Ctrl-C again ends it at once.' if signum == signal.SIGINT else ''
                _say(f'stops after the iteration under way, with a checkpoint.{again}')
            if self._process:
                self._process.send_signal(signal.SIGUSR1)
        elif signum == signal.SIGINT and time.monotonic() - first > _REPEAT:
            self._ends_at_once = True
            self._process.terminate()
            threading.Timer(_GRACE, self._process.kill).start()

    def _suspend(self, signum, frame):
        if not self._process:
            return
        self._process.send_signal(signal.SIGTSTP)
        os.kill(os.getpid(), signal.SIGSTOP)
        self._process.send_signal(signal.SIGCONT)

    def _pass_on(self, pipe, descriptor):
        """Copies what mpiexec prints to this process's output, as soon as it comes."""
        banners, has_reader = _Banners(), True
        data = b' '
        while data:
            data = os.read(pipe.fileno(), 1 << 16)
            self._has_said_how_to_go_on |= b'To go on: ' in data
            self._has_said_error |= b'error: ' in data
            self._has_said_not_started |= self._is_srun and _NOT_STARTED in data
            # mpiexec reports an end that was asked for, or that a rank has explained, once more.
            explained = self._signum or self._has_said_error
            shown = data
            if descriptor == 2:
                shown = banners.drop(data) if explained else data.replace(_END, b'')
            try:
                while shown and has_reader:
                    shown = shown[os.write(descriptor, shown) :]
            except OSError as error:
                has_reader = False  # the rest is read, and lost: else the job would wait
                self._lose_reader(error)

    def _lose_reader(self, error):
        if self._signum or self._reader_gone:
            return
        self._reader_gone = error
        _say(f'the output cannot be written ({error.strerror}): the job stops with a checkpoint')
        self._process.send_signal(signal.SIGUSR1)

    def _say_what_is_kept(self):
        folder = Path(self._out, 'checkpoints')
        kept = 'There is no checkpoint yet.'
        if any(folder.glob('checkpoint-*.npz')):
            kept = f'The checkpoints in {folder} are kept. To go on: {self._go_on}'
        _say(f'ended at once. {kept}' if self._ends_at_once else kept)


class _Banners:
    """Finds what mpiexec adds to the output of the ranks: blocks between lines of dashes."""

    def __init__(self):
        self._rest, self._inside = b'', False

    def drop(self, data: bytes) -> bytes:
        """Returns the data without banners; a line that is not complete waits for its end."""
        *lines, self._rest = (self._rest + data.replace(_END, b'')).split(b'\n')
        if not data and self._rest:
            lines, self._rest = [*lines, self._rest], b''
        kept = []
        for line in lines:
            if line.startswith(_DASHES):
                self._inside = not self._inside
            elif not self._inside:
                kept.append(line + b'\n')
        return b''.join(kept)


def _end_with_parent():
    """Lets mpiexec get a SIGTERM when this process is killed. Linux only."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _say(text):
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(2, f'{text}\n'.encode())


def main(argv):
    """Runs a job: OUT START COMMAND... Returns the exit status."""
    out, start, *command = argv
    go_on = ''
    if out:
        program = next(i for i, word in enumerate(command) if word.endswith('reproduce/train.py'))
        go_on = command_to_go_on(command[program:], start)
    return Job(out, go_on, command).wait()


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
