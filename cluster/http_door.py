"""The address at which an application on Ray Serve is asked: free, and open."""

from __future__ import annotations

from contracts.config import ConfigError
from serving.listening import listen


def check_port(host: str, port: int, *, section: str) -> None:
    """Raises ConfigError where another program listens there already, or the machine has no such address.

    `section` is that of the configuration with `host` and `port`.
    """
    try:
        listen(host, port).close()
    except RuntimeError as error:
        raise ConfigError(f"{error}; set {section}.port or {section}.host to another") from None


def url_of(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
