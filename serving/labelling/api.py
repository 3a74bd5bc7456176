"""The API that the labelling page speaks, and anything else that labels.

Whoever asks says who they are with `Authorization: Bearer TOKEN` (`Store.register` gives tokens out). The store is one
SQL database, so everything that must not happen twice or at once is settled there; this is the door.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI
from fastapi.responses import FileResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, ConfigDict
from ray import serve

from contracts.labelling import LabellingConfig
from contracts.waiting import answer
from feedback.store import Receipt, Refused, Store
from serving.labelling import views
from serving.labelling.errors import Guard, answer_errors
from serving.listening import ON_THE_HEAD, listen, serving_http

T = TypeVar("T")
# The store refuses a writer that waited for so long, before the request's own deadline would leave it unclear.
BUSY_SHARE = 0.5
bearer = HTTPBearer(auto_error=False, description="the annotator's token")
Bearer = Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]


class Undo(BaseModel):
    """Taking a vote back."""

    model_config = ConfigDict(extra="forbid", strict=True)

    idempotency_key: str


class Desk:
    """The store, behind a thread of its own, so that its calls, which block, hold nobody else up.

    One thread: writers of an SQLite file take turns, and SQLite's own queue sleeps and is not fair (with 8 threads the
    slowest of 8 annotators waited 1.9 s, not 0.3). A call waits for its turn and for other processes that write; it
    gives up after `request_s`. One that had begun then still ends by itself (`busy_s`), so a vote may be in that was
    answered with 503: sending it again with its key tells.
    """

    def __init__(self, config: LabellingConfig) -> None:
        self.config = config
        self.store = Store(config.store, busy_s=config.request_s * BUSY_SHARE)
        self.guidelines = views.guidelines(config.guidelines)
        self.offensive = views.offensive_words(config.offensive_words)
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="store")

    async def ask(self, who: HTTPAuthorizationCredentials | None, work: Callable[[int], T]) -> T:
        """`work(annotator_id)` in a thread. Raises Refused, NoAnswer."""

        def known() -> T:
            if who is None:
                raise Refused("unknown_annotator", "there is no header `Authorization: Bearer TOKEN`")
            return work(self.store.authenticate(who.credentials))

        call = asyncio.get_running_loop().run_in_executor(self._threads, known)
        return await answer(call, who="the feedback store", asked="answer", deadline_s=self.config.request_s)

    def next_task(self, annotator_id: int) -> dict[str, Any]:
        config = self.config
        given = self.store.next_task(
            annotator_id, lease_s=config.lease_s, gold_rate=config.gold_rate, kinds=config.kinds
        )
        return {"task": given and views.task(given, self.offensive), "progress": self.progress(annotator_id)}

    def submit(self, annotator_id: int, vote: views.Vote) -> dict[str, Any]:
        left = self.store.shown_left(annotator_id, vote.lease_id)
        receipt: Receipt = self.store.submit(annotator_id, vote.task_id, vote.judgment(left), lease_id=vote.lease_id)
        return views.receipt(receipt, left, skipped=vote.choice == "skip")

    def undo(self, annotator_id: int, judgment_id: int, key: str) -> dict[str, Any]:
        given = self.store.undo(annotator_id, judgment_id, idempotency_key=key, lease_s=self.config.lease_s)
        return {"task": given and views.task(given, self.offensive), "progress": self.progress(annotator_id)}

    def session(self, annotator_id: int) -> dict[str, Any]:
        return {
            "annotator_id": annotator_id,
            "lease_s": self.config.lease_s,
            "aspects": self.config.aspects,
            "guidelines": self.guidelines,
            "progress": self.progress(annotator_id),
        }

    def progress(self, annotator_id: int) -> dict[str, int]:
        return views.progress(self.store.progress(annotator_id))

    def close(self) -> None:
        self._threads.shutdown()
        self.store.close()


def labelling_app(config: LabellingConfig, listening: socket.socket | None = None) -> FastAPI:
    """Page and API on the store of `config`, which is open until the app ends; it answers what connects to `listening`.

    Raises Refused, OSError.
    """
    desk = Desk(config)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            stack.callback(desk.close)
            if listening is not None:
                await stack.enter_async_context(serving_http(app, listening, finish_s=config.request_s))
            yield

    app = FastAPI(
        title="Headrace labelling", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url="/api/openapi.json"
    )
    app.add_middleware(Guard, max_body_bytes=config.max_body_bytes)
    answer_errors(app)
    _add_routes(app, desk)
    app.mount("/page", StaticFiles(directory=views.PAGE))
    return app


def _add_routes(app: FastAPI, desk: Desk) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(views.PAGE / "index.html")

    @app.get("/page/common.css", include_in_schema=False)
    async def common_css() -> FileResponse:
        return FileResponse(views.COMMON_CSS)

    @app.get("/api/health")
    async def health() -> dict[str, str]:
        """Whether anybody is here; asks nothing of the store."""
        return {"status": "ok"}

    @app.get("/api/session")
    async def session(who: Bearer) -> dict[str, Any]:
        """Who the token is, the guidelines with their version, which aspects are asked, how far the work is."""
        return await desk.ask(who, desk.session)

    @app.get("/api/progress")
    async def progress(who: Bearer) -> dict[str, int]:
        return await desk.ask(who, desk.progress)

    @app.post("/api/next")
    async def next_task(who: Bearer) -> dict[str, Any]:
        """The task to answer next, leased; the one that is held already comes again. `task` is null: nothing left."""
        return await desk.ask(who, desk.next_task)

    @app.post("/api/judgments")
    async def submit(who: Bearer, vote: views.Vote) -> dict[str, Any]:
        """One vote. Sent again with its idempotency_key it brings the same receipt, `repeated`."""
        return await desk.ask(who, lambda annotator_id: desk.submit(annotator_id, vote))

    @app.post("/api/judgments/{judgment_id}/undo")
    async def undo(who: Bearer, judgment_id: int, body: Undo) -> dict[str, Any]:
        """Takes an own vote back; `task` is that task again, with sides drawn anew."""
        return await desk.ask(who, lambda annotator_id: desk.undo(annotator_id, judgment_id, body.idempotency_key))

    @app.post("/api/leases/{lease_id}/renew")
    async def renew(who: Bearer, lease_id: str) -> dict[str, float]:
        lease_s = desk.config.lease_s
        deadline_s = await desk.ask(who, lambda person: desk.store.renew(person, lease_id, lease_s=lease_s))
        return {"deadline_s": deadline_s}

    @app.post("/api/leases/{lease_id}/release")
    async def release(who: Bearer, lease_id: str) -> dict[str, bool]:
        """Gives the task back unanswered, for somebody else."""
        await desk.ask(who, lambda person: desk.store.release(person, lease_id))
        return {"released": True}


def build(config: LabellingConfig) -> serve.Application:
    """The application, which listens at `config.host` and `config.port` of Ray's head by itself.

    Paths in `config` are absolute: replicas run elsewhere. One replica: what it waits for is the database, and an
    SQLite file is on one machine.
    """

    def in_the_replica() -> FastAPI:
        return labelling_app(config, listen(config.host, config.port))

    door = serve.ingress(in_the_replica)
    on_the_head = {"num_cpus": 0.1, "resources": ON_THE_HEAD}
    deployment: Any = serve.deployment(door(), name="labelling", num_replicas=1, ray_actor_options=on_the_head)
    application: serve.Application = deployment.bind()
    return application
