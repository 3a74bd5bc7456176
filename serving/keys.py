"""API keys: random, shown once, kept as hashes; each may do what its scopes say.

A key's line, in the file `serving.keys` or in HEADRACE_API_KEYS (there lines may also be separated by `;`):
`NAME SCOPE[,SCOPE...] sha256:HASH`. Empty lines and those that begin with # say nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from contracts.config import ConfigError

Scope = Literal["chat", "score", "feedback", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
ENVIRONMENT = "HEADRACE_API_KEYS"
_PREFIX = "hr-"
_LINE = re.compile(r"(?P<name>[\w.@-]{1,100})\s+(?P<scopes>[\w,]+)\s+sha256:(?P<hash>[0-9a-f]{64})")
_LOCAL_NAMES = {"localhost", "127.0.0.1", "[::1]"}


@dataclass(frozen=True)
class Key:
    """Who calls, and what they may do. `hash` is empty where no key was needed."""

    name: str
    scopes: frozenset[str]
    hash: str = ""

    @property
    def line(self) -> str:
        return f"{self.name} {','.join(scope for scope in SCOPES if scope in self.scopes)} sha256:{self.hash}"


LOCAL = Key("local", frozenset(SCOPES))


class Keys:
    """All keys of an application; none at all lets callers from this machine in."""

    def __init__(self, keys: Iterable[Key]) -> None:
        self._keys = tuple(keys)

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, presented: str) -> Key | None:
        """The key that this is. Compared with every one in constant time: how long it takes tells nothing."""
        presented_hash = key_hash(presented)
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.hash, presented_hash):
                found = key
        return found


def load_keys(path: Path | None, environment: Mapping[str, str] = os.environ) -> Keys:
    """The keys of the file and of HEADRACE_API_KEYS.

    Raises:
        ConfigError: a file that is not there or says nothing, a line that is none, or a name that comes twice.
    """
    found: dict[str, Key] = {}
    sources = [(ENVIRONMENT, environment.get(ENVIRONMENT, "").replace(";", "\n"))]
    if path is not None:
        try:
            sources.append((str(path), path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"serving.keys: {path} cannot be read: {error}") from error
    for source, text in sources:
        for key in _parse(source, text):
            if key.name in found:
                raise ConfigError(f"{source}: there are two keys {key.name!r}: every key needs a name of its own")
            found[key.name] = key
    if path is not None and not found:
        raise ConfigError(f"serving.keys: {path} holds no key: make one with `headrace key NAME --file {path}`")
    return Keys(found.values())


def _parse(source: str, text: str) -> list[Key]:
    keys = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:  # without the line itself: it may be a key in plain text
            raise ConfigError(f"{source}, line {number}: is not `NAME SCOPE[,SCOPE...] sha256:HASH`")
        keys.append(Key(match["name"], check_scopes(match["scopes"], f"{source}, line {number}"), match["hash"]))
    return keys


def check_scopes(text: str, source: str = "--scopes") -> frozenset[str]:
    """`chat,score` as a set.

    Raises:
        ConfigError: one of them is unknown.
    """
    scopes = frozenset(text.split(","))
    unknown = sorted(scopes - set(SCOPES))
    if unknown:
        raise ConfigError(f"{source}: scope {unknown[0]!r} is unknown, allowed are {', '.join(SCOPES)}")
    return scopes


def make_key(name: str, scopes: str, file: Path | None) -> tuple[str, Key]:
    """A new key (shown here and never again) and what is kept of it, which is added to `file`.

    Raises:
        ConfigError: a name or scope that is none, or a name that the file has already.
    """
    secret = _PREFIX + secrets.token_urlsafe(32)
    key = Key(name, check_scopes(scopes), key_hash(secret))
    if not _LINE.fullmatch(key.line):
        raise ConfigError(f"NAME: {name!r} is not allowed: 1 to 100 letters, digits and . @ _ -")
    if file is not None:
        before = file.read_text(encoding="utf-8") if file.exists() else ""
        if name in {known.name for known in _parse(str(file), before)}:
            raise ConfigError(f"{file}: has a key {name!r} already: take its line out first, or choose another name")
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as out:
            out.write(("" if before.endswith("\n") or not before else "\n") + key.line + "\n")
    return secret, key


def key_hash(secret: str) -> str:
    """Keys are 256 random bits: no salt and no slow hash are needed, nobody can guess one."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def is_local(client: str | None, headers: Mapping[str, str]) -> bool:
    """Whether a request comes from this machine and from nobody behind it.

    A proxy here forwards callers from anywhere, and a page in a browser here can be made to call under another name.
    """
    host = headers.get("host", "localhost")
    name = host if host.endswith("]") else host.rsplit(":", 1)[0]
    if name not in _LOCAL_NAMES or {"forwarded", "x-forwarded-for", "x-real-ip"} & set(headers):
        return False
    try:
        return ipaddress.ip_address(client or "").is_loopback
    except ValueError:
        return False
