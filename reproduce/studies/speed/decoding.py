"""How fast are images loaded? ./run_mpi.sh benchmark loader

It times the augmentation on one core against plain Pillow, then the libraries that could decode and
resize, then one loader process against two, threads, and no helper.
"""

from __future__ import annotations

import io
import resource
import tempfile
import time
import zipfile
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from reproduce import images, loader
from reproduce.listing import ImageFolder
from reproduce.order import ImageOrder
from reproduce.studies.speed.side_by_side import side_by_side, table

_SAMPLE = Path(__file__).resolve().parents[4] / 'shared' / 'data' / 'imagenet-sample.zip'
_N_MADE = 64
# GPU to the images/s that 8 of them train on, and the source.
_NODES = (
    ('P100', 1_500, 'in float32; an assumption'),
    ('A100', 16_621, 'in mixed precision: NVIDIA DeepLearningExamples, PyTorch, DGX A100'),
    ('H100', 29_918, '1.8 x A100, as 16 GPUs of each in MLPerf Training 3.0, of Dell'),
)


def write_jpeg(path, seed: int, size=(500, 375)) -> Path:
    """Makes a JPEG file of smooth shapes and grain, about as large as ImageNet's files.

    Returns:
        Path: The path, as given.
    """
    rng = np.random.RandomState(seed)
    pixels = np.full((size[1], size[0], 3), 128.0)
    for n, contrast in ((6, 70), (40, 30), (size[1], 12)):
        noise = np.clip(rng.standard_normal((n, n, 3)) * 20 + 128, 0, 255).astype(np.uint8)
        enlarged = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
        pixels += contrast / 20 * (np.asarray(enlarged) - 128.0)
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path, quality=95)
    return path


def with_plain_pillow(path, rng, preprocessing, out):
    """Augments as most programs do, with Pillow alone: open, convert, crop, resize, flip."""
    image = Image.open(path).convert('RGB')
    box = images.random_crop(image.size, rng, preprocessing)
    side = preprocessing.image_size
    image = image.crop(box).resize((side, side), Image.Resampling.BILINEAR)
    if rng.randint(2):
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    out[...] = image


def run(repeat: int) -> dict:
    """Runs all measurements, and prints their tables and the cores that 8 GPUs need.

    The images are the sample of ImageNet beside the repository. Without the sample, they are JPEG
    files that this function makes.

    Args:
        repeat (int): Rounds that are timed. The loaders get a fifth as many.

    Returns:
        dict: The tables, for JSON.
    """
    with tempfile.TemporaryDirectory() as folder:
        listing = _images(Path(folder))
        result = one_core(listing, repeat)
        result['libraries'] = libraries(listing, repeat)
        result['loaders'] = loaders(listing, repeat)
    per_core = result['loaders']['processes:1']['images_per_second']
    print(f'cores that feed 8 GPUs, at {per_core:,.0f} images/s per core:')
    for gpu, rate, source in _NODES:
        print(f'  {rate / per_core:6.1f}  {gpu}: {rate:,} images/s ({source})')
    result['cores of a node'] = {gpu: rate / per_core for gpu, rate, _ in _NODES}
    return result


def _images(folder) -> ImageFolder:
    if _SAMPLE.exists():
        with zipfile.ZipFile(_SAMPLE) as archive:
            archive.extractall(folder)
        files = [path for path in folder.rglob('*') if path.suffix.lower() in ('.jpeg', '.jpg')]
        return _folder_of(folder, sorted(str(path.relative_to(folder)) for path in files))
    return _folder_of(folder, [write_jpeg(folder / f'{i}.jpg', i).name for i in range(_N_MADE)])


def _folder_of(root, files) -> ImageFolder:
    names = ''.join(f'{name}\0' for name in files).encode()
    return ImageFolder(str(root), ('.',), np.array([len(files)]), names)


def one_core(listing, repeat) -> dict:
    """Times training's augmentation in this process, from JPEG files into a minibatch."""
    paths = [listing.path(i) for i in range(len(listing))]
    out = np.empty((len(paths), 224, 224, 3), np.uint8)
    rng = np.random.RandomState(0)

    def load(function, resize_filter='antialiased'):
        preprocessing = images.Preprocessing(resize_filter=resize_filter)

        def all_of_them():
            for i, path in enumerate(paths):
                images.augmentation_rng(0, 0, i, rng=rng)
                function(path, rng, preprocessing, out[i])

        return all_of_them

    ours = 'train_image, antialiased'
    candidates = {
        ours: load(images.train_image),
        'train_image, pillow': load(images.train_image, 'pillow'),
        'Pillow: open, convert, crop, resize, flip': load(with_plain_pillow),
    }
    shape = images.decode(paths[0]).shape
    size = f'{shape[1]} x {shape[0]}'
    title = f'{len(paths)} JPEG files to 224 x 224, on one core; the first file is {size}'
    result = table(title, side_by_side(candidates, repeat), ours)
    load(with_plain_pillow)()
    expected = out.astype(int)
    for name, candidate in candidates.items():
        candidate()
        differences = abs(out - expected).mean(axis=(1, 2, 3))
        result[name]['images_per_second'] = len(paths) / result[name]['median_seconds']
        result[name]['grey_levels_from_pillow'] = float(differences.mean())
        print(
            f'{name:44}{result[name]["images_per_second"]:9.0f} images/s, {differences.mean():.2f} '
            f'grey levels from Pillow on average, {differences.max():.2f} in the worst image'
        )
    return result


def libraries(listing, repeat) -> dict:
    """Times decoding alone, and resizing training's crops alone, with each possible library."""
    files = [Path(listing.path(i)).read_bytes() for i in range(len(listing))]
    decoders = {
        'simplejpeg': simplejpeg.decode_jpeg,
        'OpenCV': lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR),
        'Pillow': lambda data: Image.open(io.BytesIO(data)).convert('RGB'),
    }
    preprocessing = images.Preprocessing()
    pixels = [simplejpeg.decode_jpeg(data) for data in files]
    boxes = np.array(
        [
            images.random_crop(p.shape[1::-1], images.augmentation_rng(0, epoch, i), preprocessing)
            for epoch in range(20)
            for i, p in enumerate(pixels)
        ]
    )
    crops = [p[upper:lower, left:right] for p, (left, upper, right, lower) in zip(pixels, boxes)]

    filters = {name: _resize(name) for name in images.FILTERS}
    for name in ('INTER_AREA', 'INTER_LINEAR'):  # INTER_LINEAR aliases
        filters[f'OpenCV {name}'] = _resize_by_opencv(getattr(cv2, name))
    result = {}
    steps = (('decode', decoders, files, 'files'), ('resize', filters, crops, 'crops'))
    for step, functions, values, noun in steps:
        candidates = {
            name: lambda function=function, values=values: list(map(function, values))
            for name, function in functions.items()
        }
        title = f'{step} {len(values):,} {noun}'
        result[step] = table(title, side_by_side(candidates, repeat), next(iter(candidates)))
    expected = [filters['pillow'](crop).astype(int) for crop in crops]
    for name, function in filters.items():
        differences = [abs(function(crop) - e).mean() for crop, e in zip(crops, expected)]
        result['resize'][name]['grey_levels_from_pillow'] = float(np.mean(differences))
        print(f'{name:44}{np.mean(differences):9.2f} grey levels from Pillow on average')
    large = float(((boxes[:, 2:] - boxes[:, :2]).min(axis=1) >= 2 * 224).mean())
    print(f'{large:.1%} of the crops have the 448 x 448 pixels that decoding at half size needs')
    return {**result, 'crops_of_twice_the_size': large}


def _resize(name):
    return lambda crop: images.resized(crop, 224, 224, name)


def _resize_by_opencv(interpolation):
    return lambda crop: cv2.resize(crop, (224, 224), interpolation=interpolation)


def loaders(listing, repeat) -> dict:
    """Times the loader as a rank uses it: its images/s, and the rank's own share of a core."""
    order = ImageOrder(len(listing), 1, min(32, len(listing)), 0)
    kinds = ('processes:1', 'processes:2', 'threads:1', 'threads:2', 'serial')
    found: dict = {kind: [] for kind in kinds}
    seconds = min(repeat, 4)
    for _ in range(max(1, repeat // 5)):
        for kind in kinds:
            with loader.ImageLoader(
                listing, listing, order, images.Preprocessing(), 0, range(1), kind
            ) as batches:
                found[kind].append(_rate(batches, order.local_batch_size, seconds))
    print(f'{"loader":16}{"images/s":>10}{"/ processes:1":>16}{"CPU time of the rank":>22}')
    result = {}
    for kind, values in found.items():
        rate, own = np.median(values, axis=0)
        ratio = float(np.median(np.array(values)[:, 0] / np.array(found[kinds[0]])[:, 0]))
        result[kind] = {'images_per_second': rate, 'ratio': ratio, 'own_core': own}
        print(f'{kind:16}{rate:10,.0f}{ratio:16.2f}{own:22.1%}')
    return result


def _rate(batches, batch_size, seconds) -> tuple[float, float]:
    for iteration in range(5):  # not timed: the processes start
        batches.train_batch(iteration, 0)
    start, cpu = time.perf_counter(), _own_seconds()
    while time.perf_counter() < start + seconds:
        iteration += 1
        batches.train_batch(iteration, 0)
    passed = time.perf_counter() - start
    return (iteration - 4) * batch_size / passed, (_own_seconds() - cpu) / passed


def _own_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
