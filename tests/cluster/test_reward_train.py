"""`headrace reward-train`: files in, a reward model out, and one clear line where that cannot be."""

import asyncio
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.cli import main
from cluster.progress import Progress
from cluster.reward_train import check_reward_train, train_from_files
from contracts import loading as configuration
from contracts.config import ConfigError
from contracts.reward_model import RewardTrainConfig
from contracts.stopping import StopRequest
from models.reward import RewardModel
from tests.command import Command
from tests.tiny import build_tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("base") / "model", tied=True)


def write_files(folder: Path, *, pairs: int = 40, labels: int = 40) -> None:
    write(
        folder / "pairs.jsonl",
        [
            {"prompt": f"Question {n}?", "chosen": f"great {n}", "rejected": f"bad {n}", "domain": "talk"}
            for n in range(pairs)
        ],
    )
    write(
        folder / "labels.jsonl",
        [
            {"prompt": f"Label {n}?", "completion": f"{'great' if n % 2 else 'bad'} {n}", "label": n % 2 == 1}
            for n in range(labels)
        ],
    )


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def project(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A configuration of files in a folder, which becomes the working directory."""

    def written(**changes: Any) -> Path:
        write_files(tmp_path)
        model = {"base": str(base), "batch_size": 8, "max_tokens": 64, "learning_rate": 1e-3, **changes}
        config = {
            "output_dir": "run",
            "preferences": {"path": ["pairs.jsonl", "labels.jsonl"], "reward_model": model},
            "threads": 1,
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        monkeypatch.chdir(tmp_path)
        return tmp_path

    return written


def refusal(*arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The last line that the command prints; it must exit with 2."""
    monkeypatch.setattr("sys.argv", ["headrace", "reward-train", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    return lines[-1].removeprefix("error: ")


def test_pairs_and_labels_become_a_reward_model(project: Callable[..., Path]) -> None:
    folder = project()
    training = check_reward_train(configuration.load(folder / "config.yaml", kind=RewardTrainConfig))
    report = asyncio.run(train_from_files(training, Progress(0), StopRequest()))
    assert report is not None
    assert (report.train_pairs + report.train_labels + report.calibration_rows, report.held_out_pairs) == (64, 16)
    model = RewardModel.load(str(folder / "run" / "reward_model"), max_tokens=64)
    assert model.version == report.reward_version
    left = {path.name for path in (folder / "run").iterdir()}
    assert left == {"config.yaml", "reward_model"}, "neither a checkpoint nor scratch folders stay"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("preferences.path=none.jsonl", "preferences.path none.jsonl: no such file"),
        ("preferences.path=empty.jsonl", "preferences.path empty.jsonl: is empty"),
        ("preferences.path=other.jsonl", "other.jsonl:1: 'chosen' is missing, there are: text"),
        ("preferences.path=third.jsonl", "third.jsonl:2: 'label' is 0.5, allowed is true or false"),
        (
            "preferences.path=good.jsonl",
            "preferences: head reward: all 5 labels to train on are good: needed are both",
        ),
        (
            "preferences.reward_model.base=/none",
            "preferences.reward_model.base /none: no such folder, and not a Hugging",
        ),
        ("preferences.reward_model.base=", "config.yaml: preferences: reward_model.base: required, there is no policy"),
        ("preferences.reward_model.flips=0.1", "unknown key, did you mean flip_rate?"),
        ("preferences.reward_model.flip_rate=0.5", "preferences.reward_model.flip_rate: input should be less than 0.5"),
        ("preferences.reward_model.heads={a b: []}", "preferences.reward_model.heads.a b.[key]: string should match"),
        ("resume=true", "output_dir run: there is no training to resume; start one without resume=true"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(
    project: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: str,
    message: str,
) -> None:
    folder = project()
    (folder / "empty.jsonl").touch()
    write(folder / "other.jsonl", [{"text": "what"}])
    write(folder / "third.jsonl", [{"prompt": "p", "completion": "c", "label": label} for label in (1, 0.5)])
    write(folder / "good.jsonl", [{"prompt": f"p{n}", "completion": "c", "label": True} for n in range(6)])
    line = refusal("config.yaml", change, monkeypatch=monkeypatch, capsys=capsys)
    assert message in line
    assert not (folder / "run" / "reward_model").exists()


def test_a_base_without_chat_template_is_refused(
    project: Callable[..., Path], base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = project()
    bare = folder / "bare"
    bare.mkdir()
    for file in base.iterdir():
        if file.name != "chat_template.jinja":
            (bare / file.name).write_bytes(file.read_bytes())
    line = refusal("config.yaml", "preferences.reward_model.base=bare", monkeypatch=monkeypatch, capsys=capsys)
    assert "preferences.reward_model.base bare: has no chat template" in line
    assert not (folder / "run").exists()


def test_a_folder_that_holds_something_is_never_written(project: Callable[..., Path]) -> None:
    folder = project()
    (folder / "run").mkdir()
    (folder / "run" / "mine").touch()
    config = configuration.load(folder / "config.yaml", kind=RewardTrainConfig)
    with pytest.raises(ConfigError, match="output_dir run is not empty"):
        check_reward_train(config)
    (folder / "run" / "reward_model").mkdir()
    with pytest.raises(ConfigError, match="output_dir run: holds a trained reward model"):
        check_reward_train(config)


def test_resuming_another_training_names_what_differs(project: Callable[..., Path]) -> None:
    folder = project()
    config = configuration.load(folder / "config.yaml", kind=RewardTrainConfig)
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text(configuration.dump(config), encoding="utf-8")
    check_reward_train(config.model_copy(update={"resume": True}))
    other = configuration.load(
        folder / "config.yaml", ["resume=true", "preferences.reward_model.epochs=2"], kind=RewardTrainConfig
    )
    with pytest.raises(ConfigError, match=r"may not change \(preferences\.reward_model\.epochs: 1 -> 2\)"):
        check_reward_train(other)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill -9", "Ctrl-C"])
def test_an_interrupted_command_resumes_to_the_same_bits(project: Callable[..., Path], how: str) -> None:
    folder = project(epochs=40, checkpoint_steps=5)
    state = folder / "run" / "checkpoint" / "training.safetensors"
    with Command("reward-train", "config.yaml", cwd=folder) as command:
        command.until(state.exists, "checkpoint")
        time.sleep(0.2)
        if how == "kill -9":
            command.kill()
        else:
            command.ctrl_c()
            assert command.status() == 128 + signal.SIGINT
            assert "continue with: headrace reward-train config.yaml resume=true" in command.output
    assert not (folder / "run" / "reward_model").exists()
    with Command("reward-train", "config.yaml", "resume=true", cwd=folder) as command:
        assert command.status() == 0, command.output
        assert "reward model: resumed after step " in command.output
    with Command("reward-train", "config.yaml", "output_dir=whole", cwd=folder) as command:
        assert command.status() == 0, command.output
    versions = [
        json.loads((folder / run / "reward_model" / "reward_card.json").read_text())["reward_version"]
        for run in ("run", "whole")
    ]
    assert versions[0] == versions[1]
