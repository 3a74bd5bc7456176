"""Settings of a reward model that contradict each other are refused in one line."""

from pathlib import Path
from typing import Any

import pytest

from contracts.config import Config, ConfigError
from contracts.loading import load, validate
from contracts.reward_model import RewardTrainConfig


def refusal(file: Path, **model: Any) -> str:
    file.write_text(f"output_dir: run\npreferences: {{path: p.jsonl, reward_model: { ({'base': 'b'} | model)!r}}}\n")
    with pytest.raises(ConfigError) as caught:
        load(file, kind=RewardTrainConfig)
    return str(caught.value)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"lora": {}, "trainable_layers": 2}, "give lora or trainable_layers, not both"),
        ({"label_smoothing": 0.1, "flip_rate": 0.1}, "give label_smoothing or flip_rate, not both"),
        ({"num_ranks": 3, "batch_size": 2}, "num_ranks 3 is more than batch_size 2: some would idle"),
        ({"calibration_fraction": 1}, "calibration_fraction: input should be less than 1, got 1"),
        ({"heads": {}}, "heads: dictionary should have at least 1 item"),
    ],
)
def test_contradictions(tmp_path: Path, model: dict[str, Any], message: str) -> None:
    assert message in refusal(tmp_path / "config.yaml", **model)


def run(**component: Any) -> Config:
    data = {
        "output_dir": "run",
        "model": {"path": "m"},
        "prompts": {"path": "p"},
        "rewards": [{"name": "rm", "model": "preferences", **component}],
        "preferences": {"path": ["a", "b"], "reward_model": {"heads": {"kind": ["x"], "safe": []}}},
    }
    return validate(data, source="test")


def test_a_component_names_one_of_several_heads() -> None:
    config = run(head="safe")
    assert config.preferences is not None
    assert config.preferences.paths == (Path("a"), Path("b"))
    for head in (None, "other"):
        with pytest.raises(ConfigError, match=f"rm has head {head!r}, allowed is one of .*: kind, safe"):
            run(head=head)
    with pytest.raises(ConfigError, match="head names one of a reward model's, and this component is a function"):
        run(model=None, function="a:b", head="kind")
