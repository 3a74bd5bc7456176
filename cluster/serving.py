"""Training publishes into a serving application on the same cluster, and is never held up by it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from actors.delivery import Published
from contracts.events import Event, first_line
from contracts.serving import ServingConfig
from contracts.waiting import NoAnswer, answer
from serving.records import VERSIONS

_WHO = "the serving application"
_FAILED = (NoAnswer, RayError, RayServeException, OSError, ValueError)  # it is away, or has refused


async def find_keeper(config: ServingConfig, *, deadline_s: float) -> Any:
    """The version keeper of the running application.

    Raises:
        RayServeException: there is none.
        NoAnswer: Ray Serve did not say.
    """
    found = asyncio.to_thread(serve.get_deployment_handle, VERSIONS, config.application, _check_exists=True)
    return await answer(found, who="Ray Serve", asked=f"find {config.application}", deadline_s=deadline_s)


class ServingLink:
    """Sends each published version to the keeper, one at a time, beside the training.

    A version that comes while another is on its way is not sent by itself: a keyframe of the newest follows. The same
    after a failure: the next version is tried with a keyframe.

    Args:
        keeper: finds the version keeper; called before each version until it was found.
        keyframe: the newest version, complete in itself (`LearnerGroup.keyframe`).
    """

    def __init__(
        self,
        keeper: Callable[[], Awaitable[Any]],
        keyframe: Callable[[], Awaitable[Published]],
        *,
        deadline_s: float,
        on_event: Callable[[Event], None],
    ) -> None:
        self._find, self._keyframe, self._deadline_s, self._on_event = keeper, keyframe, deadline_s, on_event
        self._keeper: Any = None
        self._sending: asyncio.Task[None] | None = None
        self._behind = False  # a version came while another was on its way
        self._complete = False  # the next has to be a keyframe

    def publish(self, published: Published) -> None:
        """Begin to send a version, and return at once."""
        if self._sending is not None and not self._sending.done():
            self._behind = True
            return
        self._sending = asyncio.ensure_future(self._send(published))

    async def roll_back(self, version: int) -> None:
        """Let serving go back to `version` and stay there; where it cannot, an event says so.

        One that serves an older version, because it follows each N-th or its gate has not judged the newest, stays
        at that.
        """
        await self.finish()
        try:
            keeper = await self._found()
            served = (await self._asked(keeper.status.remote(), "say what it serves"))["current"]
            hold = keeper.rollback.remote(version) if served > version else keeper.pin.remote(str(served))
            served = (await self._asked(hold, f"go back to version {version}"))["current"]
        except _FAILED as error:
            self._keeper = None
            self._on_event(Event("refusal", _WHO, _cause(error), f"it was not brought back to version {version}"))
        else:
            self._on_event(Event("roll_back", _WHO, "an alarm", f"it serves version {served} until told otherwise"))

    async def finish(self) -> None:
        """Wait until what is on its way has arrived, or failed: each part of it has a deadline."""
        if self._sending is not None:
            await self._sending

    async def _send(self, published: Published) -> None:
        version = published[0].version
        while True:
            try:
                if self._complete or self._behind:
                    self._behind = False
                    published = await self._keyframe()
                version = published[0].version
                wants_keyframe = await self._sent(published)
            except _FAILED as error:
                self._complete, self._keeper = True, None
                consequence = f"it does not have version {version}, and gets the next one with a keyframe"
                self._on_event(Event("refusal", _WHO, _cause(error), consequence))
                return
            self._complete = wants_keyframe
            if not self._behind and (not wants_keyframe or published[0].is_keyframe):
                return

    async def _sent(self, published: Published) -> bool:
        update, payload = published
        keeper = await self._found()
        wants_keyframe: bool = await self._asked(
            keeper.publish.remote(update, payload), f"take version {update.version}"
        )
        return wants_keyframe

    async def _found(self) -> Any:
        if self._keeper is None:
            self._keeper = await self._find()
        return self._keeper

    async def _asked(self, call: Awaitable[Any], asked: str) -> Any:
        return await answer(call, who=_WHO, asked=asked, deadline_s=self._deadline_s)


def _cause(error: Exception) -> str:
    """What the keeper said itself: through Ray its errors begin with where they were raised."""
    return first_line(error.cause if isinstance(error, RayTaskError) else error)
