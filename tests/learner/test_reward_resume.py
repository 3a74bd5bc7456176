"""A reward model's training that was interrupted ends bit for bit as one that was not."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from contracts.records import Comparison
from contracts.reward_model import RewardModelConfig
from feedback.quality import UnpairedLabel
from learner.reward_model import Interrupted, RewardModelReport, train_reward_model
from learner.reward_model.examples import dialogue
from learner.reward_model.fitting import STATE_FILE
from learner.reward_model.network import initial_model
from models.reward import RewardModel
from tests.tiny import build_tiny_model

CONFIG = RewardModelConfig(
    learning_rate=1e-3, head_learning_rate=1e-2, epochs=2, batch_size=8, max_tokens=64, members=2, checkpoint_steps=3
)
PAIRS = [Comparison(f"Question {n}?", f"great {n}", f"bad {n}", prompt_id=str(n)) for n in range(48)]
LABELS = [UnpairedLabel(f"Question {n}?", f"turn {n}", n % 2 == 0, str(n), 1, 1) for n in range(48)]
STEPS = 20  # of 76 rows that are neither held out nor calibrated on


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on two, above all beside other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("base") / "model", tied=True)


Train = Callable[..., RewardModelReport]


@pytest.fixture
def train(base: Path, tmp_path: Path) -> Train:
    def trained(
        name: str,
        *,
        stop_after: int | None = None,
        stop: Callable[[], bool] | None = None,
        seed: int = 4,
        **config: object,
    ) -> RewardModelReport:
        asked = 0

        def should_stop() -> bool:
            nonlocal asked
            asked += 1
            return asked == stop_after

        return train_reward_model(
            PAIRS,
            CONFIG.model_copy(update=config),
            labels=LABELS,
            base=str(base),
            output_dir=tmp_path / name,
            seed=seed,
            checkpoint_dir=tmp_path / "checkpoint",
            should_stop=stop or should_stop,
        )

    return trained


def test_interrupted_twice_it_ends_with_the_same_bits(train: Train, tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match=f"after step 5 of {STEPS}"):
        train("cut", stop_after=5)
    assert not (tmp_path / "cut").exists()
    with pytest.raises(Interrupted, match=f"after step 12 of {STEPS}"):
        train("cut", stop_after=7)
    resumed = train("cut")
    assert not (tmp_path / "checkpoint").exists(), "the model is written, nothing is left to resume"
    whole = train("whole")
    assert resumed.reward_version == whole.reward_version
    assert train("other", seed=5).reward_version != whole.reward_version


def test_another_training_is_not_resumed_from_it(train: Train, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train("cut", stop_after=2)
    with pytest.raises(ValueError, match=r"is of another training \(seed: 4 -> 5\); set it back"):
        train("cut", seed=5)
    with pytest.raises(
        ValueError, match=r"is of another training \(config: .*'flip_rate': 0\.0.* -> .*'flip_rate': 0\.1"
    ):
        train("cut", flip_rate=0.1)
    train("cut", checkpoint_steps=7)


def test_a_damaged_checkpoint_says_so(train: Train, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train("cut", stop_after=2)
    file = tmp_path / "checkpoint" / STATE_FILE
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{STATE_FILE}: is damaged .*; remove it to start over"):
        train("cut")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".cut")], "nothing half-written stays"


@pytest.mark.slow
def test_two_ranks_train_what_one_does(train: Train, base: Path, tmp_path: Path) -> None:
    """The same batches, gradients summed over ranks: equal but for the order of rounding, and interruptible too."""
    one = train("one", epochs=1)
    with pytest.raises(Interrupted, match="after step 3 of 10"):
        train("two", epochs=1, num_ranks=2, stop_after=3)
    two = train("two", epochs=1, num_ranks=2)
    again = train("again", epochs=1, num_ranks=2)
    assert two.reward_version == again.reward_version != one.reward_version
    assert not multiprocessing.active_children()
    texts = [dialogue(row.prompt, row.chosen) for row in PAIRS[:8]]
    scores = [
        RewardModel.load(str(tmp_path / name), dtype="float32", max_tokens=64).score(texts) for name in ("one", "two")
    ]
    initial = initial_model(str(base), name="base", seed=4, labels=["reward.0", "reward.1"])
    assert scores[0] == pytest.approx(scores[1], abs=0.1)
    moved = load_file(tmp_path / "one" / "model.safetensors")["score.weight"].float() - initial.score.weight
    apart = moved - (load_file(tmp_path / "two" / "model.safetensors")["score.weight"].float() - initial.score.weight)
    assert apart.norm() < 0.1 * moved.norm()


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_training(train: Train) -> None:
    def kill_the_other() -> bool:
        for process in multiprocessing.active_children():
            os.kill(int(process.pid or 0), signal.SIGKILL)
        return False

    with pytest.raises(RuntimeError):
        train("dies", num_ranks=2, stop=kill_the_other)
    assert not multiprocessing.active_children()
