"""The environment of ranks that are started on one machine, as torchrun sets it; `launcher` is what reads it."""

from __future__ import annotations

import socket
from collections.abc import Mapping

HOST = "127.0.0.1"


def rank_environments(
    environment: Mapping[str, str], count: int
) -> list[dict[str, str]]:
    """`environment` for each of `count` ranks; a single process has none of a launcher's variables."""
    if count == 1:
        return [dict(environment)]
    port = free_port()
    return [
        {**environment, **rank_variables(rank, count, port)} for rank in range(count)
    ]


def rank_variables(rank: int, count: int, port: int) -> dict[str, str]:
    """What a launcher on this machine puts into the environment of a rank; the ranks meet at `port`."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port
