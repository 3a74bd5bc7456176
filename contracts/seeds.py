"""Independent random streams from one seed."""

import hashlib


def derive_seed(seed: int, *purpose: int | str) -> int:
    """A 63-bit seed for one purpose of a run: equal arguments, equal seed, on every machine and every version."""
    data = "/".join(map(str, (seed, *purpose))).encode()
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") >> 1
