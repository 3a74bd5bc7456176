"""Members of an ensemble become one reward, as the configuration says."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from ray import serve

from actors.ensemble import ensemble_rewards
from actors.reward import RewardComponents, RewardHandle, Score, ScoreRequest, deploy_reward
from contracts.config import ConfigError, RewardConfig
from contracts.loading import validate
from contracts.records import Prompt
from contracts.workers import ReplicaConfig
from models.reward import RewardModel
from models.reward_card import CARD
from tests.command import Processes
from tests.conftest import RunCoroutine
from tests.tiny_reward import build_tiny_reward_model

MEMBERS = [[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]]
STD = [(14 / 3) ** 0.5, 0.0]  # population deviations, by hand: (4 + 1 + 9) / 3


@pytest.mark.parametrize(
    ("rule", "std_weight", "expected"),
    [
        ("mean", 9.0, [3.0, 4.0]),
        ("minimum", 9.0, [1.0, 4.0]),
        ("mean_minus_std", 0.5, [3.0 - 0.5 * STD[0], 4.0]),
        ("mean_minus_std", 0.0, [3.0, 4.0]),
    ],
)
def test_what_members_become(rule, std_weight, expected):
    assert ensemble_rewards(MEMBERS, STD, rule=rule, std_weight=std_weight) == pytest.approx(expected)


def test_a_function_has_no_members():
    data = {"output_dir": "x", "model": {"path": "y"}, "prompts": {"path": "z"}}
    with pytest.raises(ConfigError, match="this component is a function"):
        validate(data | {"rewards": [{"name": "a", "function": "m:f", "ensemble": "minimum"}]}, source="here")
    validate(data | {"rewards": [{"name": "a", "model": "m", "ensemble": "mean_minus_std"}]}, source="here")
    with pytest.raises(ConfigError, match="std_weight"):
        validate(data | {"rewards": [{"name": "a", "model": "m", "std_weight": -1}]}, source="here")


@dataclass
class Scripted(RewardHandle):
    """Answers with the scores that it was given."""

    scores: tuple[Score, ...] = ()

    async def score_together(self, requests, *, deadline_s):
        return list(self.scores)


def scripted(name: str, weight: float, *scores: Score) -> Scripted:
    return Scripted(RewardConfig(name=name, weight=weight, model="x"), None, "", scores=scores)  # type: ignore[arg-type]


async def test_disagreement_is_kept_beside_the_score_and_not_added_up():
    handles = [
        scripted("helpful", 2.0, Score(1.5, "", "v1", "r", std=0.25), Score(2.0, "", "v1", "r", std=0.0, latent=1.5)),
        scripted("gold", 0.0, Score(7.0, "", "v2", "r", latent=0.0), Score(9.0, "", "v2", "r")),
    ]
    prompt = Prompt("p", [1], "why", [{"role": "user", "content": "why"}])
    found = await RewardComponents(handles, deadline_s=1).score_together([(prompt, "a"), (prompt, "b")])
    assert found == [
        (3.0, {"helpful": 1.5, "gold": 7.0, "helpful/std": 0.25, "gold/latent": 0.0}, "v1+v2"),
        (4.0, {"helpful": 2.0, "gold": 9.0, "helpful/std": 0.0, "helpful/latent": 1.5}, "v1+v2"),
    ]


@pytest.mark.slow
def test_a_replica_gives_what_the_rule_says(
    ray_session: Processes, run: RunCoroutine, tiny_model: Path, tmp_path: Path
) -> None:
    folder = build_tiny_reward_model(tmp_path / "ensemble", tiny_model, seed=3, heads=("one", "two", "three"))
    card = json.loads((folder / CARD).read_text())
    (folder / CARD).write_text(json.dumps(card | {"heads": ["reward"], "members": 3}))
    messages = [{"role": "user", "content": "What?"}]
    answers = ["Read, listen and speak every day.", "The wheel began to turn."]
    dialogues = [[*messages, {"role": "assistant", "content": answer}] for answer in answers]
    expected = RewardModel.load(str(folder), dtype="float32", max_tokens=64).scores(dialogues)
    assert expected.std[0] > 0.01

    async def scored() -> list[Score]:
        handle = await deploy_reward(
            RewardConfig(name="rm", model=str(folder), ensemble="minimum"),
            ReplicaConfig(num_cpus=0.1, threads=1),
            application="test-ensemble",
            model_path=str(folder),
            dtype="float32",
            max_tokens=64,
            start_s=240,
        )
        return await handle.score_together(
            [ScoreRequest(messages, "What?", answer, {}) for answer in answers], deadline_s=60
        )

    try:
        found = run(scored(), timeout_s=300)
    finally:
        serve.delete("test-ensemble")
    assert [score.value for score in found] == pytest.approx([min(members) for members in expected.members], abs=1e-3)
    assert [score.std for score in found] == pytest.approx(expected.std, abs=1e-3)
