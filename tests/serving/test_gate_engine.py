"""The gate with a real engine: what it measures against transformers, and what the version keeper makes of it."""

import asyncio
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.prompts import PromptRow, render
from contracts.serving import EngineReplicaConfig, GateConfig, ServingConfig
from contracts.waiting import NoAnswer
from models.engine_shadow import policy_tensors
from serving.gate_engine import GateEngine, GateSettings
from serving.records import StartWeights, VersionRow
from serving.versions import VersionKeeper
from tests.conftest import RunCoroutine
from tests.models.test_weight_stream import sent
from tests.serving.published import KEY, Trainer
from tests.serving.test_versions import Here, until
from tests.tiny import build_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

GATE = GateConfig(prompts=Path("none.jsonl"), max_response_tokens=24, max_kl=10.0, max_reward_drop=0.5)
CONFIG = ServingConfig(gate=GATE, replicas=EngineReplicaConfig(kv_cache_gib=0.1))
NUM_PROMPTS = 16
# vLLM and transformers, both in bf16, differ by 0.03 a token on average on these models (tests/models/test_engine.py).
LOGPROB_ERROR = 0.05


@dataclass
class Reward:
    """Twice the share of the letter e, less a column of the prompt; it can be on strike."""

    strike: bool = False
    asked: list[str] = field(default_factory=list)

    async def __call__(
        self, messages: list[dict[str, str]], response: str, columns: Mapping[str, Any] | None = None
    ) -> tuple[float, str]:
        if self.strike:
            raise NoAnswer("the judge is on strike")
        self.asked.append(messages[-1]["content"])
        if columns and columns["poison"]:
            raise ValueError("a poisoned prompt")
        return response.count("e") / max(1, len(response)), "v1"


class Rig:
    """A gate, and a keeper whose state is new in each test; training goes on through all of them."""

    def __init__(self, folder: Path, run: RunCoroutine) -> None:
        self.run = run
        self.model = build_tiny_model(folder / "current", tied=True)
        self.other = policy_tensors(str(build_tiny_model(folder / "other", tied=True, seed=1)), "bfloat16")
        rows = [
            PromptRow(f"p{i}", [{"role": "user", "content": f"Question {i}?"}], "test", columns={"poison": i == 3})
            for i in range(NUM_PROMPTS)
        ]
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        self.prompts = tuple(render(rows, tokenizer, system=None, max_prompt_tokens=200)[0])
        self.reward = Reward()
        self.start = StartWeights(str(self.model), 0)
        scorers = {"letter": (2.0, self.reward)}
        self.gate: GateEngine = object.__new__(GateEngine)
        run(GateEngine.__init__(self.gate, GateSettings(CONFIG, self.start, 256, self.prompts, scorers, 120.0, KEY)))

    def keeper(self, folder: Path) -> VersionKeeper:
        # Its versions have other weights than those of the same numbers before.
        self.gate._taking.forget()
        self.gate._measured = None
        return VersionKeeper(CONFIG, folder, self.start, key=KEY, gate=Here(self.gate))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory, run: RunCoroutine) -> Iterator[Rig]:
    made = Rig(tmp_path_factory.mktemp("gate"), run)
    yield made
    made.gate.__del__()


class Training:
    """Publishes what a test says into a keeper."""

    def __init__(self, rig: Rig, keeper: VersionKeeper) -> None:
        self.keeper = keeper
        self.trainer = Trainer(start=policy_tensors(str(rig.model), "bfloat16"))

    async def publish(self, weights: Mapping[str, Tensor]) -> int:
        trainer = self.trainer
        trainer.version += 1
        trainer.weights[trainer.version] = {name: tensor.clone() for name, tensor in weights.items()}
        frames, update = sent(trainer.sender, trainer.weights[trainer.version], trainer.version)
        await self.keeper.publish(update, [ray.put(np.frombuffer(bytes(frame), np.uint8)) for frame in frames])
        return trainer.version

    async def judged(self, version: int) -> VersionRow:
        found: list[VersionRow] = []

        async def there() -> bool:
            found[:] = [row for row in await self.keeper.history() if row.version == version and row.metrics]
            return bool(found)

        await until(there)
        return found[0]


def nudged(weights: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Every weight moved at random by a share of itself."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: (each.float() * (1 + share * torch.randn(each.shape, generator=generator))).to(each.dtype)
        for name, each in weights.items()
    }


def logprobs(rig: Rig, weights: Mapping[str, Tensor], prompt: list[int], response: list[int]) -> Tensor:
    """By transformers, in float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(rig.model, dtype=torch.float32)
    model.load_state_dict({name: each.float() for name, each in weights.items()}, strict=False)
    model.tie_weights()
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]


def test_one_version_is_promoted_and_another_refused(rig: Rig, run: RunCoroutine, tmp_path: Path) -> None:
    async def check() -> tuple[VersionRow, VersionRow, Any, Training]:
        training = Training(rig, rig.keeper(tmp_path))
        near = nudged(training.trainer.weights[0], 0.02)
        first = await training.judged(await training.publish(near))
        measured = rig.gate._measured
        second = await training.judged(await training.publish(rig.other))
        return first, second, measured, training

    promoted, refused, measured, training = run(check())
    assert (promoted.status, promoted.reason) == ("promoted", "within the limits of the gate")
    assert refused.status == "refused"
    assert "nats a response from the current version (max_kl 10)" in refused.reason
    assert training.keeper._table.current == 1
    assert 0 < promoted.metrics["kl"] < 2.0
    assert promoted.metrics["prompts"] == NUM_PROMPTS - 1  # but for the poisoned one

    # The second one's KL, on the responses of the first one, which was the current version by then.
    kl = 0.0
    assert measured.version == 1
    for prompt, response, under_current in zip(rig.prompts, measured.responses, measured.logprobs, strict=True):
        current = logprobs(rig, training.trainer.weights[1], prompt.tokens, response)
        assert (current - torch.tensor(under_current)).abs().mean() < 2 * LOGPROB_ERROR
        log_ratio = logprobs(rig, rig.other, prompt.tokens, response) - current
        kl += float((log_ratio.exp() - 1 - log_ratio).sum()) / NUM_PROMPTS
    assert kl > 10.0
    assert refused.metrics["kl"] == pytest.approx(kl, rel=0.1)
    tokens = [len(response) for response in measured.responses]
    assert refused.metrics["response_tokens_current"] == promoted.metrics["response_tokens"] == np.mean(tokens)
    texts = [
        AutoTokenizer.from_pretrained(rig.model).decode(each, skip_special_tokens=True) for each in measured.responses
    ]
    shares = [text.count("e") / max(1, len(text)) for index, text in enumerate(texts) if index != 3]
    assert promoted.metrics["reward/letter"] == pytest.approx(np.mean(shares))
    assert promoted.metrics["reward"] == pytest.approx(2 * np.mean(shares))


def test_versions_that_do_not_differ_say_the_same(rig: Rig, run: RunCoroutine, tmp_path: Path) -> None:
    async def check() -> VersionRow:
        training = Training(rig, rig.keeper(tmp_path))
        return await training.judged(await training.publish(training.trainer.weights[0]))

    row = run(check())
    assert row.status == "promoted"
    assert row.metrics["kl"] < 0.01
    assert row.metrics["response_tokens"] == pytest.approx(row.metrics["response_tokens_current"], rel=0.1)


def test_a_gate_that_fails_promotes_nothing_and_holds_nothing_up(
    rig: Rig, run: RunCoroutine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.versions._GATE_PAUSE_S", 0.5)

    async def check() -> None:
        keeper = rig.keeper(tmp_path)
        training = Training(rig, keeper)
        rig.reward.strike = True
        for _ in range(3):
            await asyncio.wait_for(training.publish(nudged(training.trainer.weights[0], 0.02)), 10)

        async def told() -> bool:
            return bool((await keeper.status())["problems"])

        await until(told)
        status = await keeper.status()
        assert status["problems"][0].startswith("the gate did not judge version ")
        assert "the judge is on strike" in status["problems"][0]
        assert (status["current"], status["candidate"], status["newest"]) == (0, 3, 3)
        assert "the judge is on strike" in (tmp_path / "events.jsonl").read_text()
        rig.reward.strike = False
        assert (await training.judged(3)).status == "promoted"
        assert (await keeper.status())["problems"] == []

    run(check())


def test_damaged_weights_are_asked_for_again_as_a_keyframe(rig: Rig, run: RunCoroutine, tmp_path: Path) -> None:
    async def check() -> None:
        training = Training(rig, rig.keeper(tmp_path))
        await training.judged(await training.publish(training.trainer.weights[0]))
        held, _ = await rig.gate.holds()
        assert held == 1
        frames, update = training.trainer.delta()
        forged = [ray.put(np.zeros_like(np.frombuffer(frame, np.uint8))) for frame in frames]
        with pytest.raises(RuntimeError, match="weights version 2 from the version keeper refused"):
            await rig.gate.judge(1, [], 2, [(update, forged)])
        assert await rig.gate.holds() == (None, 1)
        frames, update = training.trainer.keyframe()
        refs = [ray.put(np.frombuffer(frame, np.uint8)) for frame in frames]
        verdict = await rig.gate.judge(1, [], 2, [(update, refs)])
        assert math.isfinite(verdict.metrics["kl"])
        assert await rig.gate.holds() == (2, 2 if verdict.promote else 1)

    run(check())
