"""`allow_mixed`: answers go on under new weights and nobody waits; without it each answer is of one version."""

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
from ray import serve
from safetensors.torch import load_file, save_file
from torch import Tensor

from contracts.serving import ServingConfig
from models.engine_adapters import AdapterSettings
from models.engine_shadow import policy_tensors
from models.engine_update import UpdateTimes
from models.openai import Answer
from serving import replica as replicas
from serving.records import LIVE, Head, PolicyRequest, StartWeights
from serving.replica import PolicyReplica, ReplicaSettings
from serving.versions import VersionKeeper
from tests.command import Processes
from tests.conftest import RunCoroutine
from tests.models.test_weight_stream import clone
from tests.serving.published import KEY, Trainer
from tests.serving.test_replica import LONG, Rig, Spoken, chat
from tests.tiny import build_tiny_model

APP = "headrace-serving-mixed-test"
STEP_S = 0.005


class ScriptedEngine:
    """Stands for vLLM: weights and their version, exchanged when the replica lets it."""

    broken = None

    def __init__(self, tensors: dict[str, Tensor], *, takes_adapters: bool = False) -> None:
        self.version, self.shadow_tensors, self.takes_adapters = 0, tensors, takes_adapters

    async def update(
        self,
        version: int,
        write: Callable[[Mapping[str, Tensor]], object],
        *,
        deadline_s: float,
        exchange_in: Callable[[], AbstractAsyncContextManager[object]],
    ) -> UpdateTimes:
        await asyncio.to_thread(write, self.shadow_tensors)
        async with exchange_in():
            self.version = version
        return UpdateTimes(0.0, 0.0, 0.0, 0.0)

    async def load_adapter(self, version: int, tensors: dict[str, Tensor], *, deadline_s: float) -> UpdateTimes:
        self.version, self.shadow_tensors = version, tensors
        return UpdateTimes(0.0, 0.0, 0.0, 0.0)

    async def ping(self) -> None:
        pass

    def core_computed_s(self) -> float:
        return 0.0

    def shutdown(self) -> None:
        pass


class ScriptedHandlers:
    """An answer says, token by token, which version writes it, until `body["ends"]` is set."""

    def __init__(self, engine: ScriptedEngine, name: str, *, most_tokens: int) -> None:
        self._engine = engine

    async def answer(self, kind: str, body: dict[str, Any], *, answer_id: str) -> Answer:
        async def parts() -> AsyncGenerator[bytes, None]:
            yield str(self._engine.version).encode()
            while not body["ends"].is_set():
                await asyncio.sleep(STEP_S)
                yield str(self._engine.version).encode()

        return Answer(self._engine.version, parts())


class Called:
    """A handle to an object of this process: a call runs whether or not somebody waits for it."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._target, name)
        return SimpleNamespace(remote=lambda *given, **named: asyncio.ensure_future(method(*given, **named)))


class Talk:
    """An answer of a replica, as it comes."""

    def __init__(self, replica: PolicyReplica) -> None:
        self.ends = asyncio.Event()
        self.head: Head | None = None
        self.written: list[int] = []
        self.task = asyncio.ensure_future(self._read(replica))

    async def _read(self, replica: PolicyReplica) -> None:
        async for part in replica.answer(PolicyRequest("chat", {"ends": self.ends}, "answer", 30.0)):
            if isinstance(part, Head):
                self.head = part
            else:
                self.written.append(int(part))


@asynccontextmanager
async def following(
    config: ServingConfig, model: Path, folder: Path, patch: pytest.MonkeyPatch, adapters: AdapterSettings | None = None
) -> AsyncIterator[tuple[PolicyReplica, ScriptedEngine, VersionKeeper, Trainer]]:
    """A replica and its version keeper, of which the engine alone is scripted."""
    trainer = Trainer(start=policy_tensors(str(model), "bfloat16"))
    engine = ScriptedEngine(clone(trainer.weights[0]), takes_adapters=adapters is not None)

    async def start_engine(*_: Any, **__: Any) -> ScriptedEngine:
        return engine

    start = StartWeights(str(model), 0, adapters=adapters)
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="a"))
    with patch.context() as scripted:
        scripted.setattr(replicas, "start_engine", start_engine)
        scripted.setattr(replicas, "OpenAIHandlers", ScriptedHandlers)
        scripted.setattr(serve, "get_replica_context", lambda: context)
        keeper = VersionKeeper(config, folder, start, key=KEY)
        replica = PolicyReplica.__new__(PolicyReplica)
        await replica.__init__(ReplicaSettings(LIVE, "policy", start, 256, config, 30.0, KEY), Called(keeper))  # type: ignore[misc]
        try:
            yield replica, engine, keeper, trainer
        finally:
            replica.__del__()
            await asyncio.sleep(0.05)  # the keeper hears of it


async def until(holds: Callable[[], bool], timeout_s: float = 20.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not holds():  # noqa: ASYNC110 what is tested tells nobody
            await asyncio.sleep(STEP_S)


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("allow_mixed", [False, True])
def test_an_answer_over_a_rollover(
    allow_mixed: bool, tiny_model: Path, tmp_path: Path, run: RunCoroutine, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ServingConfig(allow_mixed=allow_mixed)

    async def check() -> None:
        async with following(config, tiny_model, tmp_path, monkeypatch) as (replica, engine, keeper, trainer):
            long = Talk(replica)
            await until(lambda: len(long.written) > 2)
            frames, update = trainer.delta()
            await keeper.publish(update, [ray.put(np.frombuffer(frame, np.uint8)) for frame in frames])
            if allow_mixed:
                await until(lambda: engine.version == 1)
                seen = len(long.written)
                await until(lambda: len(long.written) > seen)
                short = Talk(replica)
                short.ends.set()
                await asyncio.wait_for(short.task, 5)  # while the other one is being written
                assert not long.task.done()
            else:
                await until(lambda: replica._gate.turns_away is False and not replica._gate._open.is_set())
                short = Talk(replica)
                short.ends.set()
                await asyncio.sleep(20 * STEP_S)
                assert (short.head, engine.version) == (None, 0)  # waits: there is no other replica
            long.ends.set()
            await asyncio.wait_for(asyncio.gather(long.task, short.task), 20)
            assert long.written[0] == 0
            assert set(long.written) == ({0, 1} if allow_mixed else {0})
            assert long.head is not None
            assert (long.head.status, long.head.version) == (200, 0)
            assert short.head is not None
            assert (short.head.status, short.head.version, set(short.written)) == (200, 1, {1})

    run(check())


@pytest.fixture(scope="module")
def mixed(ray_session: Processes, tmp_path_factory: pytest.TempPathFactory, run: RunCoroutine) -> Iterator[Rig]:
    """Version 1 has its favourites among the tokens; under version 2 all are as likely as each other."""
    folder = tmp_path_factory.mktemp("mixed")
    models = [build_tiny_model(folder / name, tied=True) for name in ("ordinary", "even")]
    even = load_file(models[1] / "model.safetensors")
    even["model.norm.weight"].zero_()
    save_file(even, models[1] / "model.safetensors", metadata={"format": "pt"})
    yield Rig(models, run, application=APP, allow_mixed=True)
    serve.delete(APP)


@pytest.mark.slow
def test_real_answers_go_on_under_new_weights_and_name_both_versions(mixed: Rig) -> None:
    async def scenario() -> tuple[list[Spoken], tuple[int, str]]:
        stop = asyncio.Event()
        spoken: list[Spoken] = []

        async def keep_asking(number: int) -> None:
            while not stop.is_set():
                # Of different lengths: else all of them would end in the same step, and the weights could come then.
                body = chat(stream=number % 2 == 0, seed=number, max_tokens=LONG - 20 * number, logprobs=True)
                spoken.append(await mixed.ask(body, answer_id=f"answer-{number}"))

        asking = [asyncio.create_task(keep_asking(number)) for number in range(8)]
        await asyncio.sleep(1.0)
        outcome = await mixed.give(mixed.order(mixed.to_2))
        await asyncio.sleep(0.5)
        stop.set()
        await asyncio.gather(*asking)
        return spoken, outcome

    kinds: set[str] = set()
    for _ in range(5):
        spoken, outcome = mixed.run(scenario())
        assert outcome == (2, "")
        kinds |= {each.objects[0]["object"] for each in spoken if check(each)}
        if kinds == {"chat.completion", "chat.completion.chunk"}:
            return
        assert mixed.run(mixed.give(mixed.order(mixed.to_1))) == (1, "")
    pytest.fail(f"of both kinds some should go on under the new weights, those of {kinds} did")


def check(spoken: Spoken) -> bool:
    """Whether two versions wrote it; and what it says of its versions is what its tokens show."""
    assert (spoken.head.status, spoken.done) == (200, True)
    assert spoken.objects[-1]["choices"][0]["finish_reason"] == "length"
    assert spoken.versions == {spoken.head.version}
    even = [abs(logprob + math.log(320)) < 0.02 for logprob in logprobs(spoken)]
    num_of_1 = len(even) - even[::-1].index(False) if False in even else 0  # what comes after is of version 2
    assert len(even) >= LONG - 140
    assert sum(even[:num_of_1]) <= num_of_1 / 4
    if "weights_versions" in spoken.objects[-1]:
        assert spoken.objects[-1]["weights_versions"] == [1, 2]
        assert spoken.head.version == 1
        assert 0 < num_of_1 < len(even)
        return True
    assert num_of_1 == 0 if spoken.head.version == 2 else num_of_1 > len(even) - 8
    return False


def logprobs(spoken: Spoken) -> list[float]:
    """Of each token of an answer, in nats."""
    found = (choice["logprobs"] for part in spoken.objects for choice in part["choices"] if choice.get("logprobs"))
    return [token["logprob"] for each in found for token in each["content"]]
