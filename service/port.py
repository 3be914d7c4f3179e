"""The socket the service listens on, opened before anything slow is even imported. Knows no HTTP."""

from __future__ import annotations

import socket

LISTEN_BACKLOG = 2048


class PortError(Exception):
    """The address cannot be listened on; the message is one line for the operator."""


def open_port(host: str, port: int) -> socket.socket:
    """A socket bound to `host` and `port` (0: a free one).

    Raises:
        PortError: the address is taken, unknown or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            bound.listen(LISTEN_BACKLOG)
        except OSError:
            bound.close()
            raise
    except OSError as error:
        raise PortError(
            f"--host={host} --port={port} is not possible: {error.strerror or error}; free the port or choose another "
            "(--port 0 picks a free one)"
        ) from error
    return bound
