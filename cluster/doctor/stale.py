"""What dead runs left on a Ray cluster, asked in a process of its own: a broken Ray must not break the doctor."""

from __future__ import annotations

import json
import subprocess
import sys

from cluster.doctor.finding import Finding

_ASK = """
import asyncio, json, logging, sys
from cluster.loopback import stay_on_loopback
stay_on_loopback()
import ray
from cluster.presence import dead_runs
ray.init(sys.argv[1], log_to_driver=False, logging_level=logging.ERROR)
print(json.dumps(asyncio.run(dead_runs(deadline_s=20))))
"""
_ASK_S = 60.0


def check_applications(address: str) -> Finding:
    """Serve applications of runs that are dead; the next run there deletes them."""
    name = "Serve applications"
    try:
        asked = subprocess.run(
            [sys.executable, "-c", _ASK, address], capture_output=True, text=True, timeout=_ASK_S, check=False
        )
    except subprocess.TimeoutExpired:
        return Finding(name, "warn", f"the cluster at {address} did not answer within {_ASK_S:g} s", "is it running?")
    if asked.returncode:
        last = (asked.stderr.strip().splitlines() or ["no reason given"])[-1]
        return Finding(name, "warn", f"the cluster at {address} could not be asked: {last}", "is the address right?")
    dead = json.loads(asked.stdout.strip().splitlines()[-1])
    if not dead:
        return Finding(name, "ok", f"none of dead runs at {address}")
    advice = "the next run with this ray.address deletes them"
    return Finding(name, "warn", f"of dead runs at {address}: {', '.join(f'{run}-*' for run in dead)}", advice)
