"""Simulates an all-reduce message by message with SimGrid; prints the simulated seconds.

It is run by the Python that has SimGrid, and knows of this project only the JSON on its standard
input::

    {"cluster": {hosts_per_group, uplinks, uplink, host: {rails, network, bus}},
     "order": [host, host, ...], "gpus": GPUs of each host, "bytes": of the buffer,
     "algorithm": "ring" or "hierarchical", "pieces": of the latter's chains,
     "eager": whether a message may start before its receiver waits for it}

Links have {bandwidth (bytes/s, in each direction), latency (s, from end to end)}. Every GPU has a
link to its host's bus, every host one to its group's switch, every group one to the switch above;
each is two, one a direction, shared fairly by the messages on it at a time.
"""

import collections
import json
import sys

from simgrid import Actor, Engine, LinkInRoute, Mailbox, NetZone

task = json.load(sys.stdin)
cluster, order, gpus = task['cluster'], task['order'], task['gpus']
host = cluster['host']
ring = [(h, g) for h in order for g in range(gpus)]
leaders = [(h, 0) for h in order]

engine = Engine(
    [
        'simulate',
        '--cfg=network/model:CM02',
        '--cfg=network/crosstraffic:0',
        '--cfg=network/TCP-gamma:0',
    ]
)
zone = NetZone.create_full_zone('cluster')
ranks = {rank: zone.create_host('-'.join(map(str, rank)), 1e9) for rank in ring}
links = {}


def link(name, bandwidth, latency=0.0):
    if name not in links:
        links[name] = zone.create_link(name, bandwidth).set_latency(latency).seal()
    return LinkInRoute(links[name])


def connect(sender, receiver):
    (a, i), (b, j) = sender, receiver
    bus, network, uplink = host['bus'], host['network'], cluster['uplink']
    route = [link(f'from {a} {i}', bus['bandwidth']), link(f'to {b} {j}', bus['bandwidth'])]
    if a == b:
        route.append(link('bus', 1e18, bus['latency']))
    else:
        capacity = host['rails'] * network['bandwidth']
        route += [link(f'from {a}', capacity), link(f'to {b}', capacity)]
        route.append(link('network', 1e18, network['latency']))
    groups = [x // cluster['hosts_per_group'] for x in (a, b)]
    if groups[0] != groups[1]:
        capacity = cluster['uplinks'] * uplink['bandwidth']
        route += [link(f'up {groups[0]}', capacity), link(f'down {groups[1]}', capacity)]
        route.append(link('uplink', 1e18, uplink['latency']))
    zone.add_route(ranks[sender].netpoint, ranks[receiver].netpoint, None, None, route, False)


def box(sender, receiver):
    return Mailbox.by_name(f'{sender} {receiver}')


def around(members, rank, size):
    """Reduce-scatter and all-gather on a ring: in every step each one sends to the next."""
    n = len(members)
    i = members.index(rank)
    before, after = members[i - 1], members[(i + 1) % n]
    for _ in range(2 * (n - 1)):
        sent = box(rank, after).put_async(0, int(size / n))
        box(before, rank).get()
    sent.wait()


def along(members, rank, size, pieces):
    """A chain, one piece after the other: a reduction towards its end, or a broadcast from it."""
    i = members.index(rank)
    sent = []
    for _ in range(pieces):
        if i > 0:
            box(members[i - 1], rank).get()
        if i < len(members) - 1:
            if sent:
                sent.pop().wait()
            sent.append(box(rank, members[i + 1]).put_async(0, int(size / pieces)))
    for last in sent:
        last.wait()


def act(rank):
    if task['eager']:
        for sender in senders[rank]:
            box(sender, rank).set_receiver(Actor.self())
    if task['algorithm'] == 'ring':
        around(ring, rank, task['bytes'])
        return
    chain = [(rank[0], g) for g in range(gpus)]
    along(chain[::-1], rank, task['bytes'], task['pieces'])
    if rank[1] == 0:
        around(leaders, rank, task['bytes'])
    along(chain, rank, task['bytes'], task['pieces'])


def pairs():
    """Who sends to whom."""
    members = ring if task['algorithm'] == 'ring' else leaders
    if len(members) > 1:
        yield from ((members[i - 1], members[i]) for i in range(len(members)))
    if task['algorithm'] == 'hierarchical':
        for h in order:
            for g in range(1, gpus):
                yield (h, g), (h, g - 1)
                yield (h, g - 1), (h, g)


senders = collections.defaultdict(list)
for sender, receiver in sorted(set(pairs())):
    connect(sender, receiver)
    senders[receiver].append(sender)
zone.seal()
for rank in ring:
    Actor.create(str(rank), ranks[rank], act, rank)
engine.run()
print(Engine.clock)
