"""One style for all pictures: 1,400 pixels wide, for a page that shows them at 700.

Colours are those of Okabe and Ito, which colour-blind readers tell apart. No picture needs them:
lines also differ in style and marker, areas in hatching, and each has its name beside it.
"""

from __future__ import annotations

import functools
import io
import os

from PIL import Image, PngImagePlugin

from reproduce.job.plots import plt

WIDTH = 1400 / 150  # inches
_DPI = 150
_COLORS = 24  # of a PNG; enough for the edges of letters

BLACK, BLUE, VERMILION, ORANGE, GREEN, SKY, PURPLE = (
    *('#000000', '#0072B2', '#D55E00', '#E69F00', '#009E73', '#56B4E9', '#CC79A7'),
)
GREY = '#666666'

_SETTINGS = {
    'font.size': 13,
    'axes.titlesize': 14,
    'axes.titlelocation': 'left',
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.grid': True,
    'axes.axisbelow': True,
    'grid.color': '0.88',
    'lines.linewidth': 2.2,
    'lines.markersize': 7,
    'hatch.linewidth': 0.8,
    'figure.constrained_layout.use': True,
}


def styled(draw):
    """Makes a function draw in this style. A decorator."""

    @functools.wraps(draw)
    def drawn(*arguments):
        with plt.rc_context(_SETTINGS):
            return draw(*arguments)

    return drawn


def label(axis, x, y, text, color=BLACK, ha='left', va='center', offset=(0, 0), **options):
    """Writes a label beside a line or a point; ``offset`` is in points."""
    axis.annotate(
        text,
        (x, y),
        xytext=offset,
        textcoords='offset points',
        color=color,
        ha=ha,
        va=va,
        annotation_clip=False,
        **options,
    )


def save(figure, path: str, alt: str):
    """Writes a figure as a PNG file of few colours, and closes it.

    Args:
        figure (~matplotlib.figure.Figure): The figure.
        path (str): The file, which is replaced as a whole.
        alt (str): What the picture shows, for those who do not see it. The file holds it as
            ``Description``.
    """
    drawn = io.BytesIO()
    figure.savefig(drawn, format='png', dpi=_DPI)
    plt.close(figure)
    text = PngImagePlugin.PngInfo()
    text.add_text('Description', alt)
    few = Image.open(drawn).convert('RGB').quantize(_COLORS, dither=Image.Dither.NONE)
    few.save(path + '.tmp', format='png', optimize=True, dpi=(_DPI, _DPI), pnginfo=text)
    os.replace(path + '.tmp', path)
