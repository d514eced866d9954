"""Ends a job that no longer makes progress, and names the ranks that the others wait for."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

from mpi4py import MPI

from extensions.communicator_base import first_few
from reproduce.job.start import print_before_abort

_PROJECT = Path(__file__).resolve().parents[2]
_TAGS = itertools.count(20_000)  # one for each watchdog; MPI has 32,768 at least
_LAUNCHERS = ('prterun', 'prted', 'mpiexec', 'mpirun', 'orterun', 'orted', 'hydra_pmi_proxy')
_KILL = """sleep 5
while [ $# -gt 0 ]; do
    if [ "$(sed 's/.*) //' /proc/$1/stat | cut -d' ' -f20)" = $2 ]; then kill -9 $1; fi
    shift 2
done"""


class Watchdog:
    """A thread on every rank that ends a job without progress, from its start on.

    Each thread tells rank 0 where its rank is. The job ends in two cases: no rank has made progress
    for ``seconds``, or one rank has given no sign of life for so long. A part of the start, or an
    iteration, may take any time, as long as all ranks live and any of them moves.

    Every few seconds, each rank sends one message to rank 0 and gets one answer. The messages have
    a tag of their own, so nobody may receive with ``ANY_TAG``. Time in which the process itself is
    stopped does not count: a batch system's "suspend" stops all processes.

    All ranks together use this class as a context manager. They enter it without waiting for each
    other, so that a rank that never comes is named, too. Two things before it are not watched:
    MPI's own initialization, and imports that hang on all ranks at once.

    Args:
        mpi_comm (mpi4py.MPI.Comm): The ranks.
        seconds (float): Time limit in seconds. 0 means no watchdog.
    """

    def __init__(self, mpi_comm, seconds):
        self._comm = mpi_comm
        self._seconds = seconds
        self._tag = next(_TAGS)
        self._hosts = {mpi_comm.rank: MPI.Get_processor_name()}
        self._closing = threading.Event()
        self._interval = min(5.0, seconds / 10)
        self._part = 0, lambda: (0, None, 'the start')
        self._thread = None
        if seconds and _has_threads(mpi_comm.rank):
            self._thread = threading.Thread(target=self._watch, name='watchdog', daemon=True)

    def __enter__(self):
        if self._thread:
            self._thread.start()
        return self

    def __exit__(self, kind, error, trace):
        # An error of this rank alone ends all ranks. Do not wait: the others would not answer.
        if self._thread and (error is None or getattr(error, 'agreed', False)):
            self._closing.set()
            self._thread.join()

    def enter(self, position):
        """Says that this rank begins with the next part of the job. All ranks do so in one order.

        Args:
            position (str or callable): The part in words, or a function that the thread calls
                without arguments. It returns three values: the progress of this rank (a number that
                grows), the minibatches left until this rank waits for the others (None if nobody
                counts them), and the position in words. Any other result than before is a sign of
                progress.
        """
        at = position if callable(position) else lambda: (0, None, position)
        self._part = self._part[0] + 1, at

    @contextlib.contextmanager
    def part(self, name, position=None):
        """Encloses what this rank does on its own, before it waits for all ranks to be done.

        Args:
            name (str): The part in words.
            position (callable): As in :meth:`enter`, if the part itself makes progress.
        """
        self.enter(position or name)
        try:
            yield
        finally:
            self.enter(f'the agreement after {name}')

    def _watch(self):
        """Ends the job if the watchdog itself fails: from then on nobody would."""
        try:
            if self._comm.rank:
                self._report()
            else:
                self._collect()
        except BaseException as error:  # noqa: BLE001  (a thread would end without a word)
            self._end(f'the watchdog of {self._name(self._comm.rank)} failed: {error!r}')

    def _report(self):
        """Reports and waits for the answer, on all ranks except 0."""
        clock = _Clock(self._seconds)
        while True:
            last = self._closing.is_set()
            words = last, self._hosts[self._comm.rank], self._position(), _where()
            request = self._comm.isend(words, 0, self._tag)
            sent = clock.now()
            while not self._comm.iprobe(0, self._tag):
                self._pause()
                if clock.now() - sent > self._seconds:
                    self._end(
                        f'no sign of life from {self._name(0)} for {self._seconds:g} s '
                        '(--watchdog): is it stopped, or its host cut off?'
                    )
            self._hosts[0] = self._comm.recv(source=0, tag=self._tag)
            request.wait()
            if last:
                return
            self._closing.wait(self._interval)

    def _collect(self):
        """Answers the other ranks, on rank 0, until all ranks have closed."""
        clock = _Clock(self._seconds)
        moved = clock.now()
        last_sign = dict.fromkeys(range(1, self._comm.size), moved)
        places: dict = {}
        answers = []
        while last_sign or not self._closing.is_set():
            now = clock.now()
            received = {0: (self._position(), _where())}
            status = MPI.Status()
            while self._comm.iprobe(tag=self._tag, status=status):
                rank = status.source
                last, self._hosts[rank], *place = self._comm.recv(source=rank, tag=self._tag)
                answers.append(self._comm.isend(self._hosts[0], rank, self._tag))
                received[rank] = tuple(place)
                last_sign[rank] = now
                if last:
                    del last_sign[rank]
            answers = [request for request in answers if not request.test()[0]]
            if any(place[0] != places.get(rank, ('',))[0] for rank, place in received.items()):
                moved = now
                # The ranks may start one after another.
                last_sign.update((r, now) for r in last_sign if r not in self._hosts)
            places.update(received)
            silent = [r for r, then in last_sign.items() if now - then > self._seconds]
            if silent or now - moved > self._seconds:
                # Mostly, a rank that is silent now was silent for as long as nothing moved.
                silent = [r for r, t in last_sign.items() if now - t > 3 * self._interval]
                self._end(self._diagnosis(places, silent))
            self._pause()
        for request in answers:
            request.wait()

    def _pause(self):
        """Waits between two looks for messages, only briefly once this rank is done."""
        if self._closing.wait(self._interval / 10):
            time.sleep(0.01)

    def _position(self):
        number, position = self._part
        done, left, words = position()
        return (number, done), left, words

    def _diagnosis(self, places, silent) -> str:
        furthest = max(done for (done, _, _), _ in places.values())
        behind = {r for r, ((done, left, _), _) in places.items() if done < furthest or left}
        n_missing = self._comm.size - len(places) + len(silent) + len(behind)
        groups = defaultdict(list)
        for rank in range(self._comm.size):
            if rank not in places:
                what = 'not started (stopped, or its file system slow or dead?)'
            elif rank in silent:
                what = 'no sign of life (stopped, or its host cut off?)'
            else:
                (_, _, words), where = places[rank]
                what = f'in {words}, {where}'
                if n_missing:
                    what = f'not arrived, still {what}' if rank in behind else f'waiting {what}'
            groups[what].append(rank)
        sentences = [f'{what}: {self._names(ranks)}' for what, ranks in sorted(groups.items())]
        return f'nothing has moved for {self._seconds:g} s (--watchdog); {"; ".join(sentences)}'

    def _name(self, rank) -> str:
        return f'rank {rank} on {self._hosts[rank]}' if rank in self._hosts else f'rank {rank}'

    def _names(self, ranks) -> str:
        return first_few([self._name(rank) for rank in ranks])

    def _end(self, message):
        try:
            print_before_abort(f'error: {message}')
            _kill_later()
        finally:
            MPI.COMM_WORLD.Abort(1)


@functools.cache
def _has_threads(rank) -> bool:
    """Returns whether several threads may use MPI. If they may not, rank 0 says so, once."""
    if MPI.Query_thread() >= MPI.THREAD_MULTIPLE:
        return True
    if rank == 0:
        print('note: the watchdog is off: this MPI has no MPI_THREAD_MULTIPLE', flush=True)
    return False


class _Clock:
    """A clock in seconds that leaves out times when this process was stopped."""

    def __init__(self, seconds):
        self._longest = seconds / 4
        self._last = time.monotonic()
        self._now = 0.0

    def now(self) -> float:
        then, self._last = self._last, time.monotonic()
        self._now += min(self._last - then, self._longest)
        return self._now


def _where() -> str:
    """Returns the innermost line of this project that the main thread executes."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame:
        path = Path(frame.f_code.co_filename)
        if any(_PROJECT / package in path.parents for package in ('reproduce', 'extensions')):
            return f'{path.relative_to(_PROJECT)}:{frame.f_lineno} ({frame.f_code.co_name})'
        frame = frame.f_back
    return ''


def _kill_later():
    """Kills this process and the launcher on this host in five seconds, if they still exist.

    Open MPI's abort waits for all hosts, even for a host that is cut off.
    """
    me, launcher = _process('self'), _process(os.getppid())
    victims = [launcher[:2]] if launcher and launcher[2] in _LAUNCHERS else []
    victims += [me[:2]] if me else []
    subprocess.Popen(
        ['/bin/sh', '-c', _KILL, 'sh', *(word for victim in victims for word in victim)],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _process(number) -> tuple[str, str, str] | None:
    """Returns number, start time and name of a process. The first two identify the process.

    Returns None if the process has ended, or this host hides those of others (hidepid).
    """
    try:
        stat = Path(f'/proc/{number}/stat').read_text()
    except OSError:
        return None
    before, _, after = stat.rpartition(')')
    number, _, name = before.partition(' (')
    return number, after.split()[19], name
