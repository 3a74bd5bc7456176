"""`headrace pin` and `headrace rollback`: which version a serving application serves, asked over HTTP."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

from contracts.config import ConfigError

_ANSWER_S = 60.0


def pin(url: str, target: str, key: str | None) -> str:
    """What was answered, in one line.

    Raises:
        ConfigError: the target or the key is refused, or nothing of ours answers there.
    """
    if target != "latest" and not (target.isascii() and target.isdigit()):
        raise ConfigError(f"{target!r} is no version: give a number, or latest")
    return _said(_post(url, "pin", {"version": target}, key))


def rollback(url: str, version: int, key: str | None) -> str:
    """As `pin`."""
    return _said(_post(url, "rollback", {"version": version}, key))


def _post(url: str, what: str, body: dict[str, Any], key: str | None) -> dict[str, Any]:
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--url {url}: must begin with http:// or https://")
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(f"{url.rstrip('/')}/v1/versions/{what}", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=_ANSWER_S) as response:
            status: dict[str, Any] = json.load(response)["status"]
    except urllib.error.HTTPError as error:
        raise ConfigError(f"{url}: {_reason(error)}") from None
    except OSError as error:
        raise ConfigError(f"{url}: no answer: {getattr(error, 'reason', error)}") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{url}: what answers there is not headrace serve") from None
    return status


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        return f"{error.code}: {json.load(error)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{error.code} {error.reason}; is this headrace serve?"


def _said(status: dict[str, Any]) -> str:
    return f"serves version {status['current']}" + (
        ", until `headrace pin latest`" if status["held"] else f", follows {status['follow']}"
    )
