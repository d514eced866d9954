import dataclasses

import numpy as np
import pytest

from extensions import alpha_sgd, learning_rate
from reproduce.settings import PRESETS, Settings


def test_the_default_is_the_papers_run():
    settings = Settings()
    assert settings == PRESETS['paper']()
    assert (settings.workers, settings.local_batch_size, settings.epochs) == (1024, 32, 90)
    assert settings.total_batch_size == 32768
    assert settings.lr_base == pytest.approx(12.8, rel=1e-15)
    assert settings.iterations(1_281_167) == 3519
    assert (settings.alpha_form, settings.beta_center, settings.beta_period) == ('printed', 10, 5)
    assert (settings.mu1, settings.mu2, settings.eps, settings.lr_rmsprop) == (
        0.9,
        0.99,
        1e-8,
        3e-4,
    )
    assert settings.weight_decay == 1e-4 and not settings.pooled_variance
    assert (settings.allreduce_grad_dtype, settings.communicator) == ('float16', 'auto')
    assert (settings.width, settings.stem, settings.image_size, settings.resize) == (
        64,
        'imagenet',
        224,
        256,
    )
    assert (settings.min_crop_area, settings.horizontal_flip) == (0.08, True)


# Where and how a run runs, not what it computes.
MAY_CHANGE = set(
    'preset communicator train_root val_root n_train_images validation_batch_size loader '
    'bad_images manifests out checkpoint_every keep_checkpoints resume overwrite evaluate '
    'watchdog'.split()
)


@pytest.mark.parametrize('name', [field.name for field in dataclasses.fields(Settings)])
def test_what_a_run_may_change_when_it_resumes(name):
    """Every other setting must be in the identity, which a checkpoint is refused by."""
    changed = dataclasses.replace(Settings(), **{name: 'another'}).identity
    assert (changed == Settings().identity) == (name in MAY_CHANGE)


def test_iterations_cover_the_epochs_and_no_more():
    settings = Settings(workers=2, local_batch_size=3, epochs=5)
    assert settings.iterations(6) == 5 and settings.iterations(7) == 6


def test_settings_of_the_images_reach_their_preprocessing():
    settings = Settings(
        image_size=20, resize=24, min_crop_area=0.3, horizontal_flip=False, resize_filter='pillow'
    )
    preprocessing = settings.preprocessing
    assert (preprocessing.image_size, preprocessing.resize) == (20, 24)
    assert (preprocessing.min_crop_area, preprocessing.max_aspect) == (0.3, 4 / 3)
    assert (preprocessing.horizontal_flip, preprocessing.resize_filter) == (False, 'pillow')
    assert Settings().preprocessing == type(preprocessing)(
        224, 256, 0.08, 4 / 3, True, 'antialiased'
    )


def test_manifests_lie_beside_the_output():
    assert Settings(out='results/paper').manifests_folder == 'results/manifests'
    assert Settings(out='here/').manifests_folder == 'manifests'
    assert Settings(manifests='/lists').manifests_folder == '/lists'


def test_schedules_of_the_settings():
    epochs = np.array([0, 9, 11, 12, 40, 89])
    settings = Settings(beta_center=9, beta_period=6, alpha_form='continuous')
    expected = alpha_sgd(epochs, 9, 6, 'continuous')
    np.testing.assert_array_equal(settings.alpha_sgd(epochs), expected)
    np.testing.assert_array_equal(settings.lr(epochs), learning_rate(epochs, 32768))
    assert Settings(lr_schedule='steps').lr(29) == 12.8
    steeper = Settings(lr_schedule='gradual_warmup', lr_per_256=0.4)
    assert (steeper.lr_base, steeper.lr(0), steeper.lr(10)) == pytest.approx((51.2, 0.4, 51.2))
    assert Settings(epochs=30).epoch_of_90(10) == 30


def test_without_a_transition_it_is_sgd_throughout():
    settings = Settings(alpha_form='sgd')
    np.testing.assert_array_equal(settings.alpha_sgd(np.array([0, 11, 89])), np.ones(3))
    assert settings.alpha_sgd(0) == 1
