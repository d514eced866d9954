import ctypes
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import zipfile
import zlib

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps, PngImagePlugin

from reproduce import images
from reproduce.images import Preprocessing
from reproduce.listing import BadImage, DataError
from reproduce.studies.speed import decoding


def picture(width=50, height=40, seed=0):
    """A smooth picture: red grows to the right, green downwards, blue is noise of 4 x 4 blocks."""
    y, x = np.mgrid[0:height, 0:width]
    noise = np.random.RandomState(seed).randint(0, 256, (height // 4 + 1, width // 4 + 1))
    blue = np.kron(noise, np.ones((4, 4)))[:height, :width]
    return np.stack([x * 255 / (width - 1), y * 255 / (height - 1), blue], axis=2).astype(np.uint8)


def test_crop_has_the_distribution_of_the_definition():
    """Area uniform in [0.08, 1], logarithm of the aspect ratio uniform, drawn again until it fits.

    A crop of less than 3/4 of a square fits with every aspect ratio; one of area a above it, where
    |log aspect| <= -log a. Kolmogorov and Smirnov's distance for a chance of 1 in 1,000 is 1.95 /
    sqrt(n); whole pixels add less than 0.001.
    """
    n = 100_000
    rng = np.random.RandomState(0)
    boxes = np.array([images.random_crop((4000, 4000), rng, Preprocessing()) for _ in range(n)])
    assert boxes.min() >= 0 and boxes.max() <= 4000
    widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    areas, log_aspects = widths * heights / 4000**2, np.log(widths / heights)
    small = areas < 0.75
    fits = (0.25 + 0.75 * np.log(0.75)) / np.log(4 / 3)  # integral of -log a / log(4/3) from 3/4 on
    share = 0.67 / (0.67 + fits)
    assert np.mean(small) == pytest.approx(share, abs=4 * (share * (1 - share) / n) ** 0.5)
    limit = 1.95 / small.sum() ** 0.5 + 0.001
    assert distance(areas[small], lambda a: (a - 0.08) / 0.67) < limit
    uniform = lambda log_aspect: (log_aspect / np.log(4 / 3) + 1) / 2
    assert distance(log_aspects[small], uniform) < limit
    halves = [log_aspects[small & (areas < 0.4)], log_aspects[small & (areas >= 0.4)]]
    assert all(distance(half, uniform) < 1.95 / len(half) ** 0.5 + 0.001 for half in halves)
    large = areas[~small]
    cdf = lambda a: (a - a * np.log(a) - 0.75 + 0.75 * np.log(0.75)) / np.log(4 / 3) / fits
    assert distance(large, cdf) < 1.95 / len(large) ** 0.5 + 0.001


def distance(values, cdf):
    """Kolmogorov and Smirnov's, between a sample and a distribution."""
    values = np.sort(values)
    steps = np.arange(len(values) + 1) / len(values)
    return max(abs(cdf(values) - steps[:-1]).max(), abs(cdf(values) - steps[1:]).max())


def test_known_crops():
    """Written down once: another order of the draws would change every run."""
    for key, box in (((0, 0, 0), (165, 17, 308, 199)), ((3, 1, 7), (69, 96, 401, 361))):
        rng = images.augmentation_rng(*key)
        assert images.random_crop((500, 375), rng, Preprocessing()) == box


def test_crop_lies_anywhere():
    rngs = (np.random.RandomState(i) for i in range(4000))
    boxes = np.array([images.random_crop((1000, 1000), rng, Preprocessing()) for rng in rngs])
    room = 1000 - (boxes[:, 2:] - boxes[:, :2])
    wide = room.min(axis=1) > 50
    place = boxes[wide, :2] / room[wide]
    np.testing.assert_allclose(place.mean(axis=0), 0.5, atol=0.03)
    np.testing.assert_allclose(place.std(axis=0), 12**-0.5, atol=0.03)


def test_crop_reaches_every_pixel():
    """Also the whole width or height, and the last place of each size."""
    rng = np.random.RandomState(0)
    boxes = {images.random_crop((5, 4), rng, Preprocessing()) for _ in range(20_000)}
    sizes = {(right - left, lower - upper) for left, upper, right, lower in boxes}
    assert {(5, 4), (4, 4), (1, 2), (2, 1), (2, 2)} <= sizes and len(sizes) > 7
    for w, h in sizes:
        places = {box[:2] for box in boxes if (box[2] - box[0], box[3] - box[1]) == (w, h)}
        assert places == {(x, y) for x in range(6 - w) for y in range(5 - h)}


def test_crop_of_a_long_strip_falls_back_to_the_centre():
    box = images.random_crop((1000, 10), np.random.RandomState(0), Preprocessing(min_crop_area=0.9))
    assert box == (495, 0, 505, 10)


def test_a_crop_is_drawn_ten_times_at_most():
    draws = []

    class Draws(np.random.RandomState):
        def uniform(self, *arguments):
            draws.append(arguments)
            return super().uniform(*arguments)

    images.random_crop((1000, 10), Draws(0), Preprocessing(min_crop_area=0.9))
    assert len(draws) == 20  # area and aspect ratio


def antialiased(pixels, width, height):
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))


def weights_of_lines(old, new):
    """[new, old]: linear interpolation at the middle of each new pixel."""
    x = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    return np.maximum(1 - abs(x[:, None] - np.arange(old)), 0)


def resized(pixels, width, height, weights):
    rows, columns = weights(pixels.shape[0], height), weights(pixels.shape[1], width)
    return np.einsum('yh,xw,hwc->yxc', rows, columns, pixels.astype(np.float64))


SIZES = [(30, 24), (61, 47), (100, 30), (29, 80)]


@pytest.mark.parametrize('old', SIZES)
def test_linear_interpolation(old):
    """OpenCV's weights have 11 bits, twice: an error of 0.3 before it rounds."""
    pixels = np.random.RandomState(0).randint(0, 256, (*old[::-1], 3)).astype(np.uint8)
    for new in ((100, 80), (128, 90)):  # larger: the filter is the interpolation alone
        actual = images.resized(pixels, *new, 'antialiased')
        expected = resized(pixels, *new, weights_of_lines)
        np.testing.assert_allclose(actual, expected, atol=0.8)


@pytest.mark.parametrize('scale', [1, 2, 3, 4, 7])
def test_reductions_by_an_integer_are_pillow_s(scale):
    """Up to the rounding of two steps here and of two there; one pixel at the border, where the
    triangle hangs over, is left out."""
    for x, y in ((scale, scale), (scale, 3), (2, scale)):
        pixels = np.random.RandomState(0).randint(0, 256, (40 * y, 30 * x, 3)).astype(np.uint8)
        actual = images.resized(pixels, 30, 40, 'antialiased')
        expected = antialiased(pixels, 30, 40)
        inside = np.s_[1:-1, 1:-1]
        difference = abs(actual[inside].astype(int) - expected[inside])
        assert difference.max() <= (2 if max(x, y) > 1 else 0)


@pytest.mark.parametrize('scale', [0.3, 1, 1.01, 1.5, 1.999, 2, 2.7, 5.3])
def test_triangle_has_the_variance_of_its_width(scale):
    weights = images.triangle(scale).astype(np.float64)
    j = np.arange(len(weights)) - len(weights) // 2
    assert weights.sum() == pytest.approx(1, abs=1e-6) and weights.min() >= 0
    np.testing.assert_array_equal(weights, weights[::-1])
    # Linear interpolation adds 1/6, that of the triangle of radius 1.
    assert (weights * j**2).sum() + 1 / 6 == pytest.approx(max(scale, 1) ** 2 / 6, rel=1e-5)


@pytest.mark.parametrize('name', images.FILTERS)
def test_sizes_and_outputs(name):
    for old in SIZES:
        pixels = np.random.RandomState(0).randint(0, 256, (*old[::-1], 3)).astype(np.uint8)
        for new in ((30, 24), (28, 40), (64, 50)):
            actual = images.resized(pixels, *new, name)
            assert actual.shape == (new[1], new[0], 3) and actual.dtype == np.uint8
            out = np.empty_like(actual)
            images.resized(pixels, *new, name, out)
            np.testing.assert_array_equal(out, actual)
            if name == 'pillow':
                np.testing.assert_array_equal(actual, antialiased(pixels, *new))
            constant = images.resized(np.full_like(pixels, 201), *new, name)
            np.testing.assert_array_equal(constant, 201)


def test_pixels_hardly_depend_on_the_processor():
    """OpenCV's plain code gives what its vector code gives, but for how a half is rounded."""
    rng = np.random.RandomState(0)
    pixels = rng.randint(0, 256, (333, 500, 3)).astype(np.uint8)
    crops = [pixels[: rng.randint(40, 334), : rng.randint(40, 501)] for _ in range(60)]
    optimized = cv2.useOptimized()
    results = []
    for use in (True, False):
        cv2.setUseOptimized(use)
        results.append(
            {
                name: np.array([images.resized(c, 224, 224, name) for c in crops], np.int16)
                for name in images.FILTERS
            }
        )
    cv2.setUseOptimized(optimized)
    np.testing.assert_array_equal(results[0]['pillow'], results[1]['pillow'])
    difference = abs(results[0]['antialiased'] - results[1]['antialiased'])
    assert difference.max() <= 1 and difference.mean() < 1e-5


@pytest.mark.parametrize('name', images.FILTERS)
def test_training_image_is_its_crop(tmp_path, name):
    path = tmp_path / 'a.png'
    pixels = picture(90, 70)
    Image.fromarray(pixels).save(path)
    preprocessing = Preprocessing(image_size=24, resize_filter=name)
    flips = 0
    for index in range(20):
        actual = images.train_image(path, images.augmentation_rng(5, 1, index), preprocessing)
        rng = images.augmentation_rng(5, 1, index)
        left, upper, right, lower = images.random_crop((90, 70), rng, preprocessing)
        crop = pixels[upper:lower, left:right]
        flip = bool(rng.randint(2))
        flips += flip
        expected = images.resized(crop, 24, 24, name)[:, :: -1 if flip else 1]
        assert actual.shape == (24, 24, 3) and actual.dtype == np.uint8
        np.testing.assert_array_equal(actual, expected)
        increasing = actual[:, -1, 0].mean() > actual[:, 0, 0].mean()
        assert increasing != flip
        out = np.empty_like(actual)
        images.train_image(path, images.augmentation_rng(5, 1, index), preprocessing, out)
        np.testing.assert_array_equal(out, actual)
    assert 3 < flips < 17
    unflipped = Preprocessing(image_size=24, horizontal_flip=False)
    for index in range(20):
        actual = images.train_image(path, images.augmentation_rng(5, 1, index), unflipped)
        assert actual[:, -1, 0].mean() > actual[:, 0, 0].mean()


def test_augmentation_is_a_function_of_seed_epoch_and_image(tmp_path):
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    draws = [tuple(images.augmentation_rng(*key).uniform(size=3)) for key in keys]
    assert len(set(draws)) == 4
    assert draws == [tuple(images.augmentation_rng(*key).uniform(size=3)) for key in keys]
    rng = np.random.RandomState(9)
    assert draws == [tuple(images.augmentation_rng(*key, rng).uniform(size=3)) for key in keys]


@pytest.mark.parametrize('size', [(90, 70), (70, 90), (33, 32), (500, 40)])
def test_validation_image_is_the_centre(tmp_path, size):
    path = tmp_path / 'a.png'
    Image.fromarray(picture(*size)).save(path)
    preprocessing = Preprocessing(image_size=32, resize=40)
    actual = images.validation_image(path, preprocessing)
    assert actual.shape == (32, 32, 3)
    out = np.empty_like(actual)
    images.validation_image(path, preprocessing, out)
    np.testing.assert_array_equal(out, actual)
    # Red is proportional to x, green to y: their mean is the picture's centre, their slope the
    # scale.
    shorter = min(size)
    for channel, axis, length in ((0, 1, size[0]), (1, 0, size[1])):
        line = actual[..., channel].astype(float).mean(axis=1 - axis)
        assert line.mean() == pytest.approx(127, abs=4)  # half a pixel of the smallest
        slope = (line[-1] - line[0]) / 31
        assert slope == pytest.approx(255 / length * shorter / 40, rel=0.05)


@pytest.mark.parametrize('size', [(500, 375), (375, 500), (300, 301), (1024, 231), (256, 400)])
def test_validation_is_the_centre_224_of_a_shorter_side_of_256(tmp_path, size):
    """Pillow's own steps, with the defaults."""
    path = tmp_path / 'a.png'
    image = Image.fromarray(picture(*size))
    image.save(path)
    shorter = min(size)
    width, height = (round(256 * n / shorter) for n in size)
    left, upper = (width - 224) // 2, (height - 224) // 2
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    expected = np.asarray(resized.crop((left, upper, left + 224, upper + 224)))
    actual = images.validation_image(path, Preprocessing(resize_filter='pillow'))
    np.testing.assert_array_equal(actual, expected)
    near = images.validation_image(path, Preprocessing())
    assert np.abs(near.astype(int) - expected).mean() < 2


def test_every_kind_of_file_becomes_8_bit_rgb(tmp_path):
    rgb = Image.fromarray(picture())
    grey = rgb.convert('L')
    sixteen = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    half_transparent = rgb.convert('RGBA')
    half_transparent.putalpha(
        Image.fromarray(np.repeat([[0] * 25 + [255] * 25], 40, 0).astype(np.uint8))
    )
    files = {
        'rgb.png': rgb,
        'grey.png': grey,
        'sixteen.png': sixteen,
        'palette.png': rgb.quantize(256),
        'transparent palette.png': rgb.quantize(16),
        'cmyk.jpg': rgb.convert('CMYK'),
        'alpha.png': half_transparent,
        'binary.png': grey.convert('1'),
    }
    decoded = {}
    for name, image in files.items():
        options = {'transparency': 7} if name.startswith('transparent') else {}
        image.save(tmp_path / name, quality=95, **options)
        decoded[name] = images.decode(tmp_path / name)
    cv2.imwrite(str(tmp_path / 'colour.png'), picture()[..., ::-1].astype(np.uint16) * 257)
    decoded['16 bits a colour'] = images.decode(tmp_path / 'colour.png')
    for pixels in decoded.values():
        assert pixels.dtype == np.uint8 and pixels.shape == (40, 50, 3)
    exact = np.asarray(rgb).astype(int)
    np.testing.assert_array_equal(decoded['rgb.png'], exact)
    np.testing.assert_array_equal(decoded['16 bits a colour'], exact)
    for name in ('grey.png', 'sixteen.png'):
        for channel in range(3):
            np.testing.assert_array_equal(decoded[name][..., channel], np.asarray(grey))
    assert np.abs(decoded['palette.png'] - exact).mean() < 12
    hidden = np.asarray(files['transparent palette.png']) == 7
    assert 0 < hidden.sum() < hidden.size
    np.testing.assert_array_equal((decoded['transparent palette.png'] == 255).all(axis=2), hidden)
    assert np.abs(np.asarray(decoded['cmyk.jpg']) - exact).mean() < 12
    alpha = np.asarray(decoded['alpha.png'])
    np.testing.assert_array_equal(alpha[:, :25], 255)  # transparent: white
    np.testing.assert_array_equal(alpha[:, 25:], exact[:, 25:])


# What EXIF's standard says of the first row and column that are stored: where they belong.
STORED = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],  # top, right
    3: lambda p: p[::-1, ::-1],  # bottom, right
    4: lambda p: p[::-1],  # bottom, left
    5: lambda p: p.swapaxes(0, 1),  # left, top
    6: lambda p: p[:, ::-1].swapaxes(0, 1),  # right, top
    7: lambda p: p[::-1, ::-1].swapaxes(0, 1),  # right, bottom
    8: lambda p: p[::-1].swapaxes(0, 1),  # left, bottom
}


@pytest.mark.parametrize('orientation', STORED)
@pytest.mark.parametrize('kind', ['PNG', 'JPEG'])
def test_exif_rotation_is_undone(tmp_path, orientation, kind):
    rgb = picture()
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](rgb)))
    stored.save(tmp_path / 'turned.jpg', kind, exif=exif, quality=95)
    upright = images.decode(tmp_path / 'turned.jpg')
    assert upright.shape == (40, 50, 3)
    assert np.abs(upright.astype(int) - rgb).mean() < (12 if kind == 'JPEG' else 1e-9)


@pytest.mark.filterwarnings('ignore::UserWarning')  # of Pillow
@pytest.mark.parametrize('kind', ['JPEG', 'WEBP'])
def test_damaged_exif_does_not_matter(tmp_path, kind):
    """Pillow raises SyntaxError over some of it, and TypeError and struct.error where it writes it
    anew. Turned or not, by chance, the pixels are the same."""
    path = tmp_path / 'a.jpg'
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, 'abc'
    exif[0x8769] = {0x9286: b'hello', 0xA002: 5}
    exif[0x8825] = {1: 'N', 2: (1.0, 2.0, 3.0)}
    Image.fromarray(picture()).save(path, kind, exif=exif)
    content, rng = path.read_bytes(), np.random.RandomState(0)
    tags = exif.tobytes()[6:]
    start = content.index(tags)
    expected = np.sort(images.decode(path), axis=None)
    for i in range(600):
        damaged = bytearray(content)
        damaged[start + rng.randint((8, len(tags))[i % 2])] = rng.randint(256)
        path.write_bytes(damaged)
        np.testing.assert_array_equal(np.sort(images.decode(path), axis=None), expected)


@pytest.mark.parametrize('error', [TypeError, KeyError, struct.error, zlib.error, MemoryError])
def test_whatever_a_decoder_raises_the_file_is_named(tmp_path, monkeypatch, error):
    def fail(_):
        raise error('why')

    monkeypatch.setattr(images, '_decode_with_pillow', fail)
    Image.fromarray(picture()).save(tmp_path / 'a.png')
    with pytest.raises(DataError, match=r'a.png cannot be decoded \(.*why'):
        images.decode(tmp_path / 'a.png')


@pytest.mark.filterwarnings('ignore::UserWarning')
def test_whatever_a_damaged_file_has_it_is_decoded_or_named(tmp_path):
    rng = np.random.RandomState(0)
    rgb = Image.fromarray(picture())
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, 'abc'
    contents = []
    for kind, mode, options in (
        ('JPEG', 'RGB', {'exif': exif}),
        ('JPEG', 'CMYK', {}),
        ('PNG', 'RGBA', {'exif': exif}),
        ('PNG', 'P', {'transparency': 3}),
        ('GIF', 'P', {}),
        ('WEBP', 'RGB', {'exif': exif}),
        ('TIFF', 'RGB', {}),
    ):
        rgb.convert(mode).save(tmp_path / 'whole', kind, **options)
        contents.append((tmp_path / 'whole').read_bytes())
    path, named = tmp_path / 'a.jpg', 0
    for i in range(1500):
        damaged = bytearray(contents[i % len(contents)])
        for at in rng.randint(0, min(len(damaged), (200, 10**6)[i // 7 % 2]), size=3):
            damaged[at] = rng.randint(256)
        path.write_bytes(damaged[: rng.randint(1, 3 * len(damaged))])
        try:
            decoded = images.decode(path)
            assert decoded.dtype == np.uint8 and decoded.shape[2:] == (3,)
        except DataError as error:
            assert f'image {path} cannot be decoded (' in str(error)
            named += 1
    assert 300 < named < 1500


@pytest.mark.parametrize(
    'mode, options',
    [
        ('RGB', {'subsampling': '4:2:0'}),
        ('RGB', {'subsampling': '4:2:2'}),
        ('RGB', {'subsampling': '4:4:4'}),
        ('RGB', {'progressive': True, 'quality': 40}),
        ('L', {}),
    ],
)
def test_jpegs_have_pillow_s_pixels(tmp_path, monkeypatch, mode, options):
    path = tmp_path / 'a.jpg'
    Image.fromarray(picture(123, 77)).convert(mode).save(path, **options)
    expected = np.asarray(Image.open(path).convert('RGB'))
    monkeypatch.setattr(images, '_decode_with_pillow', None)  # it goes the fast way
    np.testing.assert_array_equal(images.decode(path), expected)


def test_what_pillow_decodes_is_not_broken(tmp_path):
    """A warning of the fast decoder, about bytes between two markers, is none of Pillow's."""
    path = tmp_path / 'a.jpg'
    Image.fromarray(picture(64, 64)).save(path)
    content = path.read_bytes()
    tables = content.index(b'\xff\xdb')
    path.write_bytes(content[:tables] + b'\0\0' + content[tables:])
    with pytest.raises(ValueError):
        simplejpeg.decode_jpeg(path.read_bytes())
    np.testing.assert_array_equal(images.decode(path), np.asarray(Image.open(path).convert('RGB')))


@pytest.mark.parametrize(
    'content, reason',
    [
        ('empty', 'empty'),
        ('text', 'not an image that Pillow knows'),
        ('truncated', 'image file is truncated'),
        ('truncated png', 'truncated'),
        ('postscript', 'PostScript'),
    ],
)
def test_a_file_that_cannot_be_decoded_is_named(tmp_path, content, reason):
    path = tmp_path / 'broken ä.jpg'
    if content.startswith('truncated'):
        Image.fromarray(picture(400, 400)).save(path, 'PNG' if 'png' in content else 'JPEG')
        path.write_bytes(path.read_bytes()[:2000])
    elif content == 'postscript':  # a program; Pillow would run it if Ghostscript is installed
        Image.fromarray(picture()).save(path, 'EPS')
    else:
        path.write_bytes(b'' if content == 'empty' else b'text, not an image')
    for decode in ways_to_decode(path):
        with pytest.raises(BadImage, match=rf'broken ä.jpg cannot be decoded \(.*{reason}'):
            decode()


def ways_to_decode(path):
    return (
        lambda: images.train_image(path, images.augmentation_rng(0, 0, 0), Preprocessing()),
        lambda: images.validation_image(path, Preprocessing()),
    )


@pytest.mark.parametrize(
    'kind, reason',
    [
        ('no permission', 'Permission denied'),
        ('a folder', 'Is a directory'),
        ('gone', 'No such file or directory'),
        ('a loop', 'Too many levels of symbolic links'),
        ('a disk that fails', 'Input/output error'),
        ('a pipe', 'a pipe or a device'),
        ('a device', 'a pipe or a device'),
        ('a socket', 'No such device or address'),
    ],
)
def test_a_file_that_cannot_be_read_is_no_bad_image(request, tmp_path, kind, reason):
    """The error names the host. Nothing waits for the other end of a pipe."""
    path = tmp_path / 'x.jpg'
    links = {'a loop': path, 'a device': '/dev/null', 'a disk that fails': '/proc/self/mem'}
    if kind in links:
        path.symlink_to(links[kind])
    elif kind == 'a folder':
        path.mkdir()
    elif kind == 'a pipe':
        os.mkfifo(path)
    elif kind == 'a socket':
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    elif kind == 'no permission':
        Image.fromarray(picture()).save(path)
        path.chmod(0)
        if os.geteuid() == 0:  # who may read everything, and becomes nobody for a while
            assert images.decode(path).shape == (40, 50, 3)
            request.addfinalizer(lambda: os.seteuid(0))
            os.seteuid(65534)
    for decode in ways_to_decode(path):
        errors = []
        thread = threading.Thread(target=lambda: errors.append(error_of(decode)), daemon=True)  # noqa: B023
        thread.start()
        thread.join(10)
        (error,) = errors
        assert isinstance(error, DataError) and not isinstance(error, BadImage)
        assert f'x.jpg cannot be read on {os.uname().nodename} ({reason}); ' in str(error)


def error_of(function):
    try:
        function()
    except Exception as error:  # noqa: BLE001
        return error
    return None


# --- What a header claims ------------------------------------------------------------------------


def claiming(path, kind, width, height, n_bytes=0):
    """Writes a small image whose header claims another size, with zeros up to ``n_bytes``."""
    options = {'progressive': True} if kind == 'progressive' else {}
    Image.fromarray(picture(64, 64)).save(path, 'PNG' if kind == 'png' else 'JPEG', **options)
    content = bytearray(path.read_bytes())
    if kind == 'png':
        content[16:24] = struct.pack('>II', width, height)
        content[29:33] = struct.pack('>I', zlib.crc32(content[12:29]))
    else:
        frame = content.index(b'\xff\xc2' if options else b'\xff\xc0')
        content[frame + 5 : frame + 9] = struct.pack('>HH', height, width)
    path.write_bytes(content + bytes(max(0, n_bytes - len(content))))
    return path


MEASURE = """
import resource, sys, time
from reproduce import images
from reproduce.listing import BadImage
from reproduce.studies import image_commands
rng = images.augmentation_rng(0, 0, 0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for decode in (
    lambda path: images.train_image(path, rng, images.Preprocessing()),
    lambda path: images.validation_image(path, images.Preprocessing()),
    image_commands.inspect,
):
    start = time.process_time()
    try:
        result = decode(sys.argv[1])
        outcome = result[0] if isinstance(result, tuple) else 'decoded'
    except BadImage:
        outcome = 'broken'
    print(outcome, time.process_time() - start)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def costs_of(root, path):
    """Outcome and seconds of training, validation and `images check`; MiB of all."""
    command = [sys.executable, '-W', 'error', '-c', MEASURE, path]
    environment = {**os.environ, 'PYTHONPATH': str(root)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    *lines, mebibytes = done.stdout.splitlines()
    outcomes = [line.split() for line in lines]
    return [name for name, _ in outcomes], max(float(s) for _, s in outcomes), float(mebibytes)


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
@pytest.mark.parametrize('kind', ['jpeg', 'progressive', 'png'])
@pytest.mark.parametrize(
    'width, height, n_bytes',
    [(65_500, 65_500, 0), (13_000, 13_000, 0), (5_000, 3_400, 0), (14_000, 14_000, 400_000)],
)
def test_a_header_is_not_believed(root, tmp_path, kind, width, height, n_bytes):
    """Neither of a file that is too short for its size, nor above Pillow's limit."""
    path = claiming(tmp_path / 'a.jpg', kind, width, height, n_bytes)
    outcomes, seconds, mebibytes = costs_of(root, path)
    assert outcomes == ['broken'] * 3 and seconds < 0.5 and mebibytes < 20
    with pytest.raises(BadImage, match=f'{width:,} x {height:,} pixels are too many|exceeds limit'):
        images.decode(path)


@pytest.mark.parametrize('kind', ['jpeg', 'progressive', 'png'])
def test_a_header_may_claim_little_whatever_the_file(root, tmp_path, kind):
    """Pillow takes a JPEG without most of its pixels for whole: the others are grey."""
    outcomes, seconds, mebibytes = costs_of(root, claiming(tmp_path / 'a.jpg', kind, 4_096, 4_096))
    assert outcomes == (['broken'] * 3 if kind == 'png' else ['decoded', 'decoded', 'odd'])
    assert seconds < 5 and mebibytes < 300


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['JPEG', 'PNG'])
def test_a_large_image_is_accepted_everywhere(root, tmp_path, kind):
    """Above the size at which Pillow warns."""
    path = tmp_path / ('a.jpg' if kind == 'JPEG' else 'a.png')
    Image.fromarray(np.tile(picture(500, 500), (19, 19, 1))[:, :9_450]).save(path, kind)
    outcomes, _, _ = costs_of(root, path)
    assert outcomes == ['decoded', 'decoded', 'odd']


def test_the_simplest_image_is_accepted(tmp_path):
    """One colour, 4:2:0, tables made for it: as many pixels per byte as a JPEG can have."""
    path = tmp_path / 'a.jpg'
    for options in ({}, {'progressive': True}):
        image = Image.new('RGB', (5_000, 5_000))
        image.save(path, subsampling='4:2:0', optimize=True, **options)
        assert 5_000**2 / path.stat().st_size > 80
        assert images.decode(path).shape == (5_000, 5_000, 3)


def scans_of(tmp_path, n, end=b''):
    """A progressive JPEG whose last scan is repeated until there are n."""
    path = tmp_path / 'scans.jpg'
    Image.fromarray(picture(64, 64)).save(path, progressive=True)
    content = path.read_bytes()
    last = content[content.rindex(b'\xff\xda') : -2]
    path.write_bytes(content[:-2] + last * (n - content.count(b'\xff\xda')) + b'\xff\xd9' + end)
    assert path.read_bytes().count(b'\xff\xda') == n + end.count(b'\xff\xda')
    return path


def test_scans_are_counted(tmp_path):
    """Each costs a pass over all pixels. What follows the image, as a film does, is none."""
    film = b'\xff\xda\0\2' * 200
    assert images.decode(scans_of(tmp_path, 100, film)).shape == (64, 64, 3)
    with pytest.raises(BadImage, match='more than 100 scans'):
        images.decode(scans_of(tmp_path, 101))


@pytest.mark.parametrize('name', images.FILTERS)
@pytest.mark.parametrize('size', [(65_000, 1), (1, 65_000), (40_000, 3)])
def test_a_strip_costs_no_more_than_a_picture(root, tmp_path, size, name):
    """Its middle is validated; enlarged as a whole it would take 12 GiB."""
    Image.new('RGB', size, 'red').save(tmp_path / 'a.png')
    outcomes, seconds, mebibytes = costs_of(root, tmp_path / 'a.png')
    assert outcomes == ['decoded', 'decoded', 'odd'] and seconds < 2 and mebibytes < 200
    preprocessing = Preprocessing(resize_filter=name)
    pixels = images.validation_image(tmp_path / 'a.png', preprocessing)
    assert pixels.shape == (224, 224, 3)
    np.testing.assert_array_equal(pixels, np.full((224, 224, 3), (255, 0, 0)))


def test_of_a_strip_the_middle_is_validated(tmp_path):
    preprocessing = Preprocessing(image_size=16, resize=20)
    pixels = picture(1_500, 10)
    for axes in ((0, 1), (1, 0)):
        turned = np.ascontiguousarray(pixels.transpose(*axes, 2))
        Image.fromarray(turned).save(tmp_path / 'strip.png')
        middle = pixels[:, 750 - 320 : 750 + 320].transpose(*axes, 2)
        Image.fromarray(np.ascontiguousarray(middle)).save(tmp_path / 'middle.png')
        np.testing.assert_array_equal(
            images.validation_image(tmp_path / 'strip.png', preprocessing),
            images.validation_image(tmp_path / 'middle.png', preprocessing),
        )


def test_a_steep_reduction_takes_pillow_s_filter():
    """OpenCV's would cost a minute for a large photograph. Up to 16, the bits stay."""
    for width, height, same in ((340, 100, True), (100, 330, True), (320, 320, False)):
        pixels = np.random.RandomState(0).randint(0, 256, (height, width, 3)).astype(np.uint8)
        actual = images.resized(pixels, 20, 20, 'antialiased')
        assert np.array_equal(actual, antialiased(pixels, 20, 20)) == same


# --- Which way is up -----------------------------------------------------------------------------


def exif_of(orientation, thumbnail=b''):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes() + thumbnail


def xmp_of(orientation):
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description '
        f'tiff:Orientation="{orientation}"/></x:xmpmeta>'
    ).encode()


def segment(marker, content):
    return bytes((0xFF, marker)) + struct.pack('>H', len(content) + 2) + content


XMP = b'http://ns.adobe.com/xap/1.0/\0'
PLACES = {
    'after other segments': (
        b'\xff\xdb',
        segment(0xE2, b'ICC_PROFILE\0\1\1profile') + segment(0xFE, b'hi'),
    ),
    'after fill bytes': (b'\xff\xdb', b'\xff\xff\xff'),
    'after stray bytes': (b'\xff\xdb', segment(0xFE, b'hi') + b'\0\0'),
    'after the tables': (b'\xff\xc0', b''),
    'before the pixels': (b'\xff\xda', b''),
}


@pytest.mark.filterwarnings('ignore::UserWarning')
@pytest.mark.parametrize('content', ['exif', 'exif with a thumbnail, then xmp', 'xmp', 'other'])
@pytest.mark.parametrize('place', PLACES)
def test_orientation_of_a_jpeg_is_pillow_s(tmp_path, place, content):
    path = tmp_path / 'a.jpg'
    Image.fromarray(picture()).save(path)
    whole = path.read_bytes()
    contents = {
        'exif': segment(0xE1, exif_of(6)),
        'xmp': segment(0xE1, XMP + xmp_of(6)),
        'exif with a thumbnail, then xmp': segment(0xE1, Image.Exif().tobytes() + whole)
        + segment(0xE1, XMP + xmp_of(6)),
        'other': segment(0xE1, b'other ' + xmp_of(6)),
    }
    before, prefix = PLACES[place]
    at = whole.index(before)
    path.write_bytes(whole[:at] + prefix + contents[content] + whole[at:])
    assert_pillow_s(path, content != 'other')


def assert_pillow_s(path, is_turned):
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert('RGB'))
    assert expected.shape == ((50, 40, 3) if is_turned else (40, 50, 3))
    np.testing.assert_array_equal(images.decode(path), expected)


@pytest.mark.parametrize('orientation', STORED)
@pytest.mark.parametrize('kind', ['WEBP', 'TIFF', 'PNG', 'PNG, at its end', 'PNG, in XMP', 'XMP'])
def test_orientation_of_other_files_is_pillow_s(tmp_path, orientation, kind):
    path = tmp_path / 'a.jpg'
    image = Image.fromarray(picture())
    if kind == 'TIFF':
        image.save(path, 'TIFF', tiffinfo={0x0112: orientation})
    elif kind == 'XMP':
        image.save(path, 'WEBP', xmp=xmp_of(orientation), lossless=True)
    elif kind == 'PNG, in XMP':
        information = PngImagePlugin.PngInfo()
        information.add_itxt('XML:com.adobe.xmp', xmp_of(orientation).decode())
        image.save(path, 'PNG', pnginfo=information)
    elif kind == 'PNG, at its end':
        image.save(path, 'PNG')
        chunk = b'eXIf' + exif_of(orientation)[6:]
        chunk = struct.pack('>I', len(chunk) - 4) + chunk + struct.pack('>I', zlib.crc32(chunk))
        content = path.read_bytes()
        path.write_bytes(content[:-12] + chunk + content[-12:])
    else:
        image.save(path, kind, exif=exif_of(orientation))
    assert_pillow_s(path, orientation > 4)


@pytest.mark.parametrize(
    'mode, kind',
    [
        *(('RGB', kind) for kind in ('JPEG', 'PNG', 'WEBP', 'TIFF', 'BMP')),
        *(('CMYK', 'JPEG'), ('L', 'JPEG'), ('L', 'PNG'), ('1', 'PNG'), ('P', 'PNG'), ('P', 'GIF')),
    ],
)
def test_pixels_are_pillow_s(tmp_path, mode, kind):
    Image.fromarray(picture()).convert(mode).save(tmp_path / 'a.jpg', kind)
    assert_pillow_s(tmp_path / 'a.jpg', is_turned=False)


def test_grey_with_alpha_is_on_white(tmp_path):
    grey = np.asarray(Image.fromarray(picture()).convert('L'))
    alpha = np.repeat([[0] * 25 + [255] * 25], 40, 0).astype(np.uint8)
    image = Image.fromarray(grey)
    image.putalpha(Image.fromarray(alpha))
    assert image.mode == 'LA'
    image.save(tmp_path / 'a.png')
    pixels = images.decode(tmp_path / 'a.png')
    np.testing.assert_array_equal(pixels[:, :25], 255)
    np.testing.assert_array_equal(pixels[:, 25:], grey[:, 25:, None].repeat(3, 2))


def test_normalize():
    batch = np.random.RandomState(0).randint(0, 256, (3, 5, 7, 3)).astype(np.uint8)
    actual = images.normalize(batch)
    expected = (batch.astype(np.float64) / 255 - images.MEAN) / images.STD
    assert actual.dtype == np.float32 and actual.shape == (3, 3, 5, 7) and actual.flags.c_contiguous
    np.testing.assert_allclose(actual, expected.transpose(0, 3, 1, 2), rtol=1e-5, atol=1e-6)


KERNEL = """
#define __fmul_rn(a, b) ((a) * (b))
#define __fadd_rn(a, b) ((a) + (b))
void normalize(const unsigned char* pixels, long long area, float scale0, float scale1,
               float scale2, float shift0, float shift1, float shift2, float* result, long long n) {
    for (long long i = 0; i < n; ++i) {
        float x;
        OPERATION
        result[i] = x;
    }
}
"""


def test_the_body_of_the_cuda_kernel_gives_the_same_bits(tmp_path):
    """Its text, compiled for the host."""
    compiler = shutil.which('cc')
    if compiler is None:
        pytest.skip('no C compiler')
    (tmp_path / 'kernel.c').write_text(KERNEL.replace('OPERATION', images.NORMALIZE[2]))
    library = tmp_path / 'kernel.so'
    command = [compiler, '-shared', '-fPIC', '-O2', '-ffp-contract=off', '-o', library]
    subprocess.run([*command, tmp_path / 'kernel.c'], check=True)
    batch = np.random.RandomState(0).randint(0, 256, (3, 5, 7, 3)).astype(np.uint8)
    scale = (1 / (255 * np.array(images.STD))).astype(np.float32)
    shift = (-np.array(images.MEAN) / images.STD).astype(np.float32)
    result = np.empty((3, 3, 5, 7), np.float32)
    ctypes.CDLL(str(library)).normalize(
        batch.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_longlong(35),
        *map(ctypes.c_float, [*scale, *shift]),
        result.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_longlong(result.size),
    )
    np.testing.assert_array_equal(result, images.normalize(batch))


@pytest.mark.gpu
def test_a_gpu_normalizes_to_the_same_bits(gpu):
    rng = np.random.RandomState(0)
    batch = rng.randint(0, 256, (3, 5, 7, 3)).astype(np.uint8), np.arange(3, dtype=np.int32)
    x, t = images.converter_to(gpu)(batch)
    assert gpu.is_array_supported(x) and gpu.is_array_supported(t)
    np.testing.assert_array_equal(x.get(), images.normalize(batch[0]))
    np.testing.assert_array_equal(t.get(), batch[1])


def jpegs(root, folder):
    """The sample of ImageNet where it lies beside the repository, else JPEG files that are made."""
    sample = root.parent / 'shared' / 'data' / 'imagenet-sample.zip'
    if sample.exists():
        with zipfile.ZipFile(sample) as archive:
            archive.extractall(folder)
        return sorted(
            path for path in folder.rglob('*') if path.suffix.lower() in ('.jpeg', '.jpg')
        )
    return [decoding.write_jpeg(folder / f'{i}.jpg', i) for i in range(20)]


def test_crops_are_near_those_of_pillow_s_filter(root, tmp_path, monkeypatch):
    """Less than one grey level on average; aliased ones are not that near."""
    paths = jpegs(root, tmp_path)
    assert len(paths) >= 20

    def crops(name):
        rngs = [images.augmentation_rng(0, 0, index) for index in range(len(paths))]
        preprocessing = Preprocessing(resize_filter=name)
        crops = [images.train_image(p, rng, preprocessing) for p, rng in zip(paths, rngs)]
        return np.array(crops, int)

    expected, near = crops('pillow'), crops('antialiased')
    monkeypatch.setattr(images, 'triangle', lambda scale: np.ones(1, np.float32))
    aliased = crops('antialiased')
    assert abs(near - expected).mean() < 0.8 < abs(aliased - expected).mean()
