"""The step of each layer in the first updates, by SGD and by RMSprop warm-up."""

from __future__ import annotations

from reproduce.job.plots import plt
from reproduce.studies.pictures import first_updates
from reproduce.studies.pictures.style import BLACK, BLUE, GREY, VERMILION, WIDTH, label, styled

DATA = first_updates.DATA
CAPTION = (
    'RMSprop gives all layers steps of like size at first, though their gradients differ more than '
    'a thousandfold, and has handed over to SGD by epoch 11.25.'
)
ALT = (
    'Two columns over the first 14 of 90 epochs, without and with RMSprop warm-up; a line for each '
    'of 51 layers. Top, the factor of the gradient, eta (alpha_SGD + alpha_RMSprop / (sqrt m + '
    'eps)): 0.4 for all layers by SGD; with the warm-up it is 0.2 to 530 at first, by layer, '
    'until all lines meet at epoch 11.25. Bottom, the step: by SGD it differs thousandfold between '
    'layers; with the warm-up it begins at 0.003 in all, and spreads after the transition.'
)

measure = first_updates.measure

NAMED = {  # layers that are drawn with their names
    'fc': ('last layer', VERMILION, '-'),
    'conv1': ('first layer', BLACK, '--'),
    'res4/2/conv2': ('a middle layer', BLUE, '-.'),
}
PLACES = {  # of the names: epoch, step, alignment
    'SGD': {'fc': (5.2, 0.014, 'left', 'bottom'), 'res4/2/conv2': (2.9, 6.5e-5, 'left', 'center')},
    'RMSprop warm-up': {
        'fc': (12.9, 2.3e-3, 'right', 'center'),
        'conv1': (9.8, 4e-3, 'right', 'bottom'),
        'res4/2/conv2': (10.9, 1.6e-4, 'right', 'top'),
    },
}


@styled
def draw(content: dict):
    """Draws the picture.

    Args:
        content (dict): Of :func:`measure`.

    Returns:
        ~matplotlib.figure.Figure: The picture.
    """
    figure, axes = plt.subplots(2, 2, figsize=(WIDTH, 6.2), sharex=True, sharey='row')
    for column, variant in enumerate(('SGD', 'RMSprop warm-up')):
        for axis, key in zip(axes[:, column], ('factor', 'step')):
            _layers(axis, content[variant], key)
        for name, (x, y, *sides) in PLACES[variant].items():
            title, color, _ = NAMED[name]
            label(axes[1, column], x, y, title, color, *sides)
        axes[1, column].set_xlabel('epoch of 90')
    axes[0, 0].set_title('SGD from the first update')
    axes[0, 1].set_title('RMSprop warm-up')
    rmsprop = r'\frac{\alpha_\mathrm{RMSprop}}{\sqrt{m} + \varepsilon}'
    axes[0, 0].set_ylabel(rf'factor $\eta\,\left(\alpha_\mathrm{{SGD}} + {rmsprop}\right)$')
    axes[1, 0].set_ylabel('step = factor x gradient')
    axes[0, 0].set_xticks(range(0, 15, 2))
    label(axes[0, 0], 0.2, 0.55, r'$\eta$, the same for all layers', va='bottom')
    label(axes[1, 0], 13.9, 5e-6, f'grey: each of {_n_others(content)} other layers', GREY, 'right')
    return figure


def _n_others(content) -> int:
    return len(set(content['SGD']['step']) - set(NAMED))


def _layers(axis, found, key):
    styles = dict.fromkeys(found[key], ('0.72', '-', 0.9))
    styles.update({name: (color, line, 2.4) for name, (_, color, line) in NAMED.items()})
    for name in sorted(styles, key=lambda name: name in NAMED):  # the named ones on top
        color, line, width = styles[name]
        axis.semilogy(found['epoch'], found[key][name], line, color=color, lw=width, label=name)
