"""The twin's network is Chainer's: parameters one to one, initial values, results."""

import extensions  # noqa: F401  isort: skip  (first: makes Chainer importable on NumPy 2)
import chainer
import chainer.functions as F
import numpy as np
import pytest

torch = pytest.importorskip('torch')
import reproduce.resnet50
from reproduce.twin import resnet50


def arrays_of(chainers):
    """Chainer's parameters and batch statistics by name."""
    arrays = {name: param.array for name, param in chainers.namedparams()}
    for name, link in chainers.namedlinks():
        if isinstance(link, chainer.links.BatchNormalization):
            arrays.update({f'{name}/avg_mean': link.avg_mean, f'{name}/avg_var': link.avg_var})
    return arrays


@pytest.mark.parametrize('stem', ['imagenet', 'cifar'])
def test_the_table_pairs_all_tensors_one_to_one(stem):
    chainers = reproduce.resnet50.ResNet50(7, 4, stem, seed=3)
    twin = resnet50.ResNet50(7, 4, stem, seed=3)
    names = resnet50.chainer_names(twin)
    arrays, tensors = arrays_of(chainers), twin.state_dict()
    counts = [name for name in tensors if name.endswith('num_batches_tracked')]
    assert len(names) == 161 + 2 * 53 and len(counts) == 53
    assert sorted(names) == sorted(set(tensors) - set(counts))
    assert sorted(names.values()) == sorted(arrays)
    for own, theirs in names.items():
        # Values of all layers differ, so a pair of equal arrays is the right pair.
        assert np.array_equal(tensors[own].numpy(), arrays[theirs]), (own, theirs)
    assert names['res4.2.conv3.weight'] == '/res4/2/conv3/W'
    assert names['bn1.running_var'] == '/bn1/avg_var' and names['fc.bias'] == '/fc/b'


def test_a_shallow_network_is_chainers():
    arrays = arrays_of(reproduce.resnet50.ResNet50(7, 4, seed=3, shallow=True))
    twin = resnet50.ResNet50(7, 4, seed=3, shallow=True)
    names, tensors = resnet50.chainer_names(twin), twin.state_dict()
    assert sorted(names.values()) == sorted(arrays)
    for own, theirs in names.items():
        assert np.array_equal(tensors[own].numpy(), arrays[theirs]), (own, theirs)


@pytest.mark.parametrize('stem', ['imagenet', 'cifar'])
def test_logits_statistics_and_gradients_are_chainers(stem):
    """In float64, where both can only agree if they compute the same."""
    rng = np.random.RandomState(0)
    side = {'imagenet': 64, 'cifar': 16}[stem]
    x, t = rng.normal(size=(3, 3, side, side)), np.array([1, 0, 4], 'i')
    with chainer.using_config('dtype', np.dtype('float64')):
        chainers = reproduce.resnet50.ResNet50(5, 2, stem, seed=1)
    twin = resnet50.ResNet50(5, 2, stem, seed=2).double()
    names = resnet50.chainer_names(twin)
    arrays, tensors = arrays_of(chainers), twin.state_dict()
    for own, theirs in names.items():
        values = rng.uniform(0.5, 1.5, arrays[theirs].shape)
        if arrays[theirs].ndim > 1:
            values = rng.normal(0, 0.3, arrays[theirs].shape)
        arrays[theirs][...] = values
        tensors[own].copy_(torch.from_numpy(values))
    for train in (True, False):  # first with the minibatch's statistics, then with the kept ones
        twin.train(train)
        chainers.cleargrads()
        twin.zero_grad()
        with chainer.using_config('train', train):
            theirs = chainers(x)
            F.softmax_cross_entropy(theirs, t).backward()
        ours = twin(torch.from_numpy(x))
        torch.nn.functional.cross_entropy(ours, torch.from_numpy(t).long()).backward()
        np.testing.assert_allclose(ours.detach().numpy(), theirs.array, rtol=1e-9)
        params, gradients = dict(twin.named_parameters()), dict(chainers.namedparams())
        for own, name in names.items():
            if own in params:
                expected = gradients[name].grad
                difference = np.abs(params[own].grad.numpy() - expected).max()
                assert difference <= 1e-8 * max(np.abs(expected).max(), 1e-6), (train, name)
        statistics = arrays_of(chainers)
        for own, name in names.items():
            np.testing.assert_allclose(tensors[own].numpy(), statistics[name], rtol=1e-9)
