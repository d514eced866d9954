"""Trains ResNet-50 as reproduce/train.py does, in PyTorch: its twin.

    torchrun --nproc-per-node 2 reproduce/twin/train.py --preset smoke
    mpiexec -n 2 python reproduce/twin/train.py --preset smoke

Settings, schedules, images and their order are the same numbers. All that computes is PyTorch's.
"./run_mpi.sh twin compare" runs both, and compares each iteration. Checkpoints and some options of
reproduce/train.py are absent here: records.py lists them.
"""

import sys
from pathlib import Path

if __name__ == '__main__':  # first on the path: others may have packages of these names, too
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from reproduce.twin import processes as job

if __name__ == '__main__':
    job.before_mpi()

import extensions  # noqa: F401  isort: skip  (first: settings import Chainer, on NumPy 2)
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from extensions.schedules import PAPER_EPOCHS, alpha_rmsprop
from reproduce import images
from reproduce.job import supervise
from reproduce.loader import ImageLoader
from reproduce.order import ImageOrder
from reproduce.twin import half_precision, records
from reproduce.twin.resnet50 import ResNet50
from reproduce.twin.rmsprop_warmup import RMSpropWarmup
from reproduce.twin.virtual_workers import VirtualWorkers, workers_of


def experiment(settings, processes, train, val):
    """Builds the training, but does not start it.

    Args:
        settings (Settings): The numbers of the experiment.
        processes (~reproduce.twin.processes.Processes): Together they play ``settings.workers``
            workers.
        train, val (ImageFolder): Training and validation images.

    Returns:
        tuple: The Training, and the ImageLoader that feeds it and is a context manager.
    """
    # Data: every epoch is a new permutation. In each iteration, each worker gets its own 32 images.
    order = ImageOrder(len(train), settings.workers, settings.local_batch_size, settings.seed)
    own_workers = workers_of(processes.rank, processes.size, settings.workers)
    batches = ImageLoader(
        train,
        val,
        order,
        settings.preprocessing,
        settings.seed,
        own_workers,
        settings.loader,
        settings.validation_batch_size,
        settings.bad_images,
    )

    # Model: on every process the same initial values, which are Chainer's, too.
    device = processes.device
    model = ResNet50(
        len(train.classes), settings.width, settings.stem, settings.seed, settings.shallow
    ).to(device)

    # Optimizer: RMSprop warm-up. Weight decay is added once, after the all-reduce.
    decayed, others = decayed_parameters(model)
    optimizer = RMSpropWarmup(
        [{'params': decayed, 'weight_decay': settings.weight_decay}, {'params': others}],
        settings.lr_base,
        mu1=settings.mu1,
        mu2=settings.mu2,
        eps=settings.eps,
    )

    # Half precision, and batch statistics: with several workers in each process, VirtualWorkers
    # averages the gradients after the last of them. With one, DistributedDataParallel does, during
    # the backward pass. Batch normalization has momentum 1 (resnet50.py).
    dtype = getattr(torch, settings.allreduce_grad_dtype)
    exact = settings.accumulate == 'exact' and device.type == 'cpu'
    workers = VirtualWorkers(model, settings.workers, dtype, exact)
    network = model
    if len(own_workers) == 1:
        network = DistributedDataParallel(model)
        network.broadcast_buffers = False  # during training; its argument has had two names
        hook = half_precision.exact_sum if exact else half_precision.cast_sum_divide
        network.register_comm_hook(dtype, hook)
    return Training(settings, model, network, workers, optimizer, batches), batches


def decayed_parameters(model):
    """Returns all parameters except gamma and beta of batch normalization (G), and these."""
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    others = [param for layer in layers for param in layer.parameters()]
    exempt = set(map(id, others))
    return [param for param in model.parameters() if id(param) not in exempt], others


class Training:
    """The loop, which in Chainer is an updater, a trainer and its extensions.

    Attributes:
        iteration (int): Number of completed updates.
        losses (list): A float64 tensor of this process's workers per iteration of the epoch.
    """

    def __init__(self, settings, model, network, workers, optimizer, batches):
        self.settings, self.model, self.network, self.workers = settings, model, network, workers
        self.optimizer, self.batches = optimizer, batches
        self.device = next(model.parameters()).device
        self.iteration, self.losses = 0, []

    @property
    def averages_by(self) -> str:
        """How the gradients are averaged, in words."""
        how = 'exact sum' if self.workers.exact else "the library's sum"
        return how + (' of virtual workers' if self.network is self.model else ', by a hook of DDP')

    @property
    def epoch(self) -> float:
        return self.iteration * self.settings.total_batch_size / len(self.batches.train)

    def run(self, record):
        """Trains to the end; validates after every epoch. ``record`` takes an entry of the log."""
        while self.iteration < self.settings.iterations(len(self.batches.train)):
            epoch = int(self.epoch)
            self.update()
            if int(self.epoch) > epoch:
                self.workers.average_statistics()
                losses = {'main/loss': self.training_loss(), **self.validate()}
                record({**losses, **self.hyperparameters})

    def update(self):
        """Runs one iteration: all workers of this process, one all-reduce and one update."""
        self.set_schedules()
        self.model.train()
        losses = []
        for worker in self.workers:
            x, t = self.convert(self.batches.train_batch(self.iteration, worker))
            loss = F.cross_entropy(self.network(x), t)
            loss.backward()  # with one worker in each process, this all-reduces
            losses.append(loss.detach().double())
            self.add_worker()
        if self.network is self.model:
            self.workers.mean_grad()
        self.check_gradients()
        self.optimizer.step()
        self.losses.append(torch.stack(losses))
        self.iteration += 1

    def add_worker(self):
        if self.network is self.model:
            self.workers.add_worker()
        else:
            self.workers.batch_statistics.add_worker()

    def set_schedules(self):
        """Sets lr, alpha_sgd and alpha_rmsprop of the update to come."""
        s = self.settings
        n_images = self.iteration * s.total_batch_size
        of_90 = n_images * PAPER_EPOCHS / (len(self.batches.train) * s.epochs)
        lr, alpha = float(s.lr(of_90)), float(s.alpha_sgd(of_90))
        rmsprop = alpha_rmsprop(alpha, lr, s.lr_rmsprop)
        self.hyperparameters = {'lr': lr, 'alpha_sgd': alpha, 'alpha_rmsprop': rmsprop}
        for group in self.optimizer.param_groups:
            group.update(self.hyperparameters)

    def convert(self, batch):
        """Turns pixels, uint8 [N, H, W, 3], into float32 [N, 3, H, W], as images.normalize does."""
        pixels, labels = (torch.from_numpy(array).to(self.device) for array in batch)
        std = torch.tensor(images.STD, dtype=torch.float64)
        scale = (1 / (255 * std)).float()
        shift = (-torch.tensor(images.MEAN, dtype=torch.float64) / std).float()
        scale, shift = (v.to(self.device).view(3, 1, 1) for v in (scale, shift))
        x = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return x.mul_(scale).add_(shift), labels.long()

    def check_gradients(self):
        """Ends the run on every process if the mean gradient is infinite or NaN."""
        gradients = [param.grad for param in self.model.parameters()]
        if not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            raise job.TogetherError(
                f'iteration {self.iteration + 1}: the mean gradient is infinite or NaN; lower the '
                'learning rate, or look for broken images'
            )

    @torch.no_grad()
    def validate(self) -> dict:
        """Counts every image once, on shards without duplicates. Collective."""
        rank, size = dist.get_rank(), dist.get_world_size()
        n, b = len(self.batches.val), self.settings.validation_batch_size
        n_batches = -(-n // b)
        first, end = (r * n_batches // size for r in (rank, rank + 1))
        counts = torch.zeros(3, dtype=torch.int64)  # images, top-1 correct, top-5 correct
        losses = torch.zeros(n_batches, dtype=torch.float64)  # zero for those of other processes
        self.model.eval()
        shard = self.batches.validation_batches(first * b, min(end * b, n))
        for number, batch in enumerate(shard, first):
            x, t = self.convert(batch)
            logits = self.model(x)
            losses[number] = (
                F.cross_entropy(logits, t, reduction='none', ignore_index=-1).double().sum()
            )
            true = logits.gather(1, t.clamp(min=0)[:, None])
            # As in argmax, the first of equal logits wins; a NaN comes before all.
            classes = torch.arange(logits.shape[1], device=self.device)
            before = ~(logits <= true) | ((logits == true) & (classes < t[:, None]))
            place, counted = before.sum(1), t >= 0
            hits = [counted, counted & (place < 1), counted & (place < 5)]
            counts += torch.stack([hit.sum() for hit in hits]).cpu()
        dist.all_reduce(counts)
        dist.all_reduce(losses)
        n_images, top1, top5 = counts.tolist()
        return {
            'validation/main/loss': float(losses.sum()) / n_images,
            'validation/main/accuracy': top1 / n_images,
            'validation/main/top5_accuracy': top5 / n_images,
            'validation/images': n_images,
        }

    def training_loss(self) -> float:
        """Returns the mean over all workers and the iterations since the last call. Collective."""
        losses = torch.stack(self.losses).cpu()
        self.losses.clear()
        everyone = [torch.empty_like(losses) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, losses)
        return float(torch.cat(everyone, dim=1).mean())


def main(argv=None):
    """Runs the experiment on all processes. Returns its Training."""
    argv = sys.argv[1:] if argv is None else argv
    processes = job.Processes(records.timeout_of(argv))
    settings = records.read_settings(processes, argv, __doc__)
    train, val = supervise.find_images(processes, processes, settings)
    training, batches = experiment(settings, processes, train, val)
    with batches:
        record = records.Records(processes, training)
        training.run(record.add)
        record.close()
    processes.close()
    return training


if __name__ == '__main__':
    job.run(main)
