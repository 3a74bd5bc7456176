"""The address at which an application on Ray Serve is asked: free, and open."""

from __future__ import annotations

import logging
import socket

from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation

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


def start_http(host: str, port: int) -> None:
    """Ray Serve with a proxy for HTTP, on the head.

    Raises:
        ConfigError: Serve runs on this cluster without one, and cannot get one any more.
    """
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    options = HTTPOptions(host=host, port=port, location=ProxyLocation.HeadOnly)
    serve.start(http_options=options, logging_config={"log_level": "ERROR"})
    if not serve.status().proxies:
        raise ConfigError(
            "Ray Serve runs on this cluster already, without HTTP: stop it with `serve shutdown` when nothing needs "
            "it, or serve on another cluster"
        )


def url_of(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
