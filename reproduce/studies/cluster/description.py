"""The description of a cluster: a tree of switches, hosts and GPUs, each number with its source."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

_DESCRIPTIONS = Path(__file__).parent


class ClusterError(ValueError):
    """A description, or a measurement, that cannot be used."""


@dataclass(frozen=True)
class Link:
    """bandwidth in bytes/s, in each direction; latency in seconds, from end to end."""

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Host:
    """GPUs on a bus, each with a Link to it, and as many network links (rails) as a ring has lanes.

    memory_bandwidth, bytes/s, and images_per_second, local batch to rate, are one GPU's.
    forward_share is that of the forward pass in an image's time.
    """

    gpus: int
    rails: int
    network: Link
    bus: Link
    memory_bandwidth: float
    images_per_second: dict
    forward_share: float


@dataclass(frozen=True)
class Cluster:
    """A tree: hosts in groups, each group's switch with ``uplinks`` links to the one above.

    sources, and those of what_if and published, say where each number is from, by its path.
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


_KINDS: dict = {'Link': Link, 'Host': Host, 'Cluster': Cluster}
_EXTRA = ('name', 'sources', 'what_if', 'published')


def read(name) -> Cluster:
    """Reads a description: the name of one that comes along, or a path.

    Raises:
        ClusterError: It is not there, no JSON, or lacks a number or a source.
    """
    known = _DESCRIPTIONS / f'{name}.json'
    path = known if known.exists() else Path(name)
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        names = ', '.join(sorted(path.stem for path in _DESCRIPTIONS.glob('*.json')))
        raise ClusterError(f'{path}: {error.strerror}; these come along: {names}') from error
    except ValueError as error:
        raise ClusterError(f'{path} is not JSON: {error}') from error
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
        raise ClusterError('a description is an object with a "name"')
    cluster = Cluster(extra['name'], sources=sources, **_parse('Cluster', data, '', sources))
    what_if: dict = {}
    for label, changes in _object(extra['what_if'], 'what_if').items():
        where = f'what_if.{label}'
        unknown = set(_object(changes, where)) - set(sources)
        if unknown:
            raise ClusterError(f'{where}: no number is called {", ".join(sorted(unknown))}')
        what_if[label] = {
            path: _number(pair, f'{where}.{path}', sources) for path, pair in changes.items()
        }
    published = {
        key: _number(pair, f'published.{key}', sources)
        for key, pair in _object(extra['published'], 'published').items()
    }
    return dataclasses.replace(cluster, what_if=what_if, published=published)


def _parse(kind, data, where, sources):
    """The value for a field of that kind; notes its sources by their paths."""
    prefix = f'{where}.' if where else ''
    if kind == 'dict':
        batches = _object(data, where)
        if not batches or not all(batch.isdecimal() for batch in batches):
            raise ClusterError(f'{where}: is from local batches, as "32", to numbers')
        return {int(b): _number(p, f'{prefix}{b}', sources) for b, p in batches.items()}
    if kind in ('int', 'float'):
        value = _number(data, where, sources)
        if kind == 'int' and not isinstance(value, int):
            raise ClusterError(f'{where}: {value} is not an integer')
        return value
    kinds = {f.name: f.type for f in dataclasses.fields(_KINDS[kind]) if f.name not in _EXTRA}
    differing = set(_object(data, where)) ^ set(kinds)
    if differing:
        problems = (
            f'{"lacks" if name in kinds else "does not know"} {prefix}{name}'
            for name in sorted(differing)
        )
        raise ClusterError('it ' + ', '.join(problems))
    values = {name: _parse(kinds[name], data[name], f'{prefix}{name}', sources) for name in kinds}
    return values if kind == 'Cluster' else _KINDS[kind](**values)


def _object(data, where) -> dict:
    if not isinstance(data, dict):
        raise ClusterError(f'{where or "the description"}: is not an object')
    return data


def _number(pair, where, sources):
    if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], str) and pair[1]):
        raise ClusterError(f'{where}: is not [number, "its source, or: assumption: why"]')
    value = pair[0]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e18:
        raise ClusterError(f'{where}: {value!r} is not a number above 0')
    sources[where] = pair[1]
    return value


def replaced(thing, path, value):
    """A copy of a Cluster in which the number at a path, as ``host.bus.latency``, is another."""
    name, _, rest = path.partition('.')
    if isinstance(thing, dict):
        return {**thing, int(name): value}
    if rest:
        value = replaced(getattr(thing, name), rest, value)
    return dataclasses.replace(thing, **{name: value})


def value_at(thing, path):
    for name in path.split('.'):
        thing = thing[int(name)] if isinstance(thing, dict) else getattr(thing, name)
    return thing
