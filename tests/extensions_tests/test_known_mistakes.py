"""What published implementations of the method got wrong, each put in, and caught.

Every mistake is written into a copy of the project, where the test that guards against it must then
fail. Without any mistake all these tests pass in the copy.
"""

import os
import re
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

RULE = 'extensions/rmsprop_warmup.py'
ELEMENT = 'extensions/rmsprop_warmup_element.h'
SCHEDULES = 'extensions/schedules.py'
RULE_TESTS = 'tests/extensions_tests/test_rmsprop_warmup.py'
SCHEDULE_TESTS = 'tests/extensions_tests/test_schedules.py'
EQUATIONS = f'{RULE_TESTS}::test_thousand_steps_follow_the_equations'
KERNEL = f'{RULE_TESTS}::test_body_of_the_cuda_kernel_run_on_the_host'
SEQUENCE = f'{SCHEDULE_TESTS}::test_all_3519_updates_of_the_paper'

# What: (file, text, its replacement, the test that notices)
MISTAKES = {
    'the RMSprop term outside the momentum': (
        RULE,
        """                delta *= mu1
                delta -= s  # [W2]
                np.multiply(delta, lr, out=s)
                p += s  # [W3]
""",
        """                delta *= mu1
                delta -= alpha_sgd * g
                p += lr * (delta - (s - alpha_sgd * g))
""",
        f'{RULE_TESTS}::test_rmsprop_term_has_the_gain_of_the_momentum',
    ),
    'the 1/2 before the exponential left out': (
        SCHEDULES,
        'np.exp(np.minimum(u, 0)) / 2',
        'np.exp(np.minimum(u, 0))',
        f'{SCHEDULE_TESTS}::test_alpha_sgd_in_both_forms',
    ),
    'iterations counted as epochs': (
        SCHEDULES,
        'return images * PAPER_EPOCHS / (self._n_images * self._epochs)',
        'return float(iteration)',
        SEQUENCE,
    ),
    'whole epochs instead of fractions': (
        SCHEDULES,
        'return images * PAPER_EPOCHS / (self._n_images * self._epochs)',
        'return images * PAPER_EPOCHS // (self._n_images * self._epochs)',
        SEQUENCE,
    ),
    'a kernel with 1 / 2, which is 0 in C': (
        ELEMENT,
        'alpha_rmsprop / (sqrt',
        '2 * (1 / 2) * alpha_rmsprop / (sqrt',
        KERNEL,
    ),
    'a kernel with a misspelt parameter': (
        ELEMENT,
        'mu1 * delta',
        'mu_1 * delta',
        KERNEL,
    ),
    'a kernel with the sign of the update reversed': (
        ELEMENT,
        'param + lr * step',
        'param - lr * step',
        KERNEL,
    ),
    'the sign of the update reversed': (RULE, 'p += s  # [W3]', 'p -= s', EQUATIONS),
    'a hyper-parameter given and ignored': (
        RULE,
        'for name, value in given.items() if value is not None}',
        "for name, value in given.items() if value is not None and name != 'mu2'}",
        f'{RULE_TESTS}::test_every_hyperparameter_reaches_the_rule',
    ),
    'a boolean taken for a number': (
        RULE,
        'isinstance(value, (bool, np.bool_)) or',
        '',
        f'{RULE_TESTS}::test_impossible_hyperparameters_are_errors',
    ),
    'no weight decay': (
        'reproduce/train.py',
        '        param.update_rule.hyperparam.weight_decay_rate = settings.weight_decay',
        '        pass',
        'tests/reproduce_tests/test_train.py::test_what_main_hands_to_the_trainer',
    ),
    'no all-reduce of the BN statistics': (
        'extensions/batch_statistics.py',
        'self._comm.mpi_comm.Allreduce(MPI.IN_PLACE, total, MPI.SUM)',
        'total *= self._comm.size',
        'tests/mpi/test_batch_statistics.py::test_average_of_all_ranks_minibatches[2-False]',
    ),
    'no float16 on the wire': (
        'extensions/communicator_base.py',
        "self.set_config('allreduce_grad_dtype', allreduce_grad_dtype)",
        "self.set_config('allreduce_grad_dtype', 'float32')",
        'tests/mpi/test_half_precision.py::test_mean_equals_the_reference[2-1-float16-0-exact-1]',
    ),
}


@pytest.fixture
def run_in_copy(root, tmp_path):
    """``run_in_copy(test, file, old, new)``: the test's outcome in a copy with that change."""

    def run(tests, file=None, old=None, new=None):
        names = ['extensions', 'reproduce', 'tests', 'pyproject.toml', 'README.md', 'setup.py']
        for name in [*names, 'constraints.txt', 'run_mpi.sh', 'hostfiles']:
            source, copy = root / name, tmp_path / 'copy' / name
            if source.is_dir():
                shutil.copytree(source, copy, ignore=shutil.ignore_patterns('*.so', '__pycache__'))
            else:
                copy.parent.mkdir(exist_ok=True)
                shutil.copy(source, copy)
        if file is not None:
            text = (tmp_path / 'copy' / file).read_text()
            assert text.count(old) == 1, f'{file} no longer has {old!r}'
            (tmp_path / 'copy' / file).write_text(text.replace(old, new))
        return subprocess.run(
            [sys.executable, '-m', 'pytest', '-x', '-q', '-p', 'no:cacheprovider', *tests],
            cwd=tmp_path / 'copy',
            env={**os.environ, 'PYTHONPATH': str(tmp_path / 'copy')},
            check=False,
            capture_output=True,
            text=True,
        )

    return run


def test_without_a_mistake_the_tests_pass(run_in_copy):
    done = run_in_copy(sorted({mistake[-1] for mistake in MISTAKES.values()}))
    assert done.returncode == 0, done.stdout
    assert re.search(r'\d+ passed', done.stdout)


@pytest.mark.parametrize('mistake', MISTAKES)
def test_mistake_is_caught(run_in_copy, mistake):
    file, old, new, test = MISTAKES[mistake]
    done = run_in_copy([test], file, old, new)
    assert done.returncode == 1, done.stdout
    assert re.search(r'^FAILED ' + re.escape(test), done.stdout, re.MULTILINE), done.stdout
