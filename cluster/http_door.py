"""The address at which an application on Ray Serve is asked: free, and open."""

from __future__ import annotations

import socket

from contracts.config import ConfigError


def check_port(host: str, port: int, *, section: str) -> None:
    """Raises ConfigError where another program listens there already, or the machine has no such address.

    `section` is that of the configuration with `host` and `port`.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            message = f"cannot listen on {host}:{port}: {error.strerror}"
            raise ConfigError(f"{message}; set {section}.port or {section}.host to another") from None


def url_of(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
