import zipfile

import numpy as np
import pytest
from PIL import Image

from reproduce import images
from reproduce.images import DataError, Preprocessing


def picture(width=50, height=40, seed=0):
    """A smooth picture: red grows to the right, green downwards, blue is noise of 4 x 4 blocks."""
    y, x = np.mgrid[0:height, 0:width]
    noise = np.random.RandomState(seed).randint(0, 256, (height // 4 + 1, width // 4 + 1))
    blue = np.kron(noise, np.ones((4, 4)))[:height, :width]
    return np.stack([x * 255 / (width - 1), y * 255 / (height - 1), blue], axis=2).astype(np.uint8)


def folder_of(top, **classes):
    for name, files in classes.items():
        (top / name).mkdir(parents=True)
        for file in files:
            Image.fromarray(picture()).save(top / name / file)
    return top


def test_listing_is_sorted_and_sees_all_suffixes(tmp_path):
    folder_of(tmp_path, b=['2.png', '10.JPEG', 'ä b.Jpg'], a=['x.png'])
    (tmp_path / 'b' / 'notes.txt').write_text('no image')
    (tmp_path / 'README').write_text('no class')
    listing = images.list_images(tmp_path)
    assert listing.classes == ('a', 'b')
    assert listing.names == ('a/x.png', 'b/10.JPEG', 'b/2.png', 'b/ä b.Jpg')
    assert listing.labels.tolist() == [0, 1, 1, 1] and listing.labels.dtype == np.int32
    again = images.ImageFolder.unpack(listing.pack())
    assert again.names == listing.names and again.classes == listing.classes
    assert again.labels.tolist() == listing.labels.tolist() and again.path(3) == listing.path(3)


def test_impossible_folders_are_named(tmp_path):
    with pytest.raises(DataError, match='none.*No such file'):
        images.list_images(tmp_path / 'none')
    (tmp_path / 'flat').mkdir()
    with pytest.raises(DataError, match='flat has no class folders'):
        images.list_images(tmp_path / 'flat')
    folder_of(tmp_path / 'top', full=['1.png'], empty=[])
    with pytest.raises(DataError, match='top/empty has no image'):
        images.list_images(tmp_path / 'top')


def test_different_classes_are_named(tmp_path):
    train = images.list_images(folder_of(tmp_path / 'train', cat=['1.png'], dog=['1.png']))
    val = images.list_images(folder_of(tmp_path / 'val', cat=['1.png']))
    with pytest.raises(DataError, match='train has 1 class folder.*val has not: dog'):
        images.check_same_classes(train, val)
    with pytest.raises(DataError, match='dog'):
        images.check_same_classes(val, train)
    images.check_same_classes(train, train)


def test_crop_has_the_distribution_of_the_paper():
    preprocessing = Preprocessing()
    rng = np.random.RandomState(0)
    boxes = np.array([images.random_crop((1000, 1000), rng, preprocessing) for _ in range(20000)])
    widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0 and boxes.max() <= 1000
    areas, aspects = widths * heights / 1e6, widths / heights
    assert 0.079 < areas.min() < 0.09 and areas.max() > 0.95
    assert 0.745 < aspects.min() < 0.755 and 1.325 < aspects.max() < 1.34
    # Below 3/4 of the area every aspect ratio fits: there the draws are uniform, whatever was drawn
    # again.
    small = areas[areas < 0.74]
    assert np.mean(small) == pytest.approx((0.08 + 0.74) / 2, abs=0.01)
    assert np.mean(np.log(aspects[areas < 0.74])) == pytest.approx(0, abs=0.01)
    assert np.std(np.log(aspects[areas < 0.74])) == pytest.approx(
        np.log(16 / 9) / 12**0.5, rel=0.03
    )
    centres = (boxes[:, 0] + boxes[:, 2]) / 2
    assert np.mean(centres) == pytest.approx(500, abs=5)


def test_crop_lies_anywhere():
    rngs = (np.random.RandomState(i) for i in range(4000))
    boxes = np.array([images.random_crop((1000, 1000), rng, Preprocessing()) for rng in rngs])
    room = 1000 - (boxes[:, 2:] - boxes[:, :2])
    wide = room.min(axis=1) > 50
    place = boxes[wide, :2] / room[wide]
    np.testing.assert_allclose(place.mean(axis=0), 0.5, atol=0.03)
    np.testing.assert_allclose(place.std(axis=0), 12**-0.5, atol=0.03)


def test_crop_of_a_long_strip_falls_back_to_the_centre():
    box = images.random_crop((1000, 10), np.random.RandomState(0), Preprocessing(min_crop_area=0.9))
    assert box == (495, 0, 505, 10)


def test_training_image_is_its_crop(tmp_path):
    path = tmp_path / 'a.png'
    pixels = picture(90, 70)
    Image.fromarray(pixels).save(path)
    preprocessing = Preprocessing(image_size=24)
    flips = 0
    for index in range(20):
        actual = images.train_image(path, images.augmentation_rng(5, 1, index), preprocessing)
        rng = images.augmentation_rng(5, 1, index)
        left, upper, right, lower = images.random_crop((90, 70), rng, preprocessing)
        crop = Image.fromarray(pixels[upper:lower, left:right])
        flip = bool(rng.randint(2))
        flips += flip
        expected = np.asarray(crop.resize((24, 24), Image.BILINEAR))[:, :: -1 if flip else 1]
        assert actual.shape == (24, 24, 3) and actual.dtype == np.uint8
        np.testing.assert_array_equal(actual, expected)
        increasing = actual[:, -1, 0].mean() > actual[:, 0, 0].mean()
        assert increasing != flip
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


@pytest.mark.parametrize('size', [(90, 70), (70, 90), (33, 32), (500, 40)])
def test_validation_image_is_the_centre(tmp_path, size):
    path = tmp_path / 'a.png'
    Image.fromarray(picture(*size)).save(path)
    actual = images.validation_image(path, Preprocessing(image_size=32, resize=40))
    assert actual.shape == (32, 32, 3)
    # Red is proportional to x, green to y: their mean is the picture's centre, their slope the
    # scale.
    shorter = min(size)
    for channel, axis, length in ((0, 1, size[0]), (1, 0, size[1])):
        line = actual[..., channel].astype(float).mean(axis=1 - axis)
        assert line.mean() == pytest.approx(127, abs=4)  # half a pixel of the smallest
        slope = (line[-1] - line[0]) / 31
        assert slope == pytest.approx(255 / length * shorter / 40, rel=0.05)


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
        'cmyk.jpg': rgb.convert('CMYK'),
        'alpha.png': half_transparent,
        'binary.png': grey.convert('1'),
    }
    decoded = {}
    for name, image in files.items():
        image.save(tmp_path / name, quality=95)
        decoded[name] = images._decode(tmp_path / name)
        assert decoded[name].mode == 'RGB' and decoded[name].size == (50, 40)
    exact = np.asarray(rgb).astype(int)
    np.testing.assert_array_equal(decoded['rgb.png'], exact)
    for name in ('grey.png', 'sixteen.png'):
        np.testing.assert_array_equal(np.asarray(decoded[name])[..., 0], np.asarray(grey))
    assert np.abs(np.asarray(decoded['cmyk.jpg']) - exact).mean() < 12
    alpha = np.asarray(decoded['alpha.png'])
    np.testing.assert_array_equal(alpha[:, :25], 255)  # transparent: white
    np.testing.assert_array_equal(alpha[:, 25:], exact[:, 25:])


def test_exif_rotation_is_undone(tmp_path):
    rgb = Image.fromarray(picture())
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    rgb.rotate(90, expand=True).save(tmp_path / 'turned.jpg', exif=exif, quality=95)
    upright = images._decode(tmp_path / 'turned.jpg')
    assert upright.size == (50, 40)
    assert np.abs(np.asarray(upright).astype(int) - np.asarray(rgb)).mean() < 12


@pytest.mark.parametrize('content', [b'', b'text, not an image', None])
def test_a_file_that_cannot_be_decoded_is_named(tmp_path, content):
    path = tmp_path / 'broken.jpg'
    if content is None:  # truncated
        Image.fromarray(picture(400, 400)).save(path)
        content = path.read_bytes()[:2000]
    path.write_bytes(content)
    for decode in (
        lambda: images.train_image(path, images.augmentation_rng(0, 0, 0), Preprocessing()),
        lambda: images.validation_image(path, Preprocessing()),
    ):
        with pytest.raises(DataError, match='broken.jpg cannot be decoded'):
            decode()


def test_normalize():
    batch = np.random.RandomState(0).randint(0, 256, (3, 5, 7, 3)).astype(np.uint8)
    actual = images.normalize(batch)
    expected = (batch.astype(np.float64) / 255 - images.MEAN) / images.STD
    assert actual.dtype == np.float32 and actual.shape == (3, 3, 5, 7) and actual.flags.c_contiguous
    np.testing.assert_allclose(actual, expected.transpose(0, 3, 1, 2), rtol=1e-5, atol=1e-6)


def test_real_imagenet_files(root, tmp_path):
    sample = root.parent / 'shared' / 'data' / 'imagenet-sample.zip'
    if not sample.exists():
        pytest.skip('no sample of ImageNet beside the repository')
    with zipfile.ZipFile(sample) as archive:
        names = [name for name in archive.namelist() if name.lower().endswith(('.jpeg', '.jpg'))][
            :20
        ]
        archive.extractall(tmp_path, names)
    for name in names:
        train = images.train_image(
            tmp_path / name, images.augmentation_rng(0, 0, 0), Preprocessing()
        )
        val = images.validation_image(tmp_path / name, Preprocessing())
        assert train.shape == val.shape == (224, 224, 3)
