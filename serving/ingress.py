"""The door of a serving application: everything that HTTP callers ask goes through it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import ray
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from contracts.serving import ServingConfig
from serving import administering, completing, judging
from serving.asking import pass_http_proxies_by
from serving.desk import Desk, Scorer
from serving.door import Door
from serving.listening import listen, serving_http
from serving.protocol import ApiError, refusal

_PAGES = Path(__file__).parent / "pages"


@serve.ingress()
class Ingress:
    """The deployment that callers reach: one replica, `max_ongoing_requests` large, since it bounds its own queue.

    Bind it as `serve.deployment(Ingress).options(num_replicas=1, max_ongoing_requests=10_000).bind(...)`: the class
    is wrapped by `serve.ingress` already, and is no deployment yet.

    It consumes HTTP requests. A request waits for a place in an engine, at most `request_s`, and is refused at once
    where `limits.max_waiting` others wait already. Each call to a replica or to the keeper has a deadline.

    Args:
        config: of the application; keys are read from `config.keys` and HEADRACE_API_KEYS in its own process.
        folder: `output_dir/serving`, for feedback.sqlite and, with `log_prompts`, prompts.jsonl.
        live: of the deployment `live` (`PolicyReplica`); `answer` is called with `options(stream=True)`.
        versions: of the deployment `versions` (`VersionKeeper`).
        pinned: by version, those of the deployments `pinned-VERSION`.
        scorers: by name, the weight of each component of the reward and a picklable function that asks it.
        listens: at `config.host` and `config.port` by itself; else callers come through Ray Serve's HTTP proxy.

    Raises:
        ConfigError: keys that cannot be read.
        Refused: a feedback store that cannot be opened.
        RuntimeError: it cannot listen there.
    """

    def __init__(
        self,
        config: ServingConfig,
        folder: Path,
        live: DeploymentHandle,
        versions: DeploymentHandle,
        pinned: Mapping[int, DeploymentHandle] | None = None,
        scorers: Mapping[str, tuple[float, Scorer]] | None = None,
        *,
        listens: bool = False,
    ) -> None:
        pass_http_proxies_by()
        self._listening = listen(config.host, config.port) if listens else None
        self._desk = Desk(config, folder, live, versions, pinned or {}, scorers or {})

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_app(self._desk, self._listening)

    async def check_health(self) -> None:
        """Ray Serve replaces an ingress that raises three times in a row."""
        if self._desk.http is not None and self._desk.http.done():
            raise RuntimeError("the HTTP server has ended") from self._desk.http.exception()


def _giving(file: Path) -> Callable[[Request], Awaitable[FileResponse]]:
    async def give(_: Request) -> FileResponse:
        return FileResponse(file)

    return give


def add_chat_page(app: FastAPI) -> None:
    """The page at `/`, and each file that it is made of."""
    for file in (_PAGES / "common.css", *sorted((_PAGES / "chat").iterdir())):
        app.add_route("/" if file.name == "index.html" else f"/{file.name}", _giving(file), include_in_schema=False)


def build_app(desk: Desk, listening: socket.socket | None = None) -> FastAPI:
    """All routes over one desk; while it lives it answers what connects to `listening`."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            stack.callback(desk.store.close)
            stack.callback(asyncio.create_task(desk.watch_versions()).cancel)
            await stack.enter_async_context(desk.inbox.opened(ray.get_runtime_context().get_node_id()))
            if listening is not None:
                http = serving_http(app, listening, finish_s=desk.config.request_s)
                desk.http = await stack.enter_async_context(http)
            yield

    app = FastAPI(title="Headrace", version="1", lifespan=lifespan)
    app.state.desk = desk
    for module in (completing, judging, administering):
        app.include_router(module.router)
    add_chat_page(app)
    app.add_middleware(
        Door,
        keys=desk.keys,
        requests=desk.requests,
        admission=desk.admission,
        max_body_bytes=desk.config.limits.max_body_bytes,
        meters=desk.meters,
    )

    @app.exception_handler(ApiError)
    async def known(_: Request, error: ApiError) -> JSONResponse:
        return JSONResponse({"error": error.error}, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return await known(request, refusal(list(error.errors())))

    @app.exception_handler(HTTPException)
    async def elsewhere(request: Request, error: HTTPException) -> JSONResponse:
        said = {404: "there is no such path", 405: f"{request.method} is not for this path"}
        message = f"{said.get(error.status_code, str(error.detail))}: {request.url.path:.200}"
        answer = await known(request, ApiError(error.status_code, message))
        answer.headers.update(error.headers or {})
        return answer

    return app
