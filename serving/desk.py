"""What the routes of an ingress share: replicas by the name of a model, limits, the newest answers, the clock."""

from __future__ import annotations

import asyncio
import importlib
import json
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from contracts.clock import now
from contracts.events import Event, first_line
from contracts.serving import ServingConfig
from contracts.waiting import NoAnswer, answer
from feedback.store import Store
from serving.answers import Answers
from serving.asking import Replicas, tell
from serving.keys import load_keys
from serving.limits import Admission, Rates
from serving.meters import Meters
from serving.protocol import BUSY_S, ApiError, overloaded
from serving.records import LIVE
from serving.wire import Inbox

# A component of the reward: (messages, response) -> (score, version). Raises ValueError for what it cannot score.
Scorer = Callable[[list[dict[str, str]], str], Awaitable[tuple[float, str]]]

KEEPER_S = 10.0
SCORE_S = 60.0
_BUSY_STORE_S = 10.0
_LOOK_AGAIN_S = 1.0
_MOST_BY_VALUE = 3 << 20  # bytes: Serve's replicas take 4 MiB so, and a request is packed a little larger than its body


class Desk:
    """The state of an ingress; its arguments are those of `serving.ingress.Ingress`."""

    def __init__(
        self,
        config: ServingConfig,
        folder: Path,
        live: DeploymentHandle,
        versions: DeploymentHandle,
        pinned: Mapping[int, DeploymentHandle],
        scorers: Mapping[str, tuple[float, Scorer]],
    ) -> None:
        self.config, self.folder, self.versions, self.scorers = config, folder, versions, scorers
        self.keys = load_keys(config.keys)
        self.admission = Admission(config.limits.max_waiting)
        self.meters = Meters(self.admission)
        self.requests = Rates(config.limits.requests_per_minute)
        self.tokens = Rates(config.limits.tokens_per_minute)
        self.answers = Answers(config.answers_kept)
        self.store = Store(config.feedback or folder / "feedback.sqlite", busy_s=_BUSY_STORE_S)
        self.began_s = int(time.time())
        slots = {LIVE: live} | {f"pinned-{version}": handle for version, handle in pinned.items()}
        self.inbox = Inbox()
        self.on_one_machine = False  # until `watch_versions` has looked
        self.http: asyncio.Task[None] | None = None  # the server in this process, where there is one
        self.slots = {
            slot: Replicas(
                slot,
                each,
                retries=config.first_token_retries,
                meters=self.meters,
                inbox=self.inbox,
                on_one_machine=lambda: self.on_one_machine and config.limits.max_body_bytes <= _MOST_BY_VALUE,
            )
            for slot, each in slots.items()
        }
        for slot in self.slots:
            replicas = config.replicas.min_replicas if slot == LIVE else 1
            self.admission.set_places(slot, replicas * config.replicas.max_running)
        self._redact = _function(config.redact) if config.redact else str

    def replicas(self, model: str) -> Replicas:
        """Those that NAME or NAME@VERSION asks for.

        Raises:
            ApiError: 404, with the names that there are.
        """
        name, at, version = model.partition("@")
        slot = f"pinned-{version}" if at else LIVE
        if name == self.config.name and slot in self.slots:
            return self.slots[slot]
        what = f"version {version}" if name == self.config.name else f"model {name!r:.80}"
        known = ", ".join(self.models())
        raise ApiError(
            404, f"{what:.100} is not served here, ask for one of: {known}", param="model", code="model_not_found"
        )

    def models(self) -> dict[str, str]:
        """Slots by the names that they are asked for."""
        name = self.config.name
        return {name if slot == LIVE else f"{name}@{slot.removeprefix('pinned-')}": slot for slot in self.slots}

    @contextmanager
    def token_budget(self, caller: str, reserved: float) -> Iterator[Callable[[float], None]]:
        """`reserved` tokens of the caller's rate; what is yielded is told how many it became.

        Raises:
            ApiError: 429.
        """
        wait_s = self.tokens.take(caller, reserved, now_s=now())
        if wait_s:
            message = f"too many tokens with this key: ask again in {wait_s:.1f} s, or for a smaller max_tokens"
            raise ApiError(429, message, code="rate_limit_exceeded", retry_after_s=wait_s)
        used = 0.0

        def tell_used(tokens: float) -> None:
            nonlocal used
            used = tokens

        try:
            yield tell_used
        finally:
            self.tokens.settle(caller, reserved, used, now_s=now())

    @contextmanager
    def place(self, slot: str) -> Iterator[None]:
        """A place in an engine, or one among those that wait for it.

        Raises:
            ApiError: 503 at once, where too many wait already.
        """
        if not self.admission.enter(slot):
            raise overloaded(self.admission.waiting)
        try:
            yield
        finally:
            self.admission.leave(slot)

    async def ask_keeper(self, method: str, *arguments: Any) -> Any:
        """What the version keeper says.

        Raises:
            ApiError: 400 with its words where it refuses, 503 where it does not answer.
        """
        call = getattr(self.versions, method).remote(*arguments)
        try:
            return await answer(call, who="the version keeper", asked=method, deadline_s=KEEPER_S)
        except ValueError as error:  # through Ray it is a RayTaskError too, with a traceback for its text
            said = str(getattr(error, "cause", error))
            raise ApiError(400, said, param="version", code="unknown_version") from error
        except (RayError, RayServeException, NoAnswer) as error:
            tell(Event("refusal", "the version keeper", first_line(error), f"{method} is answered with 503"))
            message = "the version keeper does not answer now: ask again later"
            raise ApiError(503, message, code="keeper_lost", retry_after_s=BUSY_S) from error

    async def watch_versions(self) -> None:
        """Keep the number of places and the versions in the metrics as the keeper says they are. Never ends."""
        while True:
            await self._count_machines()
            try:
                status = await self.ask_keeper("status")
            except ApiError:
                status = {"replicas": []}  # `ask_keeper` has told; the places stay as they were
            found = [
                replica
                for replica in status["replicas"]
                if replica["slot"] in self.slots and replica["state"] != "starting"  # it answers nobody yet
            ]
            counts = {slot: sum(replica["slot"] == slot for replica in found) for slot in self.slots}
            for slot, count in counts.items():
                if count:
                    self.admission.set_places(slot, count * self.config.replicas.max_running)
            for replica in found:
                if replica["version"] is not None:
                    self.meters.version(replica["slot"], replica["version"])
            self.meters.replicas(counts)
            await asyncio.sleep(_LOOK_AGAIN_S)

    async def _count_machines(self) -> None:
        """Ray's own processes answer at once; where they do not, nothing is known of other machines."""
        try:
            nodes = await answer(asyncio.to_thread(ray.nodes), who="Ray", asked="name its nodes", deadline_s=KEEPER_S)
        except (RayError, NoAnswer) as error:
            if self.on_one_machine:
                tell(Event("lost", "Ray", first_line(error), "requests go through Ray until it answers"))
            self.on_one_machine = False
        else:
            self.on_one_machine = sum(node["Alive"] for node in nodes) == 1

    def log_prompt(self, **said: Any) -> None:
        """A line in prompts.jsonl, only with `log_prompts`; every text in it has gone through `redact`."""
        if not self.config.log_prompts:
            return
        try:
            line = json.dumps({"time": time.time(), **_redacted(said, self._redact)})
            with (self.folder / "prompts.jsonl").open("a", encoding="utf-8") as out:
                out.write(line + "\n")
        except Exception as error:  # noqa: BLE001 - `redact` is the user's: without it nothing is logged, and we go on
            tell(Event("refusal", "prompts.jsonl", first_line(error), "a prompt is not logged"))


def new_answer_id(kind: str) -> str:
    return f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{secrets.token_hex(16)}"


def _redacted(said: Any, redact: Callable[[str], str]) -> Any:
    if isinstance(said, dict):
        return {name: value if name in ("id", "model") else _redacted(value, redact) for name, value in said.items()}
    if isinstance(said, list):
        return [_redacted(value, redact) for value in said]
    return redact(said) if isinstance(said, str) else said


def _function(path: str) -> Callable[[str], str]:
    """The function that `module:function` names."""
    module, _, name = path.partition(":")
    function: Callable[[str], str] = getattr(importlib.import_module(module), name)
    return function
