"""The files of --evaluate: which are models, and what is refused."""

import io
import json

import extensions  # noqa: F401  isort: skip  (it makes Chainer importable on NumPy 2)
import chainer
import numpy as np
import pytest

from extensions import checkpoint
from reproduce.dataset import find_validation
from reproduce.job import evaluation
from reproduce.job.options import parse
from reproduce.listing import ImageFolder, list_images
from reproduce.resnet50 import ResNet50
from reproduce.settings import InputError


def settings_of(path, *words):
    return parse(['--preset', 'smoke', '--width', '2', '--evaluate', str(path), *words], 2)[0]


@pytest.fixture
def val(tmp_path):
    from PIL import Image

    for name in 'abc':
        (tmp_path / 'val' / name).mkdir(parents=True)
        Image.new('RGB', (8, 8)).save(tmp_path / 'val' / name / '0.png')
    return list_images(tmp_path / 'val')


@pytest.fixture
def model():
    model = ResNet50(3, width=2, seed=1)
    rng = np.random.RandomState(0)
    for link in model.links():
        if isinstance(link, chainer.links.BatchNormalization):
            link.avg_mean[...] = rng.randn(link.avg_mean.size)
            link.avg_var[...] = rng.rand(link.avg_var.size) + 0.5
    return model


def arrays_of(model):
    arrays = {}
    chainer.serializers.DictionarySerializer(arrays).save(model)
    return arrays


def test_a_file_that_a_run_has_left(model, val, tmp_path):
    path = tmp_path / 'model.npz'
    chainer.serializers.save_npz(path, model)
    (tmp_path / 'settings.json').write_text(json.dumps({'resize': 40, 'width': 2}))
    arrays, recorded = evaluation.read(path)
    assert recorded == {'resize': 40, 'width': 2}
    evaluation.check(arrays, model, settings_of(path), val)
    for name, array in arrays_of(model).items():
        np.testing.assert_array_equal(arrays[name], array, err_msg=name)


@pytest.mark.parametrize('beside', ['', '[1]', '{"resize": '])
def test_no_settings_beside_it(model, tmp_path, beside):
    chainer.serializers.save_npz(tmp_path / 'model.npz', model)
    if beside:
        (tmp_path / 'settings.json').write_text(beside)
    assert evaluation.read(tmp_path / 'model.npz')[1] == {}


def test_a_checkpoint_with_and_without_a_validation(model, val, tmp_path):
    path = tmp_path / 'best.npz'
    entries = {f'updater/model:main/{name}': array for name, array in arrays_of(model).items()}
    entries['updater/iteration'] = np.array(3)
    checkpoint.write(path, entries, {'seed': 3}, {'top1': 0.0})
    arrays, recorded = evaluation.read(path)
    assert recorded == {'seed': 3} and arrays.keys() == arrays_of(model).keys()
    evaluation.check(arrays, model, settings_of(path), val)
    for properties in ({'top1': None}, {}):
        checkpoint.write(path, entries, {}, properties)
        with pytest.raises(
            InputError, match="without a validation: its batch .* one worker's; give"
        ):
            evaluation.read(path)
    data = path.read_bytes()
    path.write_bytes(data[:-40] + data[-39:])
    with pytest.raises(InputError, match=r'--evaluate \S*best.npz is damaged'):
        evaluation.read(path)


def test_what_is_no_model(tmp_path):
    path = tmp_path / 'file'
    with pytest.raises(InputError, match=r'--evaluate \S*file: No such file or directory; give a'):
        evaluation.read(path)
    with pytest.raises(InputError, match=r'Is a directory; give a run'):
        evaluation.read(tmp_path)
    array, pickled = io.BytesIO(), io.BytesIO()
    np.save(array, np.ones(3))
    np.savez(pickled, x=np.array([print]))
    for data in (b'', b'text', array.getvalue(), pickled.getvalue()):
        path.write_bytes(data)
        with pytest.raises(InputError, match=r'file is damaged or not a model \(.*\); give a run'):
            evaluation.read(path)


def test_the_model_of_another_network(model, val, tmp_path):
    def refused(change, *words):
        arrays = arrays_of(model)
        change(arrays)
        settings = settings_of(tmp_path / 'm.npz', *words)
        other = ResNet50(len(val.classes), settings.width, settings.stem)
        with pytest.raises(InputError) as raised:
            evaluation.check(arrays, other, settings, val)
        message = str(raised.value)
        assert message.startswith(f'--evaluate {tmp_path}/m.npz') and '\n' not in message
        return message

    def put(name, array):
        return lambda arrays: arrays.update({name: array})

    def nothing(arrays):
        pass

    assert 'conv1/W is float32 [2, 3, 7, 7], but --width 4' in refused(nothing, '--width', '4')
    assert 'need float32 [2, 3, 3, 3]: give the options' in refused(nothing, '--stem', 'cifar')
    other = arrays_of(ResNet50(5, width=2))
    assert 'fc/W is float32 [5, 64], but' in refused(lambda arrays: arrays.update(other))
    assert f'3 classes of {val.root}' in refused(lambda arrays: arrays.update(other))
    assert 'only one of the two has fc/b; give the options' in refused(
        lambda arrays: arrays.pop('fc/b')
    )
    assert 'only one of the two has more' in refused(put('more', np.ones(1)))
    # NumPy would spread one value over all channels, and cut a float64 or a complex number.
    for array in (
        np.ones(1, 'f'),
        np.ones(2, 'e'),
        np.ones(2),
        np.ones(2, 'F'),
        np.array(['a', 'b']),
    ):
        assert 'bn1/avg_mean is ' in refused(put('bn1/avg_mean', array))


def test_the_images_of_the_validation_alone(monkeypatch, val, tmp_path):
    monkeypatch.delenv('IMAGENET_ROOT', raising=False)
    found = find_validation(settings_of('m', '--val-root', val.root))
    assert isinstance(found, ImageFolder) and found.digest() == val.digest()
    out = tmp_path / 'out'
    assert len(find_validation(settings_of('m', '--out', str(out)))) == 360
    assert [path.name for path in out.iterdir()] == ['digits']
    (tmp_path / 'file').write_text('')
    with pytest.raises(InputError, match=r'--out \S*file cannot take the digits: File exists'):
        find_validation(settings_of('m', '--out', str(tmp_path / 'file')))
    paper = parse(['--evaluate', 'm', '--manifests', str(tmp_path)], 1)[0]
    with pytest.raises(InputError, match='no images: give --val-root, or, for --preset paper'):
        find_validation(paper)
    with pytest.raises(InputError, match='no images: give --val-root'):
        find_validation(settings_of('m', '--train-root', val.root))
    monkeypatch.setenv('IMAGENET_ROOT', str(tmp_path))
    assert find_validation(paper).root == val.root
