"""A reward model is read with the tokenizer and template that it was trained with, or not at all."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from models.reward import RewardModel
from models.reward_card import CARD
from tests.tiny import build_tiny_model
from tests.tiny_reward import build_tiny_reward_model


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("card")
    base = build_tiny_model(root / "base", tied=True)
    return build_tiny_reward_model(root / "reward", base, seed=0)


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "reward"))


def test_it_loads_as_it_was_saved_and_saved_again(folder: Path) -> None:
    assert RewardModel.load(str(folder), max_tokens=64).heads == ("reward",)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "left"
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=9)  # both are kept in the tokenizer's file
    tokenizer.save_pretrained(folder)
    RewardModel.load(str(folder), max_tokens=64)


def test_another_template_is_refused(folder: Path) -> None:
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("'\\n'", "' '", 1))
    with pytest.raises(
        ValueError, match=r"its chat template is not the one that it was trained with .*put the original"
    ):
        RewardModel.load(str(folder), max_tokens=64)


def test_another_tokenizer_is_refused(folder: Path) -> None:
    rules = json.loads((folder / "tokenizer.json").read_text())
    rules["model"]["merges"] = rules["model"]["merges"][:-1]
    (folder / "tokenizer.json").write_text(json.dumps(rules))
    with pytest.raises(ValueError, match="its tokenizer is not the one that it was trained with"):
        RewardModel.load(str(folder), max_tokens=64)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"schema_version": 1}', "has schema version 1, this Headrace reads 2; train the reward model again"),
        ("{", "cannot be read as JSON"),
        ("[]", "has schema version None"),
    ],
)
def test_a_card_that_cannot_be_read_is_refused(folder: Path, text: str, problem: str) -> None:
    (folder / CARD).write_text(text)
    with pytest.raises(ValueError, match=problem):
        RewardModel.load(str(folder), max_tokens=64)


def test_a_classifier_must_have_the_labels_that_its_card_names(folder: Path) -> None:
    card = json.loads((folder / CARD).read_text())
    (folder / CARD).write_text(json.dumps(card | {"heads": ["a", "b"], "members": 3}))
    with pytest.raises(ValueError, match="a classifier with num_labels 1, a reward model has 6"):
        RewardModel.load(str(folder), max_tokens=64)
