"""Runs on a shared cluster: what a dead one left in Serve is named by the doctor and deleted by the next run."""

import asyncio
import subprocess
import sys

import pytest
import ray
from ray import serve

from actors.applications import application_names
from cluster.doctor import stale
from cluster.presence import dead_runs, reap
from tests.command import Processes
from tests.conftest import RunCoroutine

DEAD, ALIVE = "headrace-deadbeef", "headrace-a11ce000"

RUN = """
import asyncio, sys, time
from cluster.loopback import stay_on_loopback
stay_on_loopback()
import pytest
import ray
from ray import serve
from cluster.presence import announce
address, run_id = sys.argv[1:]
ray.init(address, log_to_driver=False)
presence = asyncio.run(announce(run_id, deadline_s=60))

@serve.deployment(ray_actor_options={"num_cpus": 0})
class Nothing: ...

serve.run(Nothing.bind(), name=f"{run_id}-reference", route_prefix=None)
print("up", flush=True)
time.sleep(600)
"""


def driver(address: str, run_id: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", RUN, address, run_id], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    return process


@pytest.mark.slow
def test_applications_of_a_killed_driver_are_named_and_deleted_and_no_others(
    ray_session: Processes, run: RunCoroutine
) -> None:
    address = ray.get_runtime_context().gcs_address
    drivers = [driver(address, DEAD), driver(address, ALIVE)]
    try:
        names = [f"{ALIVE}-reference", f"{DEAD}-reference"]
        assert set(run(application_names(60))) >= set(names)
        assert run(dead_runs(deadline_s=60)) == []
        drivers[0].kill()
        drivers[0].wait(30)
        run(until_dead(DEAD))

        finding = stale.check_applications(address)
        assert (finding.status, finding.detail) == ("warn", f"of dead runs at {address}: {DEAD}-*")
        assert run(reap(deadline_s=60)) == [DEAD]
        left = run(application_names(60))
        assert f"{DEAD}-reference" not in left
        assert f"{ALIVE}-reference" in left
        assert stale.check_applications(address).status == "ok"
    finally:
        for each in drivers:
            each.kill()
            each.wait(30)
        for run_id in (DEAD, ALIVE):
            serve.delete(f"{run_id}-reference")


async def until_dead(run_id: str) -> None:
    """Ray takes a moment to notice that a driver is gone."""
    for _ in range(300):
        if await dead_runs(deadline_s=60) == [run_id]:
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"{run_id} still counts as alive")
