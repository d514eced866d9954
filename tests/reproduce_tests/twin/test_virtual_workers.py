"""n workers on P processes of PyTorch: the same numbers for every P, and a step of n GPUs."""

import extensions  # noqa: F401  isort: skip  (first: makes Chainer importable on NumPy 2)
import ast
import importlib.util
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip('torch')
import torch.nn.functional as F

from reproduce.twin import virtual_workers
from reproduce.twin.virtual_workers import BatchStatistics, VirtualWorkers

PROGRAM = Path(__file__).parent / 'programs' / 'play.py'
SOURCE = Path(virtual_workers.__file__)


def model_of(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3, bias=False),
        torch.nn.BatchNorm2d(6, momentum=1.0),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(6 * 16, 4),
    )


def minibatch(step, worker):
    rng = np.random.RandomState([step, worker])
    x = (0.2 + worker) * rng.normal(size=(5, 3, 6, 6)) + worker
    return torch.from_numpy(x.astype('f')), torch.from_numpy(rng.randint(4, size=5))


@pytest.mark.parametrize('dtype', [torch.float16, torch.float32])
@pytest.mark.parametrize('exact', [True, False])
def test_the_mean_is_that_of_n_separate_models(dtype, exact):
    """Each with its own batch normalization; gradients are rounded one by one."""
    gradients, means, variances = [], [], []
    for worker in range(3):
        alone = model_of()
        x, t = minibatch(0, worker)
        F.cross_entropy(alone(x), t).backward()
        gradients.append([param.grad.to(dtype).double() for param in alone.parameters()])
        h = alone[0](x).detach().double()
        means.append(h.mean(dim=(0, 2, 3)))
        variances.append(h.var(dim=(0, 2, 3), unbiased=True))
    model = model_of()
    workers = VirtualWorkers(model, 3, dtype, exact)
    for worker in workers:
        x, t = minibatch(0, worker)
        F.cross_entropy(model(x), t).backward()
        workers.add_worker()
    workers.mean_grad()
    workers.average_statistics()
    for i, param in enumerate(model.parameters()):
        mean = torch.stack([gradient[i] for gradient in gradients]).mean(0)
        assert param.grad.dtype == torch.float32
        if exact:
            expected = mean.numpy().astype({torch.float16: 'e', torch.float32: 'f'}[dtype])
            assert np.array_equal(param.grad.numpy(), expected.astype('f'))
        else:
            assert torch.allclose(param.grad.double(), mean, rtol=2e-3, atol=1e-7)
    assert torch.allclose(model[1].running_mean.double(), torch.stack(means).mean(0), rtol=1e-5)
    assert torch.allclose(model[1].running_var.double(), torch.stack(variances).mean(0), rtol=1e-5)


@pytest.mark.slow
def test_one_two_and_four_processes(torchrun, tmp_path):
    """The exact sum gives the same bits; a sum of float16 differs by its rounding."""
    spec = importlib.util.spec_from_file_location('play', PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    one = module.both()
    assert len(one) == 2 * 7
    for processes in (2, 4):
        done = torchrun(processes, PROGRAM, tmp_path / f'{processes}-')
        assert done.returncode == 0, done.stdout
        for rank in range(processes):
            found = dict(np.load(tmp_path / f'{processes}-{rank}.npz'))
            same = {name: np.array_equal(array, found[name]) for name, array in one.items()}
            assert all(same[name] for name in same if name.startswith('exact'))
            assert not all(same.values())
            for name, array in one.items():
                assert abs(found[name] - array).max() < 3e-3 * abs(array).max(), (name, processes)


def test_the_example_in_the_file_trains_in_another_program(tmp_path):
    """In a folder with this file and nothing else of the project."""
    text = SOURCE.read_text()
    (block,) = re.findall(r'::\n\n((?:    .*\n|\n)+)', ast.get_docstring(ast.parse(text)) + '\n')
    example = textwrap.dedent(block)
    assert len(example.strip().splitlines()) == 10
    (tmp_path / 'virtual_workers.py').write_text(text)
    before = textwrap.dedent("""
        import torch
        import torch.nn.functional as F
        from virtual_workers import VirtualWorkers

        torch.manual_seed(0)
        x_all = torch.randn(512, 20)
        t_all = (x_all.sum(1) > 0).long()

        def make_model():
            global optimizer
            layers = torch.nn.Linear(20, 16), torch.nn.BatchNorm1d(16, momentum=1.0)
            model = torch.nn.Sequential(*layers, torch.nn.Linear(16, 2))
            optimizer = torch.optim.SGD(model.parameters(), 0.5)
            return model

        def minibatch(step, worker):
            i = (step * 256 + worker * 32) % 512
            return x_all[i : i + 32], t_all[i : i + 32]
    """)
    after = textwrap.dedent("""
        model.eval()
        print(float((model(x_all).argmax(1) == t_all).float().mean()), *sorted(sys.modules))
    """)
    start = f'import sys\nsys.path.insert(0, {str(tmp_path)!r})\n'
    done = subprocess.run(
        [sys.executable, '-I', '-c', start + before + example + after],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    accuracy, *modules = done.stdout.split()
    assert float(accuracy) > 0.95
    assert not {name.split('.')[0] for name in modules} & {'chainer', 'extensions', 'reproduce'}


def test_what_is_forgotten_is_an_error():
    model = model_of()
    workers = VirtualWorkers(model, 2)
    with pytest.raises(ValueError, match='backward'):
        workers.add_worker()
    for worker in workers:
        x, t = minibatch(0, worker)
        F.cross_entropy(model(x), t).backward()
        workers.add_worker()
        break
    with pytest.raises(ValueError, match='1 times, not 2'):
        workers.mean_grad()
    model[1].momentum = 0.1
    with pytest.raises(ValueError, match='^1 has momentum 0.1'):
        BatchStatistics(model)
    for wrong in (0, -1):
        with pytest.raises(ValueError, match='evenly'):
            VirtualWorkers(model, wrong)
    with pytest.raises(ValueError, match='3 workers cannot be spread evenly over 2 processes'):
        virtual_workers.workers_of(0, 2, 3)


def test_statistics_of_one_worker_are_the_last_minibatchs():
    model = model_of()
    statistics = BatchStatistics(model)
    for worker in range(2):
        model(minibatch(0, worker)[0])
    last = model[1].running_mean.clone(), model[1].running_var.clone()
    statistics.average()
    assert torch.equal(model[1].running_mean, last[0])
    assert torch.equal(model[1].running_var, last[1])
    BatchStatistics(torch.nn.Linear(2, 2)).average()  # nothing to average
