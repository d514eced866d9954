"""Is this machine's GPU right, and how fast is it? Answers in less than nine minutes.

./run_mpi.sh gpu-check

It compares what the GPU computes with the CPU, trains a small network to its accuracy, kills and
resumes a training, and then measures speed. The most valuable steps come first, and each has a
limit. A row of the table is printed when its step ends. OUT gets the table (table.txt), all
output (log.txt), and all numbers (gpu_check.json). The exit status is 0 if every step passes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from reproduce import dataset
from reproduce.job.command_line import Parser, reason, run_program
from reproduce.studies.speed.side_by_side import job_of

_RIGHT, _SPEED = 'reproduce.studies.gpu_check.right', 'reproduce.studies.gpu_check.speed'
_TOP1 = 0.95  # of the preset smoke
_PATIENCE = 60  # seconds for the first answer of the driver
_LEAST = 10.0  # seconds; with less left, a step does not start


@dataclasses.dataclass(frozen=True)
class Step:
    """A part of the check.

    Attributes:
        name (str): In the table.
        limit (float): Seconds that it may take.
        question (str): What it asks, in words.
        run (callable): Takes this Step and a :class:`Session`. Returns words for the table.
            Raises :class:`Failed`.
        needs (str): What the step is left out without: a package, or ``'cudnn'`` in Chainer.
        environment (dict): Variables that it adds.
    """

    name: str
    limit: float
    question: str
    run: object
    needs: str = ''
    environment: dict = dataclasses.field(default_factory=dict)


class Failed(Exception):
    """A step that failed. The message is for the table."""


class Session:
    """The folder of a check, its log, and the time that is left.

    Attributes:
        out (Path): The folder of the results.
        scratch (Path): A folder for what is thrown away.
        figures (dict): Name of a step to the numbers that it found.
        has_torch (bool): Whether there is a PyTorch for GPUs.
        has_cudnn (bool): Whether Chainer has cuDNN.

    Raises:
        OSError: The folder cannot be made, or not be written to.
    """

    def __init__(self, out: Path, scratch: Path, seconds: float, about: dict):
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.scratch, self._about = out, scratch, about
        self.figures: dict = {}
        self.has_torch = bool(about['cudnn of torch'])
        self.has_cudnn = about['versions']['cudnn'] != 'none'
        self._log = open(out / 'log.txt', 'w')  # noqa: SIM115  (until the end)
        (out / 'table.txt').unlink(missing_ok=True)
        self._end = self._end_of_step = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds until the check must end."""
        return self._end - time.monotonic()

    def begin(self, step):
        """Starts the clock of a step."""
        self._end_of_step = min(self._end, time.monotonic() + step.limit)

    def save(self, results: dict):
        """Writes gpu_check.json, anew after each step."""
        content = {
            'date': time.strftime('%Y-%m-%d'),
            'machine': self._about,
            'steps': results,
            'figures': self.figures,
        }
        (self.out / 'gpu_check.json').write_text(json.dumps(content, indent=1) + '\n')

    def say(self, line: str):
        print(line, flush=True)
        with open(self.out / 'table.txt', 'a') as file:
            file.write(f'{line}\n')

    def job(self, step, n, module, arguments, until=None) -> str:
        """Runs a job of ``n`` ranks, or kills it. Returns its output.

        Args:
            step (Step): Its limit and environment count.
            n (int): Ranks.
            module (str): Module that they run.
            arguments (list): Its words.
            until (callable): The job is killed as soon as this is true. None: it must end itself.

        Raises:
            Failed: The job took too long, or failed, or ended before ``until``.
        """
        command, environment = job_of(n, list(map(str, arguments)), module)
        return self.command(step, command, environment, until)

    def command(self, step, command, environment=None, until=None) -> str:
        """Runs a command, as :meth:`job`."""
        self._log.write(f'\n===== {step.name}: {" ".join(command)}\n')
        self._log.flush()
        begin = time.monotonic()
        done = False  # what ``until`` waits for
        with tempfile.TemporaryFile('w+', errors='replace') as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**(environment or os.environ), **step.environment},
                start_new_session=True,
            )
            try:
                while process.poll() is None and time.monotonic() < self._end_of_step:
                    done = until is not None and until()
                    if done:
                        break
                    time.sleep(0.1)
                ended, seconds = process.poll(), time.monotonic() - begin
            finally:
                _kill(process)
            output.seek(0)
            text = output.read()
        self._log.write(text)
        self._log.flush()
        if ended is None and not done:
            raise Failed(f'was stopped after {seconds:.0f} s')
        if until and ended is not None:
            raise Failed(f'ended with exit status {ended}, instead of being killed')
        if ended:
            raise Failed(_last_line(text) or f'exit status {ended}')
        return text


def _kill(process):
    """Ends a job: mpiexec ends its ranks when it is asked to, and is killed if it does not."""
    for signum, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signum)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            return


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    failures = [line for line in lines if line.startswith(('FAIL', 'error:'))]
    return (failures or lines or [''])[-1]


# ---------------------------------------------------------------- the steps


def checks(module, n=1, functions='chainer'):
    """Returns a step's ``run`` that makes the checks of one of this package's programs."""

    def run(step, session):
        path = session.scratch / f'{step.name}.json'
        kind = step.name.split(',')[0]
        try:
            session.job(step, n, module, [kind, path, functions])
        finally:
            if path.exists():
                session.figures[step.name] = json.loads(path.read_text())
        found = session.figures[step.name]
        return '; '.join(f'{name.replace("_", " ")} {c["words"]}' for name, c in found.items())

    return run


def train(*options, folder, overwrite=True):
    """Returns the words of a training with the digits."""
    return ['--preset', 'smoke', '--out', folder, *['--overwrite'] * overwrite, *options]


def smoke(n_workers, module='reproduce.train'):
    """Returns a step's ``run`` that trains the preset smoke to its accuracy."""

    def run(step, session):
        folder = session.scratch / module
        session.job(step, 1, module, train('--workers', n_workers, folder=folder))
        summary = json.loads((folder / 'summary.json').read_text())
        session.figures[step.name] = summary
        if not summary['top1'] >= _TOP1:
            raise Failed(f'top-1 {summary["top1"]:.2%}, less than {_TOP1:.0%}')
        return f'top-1 {summary["top1"]:.2%} in {summary["seconds"]:.0f} s'

    return run


def resume(step, session):
    import numpy as np

    images = few_digits(session.scratch / 'digits')
    options = (
        f'--workers 1 --epochs 6 --width 8 --train-root {images}/train --val-root {images}/val'
    )
    whole, parts = session.scratch / 'whole', session.scratch / 'parts'
    session.job(step, 1, 'reproduce.train', train(*options.split(), folder=whole))
    session.job(
        step,
        1,
        'reproduce.train',
        train(*options.split(), folder=parts),
        until=lambda: any(parts.glob('checkpoints/*.npz')),
    )
    resumed = train(*options.split(), '--resume', 'auto', folder=parts, overwrite=False)
    text = session.job(step, 1, 'reproduce.train', resumed)
    if 'goes on from ' not in text:
        raise Failed('the killed run did not go on from its checkpoint')
    with np.load(whole / 'model.npz') as a, np.load(parts / 'model.npz') as b:
        same = sum(np.array_equal(a[name], b[name]) for name in a.files)
        n, worst = len(a.files), max(float(abs(a[k] - b[k]).max()) for k in a.files)
    session.figures[step.name] = {'arrays': n, 'same': same, 'largest difference': worst}
    words = f'{same} of {n} arrays have the bits of a run that was not killed'
    if same < n:
        raise Failed(f'{words}; the others differ by up to {worst:.1e}')
    return words


def few_digits(folder, per_class=10):
    """Writes the digits, and keeps a few of each class."""
    dataset.write_digits(folder)
    for images in folder.glob('*/*'):
        for path in sorted(images.iterdir())[per_class:]:
            path.unlink()
    return folder


def tests(step, session):
    folder = Path(__file__).resolve().parents[3] / 'tests'
    if not folder.is_dir():
        return 'left out: the tests are not here'
    words = f'-m pytest -q -p no:cacheprovider -m gpu {folder}'.split()
    environment = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    summary = _last_line(session.command(step, [sys.executable, *words], environment)).strip('= ')
    if not re.search(r'\b[1-9]\d* passed', summary):
        raise Failed(f'no test ran: {summary}')
    return summary


def loading(step, session):
    functions = 'torch' if session.has_torch else 'chainer'
    options = {
        'functions': functions,
        'iterations': 8,
        'image_size': 224,
        'local_batch_size': 32,
        'loader': f'processes:{max(1, min(12, (os.cpu_count() or 1) - 2))}',
        'image_root': None,
        'width': 64,
        'stem': 'imagenet',
        'repeat': 3,
        'allreduce_grad_dtype': 'float16',
        'peer': 'chainermn',
        'result': str(session.scratch / 'loading.json'),
    }
    module = 'reproduce.studies.speed.iteration_program'
    session.job(step, 1, module, [json.dumps(options)])
    from reproduce.studies.speed.iteration import middle_half

    result = json.loads(Path(options['result']).read_text())
    rows = {name: middle_half(list(rounds)) for name, rounds in result['seconds'].items()}
    session.figures[step.name] = rows
    parts = ('data', 'pack', 'allreduce', 'update', 'extensions')
    return f'by {functions}: ' + '; '.join(
        f'{name}: {1000 * row["iteration"]:,.1f} ms, of these '
        + ', '.join(f'{part} {1000 * row[part]:.1f}' for part in parts)
        for name, row in rows.items()
    )


_TF32 = {'NVIDIA_TF32_OVERRIDE': '1'}
STEPS = (  # is it right, then how fast; then the same by PyTorch
    Step('kernels', 100, 'update, images, half precision, counts', checks(_RIGHT)),
    Step('network', 60, 'ResNet-50 against float64', checks(_RIGHT)),
    Step('workers', 60, '8 workers on the GPU and on the CPU', checks(_RIGHT)),
    Step('nccl', 60, 'two ranks on one GPU', checks(_RIGHT, n=2)),
    Step('smoke', 180, 'a training to its accuracy', smoke(2)),
    Step('resume', 120, 'a training that is killed goes on', resume),
    Step('tests', 180, 'the tests that need a GPU', tests, 'pytest'),
    Step('memory', 60, 'update and all-reduce against a copy', checks(_SPEED)),
    Step('iteration', 75, 'images/s by Chainer', checks(_SPEED)),
    Step(
        'iteration, no cuDNN',
        75,
        'images/s by Chainer without cuDNN',
        checks(_SPEED),
        'cudnn',
        {'CHAINER_CUDNN': '0'},
    ),
    Step(
        'network, torch',
        60,
        'the network by --functions torch',
        checks(_RIGHT, functions='torch'),
        'torch',
    ),
    Step('iteration, torch', 60, 'images/s by Torch', checks(_SPEED, functions='torch'), 'torch'),
    Step(
        'iteration, torch, TF32',
        60,
        'the same with 10 bits in products',
        checks(_SPEED, functions='torch'),
        'torch',
        _TF32,
    ),
    Step('twin', 60, 'the twin on the GPU and on the CPU', checks(_RIGHT), 'torch'),
    Step(
        'smoke, twin',
        120,
        'the twin, to its accuracy, with NCCL',  # one worker: DistributedDataParallel's hook
        smoke(1, 'reproduce.twin.train'),
        'torch',
    ),
    Step('loading', 90, "an iteration with images, and ChainerMN's own way", loading),
)


# ---------------------------------------------------------------- main


def parse(argv=None):
    parser = Parser(prog='./run_mpi.sh gpu-check', description=__doc__)
    add = parser.add_argument
    add(
        '--steps',
        metavar='NAME[;NAME]',
        help='make only these steps; their names are in the first column of the table [all]',
    )
    add(
        '--seconds',
        type=float,
        default=530,
        metavar='N',
        help='stop after N seconds; steps that are not reached are late [%(default)g]',
    )
    add(
        '--out',
        default='results/gpu-check',
        metavar='FOLDER',
        help='write the results to FOLDER [%(default)s]',
    )
    options = parser.parse_args(argv)
    names = [step.name for step in STEPS]
    wanted = [w.strip() for w in options.steps.split(';')] if options.steps else names
    for name in wanted:
        if name not in names:
            parser.refuse(f'--steps has no {name!r}; the steps are {"; ".join(names)}')
    if not options.seconds > 0:
        parser.refuse(f'--seconds must be above 0, not {options.seconds:g}')
    options.steps = [step for step in STEPS if step.name in wanted]
    return options


def machine(scratch: Path) -> dict:
    """Returns what the machine has, as ``reproduce.studies.gpu_check.machine`` finds it.

    Raises:
        Failed: No GPU can be used. The message says why.
    """
    path = scratch / 'machine.json'
    command, environment = job_of(1, [str(path)], 'reproduce.studies.gpu_check.machine')
    try:
        done = subprocess.run(
            command, env=environment, check=False, capture_output=True, text=True, timeout=_PATIENCE
        )
    except subprocess.TimeoutExpired:
        raise Failed(f'has a driver that did not answer for {_PATIENCE} s') from None
    if not path.exists():
        raise Failed(f'fails: {_last_line(done.stderr) or f"exit status {done.returncode}"}')
    about = json.loads(path.read_text())
    if about['obstacle']:
        raise Failed(about['obstacle'])
    return about


def main(argv=None) -> int:
    options = parse(argv)
    out = Path(options.out).resolve()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            about = machine(Path(scratch))
        except Failed as error:
            print(f'error: this machine {error}. These steps would have run:', file=sys.stderr)
            for step in options.steps:
                print(f'  {step.name:24} {step.question}', file=sys.stderr)
            return 1
        try:
            session = Session(out, Path(scratch), options.seconds, about)
        except OSError as error:
            print(f'error: --out {reason(error)}', file=sys.stderr)
            return 2
        session.say(f'{about["gpu"]}; {about["cores"]} cores; {about["words"]}')
        begin, results = time.monotonic(), {}
        for step in options.steps:
            state, seconds, words = _attempt(step, session)
            results[step.name] = {'state': state, 'seconds': seconds, 'words': words}
            session.say(f'{state:5} {step.name:24} {seconds:4.0f} s  {words}')
            session.save(results)
        bad = [name for name, result in results.items() if result['state'] not in ('ok', 'skip')]
        skipped = [name for name, result in results.items() if result['state'] == 'skip']
        words = f'{len(results) - len(bad) - len(skipped)} of {len(results)} steps passed in '
        words += f'{time.monotonic() - begin:.0f} s'
        words += f'; skipped: {"; ".join(skipped)}' if skipped else ''
        session.say(words + (f'; not: {"; ".join(bad)}' if bad else ''))
    print(f'results in {out}: table.txt, log.txt, gpu_check.json')
    return 1 if bad else 0


def _attempt(step, session) -> tuple[str, float, str]:
    begin = time.monotonic()
    if step.needs == 'torch' and not session.has_torch:
        return 'skip', 0, 'there is no PyTorch for GPUs'
    if step.needs == 'cudnn' and not session.has_cudnn:
        return 'skip', 0, 'Chainer has no cuDNN here'
    if step.needs and importlib.util.find_spec(step.needs) is None:
        return 'skip', 0, f'there is no package {step.needs}'
    if session.left < _LEAST:
        return 'late', 0, 'no time left'
    session.begin(step)
    try:
        state, words = 'ok', step.run(step, session)
    except Failed as error:
        state, words = 'FAIL', str(error)
    except Exception as error:  # noqa: BLE001  (the other steps go on)
        state, words = 'FAIL', f'{type(error).__name__}: {error}'
    return state, time.monotonic() - begin, re.sub(r'\s+', ' ', words)


if __name__ == '__main__':
    run_program(main)
