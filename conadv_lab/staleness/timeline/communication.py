"""Time of an all-reduce: ring, tree and hierarchical, with NCCL's published constants or α and β.

Latencies in microseconds and bandwidth corrections are those of NVIDIA/nccl, src/graph/tuning.cc (its 2.2x
versions). Ring: 2(p−1) hops and 2(p−1)/p · M/β; tree: down and up, 2 log₂(nodes) network hops and 2M/β;
hierarchical: reduce-scatter within the node, all-reduce of a shard per network card across nodes, all-gather.
"""

from dataclasses import dataclass
from math import ceil, floor, log2

from conadv_lab.staleness.timeline.cluster import Network


@dataclass(frozen=True)
class Protocol:
    """Constants of one NCCL protocol; pairs are (tree, ring).

    Attributes:
        base, node_hop, network_hop: microseconds.
        node_share, network_share: fraction of the bus bandwidth, within one node and across nodes.
        tree_correction: additional factor of the tree's bandwidth by ⌊log₂(bytes / 64)⌋, the last one for all above.
        node_hop_across: factor of the hop within a node if there are several nodes.
    """

    base: tuple[float, float]
    node_hop: tuple[float, float]
    network_hop: tuple[float, float]
    node_share: tuple[float, float]
    network_share: tuple[float, float]
    tree_correction: tuple[float, ...] = (1.0,)
    node_hop_across: float = 1.0


NCCL = (
    Protocol(  # LL
        (6.8, 6.6), (0.6, 0.6), (5.0, 2.7), (1 / 3.8, 0.5), (1 / 3.8, 0.5),
        (1, 1, 1, 1, .9, .8, .7, .7, .7, .7, .6, .5, .4, .4, .5, .6, .7, .8, .9, 1), 1.8,
    ),
    Protocol(  # LL128
        (14.0, 14.0), (1.25, 1.9), (8.5, 4.0), (0.92 * 7 / 9, 0.92), (0.92 * 120 / 128, 0.92),
        (1, 1, 1, 1, 1, .9, .8, .8, .8, .7, .6, .6, .6, .6, .6, .6, .8, .9, .9, .9, .9, 1),
    ),
    Protocol(  # Simple
        (8.4, 8.4), (4.0, 3.4), (14.0, 14.0), (0.92, 1.0), (0.92, 1.0),
        (.9, .9, .9, .9, .9, .9, .9, .8, .7, .6, .6, .5, .5, .5, .5, .6, .7, .8, .7, .7, .8, .9),
    ),
)  # fmt: skip


def all_reduce(network: Network, size: float, devices: int) -> float:
    """Seconds to average ``size`` bytes over ``devices`` with the network's algorithm; 0 for one device.

    >>> quiet = Network(model="alpha-beta", node_gbs=100.0, node_hop_us=0.0, devices_per_node=4)
    >>> all_reduce(quiet, 1e9, 4)  # 2(p−1)/p · M/β
    0.015
    """
    if devices == 1 or size == 0:
        return 0.0
    named = ("ring", "tree", "hierarchical") if network.algorithm == "auto" else (network.algorithm,)
    return min(
        one(network, name, protocol, size, devices) for name in named for protocol in protocols(network)
    )


def protocols(network: Network) -> tuple[Protocol, ...]:
    """The protocols that the network can choose from."""
    if network.model == "nccl":
        return NCCL
    hop, far = network.node_hop_us, network.network_hop_us
    return (Protocol((0, 0), (hop, hop), (far, far), (1, 1), (1, 1)),)


def one(network: Network, algorithm: str, protocol: Protocol, size: float, devices: int) -> float:
    """Seconds of one algorithm with one protocol."""
    per_node = min(devices, network.devices_per_node)
    nodes = ceil(devices / network.devices_per_node)
    if algorithm == "hierarchical" and nodes > 1:
        within = _ring(network, protocol, size, per_node, 1) if per_node > 1 else 0.0
        cards = min(per_node, network.cards_per_node)
        lone = Network(
            devices_per_node=1, cards_per_node=1, node_gbs=network.card_gbs, card_gbs=network.card_gbs
        )
        across = min(
            _ring(lone, protocol, size / cards, nodes, nodes),
            _tree(lone, protocol, size / cards, nodes, nodes),
        )
        return within + across
    shape = _tree if algorithm == "tree" else _ring
    return shape(network, protocol, size, devices, nodes)


def bus(network: Network, nodes: int) -> float:
    """Bus bandwidth in bytes per second: the node's links, limited between nodes by its network cards."""
    between = network.cards_per_node * network.card_gbs
    return 1e9 * (network.node_gbs if nodes == 1 else min(network.node_gbs, between))


def point_to_point(network: Network, size: float) -> float:
    """Seconds to send ``size`` bytes to a device of another node through one network card."""
    hop = min(protocol.network_hop[0] + protocol.base[0] for protocol in protocols(network))
    return hop * 1e-6 + size / (network.card_gbs * 1e9)


def _ring(network: Network, protocol: Protocol, size: float, devices: int, nodes: int) -> float:
    hops, far = 2 * (devices - 1), 2 * (nodes - 1)
    share = protocol.node_share[1] if nodes == 1 else protocol.network_share[1]
    near = protocol.node_hop[1] * (protocol.node_hop_across if nodes > 1 else 1)
    latency = protocol.base[1] + (hops - far) * near + far * protocol.network_hop[1]
    return latency * 1e-6 + hops / devices * size / (share * bus(network, nodes))


def _tree(network: Network, protocol: Protocol, size: float, devices: int, nodes: int) -> float:
    share = protocol.node_share[0] if nodes == 1 else protocol.network_share[0]
    table = protocol.tree_correction
    share *= table[min(len(table) - 1, max(0, floor(log2(max(size, 64) / 64))))]
    near = protocol.node_hop[0] * (protocol.node_hop_across if nodes > 1 else 1)
    latency = protocol.base[0] + 2 * ((devices / nodes - 1) * near + log2(nodes) * protocol.network_hop[0])
    return latency * 1e-6 + 2 * size / (share * bus(network, nodes))
