"""Says how long a program will still take. It imports neither MPI nor Chainer."""

from __future__ import annotations

import time


def duration(seconds: float) -> str:
    """Formats a time in seconds: 1 h 02 min, 3 min 20 s, 12 s."""
    seconds = round(seconds)
    if seconds < 60:
        return f'{seconds} s'
    if seconds < 3600:
        return f'{seconds // 60} min {seconds % 60:02d} s'
    return f'{seconds // 3600} h {seconds % 3600 // 60:02d} min'


class Countdown:
    """Prints a line with the time left, every ten seconds. It is called after each of ``total``.

    Args:
        what (str): What is counted, in the plural.
        total (int): Their number.

    Attributes:
        total (int): The argument. It may shrink on the way.
    """

    def __init__(self, what: str, total: int):
        self._what, self.total, self._done = what, total, 0
        self._start = self._last = time.monotonic()

    def __call__(self):
        self._done += 1
        now = time.monotonic()
        if now - self._last < 10:
            return
        self._last = now
        left = (now - self._start) / self._done * (self.total - self._done)
        print(f'  {self._done:,} of {self.total:,} {self._what}, {duration(left)} left', flush=True)
