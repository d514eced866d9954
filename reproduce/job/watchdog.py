"""Ends a job in which nothing moves any more, and says which ranks the others wait for."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

from mpi4py import MPI

_PROJECT = Path(__file__).resolve().parents[2]
_LAUNCHERS = ('prterun', 'prted', 'mpiexec', 'mpirun', 'orterun', 'orted', 'hydra_pmi_proxy')
_KILL = """sleep 5
while [ $# -gt 0 ]; do
    if [ "$(sed 's/.*) //' /proc/$1/stat | cut -d' ' -f20)" = $2 ]; then kill -9 $1; fi
    shift 2
done"""


class Watchdog:
    """A thread on every rank that tells rank 0 where the rank is, and ends the job when for
    ``seconds`` no rank has got anywhere, or one of them has given no sign of life.

    As long as any rank finishes a minibatch in that time, an iteration may take as long as it
    likes. What is exchanged is one message and its answer per rank every few seconds, on a
    communicator of its own. Time in which the process itself is stopped, as a batch system's
    "suspend" does with all of them, does not count.

    To be used as a context manager, by all ranks together.

    Args:
        mpi_comm (mpi4py.MPI.Comm): The ranks; collective.
        seconds (float): Above 0; with 0 there is no watchdog.
        position (callable): Called in the thread; returns how far this rank has come (a number that
            grows), the minibatches left until it waits for the others (None where nobody counts
            them), and the same in words.
    """

    def __init__(self, mpi_comm, seconds, position):
        self._seconds = seconds
        self._position = position
        self._closing = threading.Event()
        self._thread = None
        self._interval = min(5.0, seconds / 10)
        if not seconds:
            return
        if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            if mpi_comm.rank == 0:
                print('note: no watchdog: this MPI has no MPI_THREAD_MULTIPLE', flush=True)
            return
        self._comm = mpi_comm.Dup()
        self._hosts = mpi_comm.allgather(MPI.Get_processor_name())
        watch = self._report if mpi_comm.rank else self._collect
        self._thread = threading.Thread(target=watch, name='watchdog', daemon=True)

    def __enter__(self):
        if self._thread:
            self._thread.start()
        return self

    def __exit__(self, kind, error, trace):
        # After an error of this rank alone, which ends all, the others would not answer.
        if self._thread and (error is None or getattr(error, 'agreed', False)):
            self._closing.set()
            self._thread.join()
            self._comm.Free()

    def _report(self):
        """On all ranks but 0: reports, and waits for the answer."""
        clock = _Clock(self._seconds)
        while True:
            last = self._closing.is_set()
            request = self._comm.isend((last, self._position(), _where()), 0)
            sent = clock.now()
            while not self._comm.iprobe(0):
                self._pause()
                if clock.now() - sent > self._seconds:
                    self._end(
                        f'no sign of life from {self._name(0)} for {self._seconds:g} s: is it '
                        'stopped, is its host cut off?'
                    )
            self._comm.recv(source=0)
            request.wait()
            if last:
                return
            self._closing.wait(self._interval)

    def _collect(self):
        """On rank 0: answers, until all ranks have closed."""
        clock = _Clock(self._seconds)
        moved = clock.now()
        last_sign = dict.fromkeys(range(1, self._comm.size), moved)
        places = {r: ((0, None, 'not heard of yet'), '') for r in range(self._comm.size)}
        answers = []
        while last_sign or not self._closing.is_set():
            now = clock.now()
            received = {0: (self._position(), _where())}
            status = MPI.Status()
            while self._comm.iprobe(status=status):
                rank = status.source
                last, *place = self._comm.recv(source=rank)
                answers.append(self._comm.isend(None, rank))
                received[rank] = tuple(place)
                last_sign[rank] = now
                if last:
                    del last_sign[rank]
            answers = [request for request in answers if not request.test()[0]]
            if any(place[0] != places[rank][0] for rank, place in received.items()):
                moved = now
            places.update(received)
            silent = [r for r, then in last_sign.items() if now - then > self._seconds]
            if silent or now - moved > self._seconds:
                # Who is silent now has mostly been so for as long as nothing moved.
                silent = [r for r, t in last_sign.items() if now - t > 3 * self._interval]
                self._end(self._diagnosis(places, silent))
            self._pause()
        for request in answers:
            request.wait()

    def _pause(self):
        """Between two looks for messages: short once this rank has nothing else to do."""
        if self._closing.wait(self._interval / 10):
            time.sleep(0.01)

    def _diagnosis(self, places, silent) -> str:
        furthest = max(done for (done, _, _), _ in places.values())
        groups = defaultdict(list)
        for rank, ((done, left, words), where) in sorted(places.items()):
            behind = done < furthest or left
            what = f'{"not arrived" if behind else "waiting"} in {words}, {where}'
            if rank in silent:
                what = 'no sign of life (stopped, or its host cut off?)'
            groups[what].append(rank)
        sentences = [f'{what}: {self._names(ranks)}' for what, ranks in sorted(groups.items())]
        return f'nothing has moved for {self._seconds:g} s (--watchdog); {"; ".join(sentences)}'

    def _name(self, rank) -> str:
        return f'rank {rank} on {self._hosts[rank]}'

    def _names(self, ranks, n=3) -> str:
        more = f' and {len(ranks) - n} more' if len(ranks) > n else ''
        return ', '.join(self._name(rank) for rank in ranks[:n]) + more

    def _end(self, message):
        print(f'error: {message}', file=sys.stderr, flush=True)
        _kill_later()
        MPI.COMM_WORLD.Abort(1)


class _Clock:
    """Seconds, without those in which this process could not look at it."""

    def __init__(self, seconds):
        self._longest = seconds / 4
        self._last = time.monotonic()
        self._now = 0.0

    def now(self) -> float:
        then, self._last = self._last, time.monotonic()
        self._now += min(self._last - then, self._longest)
        return self._now


def _where() -> str:
    """The innermost line of this project that the main thread is in."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame:
        path = Path(frame.f_code.co_filename)
        own = path.relative_to(_PROJECT) if _PROJECT in path.parents else path
        if own.parts[0] in ('reproduce', 'extensions'):
            return f'{own}:{frame.f_lineno} ({frame.f_code.co_name})'
        frame = frame.f_back
    return ''


def _kill_later():
    """Kills the launcher on this host and this process in five seconds, if they are still there.

    Open MPI's abort waits for all hosts, one that is cut off too.
    """
    me, launcher = _process('self'), _process(os.getppid())
    victims = [launcher[:2], me[:2]] if launcher[2] in _LAUNCHERS else [me[:2]]
    subprocess.Popen(
        ['/bin/sh', '-c', _KILL, 'sh', *(word for victim in victims for word in victim)],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _process(number) -> tuple[str, str, str]:
    """Number, time of start and name of a process: the first two are of no other process."""
    before, _, after = Path(f'/proc/{number}/stat').read_text().rpartition(')')
    number, _, name = before.partition(' (')
    return number, after.split()[19], name
