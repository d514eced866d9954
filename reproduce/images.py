"""Turns image files into the network's input: decodes, crops, resizes, flips and normalizes."""

from __future__ import annotations

import dataclasses
import errno
import functools
import io
import os
import re
import stat
import warnings

import cv2
import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from reproduce.listing import BadImage, DataError

MEAN = (0.485, 0.456, 0.406)  # ImageNet's red, green and blue; full scale is 1 (G)
STD = (0.229, 0.224, 0.225)

FILTERS = ('antialiased', 'pillow')
_TRIES = 10
_STEEPEST = 16  # a reduction by 32 costs OpenCV's filter five times as much per pixel
_LONGEST = 64  # sides: what validation keeps of a strip

# What a header may claim. Decoders allocate memory for it, and fill the memory, before they notice
# that a file is too short.
_MOST_PIXELS = 178_956_970  # Pillow's own limit
_FEW_PIXELS = 2**24  # 50 MB, which any file may claim
_PIXELS_PER_BYTE = 512  # the most that a JPEG has: a bit for 8 x 8 pixels
_MOST_SCANS = 100  # each is a pass over all pixels; an ordinary progressive JPEG has 10
_MOST_BYTES = 8 * _MOST_PIXELS  # 16 bits, four channels, not compressed
_MARKER = re.compile(rb'\xff[^\x00\x01\xd0-\xd7\xff]')  # in a JPEG, a segment starts with it

_ORIENTATION = 0x0112  # the EXIF tag
_TURNS = {  # EXIF orientation: the turn that makes the image upright; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

cv2.setNumThreads(0)  # one thread per loader process is enough
warnings.simplefilter('ignore', Image.DecompressionBombWarning)  # decode() checks sizes itself


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How images are cropped, resized and flipped. The defaults are for ImageNet (G).

    Attributes:
        image_size (int): Side of the result, in pixels.
        resize (int): In validation, shorter side before the centre crop, in pixels.
        min_crop_area (float): Smallest random crop, as a fraction of the image's area.
        max_aspect (float): Largest aspect ratio of a random crop. The smallest is the inverse.
        horizontal_flip (bool): Whether to flip half of the training images.
        resize_filter (str): ``'pillow'`` is Pillow's bilinear filter, a triangle whose width grows
            with the reduction. ``'antialiased'`` is nearly the same filter in OpenCV, see
            :func:`triangle`. On another kind of processor, the latter may round one value in some
            millions differently. A reduction by more than 16 takes Pillow's filter in any case.
    """

    image_size: int = 224
    resize: int = 256
    min_crop_area: float = 0.08
    max_aspect: float = 4 / 3
    horizontal_flip: bool = True
    resize_filter: str = FILTERS[0]


def augmentation_rng(seed: int, epoch: int, index: int, rng=None) -> np.random.RandomState:
    """Returns the random generator for an image in an epoch, the same one in every process.

    Args:
        seed (int): Seed of the run.
        epoch (int): Epoch, from 0.
        index (int): Index of the image, from 0.
        rng (numpy.random.RandomState): Generator to seed and return, in a tenth of the time that a
            new generator takes. By default, a new one.

    Returns:
        numpy.random.RandomState: The seeded generator.
    """
    if rng is None:
        return np.random.RandomState([seed, epoch, index])
    rng.seed([seed, epoch, index])
    return rng


def random_crop(size, rng, preprocessing) -> tuple[int, int, int, int]:
    """Draws a random box of an image (G).

    The box's area is uniform in [min_crop_area, 1], as a fraction of the image's area. The
    logarithm of its aspect ratio is uniform. If ten draws do not fit into the image, the box is the
    largest centred square.

    Args:
        size (tuple of int): Width and height of the image, in pixels.
        rng (numpy.random.RandomState): Generator of the draws.
        preprocessing (Preprocessing): Ranges of area and aspect ratio.

    Returns:
        tuple of int: Left, upper, right and lower border, in pixels.
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


def train_image(path, rng, preprocessing, out=None) -> np.ndarray:
    """Decodes an image for training: crops it at random, resizes it, and may flip it.

    Args:
        path (str or Path): The file.
        rng (numpy.random.RandomState): Generator from :func:`augmentation_rng`.
        preprocessing (Preprocessing): How to crop, resize and flip.
        out (uint8 array): Contiguous array for the result; a new array by default.

    Returns:
        uint8 array [image_size, image_size, 3].

    Raises:
        DataError: The file cannot be decoded or read, as in :func:`decode`.
    """
    pixels = decode(path)
    height, width = pixels.shape[:2]
    left, upper, right, lower = random_crop((width, height), rng, preprocessing)
    side = preprocessing.image_size
    # Crop before resizing: the filter must not see pixels outside the crop.
    crop = pixels[upper:lower, left:right]
    if preprocessing.horizontal_flip and rng.randint(2):
        return cv2.flip(resized(crop, side, side, preprocessing.resize_filter), 1, dst=out)
    return resized(crop, side, side, preprocessing.resize_filter, out)


def validation_image(path, preprocessing, out=None) -> np.ndarray:
    """Decodes an image for validation: resizes its shorter side, and cuts out the centre.

    Args:
        path (str or Path): The file.
        preprocessing (Preprocessing): How to resize and crop.
        out (uint8 array): Array for the result; a new array by default.

    Returns:
        uint8 array [image_size, image_size, 3].

    Raises:
        DataError: The file cannot be decoded or read, as in :func:`decode`.
    """
    pixels = decode(path)
    height, width = pixels.shape[:2]
    shorter = min(width, height)
    if max(width, height) > _LONGEST * shorter:  # enlarged, it could take gigabytes
        pixels = _middle(pixels, _LONGEST * shorter)
        height, width = pixels.shape[:2]
    width, height = (round(n * preprocessing.resize / shorter) for n in (width, height))
    pixels = resized(pixels, width, height, preprocessing.resize_filter)
    side = preprocessing.image_size
    left, upper = (width - side) // 2, (height - side) // 2
    centre = pixels[upper : upper + side, left : left + side]
    if out is None:
        return centre.copy()
    np.copyto(out, centre)
    return out


def _middle(pixels, most: int):
    """Returns the middle of an image, at most ``most`` pixels high and wide."""
    upper, left = (max(0, (side - most) // 2) for side in pixels.shape[:2])
    return pixels[upper : upper + most, left : left + most]


def resized(pixels, width: int, height: int, resize_filter: str, out=None) -> np.ndarray:
    """Resizes an image.

    Args:
        pixels (uint8 array): The image, [H, W, 3].
        width, height (int): Size of the result, in pixels.
        resize_filter (str): One of ``FILTERS``, which :class:`Preprocessing` describes.
        out (uint8 array): Contiguous array for the result; a new array by default.

    Returns:
        uint8 array [height, width, 3].
    """
    steepest = max(pixels.shape[1] / width, pixels.shape[0] / height)
    if resize_filter == 'pillow' or steepest > _STEEPEST:
        # Pillow would copy a crop too, in five times the time.
        pixels = np.ascontiguousarray(pixels)
        image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
        if out is None:
            return np.asarray(image)
        np.copyto(out, np.asarray(image))
        return out
    x, y = triangle(pixels.shape[1] / width), triangle(pixels.shape[0] / height)
    if max(len(x), len(y)) > 1:
        pixels = cv2.sepFilter2D(pixels, -1, x, y, borderType=cv2.BORDER_REFLECT)
    return cv2.resize(pixels, (width, height), dst=out, interpolation=cv2.INTER_LINEAR)


def triangle(scale: float) -> np.ndarray:
    """Returns the filter to apply before a linear interpolation that shrinks an image.

    Filter and interpolation together are an antialiased bilinear filter. Let s be ``scale``. For an
    integer s, the triangle of radius s is a sum of triangles of radius 1. Their centres are j =
    1 - s ... s - 1, their weights are (s - abs(j)) / s**2. The result then equals Pillow's, except
    for rounding. For an s between two integers, the weights of both integers are mixed. The mixture
    has the variance of the triangle of radius s, s**2 / 6.

    Args:
        scale (float): Factor by which the image shrinks.

    Returns:
        float32 array: The filter, of odd length and sum 1; [1] if the image grows.
    """
    if scale <= 1:
        return np.ones(1, np.float32)
    n = int(scale)
    share = (scale**2 - n**2) / (2 * n + 1)
    j = abs(np.arange(-n, n + 1))
    weights = (1 - share) * np.maximum(n - j, 0) / n**2 + share * (n + 1 - j) / (n + 1) ** 2
    return weights.astype(np.float32)


def read(path) -> bytes:
    """Reads an image file.

    Args:
        path (str or Path): The file.

    Returns:
        bytes: Its contents.

    Raises:
        BadImage: The file is larger than any image.
        DataError: The file cannot be read, or is no regular file.
    """
    try:
        # Unlike open() alone, this does not wait for the other end of a pipe.
        with open(path, 'rb', opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as f:
            found = os.fstat(f.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise OSError(errno.EINVAL, 'a pipe or a device')
            if found.st_size > _MOST_BYTES:
                raise BadImage(
                    f'image {path} has {found.st_size:,} bytes, more than any image; remove it'
                )
            return f.read()
    except OSError as error:
        remedy = 'mend the disk, the mount or the permissions'
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
            remedy = (
                'mount or copy the folder there; if the image was removed, delete the list that '
                'names it, in the folder of --manifests, and start again'
            )
        raise DataError(
            f'image {path} cannot be read on {os.uname().nodename} ({error.strerror}); {remedy}'
        ) from error


def decode(path) -> np.ndarray:
    """Decodes an image file to 8-bit RGB, upright, with transparent parts on white.

    simplejpeg decodes JPEG files in colour or grey. It gives Pillow's pixels in three quarters of
    the time. Pillow decodes all other files, and those that simplejpeg rejects.
    ``./run_mpi.sh benchmark loader`` compares the candidates.

    Before anything is decoded, the size that the header claims is checked: it must be at most
    178,956,970 pixels, and, above 16,777,216 pixels, at most 512 per byte of the file.

    Args:
        path (str or Path): The file.

    Returns:
        uint8 array [H, W, 3].

    Raises:
        BadImage: The file cannot be decoded, or is too large.
        DataError: The file cannot be read.
    """
    data = read(path)
    try:
        return _decode_jpeg(data) if data[:2] == b'\xff\xd8' else _decode_with_pillow(data)
    except Exception as error:  # for damaged bytes, Pillow raises TypeError and others, too
        reason = str(error)
        if isinstance(error, UnidentifiedImageError):  # its message shows a memory address
            reason = 'not an image that Pillow knows' if data else 'empty'
        raise BadImage(
            f'image {path} cannot be decoded ({reason}); replace it or remove it'
        ) from error


def _check_size(width: int, height: int, n_bytes: int):
    pixels = width * height
    if pixels > min(_MOST_PIXELS, max(_FEW_PIXELS, _PIXELS_PER_BYTE * n_bytes)):
        raise ValueError(f'{width:,} x {height:,} pixels are too many for {n_bytes:,} bytes')


def _decode_jpeg(data: bytes) -> np.ndarray:
    may_be_turned, scans = _survey(data)
    if scans > _MOST_SCANS:
        raise ValueError(f'more than {_MOST_SCANS} scans')
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return _decode_with_pillow(data)  # Pillow decides whether the file is broken
    _check_size(width, height, len(data))
    # simplejpeg neither converts CMYK nor turns images upright.
    if colours in ('YCbCr', 'Gray', 'RGB') and not (may_be_turned and _is_turned(data)):
        try:
            return simplejpeg.decode_jpeg(data)
        except ValueError:
            pass
    return _decode_with_pillow(data)


def _survey(jpeg: bytes) -> tuple[bool, int]:
    """Returns whether EXIF or XMP may turn an image, and the number of its scans.

    Goes from marker to marker, over stray bytes, too, as decoders do. One scan with all components
    is the whole image, unless it is progressive.
    """
    may_be_turned, progressive, components, scans, end = False, False, b'', 0, 2
    while (found := _MARKER.search(jpeg, end)) and scans <= _MOST_SCANS:
        marker, start = found[0][1], found.end()
        end = start + int.from_bytes(jpeg[start : start + 2], 'big')
        if marker == 0xE1:
            may_be_turned = may_be_turned or (
                jpeg.startswith(b'Exif\0\0', start + 2)
                or jpeg.find(b'tiff:Orientation', start, end) >= 0
            )
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            progressive, components = marker & 3 == 2, jpeg[start + 7 : start + 8]
        elif marker == 0xDA:
            scans += 1
            if not progressive and jpeg[start + 2 : start + 3] == components:
                break
        elif marker == 0xD9:
            break
    return may_be_turned, scans


def _is_turned(jpeg: bytes) -> bool:
    with Image.open(io.BytesIO(jpeg)) as image:
        return orientation(image) != 1


def orientation(image) -> int:
    """Returns the EXIF orientation of an opened image: 1 (upright) to 8."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # noqa: BLE001  (the EXIF is damaged, but the pixels may be whole)
        return 1


def _decode_with_pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        if image.format == 'EPS':  # Pillow would start Ghostscript
            raise ValueError('a program in PostScript, not an image')
        _check_size(image.width, image.height, len(data))
        image.load()
        # ImageOps.exif_transpose would rewrite the EXIF, and fail if the EXIF is damaged.
        turn = _TURNS.get(orientation(image))
        if turn is not None:
            image = image.transpose(turn)
        if image.mode.startswith('I'):  # 16-bit grey, which convert() would clip
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ('LA', 'PA', 'RGBA') or 'transparency' in image.info:
            image = image.convert('RGBA')
            white = Image.new('RGBA', image.size, 'white')
            image = Image.alpha_composite(white, image)
        return np.array(image.convert('RGB'))


# Arguments of CuPy's ElementwiseKernel: inputs, outputs, operation, name. One pass reads bytes and
# writes floats. Each product and each sum is rounded, as in NumPy.
NORMALIZE = (
    """raw uint8 pixels, int64 area, float32 scale0, float32 scale1, float32 scale2,
    float32 shift0, float32 shift1, float32 shift2""",
    'float32 x',
    """
    const long long channel = i / area % 3;
    const long long pixel = i / (3 * area) * area + i % area;
    const float scale = channel == 0 ? scale0 : channel == 1 ? scale1 : scale2;
    const float shift = channel == 0 ? shift0 : channel == 1 ? shift1 : shift2;
    x = __fadd_rn(__fmul_rn((float)pixels[3 * pixel + channel], scale), shift);
    """,
    'normalize',
)


def normalize(batch, mean=MEAN, std=STD, xp=np):
    """Normalizes pixels for the network: (x / 255 - mean) / std for each channel.

    Args:
        batch (array): Pixels, uint8 [N, H, W, 3], of ``xp``.
        mean, std (tuple of float): Mean and deviation of red, green and blue; full scale is 1.
        xp (module): numpy or cupy.

    Returns:
        array: float32 [N, 3, H, W], contiguous. numpy and cupy give the same bits.
    """
    scale = (1 / (255 * np.asarray(std))).astype(np.float32)
    shift = (-np.asarray(mean) / np.asarray(std)).astype(np.float32)
    if xp is np:
        x = np.ascontiguousarray(batch.transpose(0, 3, 1, 2), dtype=np.float32)
        x *= scale[:, None, None]
        x += shift[:, None, None]
        return x
    n, height, width, _ = batch.shape
    x = xp.empty((n, 3, height, width), np.float32)
    return _normalize_kernel(xp)(batch, height * width, *scale, *shift, x)


@functools.cache
def _normalize_kernel(xp):
    return xp.ElementwiseKernel(*NORMALIZE)


def converter_to(device):
    """Makes a converter for Chainer's updaters and evaluators.

    Args:
        device (~chainer.backend.Device): The model's device.

    Returns:
        callable: Takes a minibatch, uint8 [N, H, W, 3] and labels [N]. Returns images, as
            :func:`normalize` makes them, and labels, both on the device.
    """

    # Chainer's updaters and evaluators pass a device, too. It is not used: `device` is the model's.
    def convert(batch, device_=None):
        x, t = (device.send(array) for array in batch)
        return normalize(x, MEAN, STD, device.xp), t

    return convert
