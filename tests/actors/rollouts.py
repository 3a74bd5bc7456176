"""A pool of real rollout actors, and requests to them."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from actors.pool import RolloutPool
from actors.rollout import RolloutRequest
from contracts.config import Config
from learner.publish import Publisher
from tests.conftest import RunCoroutine

PROMPT = [1, 40, 7, 99, 150, 30, 31, 201]
# vLLM computes in bf16 and the direct forward in fp32: 8 bits of mantissa on logits of about 4.
MAX_LOGPROB_ERROR = 0.3


def request(name: str, *, max_tokens: int = 200, temperature: float = 1.0, seed: int = 0) -> RolloutRequest:
    return RolloutRequest(
        trajectory_id=name,
        prompt_id="p0",
        group_id="g0",
        prompt_tokens=PROMPT,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
    )


def published(
    folder: Path, version: int, *, base: Path | None = None, base_version: int = 0, key: bytes | None = None
) -> Any:
    """The weights of a model folder as the learner publishes them: (update, payload).

    Complete in themselves, or as what changed since those of `base`.
    """
    publisher = Publisher(key=key)
    if base is not None:
        publisher.seed(load_file(base / "model.safetensors").items(), version=base_version)
    return publisher.publish(load_file(folder / "model.safetensors").items(), version=version)


def with_settings(config: Config, settings: dict[str, dict[str, Any]]) -> Config:
    """The configuration with some fields of some sections changed."""
    changed = {name: getattr(config, name).model_copy(update=fields) for name, fields in settings.items()}
    return config.model_copy(update=changed)


@contextmanager
def running_pool(config: Config, run: RunCoroutine, **options: Any) -> Iterator[RolloutPool]:
    async def make() -> RolloutPool:
        settings: dict[str, Any] = {"path": config.model.path, "version": 0, "seed": 0} | options
        return RolloutPool(config.model, config.rollout, config.deadlines, **settings)

    pool = run(make())
    run(pool.start())
    yield pool
    run(pool.stop())


async def ask(handle: Any, question: Any) -> Any:
    """The answer of a function that is called with the actor, in the actor's process."""
    async with asyncio.timeout(60):
        return await handle.__ray_call__.remote(question)
