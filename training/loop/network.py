"""Which network the processes of several nodes find each other over, where gloo would take the wrong one.

The votes of a run (`training.loop.distributed.StopVote`) travel over gloo, which binds to what the host's own name
resolves to: on many installations 127.0.1.1, which no other node reaches.
"""

import ipaddress
import os
import socket
from collections.abc import Iterator

# Nobody's address (RFC 5737): the way there is the default route. Nothing is sent.
_ANYWHERE = "192.0.2.1"


def choose_gloo_interface() -> None:
    """Sets `GLOO_SOCKET_IFNAME` for the processes of several nodes, unless it is set.

    It becomes the interface that NCCL is told to use, else that towards the first node, else that of the default route.
    Where there is none of these, gloo is left to itself.
    """
    several_nodes = os.environ.get("WORLD_SIZE", "1") != os.environ.get(
        "LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")
    )
    if several_nodes and "GLOO_SOCKET_IFNAME" not in os.environ:
        for name in _candidates():
            os.environ["GLOO_SOCKET_IFNAME"] = name
            return


def _candidates() -> Iterator[str]:
    import psutil  # which accelerate needs

    interfaces = psutil.net_if_addrs()
    told = os.environ.get("NCCL_SOCKET_IFNAME", "")
    for prefix in () if told.startswith("^") else told.removeprefix("=").split(","):  # "^": all but these
        yield from (name for name in sorted(interfaces) if prefix and name.startswith(prefix))
    for host in (os.environ.get("MASTER_ADDR", _ANYWHERE), _ANYWHERE):
        own = _own_address_towards(host)
        if own and not ipaddress.ip_address(own).is_loopback:
            yield from (name for name, all_of in interfaces.items() if own in {each.address for each in all_of})


def _own_address_towards(host: str) -> str | None:
    """This host's address on the way to `host`; None where there is no way."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # of a datagram: looks the route up and sends nothing
            return str(probe.getsockname()[0]).partition("%")[0]
    except OSError:
        return None
