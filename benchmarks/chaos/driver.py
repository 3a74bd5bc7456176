"""`headrace`, with one weakness: after SIGUSR1 the object store loses the next batch that the learner is sent.

Nothing outside a process can make Ray lose an object that the process owns, short of a machine that dies. So this batch
is owned by an actor that dies before anybody reads it, which is what its readers see of an eviction too.
"""

from __future__ import annotations

import signal
import time
from typing import Any

from cluster.loopback import stay_on_loopback

LOST_S = 30.0


class Owner:
    """Of one object, which dies with it."""

    def put(self, value: Any) -> list[Any]:
        import ray

        return [ray.put(value)]


def lost(value: Any) -> Any:
    """A reference to an object that is gone.

    Raises:
        RuntimeError: it is still there after `LOST_S`.
    """
    import ray
    from ray.exceptions import GetTimeoutError, ObjectLostError

    actor: Any = ray.remote(num_cpus=0)(Owner)
    owner = actor.remote()
    (ref,) = ray.get(owner.put.remote(value), timeout=LOST_S)
    ray.kill(owner)
    expires = time.monotonic() + LOST_S
    while time.monotonic() < expires:
        try:
            ray.get(ref, timeout=1.0)
        except ObjectLostError:
            return ref
        except GetTimeoutError:
            continue
        time.sleep(0.1)  # Ray has not noticed yet
    raise RuntimeError("the object outlived its owner")


def main() -> None:
    stay_on_loopback()

    import ray

    from cluster import cli

    put = ray.put
    to_lose: list[int] = []

    def losing_put(value: Any, *arguments: Any, **options: Any) -> Any:
        if to_lose and isinstance(value, list):
            to_lose.pop()
            return lost(value)
        return put(value, *arguments, **options)

    ray.put = losing_put
    signal.signal(signal.SIGUSR1, lambda number, frame: to_lose.append(number))
    cli.main()


if __name__ == "__main__":
    main()
