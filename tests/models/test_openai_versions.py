"""Which versions are noted while an OpenAI answer is written. Whole answers: test_openai_adapters.py."""

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from models.openai import _noted
from tests.conftest import RunCoroutine


class Engine:
    """Its newest adapter changes between two generations."""

    def __init__(self, *versions: int) -> None:
        self._versions = iter(versions)
        self.llm = self

    @contextmanager
    def adapter(self) -> Iterator[Any]:
        version = next(self._versions)
        yield SimpleNamespace(version=version, request=f"adapter {version}")

    async def generate(self, prompt: str, *, lora_request: str) -> AsyncIterator[Any]:
        yield prompt, lora_request


@pytest.mark.parametrize(("versions", "expected"), [((3, 3), [3]), ((3, 4), [3, 4]), ((3, 4, 3), [3, 4])])
def test_each_version_whose_adapter_wrote_is_named_once(
    versions: tuple[int, ...], expected: list[int], run: RunCoroutine
) -> None:
    """A completion of several prompts is several generations."""
    engine: Any = Engine(*versions)
    written: list[int] = []

    async def write() -> list[Any]:
        return [output for _ in versions async for output in _noted(engine, ("a prompt",), {}, written)]

    assert run(write()) == [("a prompt", f"adapter {version}") for version in versions]
    assert written == expected
