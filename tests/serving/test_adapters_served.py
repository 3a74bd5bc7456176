"""LoRA adapters with real engines: a replica on Ray Serve writes with them, the gate judges them."""

import asyncio
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from actors.prompts import PromptRow, render
from contracts.serving import EngineReplicaConfig, GateConfig, ServingConfig
from serving.archive import weights_key
from serving.gate_engine import GateEngine, GateSettings
from serving.records import StartWeights, VersionRow
from serving.versions import VersionKeeper
from tests.conftest import RunCoroutine
from tests.serving.published import KEY
from tests.serving.test_adapters import ADAPTERS, AdapterTrainer
from tests.serving.test_application import SMALL, Application, application
from tests.serving.test_gate_engine import Reward
from tests.serving.test_versions import Here, until

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]


def test_a_replica_writes_on_with_the_adapter_that_an_answer_began_with(
    tiny_model: Path, tmp_path: Path, run: RunCoroutine
) -> None:
    """Nobody waits for an exchange, each answer is of one version, and an older version answers as it did before."""
    config = ServingConfig(name="adapters", replicas=SMALL)  # type: ignore[arg-type]
    trainer = AdapterTrainer(tiny_model, weights_key(tmp_path / "serving"))

    async def serves(served: Application, version: int) -> None:
        await served.until(lambda status: status["replicas"][0]["version"] == version)

    async def answered(served: Application) -> tuple[int, str]:
        head, said = await served.ask(max_tokens=12, temperature=0)
        assert {event["weights_version"] for event in said} == {head.version}
        return head.version, "".join(event["choices"][0]["delta"].get("content") or "" for event in said)

    async def check() -> None:
        async with application(config, tiny_model, tmp_path / "serving", adapters=ADAPTERS) as served:
            first = await answered(served)
            assert first[0] == 0
            stop = asyncio.Event()
            spans: list[tuple[float, float, int]] = []
            clock = asyncio.get_running_loop().time

            async def keep_asking(number: int) -> None:
                while not stop.is_set():
                    began = clock()
                    head, said = await served.ask(max_tokens=120 + 10 * number, seed=number)
                    assert (head.status, said[-1]["choices"][0]["finish_reason"]) == (200, "length")
                    assert {event["weights_version"] for event in said} == {head.version}
                    assert "weights_versions" not in json.dumps(said)
                    spans.append((began, clock(), head.version))

            asking = [asyncio.create_task(keep_asking(number)) for number in range(3)]
            await asyncio.sleep(1.0)
            await served.versions.publish.remote(*trainer.publish(1))
            await serves(served, 1)
            while not any(version == 1 for *_, version in spans):  # noqa: ASYNC110 no event says it
                await asyncio.sleep(0.05)
            stop.set()
            await asyncio.gather(*asking)
            assert {version for *_, version in spans} == {0, 1}
            # An answer of version 0 was still being written when one of version 1 began.
            assert max(end for _, end, version in spans if version == 0) > min(
                began for began, _, version in spans if version == 1
            )

            second = await answered(served)
            assert second[0] == 1
            assert second[1] != first[1]
            await served.versions.rollback.remote(0)
            await serves(served, 0)
            assert await answered(served) == first
            await served.versions.pin.remote("1")
            await serves(served, 1)
            assert await answered(served) == second

    run(check(), timeout_s=800)


def test_the_gate_samples_and_scores_with_adapters(tiny_model: Path, tmp_path: Path, run: RunCoroutine) -> None:
    """One that changes nothing has no KL; one that changes log-probabilities by about 1 has more than is allowed."""
    gate_config = GateConfig(
        prompts=Path("none.jsonl"), max_response_tokens=16, max_reward_drop=10.0, max_kl=1.0, max_length_ratio=100.0
    )
    config = ServingConfig(gate=gate_config, replicas=EngineReplicaConfig(kv_cache_gib=0.1))
    start = StartWeights(str(tiny_model), 0, adapters=ADAPTERS)
    rows = [
        PromptRow(f"p{i}", [{"role": "user", "content": f"Question {i}?"}], "test", columns={"poison": False})
        for i in range(4)
    ]
    prompts, _ = render(rows, AutoTokenizer.from_pretrained(tiny_model), system=None, max_prompt_tokens=200)
    settings = GateSettings(config, start, 256, tuple(prompts), {"letter": (1.0, Reward())}, 120.0, KEY)
    gate: GateEngine = object.__new__(GateEngine)

    async def check() -> None:
        await GateEngine.__init__(gate, settings)
        keeper = VersionKeeper(config, tmp_path, start, key=KEY, gate=Here(gate))  # type: ignore[arg-type]
        trainer = AdapterTrainer(tiny_model)
        judged: dict[int, VersionRow] = {}
        for version, seed in ((1, 1), (2, 0)):
            await keeper.publish(*trainer.publish(version, seed))

            async def there(version: int = version) -> bool:
                judged.update({row.version: row for row in await keeper.history() if row.metrics})
                return version in judged

            await until(there, timeout_s=120)
        assert (judged[1].status, judged[2].status) == ("refused", "promoted")
        assert judged[1].metrics["kl"] > 1.0
        assert abs(judged[2].metrics["kl"]) < 0.01

    try:
        run(check(), timeout_s=800)
    finally:
        gate.__del__()
