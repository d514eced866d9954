"""Describes a cluster as a tree of switches, hosts and GPUs. Each number has its source.

A description is a JSON file, as mn1.json beside this module. The command
./run_mpi.sh cluster --cluster FILE.json reads it.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

_DESCRIPTIONS = Path(__file__).parent


class ClusterError(ValueError):
    """The description cannot be used, or the cluster cannot run the job."""


@dataclass(frozen=True)
class Link:
    """A link between two parts of a cluster.

    Attributes:
        bandwidth (float): Bytes/s in each direction.
        latency (float): Seconds from end to end.
    """

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Host:
    """A host: GPUs on a bus, and network links.

    Attributes:
        gpus (int): GPUs.
        rails (int): Network links. A ring has one lane on each.
        network (Link): One network link.
        bus (Link): The link of one GPU to the bus.
        memory_bandwidth (float): Bytes/s of the memory of one GPU.
        to_host (float): Bytes/s from the memory of one GPU to that of the host.
        copy (float): Bytes/s that one thread copies in the memory of the host.
        images_per_second (dict): Local batch to the images/s that one GPU trains on.
        forward_share (float): Share of the forward pass in the time of an image.
    """

    gpus: int
    rails: int
    network: Link
    bus: Link
    memory_bandwidth: float
    to_host: float
    copy: float
    images_per_second: dict
    forward_share: float


@dataclass(frozen=True)
class Cluster:
    """A cluster: hosts in groups. The switch of each group has links to the switch above.

    Attributes:
        name (str): The name.
        hosts (int): Hosts.
        hosts_per_group (int): Hosts in a group.
        uplinks (int): Links from the switch of a group to the switch above.
        uplink (Link): One of these links.
        host (Host): A host. All hosts are equal.
        sources (dict): Path of a number, as ``host.bus.latency``, to its source. The numbers of
            ``what_if`` and ``published`` are included.
        what_if (dict): Label of a change, then path, to the changed number.
        published (dict): Name of a published result to its value; ``gpus`` is the number of GPUs to
            which the others belong.
    """

    name: str
    hosts: int
    hosts_per_group: int
    uplinks: int
    uplink: Link
    host: Host
    sources: dict = dataclasses.field(default_factory=dict)
    what_if: dict = dataclasses.field(default_factory=dict)
    published: dict = dataclasses.field(default_factory=dict)

    @property
    def gpus(self) -> int:
        return self.hosts * self.host.gpus

    @property
    def published_here(self) -> dict:
        """The published results, if they belong to this cluster's number of GPUs; else none."""
        return self.published if self.published.get('gpus') == self.gpus else {}


_KINDS: dict = {'Link': Link, 'Host': Host, 'Cluster': Cluster}
_EXTRA = ('name', 'sources', 'what_if', 'published')


def read(name) -> Cluster:
    """Reads the description of a cluster.

    Args:
        name (str): A description beside this module, as ``mn1``, or the path of a file.

    Returns:
        Cluster: The cluster.

    Raises:
        ClusterError: The file is missing, is not JSON, or lacks a number or a source.
    """
    known = _DESCRIPTIONS / f'{name}.json'
    path = known if known.exists() else Path(name)
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        names = ', '.join(sorted(path.stem for path in _DESCRIPTIONS.glob('*.json')))
        raise ClusterError(f'--cluster {path}: {error.strerror}; included: {names}') from error
    except ValueError as error:
        raise ClusterError(
            f'{path} is not JSON ({error}): copy reproduce/studies/cluster/mn1.json'
        ) from error
    try:
        return _cluster(data)
    except ClusterError as error:
        raise ClusterError(f'{path}: {error}') from error


def _cluster(data) -> Cluster:
    extra = {}
    sources: dict = {}
    if isinstance(data, dict):
        extra = {name: data.pop(name, {}) for name in ('name', 'what_if', 'published')}
    if not isinstance(extra.get('name'), str):
        raise ClusterError('a description must be a JSON object with a "name"')
    cluster = Cluster(extra['name'], sources=sources, **_parse('Cluster', data, '', sources))
    what_if: dict = {}
    for label, changes in _object(extra['what_if'], 'what_if').items():
        where = f'what_if.{label}'
        unknown = set(_object(changes, where)) - set(sources)
        if unknown:
            raise ClusterError(f'{where}: there is no number {", ".join(sorted(unknown))}')
        what_if[label] = {
            path: _number(pair, f'{where}.{path}', sources) for path, pair in changes.items()
        }
    published = {
        key: _number(pair, f'published.{key}', sources)
        for key, pair in _object(extra['published'], 'published').items()
    }
    return dataclasses.replace(cluster, what_if=what_if, published=published)


def _parse(kind, data, where, sources):
    """Returns the value of a field of that kind, and adds its sources by their paths."""
    prefix = f'{where}.' if where else ''
    if kind == 'dict':
        batches = _object(data, where)
        if not batches or not all(batch.isdecimal() for batch in batches):
            raise ClusterError(f'{where}: must map local batches, as "32", to numbers')
        return {int(b): _number(p, f'{prefix}{b}', sources) for b, p in batches.items()}
    if kind in ('int', 'float'):
        value = _number(data, where, sources)
        if kind == 'int' and not isinstance(value, int):
            raise ClusterError(f'{where}: {value} is not an integer')
        return value
    kinds = {f.name: f.type for f in dataclasses.fields(_KINDS[kind]) if f.name not in _EXTRA}
    given = set(_object(data, where))
    problems = [
        words + ', '.join(prefix + name for name in sorted(names))
        for words, names in (('lacks ', set(kinds) - given), ('unknown: ', given - set(kinds)))
        if names
    ]
    if problems:
        raise ClusterError('; '.join(problems))
    values = {name: _parse(kinds[name], data[name], f'{prefix}{name}', sources) for name in kinds}
    return values if kind == 'Cluster' else _KINDS[kind](**values)


def _object(data, where) -> dict:
    if not isinstance(data, dict):
        raise ClusterError(f'{where or "the description"} must be a JSON object')
    return data


def _number(pair, where, sources):
    if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], str) and pair[1]):
        raise ClusterError(f'{where} must be [number, "source"] or [number, "assumption: reason"]')
    value = pair[0]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e18:
        raise ClusterError(f'{where}: {value!r} is not a number above 0 and below 1e18')
    sources[where] = pair[1]
    return value


def replaced(thing, path, value):
    """Returns a copy of a cluster in which one number is replaced.

    Args:
        thing (Cluster, Host, Link or dict): The cluster, or a part of it.
        path (str): The path of the number, as ``host.bus.latency``.
        value (float): The new number.
    """
    name, _, rest = path.partition('.')
    if isinstance(thing, dict):
        return {**thing, int(name): value}
    if rest:
        value = replaced(getattr(thing, name), rest, value)
    return dataclasses.replace(thing, **{name: value})


def value_at(thing, path):
    """Returns the number at a path of a cluster, as ``host.bus.latency``."""
    for name in path.split('.'):
        thing = thing[int(name)] if isinstance(thing, dict) else getattr(thing, name)
    return thing
