"""`headrace serve --stop`: what is removed from a cluster, after what runs has finished; on a real Ray Serve."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from ray import serve
from ray.job_submission import JobStatus, JobSubmissionClient
from typer.testing import CliRunner

from actors.applications import application_names, delete_application, run_application
from cluster.application import Application, until_stopped
from cluster.cli import app
from cluster.progress import Progress
from cluster.stop_serving import stop_serving, take_off
from contracts.config import Config, ConfigError, DeadlinesConfig
from contracts.serving import ServingConfig
from contracts.stopping import StopRequest
from tests.conftest import RunCoroutine
from tests.head import ray_head

SLOW_S = 2.0
FREE: dict[str, Any] = {"ray_actor_options": {"num_cpus": 0}, "graceful_shutdown_timeout_s": 40.0}


def bound(deployment: str) -> serve.Application:
    """One deployment of that name, which takes a while to answer."""

    class Slow:
        async def ask(self) -> str:
            await asyncio.sleep(SLOW_S)
            return "an answer"

    made: Any = serve.deployment(Slow)
    result: serve.Application = made.options(name=deployment, **FREE).bind()
    return result


@pytest.mark.usefixtures("ray_session")
def test_a_policy_and_its_scorers_are_removed_after_what_runs_and_nothing_else(
    tiny_config: Config, run: RunCoroutine
) -> None:
    there = {
        "headrace-serving-old": "versions",
        "headrace-serving-old-score-length": "reward",
        "headrace-serving-old-score-2": "versions",  # a policy of that name
    }
    deadlines = DeadlinesConfig()
    served = Application(tiny_config, ServingConfig(name="old"), (), (), ())

    async def check() -> None:
        await asyncio.gather(
            *(run_application(bound(deployment), name, start_s=120) for name, deployment in there.items())
        )
        try:
            with pytest.raises(
                ConfigError, match="at here serves no policy of the name new; it serves old, old-score-2"
            ):
                await take_off("new", "here", deadlines)
            with Progress(0) as progress:
                serving = asyncio.create_task(until_stopped(served, progress, StopRequest()))  # `headrace serve` there
                handle = serve.get_deployment_handle("versions", "headrace-serving-old")
                asked = handle.ask.remote()
                await asyncio.sleep(SLOW_S / 2)  # it runs now
                assert not serving.done()
                removed = await take_off("old", "here", deadlines)
                assert await asked == "an answer"
                assert removed == ["headrace-serving-old", "headrace-serving-old-score-length"]
                assert set(await application_names(10)) & set(there) == {"headrace-serving-old-score-2"}
                await asyncio.wait_for(serving, 20)
            with pytest.raises(ConfigError, match="serves no policy of the name old; it serves old-score-2"):
                await take_off("old", "here", deadlines)
        finally:
            for name in there:
                await delete_application(name, deadline_s=60)

    run(check())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["serve"], "takes either CONFIG, to serve, or --stop NAME"),
        (["serve", "serve.yaml", "--stop", "policy"], "takes either CONFIG, to serve, or --stop NAME"),
        (
            ["serve", "--stop", "policy", "--address", "http://127.0.0.1:8265"],
            "the address of a Ray cluster is expected",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(arguments: list[str], told: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, ConfigError)
    assert told in str(result.exception)


@pytest.mark.slow
def test_the_command_on_a_cluster(tmp_path: Path) -> None:
    """As `ray job submit` runs it: without an application it says so and ends with 2, with one it ends with 0."""
    (tmp_path / "deploy.py").write_text(
        "from ray import serve\n"
        "serve.start(proxy_location='Disabled')\n"
        "@serve.deployment(name='versions', ray_actor_options={'num_cpus': 0})\n"
        "class Keeper:\n"
        "    pass\n"
        "serve.run(Keeper.bind(), name='headrace-serving-policy', route_prefix=None)\n"
    )
    with ray_head(tmp_path, num_cpus=2) as head:
        jobs = JobSubmissionClient(head)

        def ended(entrypoint: str) -> tuple[int | None, str]:
            job = jobs.submit_job(entrypoint=entrypoint)
            while not jobs.get_job_status(job).is_terminal():
                time.sleep(0.5)
            assert jobs.get_job_status(job) is not JobStatus.STOPPED
            return jobs.get_job_info(job).driver_exit_code, jobs.get_job_logs(job)

        stop = "python -m cluster.cli serve --stop policy"
        status, said = ended(stop)
        assert (status, said.strip().splitlines()[-1]) == (
            2,
            "error: the cluster at auto serves no policy of the name policy; it serves none",
        )
        status, said = ended(f"python {tmp_path / 'deploy.py'}")
        assert status == 0, said
        status, said = ended(stop)
        assert (status, said.strip().splitlines()[-1]) == (0, "removed headrace-serving-policy"), said
        assert ended(stop)[0] == 2


def test_where_no_cluster_answers_one_line_says_so() -> None:
    with Progress(0) as progress, pytest.raises(ConfigError, match=r"--address 127\.0\.0\.1:1: no Ray cluster answers"):
        asyncio.run(stop_serving("policy", "127.0.0.1:1", progress))
