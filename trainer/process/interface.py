"""The network interface of gloo: the one that leads to MASTER_ADDR, where the user has set none.

By itself gloo takes the address of the machine's name, which is often a loopback address or that of another network.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from ipaddress import ip_address

from trainer.errors import ConfigError
from trainer.process import launcher

VARIABLE = "GLOO_SOCKET_IFNAME"


def choose_gloo_interface() -> None:
    """Set GLOO_SOCKET_IFNAME for this process, unless it is set or there is one process only.

    Raises `ConfigError` where the way to the other machines cannot be told from MASTER_ADDR.
    """
    master = os.environ.get("MASTER_ADDR", "")
    if launcher.world_size() == 1 or not master or os.environ.get(VARIABLE):
        return
    address = _own_address_towards(master)
    if address is None:
        return  # joining fails, and says that the address is not known
    interfaces = _interfaces()
    is_on_several_machines = launcher.world_size() > launcher.local_world_size()
    if is_on_several_machines and ip_address(address).is_loopback:
        # This is rank 0's machine, and its own name leads to itself: 127.0.1.1 in /etc/hosts, for example.
        interfaces = {
            other: name
            for other, name in interfaces.items()
            if not ip_address(other).is_loopback
        }
        names = sorted(set(interfaces.values()))
        if len(names) != 1:
            listing = (
                ", ".join(f"{name} ({other})" for other, name in interfaces.items())
                or "none"
            )
            raise ConfigError(
                "MASTER_ADDR",
                f"{master} is a loopback address on {socket.gethostname()}, which other machines cannot reach; set "
                f"{VARIABLE} to the interface that leads to them, one of {listing}",
            )
        os.environ[VARIABLE] = names[0]
    elif address in interfaces:
        os.environ[VARIABLE] = interfaces[address]


def _own_address_towards(host: str) -> str | None:
    """This machine's address on the way to `host`; None if there is no way. No packet is sent."""
    with suppress(OSError):
        family, kind, _, _, target = socket.getaddrinfo(
            host, 9, type=socket.SOCK_DGRAM
        )[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)
            address: str = probe.getsockname()[0]
            return address
    return None


def _interfaces() -> dict[str, str]:
    """The names of the network interfaces that are up, by their addresses."""
    import psutil  # type: ignore[import-untyped]

    states = psutil.net_if_stats()
    names: dict[str, str] = {}
    for name, addresses in psutil.net_if_addrs().items():
        if name in states and not states[name].isup:
            continue
        for entry in addresses:
            if entry.family in (socket.AF_INET, socket.AF_INET6):
                names[entry.address.partition("%")[0]] = name
    return names
