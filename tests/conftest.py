"""What the integration tests share: one tiny model, one local Ray, one event loop a session."""

import asyncio
import os
import shutil
import tempfile
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pytest

from cluster.loopback import stay_on_loopback
from contracts.config import Config
from contracts.loading import validate
from tests.command import Processes
from tests.postgresql import Server, binaries, postgresql
from tests.tiny import build_tiny_model

stay_on_loopback()  # before any test module imports Ray

T = TypeVar("T")


class RunCoroutine(Protocol):
    """Runs a coroutine on the session's loop and returns its result; TimeoutError after `timeout_s`."""

    def __call__(self, work: Coroutine[Any, Any, T], timeout_s: float = 240) -> T: ...


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny", tied=True)


@pytest.fixture(scope="session")
def short_folder() -> Iterator[Path]:
    """For Ray's sockets: their paths may have 107 bytes, and pytest's folders are too long for that."""
    folder = Path(tempfile.mkdtemp(prefix="hr-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[Server]:
    if binaries() is None:
        pytest.skip("PostgreSQL (initdb, pg_ctl) is not installed here")
    with postgresql() as server:
        yield server


@pytest.fixture(scope="session")
def run() -> Iterator[RunCoroutine]:
    """One event loop for the session: Serve handles and actor references stay on the loop that first awaits them."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="test-loop", daemon=True)
    thread.start()

    def run_coroutine(work: Coroutine[Any, Any, T], timeout_s: float = 240) -> T:
        async def bounded() -> T:
            async with asyncio.timeout(timeout_s):
                return await work

        return asyncio.run_coroutine_threadsafe(bounded(), loop).result(timeout_s + 10)

    yield run_coroutine
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


@pytest.fixture(scope="session")
def tiny_config(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The configuration of the actor tests: everything small."""
    data = {
        "output_dir": str(tmp_path_factory.mktemp("runs") / "none"),
        "model": {"path": str(tiny_model), "max_context_tokens": 256},
        "prompts": {"path": "none.jsonl"},
        "sampling": {"max_response_tokens": 200},
        "rewards": [{"name": "none", "function": "none:none"}],
        "rollout": {"num_cpus": 0.1, "kv_cache_gib": 0.1, "max_concurrent": 32},
        "reward_workers": {"num_cpus": 0.1, "threads": 1},
        "reference_workers": {"num_cpus": 0.1, "threads": 1},
        "ray": {"num_cpus": 4, "object_store_gib": 0.2, "dashboard": False},
    }
    return validate(data, source="tests/conftest.py")


@pytest.fixture(scope="session")
def ray_session(tiny_config: Config, short_folder: Path) -> Iterator[Processes]:
    """A local Ray with Serve, started as a run starts its own; at the end nothing of it may be left."""
    import ray
    from ray import serve

    from cluster.launch import start_ray

    processes = Processes()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**processes.environment, "RAY_TMPDIR": str(short_folder)}.items():
            patch.setenv(name, value)
        start_ray(tiny_config, Path(__file__).parents[1])
        # This process sets the mark aside again: what other tests start from it is not Ray's.
    yield processes
    serve.shutdown()
    ray.shutdown()
    assert processes.wait_gone() == []


def pytest_configure() -> None:
    # Rich and tqdm measure the terminal; the commands under test must look the same everywhere.
    os.environ.setdefault("COLUMNS", "120")
