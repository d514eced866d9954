"""Image folders, and the way from a file to what the network sees."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

MEAN = (0.485, 0.456, 0.406)  # of ImageNet's red, green and blue, in units of the full scale (G)
STD = (0.229, 0.224, 0.225)

_SUFFIXES = ('.jpeg', '.jpg', '.png')
_TRIES = 10


class DataError(Exception):
    """The images cannot be used; the message names the path, what is wrong and what helps."""


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """The listing of ROOT/CLASS/FILE: files sorted by class and name, whatever the file system's
    order.

    Attributes:
        root (str): The folder.
        classes (tuple of str): Names of the class folders, sorted; a label is an index into it.
        names (tuple of str): CLASS/FILE of each image.
        labels (int32 array): Label of each image.
    """

    root: str
    classes: tuple
    names: tuple
    labels: np.ndarray

    def path(self, index: int) -> str:
        return os.path.join(self.root, self.names[index])

    def digest(self) -> str:
        """Identifies the classes and names, wherever the folder is."""
        return hashlib.sha256('\0'.join((*self.classes, *self.names)).encode()).hexdigest()[:16]

    def pack(self) -> tuple:
        """The listing as three strings and an array: quick to send, however long it is."""
        counts = np.bincount(self.labels, minlength=len(self.classes))
        files = '\0'.join(name.partition('/')[2] for name in self.names)
        return self.root, '\0'.join(self.classes), counts, files

    @classmethod
    def unpack(cls, packed: tuple) -> ImageFolder:
        root, classes, counts, files = packed
        classes = tuple(classes.split('\0'))
        labels = np.repeat(np.arange(len(classes), dtype=np.int32), counts)
        names = tuple(f'{classes[t]}/{file}' for t, file in zip(labels, files.split('\0')))
        return cls(root, classes, names, labels)


def list_images(root) -> ImageFolder:
    """Lists ROOT/CLASS/*.jpg, .jpeg and .png, whatever the case of the suffix.

    Raises:
        DataError: There is no such folder, it has no class folder, or a class has no image.
    """
    root = os.fspath(root)
    try:
        classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    except OSError as error:
        raise DataError(
            f'image folder {root}: {error.strerror}; it must hold a folder of images for each class'
        ) from error
    if not classes:
        raise DataError(
            f'image folder {root} has no class folders; images belong into {root}/CLASS/'
        )
    names, counts = [], []
    for name in classes:
        files = sorted(
            entry.name
            for entry in os.scandir(os.path.join(root, name))
            if entry.name.lower().endswith(_SUFFIXES)
        )
        if not files:
            raise DataError(
                f'class folder {os.path.join(root, name)} has no image ({", ".join(_SUFFIXES)}); '
                'fill it or remove it'
            )
        names += [f'{name}/{file}' for file in files]
        counts.append(len(files))
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), counts)
    return ImageFolder(root, tuple(classes), tuple(names), labels)


def check_same_classes(train: ImageFolder, val: ImageFolder) -> None:
    """Raises DataError, with names, if the two folders do not have the same classes."""
    for one, other in ((train, val), (val, train)):
        extra = sorted(set(one.classes) - set(other.classes))
        if extra:
            shown = ', '.join(extra[:3]) + (', ...' if len(extra) > 3 else '')
            raise DataError(
                f'{one.root} has {len(extra)} class folder(s) that {other.root} has not: {shown}; '
                'both must have the same'
            )


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What is done to an image; the defaults are those for ImageNet (G).

    Attributes:
        image_size (int): Pixels of the result's side.
        resize (int): Pixels of the shorter side before validation's centre crop.
        min_crop_area (float): Smallest random crop, as a fraction of the image's area.
        max_aspect (float): Largest aspect ratio of a random crop; the smallest is its inverse.
        horizontal_flip (bool): Flip half of the training images.
    """

    image_size: int = 224
    resize: int = 256
    min_crop_area: float = 0.08
    max_aspect: float = 4 / 3
    horizontal_flip: bool = True


def augmentation_rng(seed: int, epoch: int, index: int) -> np.random.RandomState:
    """The random numbers for an image in an epoch: the same whichever process draws them."""
    return np.random.RandomState([seed, epoch, index])


def random_crop(size, rng, preprocessing) -> tuple[int, int, int, int]:
    """A random box of an image (G): area uniform in [min_crop_area, 1], logarithm of the aspect
    ratio uniform.

    Where ten draws do not fit into the image, it is the largest centred square.

    Args:
        size (tuple of int): Width and height of the image.
        rng (numpy.random.RandomState): Source of the draws.
        preprocessing (Preprocessing): The ranges.

    Returns:
        tuple: Left, upper, right, lower.
    """
    width, height = size
    log_aspect = np.log(preprocessing.max_aspect)
    for _ in range(_TRIES):
        area = width * height * rng.uniform(preprocessing.min_crop_area, 1)
        aspect = np.exp(rng.uniform(-log_aspect, log_aspect))
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, upper = rng.randint(width - w + 1), rng.randint(height - h + 1)
            return left, upper, left + w, upper + h
    side = min(width, height)
    left, upper = (width - side) // 2, (height - side) // 2
    return left, upper, left + side, upper + side


def train_image(path, rng, preprocessing) -> np.ndarray:
    """Decodes an image for training: a random crop, resized with Pillow's antialiased bilinear
    filter, flipped or not.

    Returns:
        uint8 array [image_size, image_size, 3].

    Raises:
        DataError: The file cannot be decoded.
    """
    image = _decode(path)
    box = random_crop(image.size, rng, preprocessing)
    side = preprocessing.image_size
    # Cropped first: with resize(box=...) the filter would see across the border of the crop.
    pixels = np.asarray(image.crop(box).resize((side, side), Image.Resampling.BILINEAR))
    if preprocessing.horizontal_flip and rng.randint(2):
        pixels = pixels[:, ::-1]
    return pixels


def validation_image(path, preprocessing) -> np.ndarray:
    """Decodes an image for validation: the centre of the image whose shorter side was resized.

    Returns:
        uint8 array [image_size, image_size, 3].

    Raises:
        DataError: The file cannot be decoded.
    """
    image = _decode(path)
    shorter = min(image.size)
    width, height = (round(length * preprocessing.resize / shorter) for length in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    side = preprocessing.image_size
    left, upper = (width - side) // 2, (height - side) // 2
    return np.asarray(image.crop((left, upper, left + side, upper + side)))


def _decode(path) -> Image.Image:
    """8-bit RGB, upright, whatever the file has; transparent parts lie on white."""
    try:
        with Image.open(path) as image:
            image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith('I'):  # 16-bit grey, which convert() would clip
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.mode in ('LA', 'PA', 'RGBA') or 'transparency' in image.info:
                image = image.convert('RGBA')
                white = Image.new('RGBA', image.size, 'white')
                image = Image.alpha_composite(white, image)
            return image.convert('RGB')
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f'image {Path(path)} cannot be decoded ({error}); replace it or remove it'
        ) from error


def normalize(batch, mean=MEAN, std=STD, xp=np):
    """Pixels as the network takes them: (x / 255 - mean) / std for each channel.

    Args:
        batch (array): uint8 [N, H, W, 3], of ``xp``.
        mean, std (tuple of float): Of red, green and blue, in units of the full scale.
        xp (module): numpy or cupy.

    Returns:
        array: float32 [N, 3, H, W], contiguous.
    """
    scale = xp.asarray(1 / (255 * np.asarray(std)), np.float32)
    shift = xp.asarray(-np.asarray(mean) / np.asarray(std), np.float32)
    x = xp.ascontiguousarray(batch.transpose(0, 3, 1, 2), dtype=np.float32)
    x *= scale[:, None, None]
    x += shift[:, None, None]
    return x
