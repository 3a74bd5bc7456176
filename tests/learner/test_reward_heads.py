"""Several heads on one trunk: named ones that learn from their own domains, and ensembles."""

import json
import math
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from contracts.algorithm import LoraConfig
from contracts.records import Comparison
from contracts.reward_model import RewardModelConfig
from feedback.quality import UnpairedLabel
from learner.reward_model import RewardModelReport, accuracy, saving, train_reward_model
from learner.reward_model.examples import dialogue, examples
from learner.reward_model.heads import Heads, prompts_drawn
from learner.reward_model.network import pad_apart_from_eos
from models.latent import FILE, TypicalFeatures
from models.reward import RewardModel, raw_scores
from tests.tiny import build_tiny_model, build_tiny_tokenizer

WORDS = ("kind", "every day", "the wheel", "a mill", "in short", "morning", "helpful", "turn")
CONFIG = RewardModelConfig(
    learning_rate=1e-3, head_learning_rate=1e-2, epochs=3, max_tokens=128, trainable_layers=1, calibration_fraction=0.2
)


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


def sentence(draw: random.Random, word: str) -> str:
    return " ".join([draw.choice(WORDS), word, draw.choice(WORDS)])


def opposite_tastes(count: int) -> list[Comparison]:
    """In domain `warm` the answer with "great" is chosen, in `cold` the one without it."""
    draw = random.Random(0)
    rows = []
    for number in range(count):
        with_word, without = sentence(draw, "great"), sentence(draw, draw.choice(WORDS))
        warm = number % 2 == 0
        chosen, rejected = (with_word, without) if warm else (without, with_word)
        rows.append(
            Comparison(
                f"Question {number}?", chosen, rejected, prompt_id=str(number), domain="warm" if warm else "cold"
            )
        )
    return rows


def good_and_bad(count: int, *, bad_share: int = 2) -> list[UnpairedLabel]:
    draw = random.Random(1)
    return [
        UnpairedLabel(
            f"Question {number}?",
            sentence(draw, "great" if number % bad_share == 0 else draw.choice(WORDS)),
            number % bad_share == 0,
            str(number),
            1,
            1,
        )
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def two_heads(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RewardModelReport, Path]:
    """Heads `warm` and `cold`, each an ensemble of three."""
    folder = tmp_path_factory.mktemp("heads") / "reward"
    config = CONFIG.model_copy(update={"heads": {"warm": ("warm",), "cold": ("cold",)}, "members": 3})
    report = train_reward_model(opposite_tastes(360), config, base=str(base), output_dir=folder, seed=1, threads=1)
    return report, folder


def test_each_head_learns_its_own_taste(two_heads: tuple[RewardModelReport, Path]) -> None:
    report, folder = two_heads
    assert report.heads["warm"]["accuracy"] > 0.85
    assert report.heads["cold"]["accuracy"] > 0.85
    models = RewardModel.load_heads(str(folder), max_tokens=128)
    rows = [row for row in opposite_tastes(40) if row.domain == "warm"]
    margins = {
        name: [
            a - b
            for a, b in zip(
                model.score([dialogue(row.prompt, row.chosen) for row in rows]),
                model.score([dialogue(row.prompt, row.rejected) for row in rows]),
                strict=True,
            )
        ]
        for name, model in models.items()
    }
    assert accuracy(margins["warm"], [1.0] * len(rows)) > 0.85
    assert accuracy(margins["cold"], [1.0] * len(rows)) < 0.15


def test_a_head_has_to_be_named(two_heads: tuple[RewardModelReport, Path]) -> None:
    _, folder = two_heads
    with pytest.raises(ValueError, match="has the heads warm, cold; say which one scores, not None"):
        RewardModel.load(str(folder), max_tokens=128)
    with pytest.raises(ValueError, match="not tepid"):
        RewardModel.load(str(folder), max_tokens=128, head="tepid")
    cold = RewardModel.load(str(folder), max_tokens=128, head="cold")
    assert (cold.head, cold.heads, cold.num_members) == ("cold", ("warm", "cold"), 3)


def test_members_differ_and_their_mean_is_the_score(two_heads: tuple[RewardModelReport, Path]) -> None:
    model = RewardModel.load(str(two_heads[1]), max_tokens=128, head="warm")
    texts = [dialogue(row.prompt, row.chosen) for row in opposite_tastes(30)]
    scores = model.scores(texts)
    assert scores.values == model.score(texts)
    for value, members, std in zip(scores.values, scores.members, scores.std, strict=True):
        assert value == pytest.approx(sum(members) / 3)
        assert std == pytest.approx(math.sqrt(sum((m - value) ** 2 for m in members) / 3))
    assert min(scores.std) > 0
    assert sum(scores.std) / 30 < 1, "they agree more than responses differ"


def test_plain_transformers_finds_every_label(two_heads: tuple[RewardModelReport, Path]) -> None:
    _, folder = two_heads
    model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert [model.config.id2label[at] for at in range(6)] == [f"{name}.{k}" for name in ("warm", "cold") for k in "012"]
    card = json.loads((folder / "reward_card.json").read_text())
    assert (card["heads"], card["members"]) == (["warm", "cold"], 3)


def test_transformers_scores_padded_rows_as_we_do(two_heads: tuple[RewardModelReport, Path]) -> None:
    """The base pads with EOS, with which texts end: the saved tokenizer has a pad token of its own."""
    _, folder = two_heads
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    texts = ["What is <|im_end|>", "What is the best way to learn a new language? <|im_end|>", "Read. <|im_end|>"]
    batch = tokenizer([text.replace(" <", "<") for text in texts], padding=True, return_tensors="pt")
    assert (batch["input_ids"][:, -1] == tokenizer.pad_token_id).any()
    with torch.no_grad():
        theirs = model(**batch).logits
        ours = raw_scores(model, batch["input_ids"], batch["attention_mask"])
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)


def test_it_knows_what_it_was_trained_on(two_heads: tuple[RewardModelReport, Path], tmp_path: Path) -> None:
    folder = two_heads[1]
    warm, cold = (RewardModel.load(str(folder), max_tokens=128, head=head) for head in ("warm", "cold"))
    rows = opposite_tastes(400)[360:]
    unseen = [dialogue(row.prompt, text) for row in rows for text in (row.chosen, row.rejected)]
    draw = random.Random(99)
    other = [dialogue(row.prompt, "".join(draw.choices("{}#@%&*<>", k=30))) for row in rows]
    usual, strange = warm.scores(unseen).latent, warm.scores(other).latent
    assert usual is not None
    assert strange is not None
    assert sum(usual) / 80 == pytest.approx(1.0, abs=0.2)
    assert sum(strange) / 40 > 1.5
    assert cold.scores(unseen).latent == pytest.approx(usual), "heads share the trunk"

    old = tmp_path / "old"  # from before there was such a file
    shutil.copytree(folder, old)
    (old / FILE).unlink()
    without = RewardModel.load(str(old), max_tokens=128, head="warm")
    assert without.scores(unseen[:2]).latent is None
    assert (without.version, without.score(unseen)) == (warm.version, warm.score(unseen))

    TypicalFeatures.fit(np.random.default_rng(0).normal(size=(20, 64)), np.arange(20)).save(old)
    with pytest.raises(ValueError, match=r"old/latent\.safetensors: is of 64 features, this model has 128; put back"):
        RewardModel.load(str(old), max_tokens=128, head="warm")


def test_a_handful_of_answers_is_not_called_typical(base: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"epochs": 1})
    train_reward_model(opposite_tastes(8), config, base=str(base), output_dir=tmp_path / "few", seed=1, threads=1)
    assert not (tmp_path / "few" / FILE).exists()
    assert RewardModel.load(str(tmp_path / "few"), max_tokens=128).typical is None


def test_the_temperature_is_saved_and_loaded(two_heads: tuple[RewardModelReport, Path]) -> None:
    report, folder = two_heads
    saved = load_file(folder / "model.safetensors")
    assert saved["temperature"].shape == (2,)
    cold = RewardModel.load(str(folder), max_tokens=128, head="cold")
    assert cold.temperature == pytest.approx(saved["temperature"][1].item() / cold.score_std)
    assert report.calibration_rows > 40
    assert cold.temperature != pytest.approx(1 / cold.score_std), "it was fitted"


def test_a_domain_without_a_head_is_counted_and_a_head_without_rows_refused(base: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"heads": {"warm": ("warm",)}, "epochs": 1})
    report = train_reward_model(opposite_tastes(40), config, base=str(base), output_dir=tmp_path / "one", seed=0)
    assert report.dropped == {"no head": 20, "empty": 0}
    config = CONFIG.model_copy(update={"heads": {"warm": ("warm",), "hot": ("hot",)}})
    with pytest.raises(ValueError, match=r"head hot: no row to train on, of its domains hot; .* there are: warm"):
        train_reward_model(opposite_tastes(40), config, base=str(base), output_dir=tmp_path / "two", seed=0)


def test_labels_alone_train_a_reward_model(base: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"class_weights": "balanced"})
    labels = good_and_bad(180, bad_share=4)
    report = train_reward_model((), config, labels=labels, base=str(base), output_dir=tmp_path / "reward", seed=0)
    assert (report.train_pairs, report.train_labels) == (0, 115)
    assert report.held_out_accuracy > 0.75
    fresh = good_and_bad(20)
    model = RewardModel.load(str(tmp_path / "reward"), max_tokens=128)
    scores = model.score([dialogue(label.prompt, label.response) for label in fresh])
    raw = [score * model.score_std + model.score_mean for score in scores]
    assert accuracy(raw, [float(label.good) for label in fresh]) > 0.75, "0 divides good from bad"


def test_pairs_and_labels_train_one_head_together(base: Path, tmp_path: Path) -> None:
    pairs = [row for row in opposite_tastes(120) if row.domain == "warm"]
    config = CONFIG.model_copy(update={"centring": 0.01})
    report = train_reward_model(
        pairs, config, labels=good_and_bad(100), base=str(base), output_dir=tmp_path / "reward", seed=0
    )
    assert report.train_pairs + report.train_labels + report.calibration_rows + report.held_out_pairs == 160
    assert report.held_out_accuracy > 0.75


def test_labels_of_one_class_are_refused(base: Path, tmp_path: Path) -> None:
    labels = [label for label in good_and_bad(40) if label.good]
    with pytest.raises(ValueError, match="head reward: all 16 labels to train on are good: needed are both"):
        train_reward_model((), CONFIG, labels=labels, base=str(base), output_dir=tmp_path / "reward", seed=0)
    assert not list(tmp_path.iterdir())


def test_rows_that_teach_nothing_are_counted(base: Path) -> None:
    labels = [*good_and_bad(2), UnpairedLabel("p", "  ", True, "x", 1, 1)]
    pairs = [Comparison("p", "yes", "no"), Comparison("p", "same", "same"), Comparison("p", "", "no")]
    heads = Heads({"reward": ()}, 1)
    found = examples(pairs, labels, AutoTokenizer.from_pretrained(base), heads=heads, max_tokens=64)
    assert found.dropped == {"empty": 2, "identical": 1}
    assert len(found.rows) == len(found.tokens) == 3
    wrong = [Comparison("p", "yes", "no", probability=1.2)]
    with pytest.raises(ValueError, match=r"probability is 1\.2, allowed is 0 to 1"):
        examples(wrong, [], AutoTokenizer.from_pretrained(base), heads=heads, max_tokens=64)


def test_scores_that_are_not_finite_are_never_saved(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        saving,
        "features",
        lambda model, sample: [([0, 1], torch.tensor([0.0, math.nan, 1.0, 2.0])[:, None].repeat(1, 128))],
    )
    with pytest.raises(ValueError, match="1 of 4 training scores are not finite"):
        train_reward_model(opposite_tastes(20), CONFIG, base=str(base), output_dir=tmp_path / "reward", seed=0)
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_pads_with_eos_gets_a_pad_token_of_its_own() -> None:
    tokenizer = build_tiny_tokenizer()
    assert tokenizer.pad_token == tokenizer.eos_token
    assert pad_apart_from_eos(tokenizer, name="base") == "<|endoftext|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    assert pad_apart_from_eos(tokenizer, name="base") == "", "it has one now"


def test_a_token_of_the_template_is_not_free_to_pad_with() -> None:
    tokenizer = build_tiny_tokenizer()
    tokenizer.chat_template = "<|endoftext|>" + str(tokenizer.chat_template)
    with pytest.raises(ValueError, match="base b: its tokenizer pads with its end-of-sequence token and no other"):
        pad_apart_from_eos(tokenizer, name="b")


@pytest.mark.parametrize(
    ("pad", "problem"),
    [("<|im_end|>", "pads with its end-of-sequence token"), (None, "has no pad token")],
)
def test_a_tokenizer_without_a_free_special_token_is_refused(pad: str | None, problem: str) -> None:
    tokenizer = build_tiny_tokenizer()
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["added_tokens"] = [token for token in backend["added_tokens"] if token["content"] != "<|endoftext|>"]
    from tokenizers import Tokenizer

    without = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token=pad,
    )
    without.chat_template = tokenizer.chat_template
    with pytest.raises(ValueError, match=f"base b: its tokenizer {problem} and no other special token is free"):
        pad_apart_from_eos(without, name="b")


@pytest.fixture(scope="module")
def adapted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora") / "reward"
    config = RewardModelConfig(
        learning_rate=3e-3, head_learning_rate=1e-2, epochs=3, max_tokens=128, lora=LoraConfig(rank=4, alpha=8)
    )
    rows = [row for row in opposite_tastes(240) if row.domain == "warm"]
    report = train_reward_model(rows, config, base=str(base), output_dir=folder, seed=0, threads=1)
    assert report.held_out_accuracy > 0.85
    return folder


def test_adapters_are_merged_and_the_rest_is_unchanged(adapted: Path, base: Path) -> None:
    before, after = load_file(base / "model.safetensors"), load_file(adapted / "model.safetensors")
    changed = {name for name in before if name in after and not torch.equal(before[name], after[name])}
    assert "model.layers.0.self_attn.q_proj.weight" in changed
    assert all(".self_attn." in name or ".mlp." in name for name in changed)
    assert not [name for name in after if "lora" in name]


def test_peft_loads_the_adapter_folder_to_the_same_scores(adapted: Path, base: Path) -> None:
    whole = RewardModel.load(str(adapted), dtype="float32", max_tokens=128)
    trunk = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    model = PeftModel.from_pretrained(trunk, str(adapted / "adapter")).eval()
    for row in opposite_tastes(4):
        text = dialogue(row.prompt, row.chosen)
        ids = whole.tokenizer.apply_chat_template(text, tokenize=True, return_dict=False)
        with torch.no_grad():
            raw = model(input_ids=torch.tensor([ids])).logits.item()
        assert whole.score([text])[0] == pytest.approx((raw - whole.score_mean) / whole.score_std, abs=0.1)


def test_bootstrap_draws_whole_prompts() -> None:
    groups = [str(row // 3) for row in range(300)]
    counts = prompts_drawn(groups, seed=1)
    assert counts.sum() == 300, "as many prompts as there are, three rows each"
    assert torch.equal(counts, counts.reshape(-1, 3)[:, :1].expand(-1, 3).reshape(-1))
    assert 0.25 < (counts == 0).float().mean() < 0.5, "1/e of the prompts are left out"
    assert not torch.equal(counts, prompts_drawn(groups, seed=2))


def test_weights_by_head_and_member() -> None:
    heads = Heads({"a": ("x",), "all": ()}, 2)
    weights_NL = heads.weights(["x", "y", ""], ["p", "q", "r"], bootstrap=False, seed=0)
    assert weights_NL.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]]
    assert heads.labels == ["a.0", "a.1", "all.0", "all.1"]
    drawn_NL = heads.weights(["x"] * 50, [str(n) for n in range(50)], bootstrap=True, seed=0)
    assert len({tuple(column) for column in drawn_NL.T.tolist()}) == 4
    assert Counter(drawn_NL.sum(0).tolist()) == {50.0: 4}
