"""reproduce/job/preflight.py, but the last rank has the fault that the first argument names."""

import errno
import os
import sys

from reproduce.job import start

start.before_mpi()

from reproduce.job import plots, preflight

what = sys.argv.pop(1)
is_last = preflight.MPI.COMM_WORLD.rank == preflight.MPI.COMM_WORLD.size - 1
of_host, now = preflight.agreement.of_host, preflight.time.time
Communicator = preflight.extensions.HalfPrecisionMpiCommunicator
mean_grad = Communicator.multi_node_mean_grad


def wrong_mean_grad(self, model, zero_fill=False):
    mean_grad(self, model, zero_fill)
    model.fc.W.grad[0, 1] += 0.01


def no_space(*arguments, **options):
    raise OSError(errno.ENOSPC, 'No space left on device')


def slowly(root, folder):
    print(f'lists {os.path.basename(root)}', flush=True)
    preflight.time.sleep(5)
    return listing_of(root, folder)


listing_of = preflight.dataset.listing.listing_of
if is_last:
    if what == 'version':
        preflight.agreement.of_host = lambda: {**of_host(), 'numpy': '1.0'}
    if what == 'clock':
        preflight.time.time = lambda: now() + 5
    if what == 'sum':
        Communicator.multi_node_mean_grad = wrong_mean_grad
    if what == 'memory':
        del os.memfd_create
        os.posix_fallocate = no_space
if what == 'plots':
    plots.plt.subplots = no_space
if what == 'slow listing':
    preflight.dataset.listing.listing_of = slowly
preflight.ranks.run(preflight.main)
