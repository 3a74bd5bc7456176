"""Training publishes into a serving application that is slow, absent or damaged, and goes on; `headrace pin`."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.serve.exceptions import RayServeException
from typer.testing import CliRunner

from cluster.cli import app
from cluster.serving import ServingLink
from cluster.versions_command import pin, rollback
from contracts.config import ConfigError
from contracts.events import Event
from contracts.serving import ServingConfig
from models.engine_shadow import policy_tensors
from serving.records import StartWeights
from serving.versions import VersionKeeper
from tests.conftest import RunCoroutine
from tests.serving.published import KEY, Trainer
from tests.serving.test_versions import Here
from tests.serving.test_versions import ends as keeper_and_replicas


class Ends:
    """A trainer's link to a keeper, which can be absent or slow."""

    def __init__(self, model: Path, folder: Path, **serving: Any) -> None:
        self.trainer = Trainer(start=policy_tensors(str(model), "bfloat16"))
        self.keeper = VersionKeeper(ServingConfig(**serving), folder, StartWeights(str(model), 0), key=KEY)
        self.absent, self.slow_s = False, 0.0
        self.events: list[Event] = []
        self.link = ServingLink(self.find, self.keyframe, deadline_s=1.0, on_event=self.events.append)

    async def find(self) -> Any:
        if self.absent:
            raise RayServeException("there is no such application")
        return Here(self)

    async def publish(self, update: Any, frames: Any) -> bool:
        await asyncio.sleep(self.slow_s)
        return await self.keeper.publish(update, frames)

    async def status(self) -> dict[str, Any]:
        await asyncio.sleep(self.slow_s)
        return await self.keeper.status()

    async def rollback(self, version: int) -> dict[str, Any]:
        return await self.keeper.rollback(version)

    async def pin(self, target: str) -> dict[str, Any]:
        return await self.keeper.pin(target)

    async def keyframe(self) -> Any:
        return self.put(*self.trainer.keyframe())

    def put(self, frames: Any, update: Any) -> Any:
        return update, [ray.put(np.frombuffer(frame, np.uint8)) for frame in frames]

    def train(self) -> None:
        self.link.publish(self.put(*self.trainer.delta()))

    async def train_and_send(self, num: int) -> None:
        for _ in range(num):
            self.train()
            await self.link.finish()

    async def held(self) -> Any:
        return (await self.keeper.status())["versions"]

    async def served(self) -> tuple[int, bool]:
        """The current version, and whether it stays."""
        status = await self.keeper.status()
        return status["current"], status["held"]


@pytest.mark.usefixtures("ray_session")
def test_training_goes_on_whatever_the_application_does(tiny_model: Path, tmp_path: Path, run: RunCoroutine) -> None:
    async def check() -> None:
        ends = Ends(tiny_model, tmp_path)
        ends.train()
        await ends.link.finish()
        assert await ends.held() == [0, 1]
        ends.link._keeper, ends.absent = None, True
        ends.train()
        await ends.link.finish()
        (event,) = ends.events
        assert (event.event, event.who, event.cause) == (
            "refusal",
            "the serving application",
            "there is no such application",
        )
        assert "does not have version 2" in event.consequence
        ends.absent = False
        ends.train()
        await ends.link.finish()
        assert await ends.held() == [0, 1, 3]  # a keyframe
        ends.slow_s = 3.0
        ends.train()
        await ends.link.finish()
        assert "the serving application did not answer within 1 s" in ends.events[-1].cause
        ends.slow_s = 0.5
        for _ in range(3):  # all but the first while it is on its way
            ends.train()
            await asyncio.sleep(0.1)
        await ends.link.finish()
        assert (await ends.held())[-1] == 7
        assert len(ends.events) == 2

    run(check())


@pytest.mark.usefixtures("ray_session")
def test_an_alarm_takes_the_served_policy_back_and_it_stays_there(
    tiny_model: Path, tmp_path: Path, run: RunCoroutine
) -> None:
    async def check() -> None:
        ends = Ends(tiny_model, tmp_path)
        await ends.train_and_send(3)
        ends.train()  # on its way when the alarm comes
        await ends.link.roll_back(2)
        assert await ends.served() == (2, True)
        await ends.train_and_send(1)
        assert await ends.served() == (2, True)
        assert (await ends.held())[-1] == 5
        assert [(event.event, event.consequence) for event in ends.events] == [
            ("roll_back", "it serves version 2 until told otherwise")
        ]
        rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
        assert [(row["version"], row["status"]) for row in rows[-2:]] == [(2, "rolled_back"), (5, "published")]
        assert rows[-2]["reason"] == "asked to go back from version 4"

    run(check())


@pytest.mark.usefixtures("ray_session")
def test_an_older_policy_than_the_alarm_asks_for_stays_and_no_newer_one_follows(
    tiny_model: Path, tmp_path: Path, run: RunCoroutine
) -> None:
    async def check() -> None:
        ends = Ends(tiny_model, tmp_path, follow="every:2")
        await ends.train_and_send(3)
        assert await ends.served() == (2, False)
        await ends.link.roll_back(3)
        await ends.train_and_send(1)  # would be followed
        assert await ends.served() == (2, True)
        assert [event.consequence for event in ends.events] == ["it serves version 2 until told otherwise"]

    run(check())


@pytest.mark.usefixtures("ray_session")
def test_a_version_that_is_gone_cannot_be_gone_back_to_and_training_goes_on(
    tiny_model: Path, tmp_path: Path, run: RunCoroutine
) -> None:
    async def check() -> None:
        ends = Ends(tiny_model, tmp_path, keep_versions=2, keyframe_every=1)
        await ends.train_and_send(6)
        held = await ends.held()
        assert 2 not in held
        await ends.link.roll_back(2)
        (event,) = ends.events
        assert event.event == "refusal"
        assert event.cause.startswith("the weights of version 2 are not here; there are ")
        assert event.consequence == "it was not brought back to version 2"
        assert await ends.served() == (6, False)
        await ends.train_and_send(1)
        assert await ends.served() == (7, False)
        assert len(ends.events) == 1

    run(check())


@pytest.mark.usefixtures("ray_session")
def test_a_keeper_that_is_silent_or_away_holds_no_roll_back_up(
    tiny_model: Path, tmp_path: Path, run: RunCoroutine
) -> None:
    async def check() -> None:
        ends = Ends(tiny_model, tmp_path)
        await ends.train_and_send(2)
        ends.slow_s = 30.0
        await asyncio.wait_for(ends.link.roll_back(1), 10)  # the link's deadline is 1 s
        ends.slow_s, ends.absent = 0.0, True
        await ends.link.roll_back(1)
        assert [(event.event, event.consequence) for event in ends.events] == [
            ("refusal", "it was not brought back to version 1")
        ] * 2
        assert "the serving application did not answer within 1 s" in ends.events[0].cause
        assert ends.events[1].cause == "there is no such application"
        assert await ends.served() == (2, False)
        ends.absent = False
        await ends.train_and_send(1)
        assert await ends.served() == (3, False)
        assert len(ends.events) == 2

    run(check())


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_what_a_keeper_refuses_is_told_in_its_own_words_through_ray(
    tiny_model: Path, tmp_path: Path, run: RunCoroutine
) -> None:
    async def check() -> None:
        async with keeper_and_replicas(tiny_model, tmp_path, served=True) as all_:
            events: list[Event] = []

            async def find() -> Any:
                return all_.keeper

            async def keyframe() -> Any:
                raise AssertionError("nothing is published here")

            link = ServingLink(find, keyframe, deadline_s=30.0, on_event=events.append)
            all_.trainer.delta()  # version 1, which nobody gets
            all_.trainer.delta()
            await all_.send(*all_.trainer.keyframe())
            await link.roll_back(1)
            await link.roll_back(0)
            assert [event.event for event in events] == ["refusal", "roll_back"]
            assert events[0].cause == "the weights of version 1 are not here; there are 0, 2"
            assert (await all_.keeper.status.remote())["current"] == 0

    run(check())


@contextmanager
def http_server(status: int, body: bytes) -> Iterator[tuple[str, list[Any]]]:
    """Answers every POST with that; and what was asked."""
    asked: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            asked.append((self.path, json.loads(content), self.headers["Authorization"]))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


def test_pin_and_rollback_ask_over_http_and_say_what_is_served() -> None:
    status = {"current": 3, "held": True, "follow": "latest"}
    with http_server(200, json.dumps({"status": status}).encode()) as (url, asked):
        runner = CliRunner()
        said = runner.invoke(app, ["pin", "3", "--url", url, "--key", "hr-secret"])
        assert (said.exit_code, said.output) == (0, "serves version 3, until `headrace pin latest`\n")
        assert runner.invoke(app, ["rollback", "3", "--url", f"{url}/"]).exit_code == 0
        assert pin(url, "latest", None)
    assert asked == [
        ("/v1/versions/pin", {"version": "3"}, "Bearer hr-secret"),
        ("/v1/versions/rollback", {"version": 3}, None),
        ("/v1/versions/pin", {"version": "latest"}, None),
    ]


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (401, b'{"error": {"message": "no such key"}}', "401: no such key"),
        (404, b"<html>", "404 Not Found; is this headrace serve"),
        (200, b"<html>", "what answers there is not headrace serve"),
        (200, b"[]", "what answers there is not headrace serve"),
    ],
)
def test_what_is_refused_is_told_in_one_line(status: int, body: bytes, told: str) -> None:
    with http_server(status, body) as (url, _), pytest.raises(ConfigError, match=told):
        rollback(url, 3, None)


@pytest.mark.parametrize(
    ("url", "target", "told"),
    [
        ("http://127.0.0.1:1", "3", "127.0.0.1:1: no answer: .*refused"),
        ("file:///etc/passwd", "3", "must begin with http"),
        ("http://127.0.0.1:1", "newest", "'newest' is no version: give a number, or latest"),
    ],
)
def test_what_cannot_be_asked_is_told_in_one_line(url: str, target: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        pin(url, target, None)
