"""MN-1 as a drawing: 8 groups of 16 nodes with 8 GPUs, the ring through them, the shared links."""

from __future__ import annotations

from matplotlib.patches import FancyBboxPatch

from reproduce.job.plots import plt
from reproduce.studies.cluster.description import read
from reproduce.studies.cluster.model import crossings
from reproduce.studies.pictures.style import BLUE, SKY, VERMILION, WIDTH, styled

DATA = None
CAPTION = (
    'The ring of the all-reduce leaves each group of 16 nodes once: of its 1,024 hops, 8 use the '
    'links that the nodes of a group share.'
)
ALT = (
    'A schematic of MN-1. Top: 8 groups, each with 2 switches over 16 nodes, 128 nodes in all. The '
    'ring goes through all nodes of a group, then over a link that the group shares to the next '
    'group, and from the last group back to the first. Bottom: one node, where the ring comes in '
    'by InfiniBand, goes through 8 P100 on PCIe, and leaves; beside it, the hops of the ring: 896 '
    'within nodes, 120 from node to node, 8 between groups.'
)

_SIDE = 4  # nodes of a group are drawn in a square


@styled
def draw():
    """Draws the picture, by reproduce/studies/cluster/mn1.json.

    Returns:
        ~matplotlib.figure.Figure: The picture.
    """
    cluster = read('mn1')
    figure = plt.figure(figsize=(WIDTH, 6.2), layout='none')
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_xlim(0, 140)
    axis.set_ylim(0, 93)
    axis.axis('off')
    _groups(axis, cluster)
    _node(axis, cluster)
    _hops(axis, cluster)
    return figure


def hops(cluster) -> tuple[int, int, int]:
    """Returns how many hops of the ring stay in a node, stay in a group, and leave a group."""
    leaving = sum(crossings(cluster, list(range(cluster.hosts))).values())
    return cluster.gpus - cluster.hosts, cluster.hosts - leaving, leaving


def _box(axis, x, y, width, height, face='w', gid=None):
    style = 'round,pad=0,rounding_size=0.6'
    axis.add_patch(FancyBboxPatch((x, y), width, height, style, fc=face, lw=1, gid=gid, zorder=2))


def _ring(axis, points, arrows):
    """Draws a part of the ring, with arrow heads at the middle of the lines ``arrows``."""
    axis.plot(*zip(*points), color=VERMILION, lw=2, zorder=4, solid_joinstyle='round')
    for i in arrows:
        (x0, y0), (x1, y1) = points[i], points[i + 1]
        head = (0.45 * x0 + 0.55 * x1, 0.45 * y0 + 0.55 * y1)
        style = {'arrowstyle': '-|>,head_width=0.35,head_length=0.6', 'color': VERMILION}
        axis.annotate('', head, (x0, y0), arrowprops={**style, 'shrinkA': 0, 'lw': 0}, zorder=5)


def _groups(axis, cluster):
    n = cluster.hosts // cluster.hosts_per_group
    heading = (
        f'MN-1: {n} groups of {cluster.hosts_per_group} nodes under {cluster.uplinks} switches, '
        f'{cluster.gpus:,} GPUs'
    )
    axis.text(3, 89.5, heading, fontsize=14, va='center')
    pitch, width, spine = 17, 14.4, 80
    right = 3 + (n - 1) * pitch + width
    axis.plot([3, right], [spine, spine], color=BLUE, lw=9, alpha=0.45, zorder=1)
    axis.text(right, 85, 'links between groups', color=BLUE, ha='right', va='center')
    ring = []
    for group in range(n):
        x = 3 + group * pitch
        _box(axis, x, 46, width, 28, '0.96')
        for link in range(cluster.uplinks):
            at = x + width * (link + 0.5) / cluster.uplinks
            axis.plot([at, at], [70, spine], color=BLUE, lw=5, alpha=0.45, zorder=1, gid='uplink')
            _box(axis, at - 3, 68, 6, 4, SKY, gid='switch')
        enter, leave = x + width / 4, x + 3 * width / 4
        ring += [(enter - 0.6, spine), (enter - 0.6, 70)]
        for node in range(cluster.hosts_per_group):
            column, row = divmod(node, _SIDE)
            row = row if column % 2 == 0 else _SIDE - 1 - row
            center = (x + 2.4 + 3.2 * column, 63.5 - 4.8 * row)
            _box(axis, center[0] - 1.2, center[1] - 1.6, 2.4, 3.2, '0.8', gid='node')
            ring.append(center)
        ring += [(leave + 0.6, 70), (leave + 0.6, spine)]
    ring += [(right + 1.6, spine), (right + 1.6, 43), (1.4, 43), (1.4, spine), ring[0]]
    between = [i for i in range(len(ring) - 1) if ring[i][1] == ring[i + 1][1] == spine]
    _ring(axis, ring, [*between, len(ring) - 4])
    axis.text(3, 40.6, 'the ring of the all-reduce', color=VERMILION, va='center')


def _node(axis, cluster):
    host = cluster.host
    axis.text(3, 34, f'One node: {host.gpus} Tesla P100', fontsize=14, va='center')
    _box(axis, 3, 4, 66, 27, '0.96')
    _box(axis, 6, 11, 10, 16.5, SKY, gid='network')
    axis.text(11, 18, 'FDR', ha='center', va='center', zorder=6)
    for link in range(1, host.rails):
        _box(axis, 6, 10 - 5.2 * link, 10, 4.4, SKY, gid='network')
        y = 12.2 - 5.2 * link
        axis.text(11, y, 'FDR', ha='center', va='center', zorder=6)
        axis.text(18, y, 'a ring of its own (assumed)', va='center', zorder=6)
    for gpu in range(host.gpus):
        x = 23 + 5.6 * gpu
        _box(axis, x - 2.2, 20.5, 4.4, 8, '0.8', gid='gpu')
        axis.text(x, 26.3, str(gpu + 1), ha='center', va='center', zorder=6)
        axis.plot([x, x], [17.5, 20.5], color=BLUE, lw=4, alpha=0.45, zorder=3)
    axis.plot([16, 64.4], [17.5, 17.5], color=BLUE, lw=7, alpha=0.45, zorder=3)
    axis.text(18, 15.7, 'PCIe', color=BLUE, va='top', zorder=6)
    _ring(axis, [(0, 23), (19, 23), (66.5, 23), (66.5, 12.5), (16, 12.5), (0, 12.5)], [1, 3])


def _hops(axis, cluster):
    host, counts = cluster.host, hops(cluster)
    axis.text(76, 34, f'The {sum(counts):,} hops of the ring', fontsize=14, va='center')
    bus, network, uplink = (
        f'{link.bandwidth / 1e9:.1f} GB/s' for link in (host.bus, host.network, cluster.uplink)
    )
    speeds = (
        f'from GPU to GPU in a node:\nPCIe, {bus}',
        f'from node to node: {host.rails} InfiniBand\nlinks (FDR), {network} each',
        f'from group to group: {cluster.uplinks} links for all\nnodes, {uplink} each (assumed)',
    )
    for i, (count, speed) in enumerate(zip(counts, speeds)):
        y = 27.5 - 9 * i
        axis.text(86, y, f'{count}', ha='right', va='top', fontsize=16, color=VERMILION)
        axis.text(88.5, y - 0.3, speed, va='top')
