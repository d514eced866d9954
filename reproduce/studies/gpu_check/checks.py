"""Runs the checks of a step, and keeps what they found."""

from __future__ import annotations

import json
import time
import traceback
from pathlib import Path


class Failed(Exception):
    """A check whose result is wrong. The message tells the value."""


def require(condition, message: str):
    """Raises :class:`Failed` unless the condition holds."""
    if not condition:
        raise Failed(message)


def require_below(most: float, errors: dict):
    """Raises :class:`Failed` unless all errors are below the limit, as NaN is not."""
    for name, error in errors.items():
        require(error < most, f'{name}: {error:.1e}, not below {most:g}')


def run(functions, path: str, mpi_comm) -> list[str]:
    """Runs all checks, on all ranks. A check that fails does not stop the next one.

    Args:
        functions (iterable of callable): Each returns its numbers by name, or words. An exception
            is a failure.
        path (str): File for the results of rank 0, in JSON.
        mpi_comm (mpi4py.MPI.Comm): The ranks.

    Returns:
        list of str: The names of the checks that failed on any rank.
    """
    results, failed = {}, []
    for function in functions:
        begin = time.perf_counter()
        try:
            found, error = function(), ''
        except Exception as its_error:  # noqa: BLE001  (any error is a result)
            found, error = None, f'{type(its_error).__name__}: {its_error}'
            if not isinstance(its_error, Failed):
                traceback.print_exc()
        seconds = time.perf_counter() - begin
        errors = [e for e in mpi_comm.allgather(error) if e]
        words = errors[0] if errors else _words(found)
        results[function.__name__] = {
            'ok': not errors,
            'seconds': seconds,
            'found': found,
            'words': words,
        }
        failed += [function.__name__] * bool(errors)
        if mpi_comm.rank == 0:
            name = function.__name__.replace('_', ' ')
            print(f'{"FAIL" if errors else "ok":5}{name:20}{seconds:6.1f} s  {words}', flush=True)
    if mpi_comm.rank == 0:
        Path(path).write_text(json.dumps(results, indent=1))
    return failed


def _words(found) -> str:
    if isinstance(found, str):
        return found
    return ', '.join(f'{name} {_number(value)}' for name, value in found.items())


def _number(value) -> str:
    if not isinstance(value, float):
        return f'{value}'
    return f'{value:.1e}' if value and abs(value) < 1e-3 else f'{value:,.4g}'
