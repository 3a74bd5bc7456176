"""`headrace reward-eval` on a tiny reward model: the whole way, the page in a browser, and what is refused."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from cluster.cli import main
from cluster.progress import Progress
from cluster.reward_eval import RewardEvalOptions, evaluate_reward_model
from cluster.reward_eval.invariance import invariance
from contracts.config import ConfigError
from contracts.records import Comparison
from feedback.formats import write_preferences
from models.reward import RewardModel
from tests.browser import check_readable, chromium, new_page
from tests.tiny import build_tiny_model

WORDS = ["the", "wheel", "of", "a", "mill", "is", "kind", "in", "the", "morning", "and", "so", "on", "every", "day"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on two, above all beside other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("reward")
    base = build_tiny_model(root / "base", tied=True)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    with torch.no_grad():
        model.score.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(root / "reward")
    AutoTokenizer.from_pretrained(base).save_pretrained(root / "reward")
    return root / "reward"


@pytest.fixture(scope="module")
def pairs(reward_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labels that follow the reward model's own scores in one domain, and are turned around in another."""
    draw = np.random.default_rng(0)
    model = RewardModel.load(str(reward_folder), max_tokens=128)
    rows = []
    for number in range(80):
        prompt = f"Question {number // 2}?"
        texts = [" ".join(draw.choice(WORDS, draw.integers(3, 9))) for _ in range(2)]
        scores = model.score(
            [[{"role": "user", "content": prompt}, {"role": "assistant", "content": t}] for t in texts]
        )
        domain = "</td><script>alert(1)</script>" if number % 4 < 2 else "against"
        better = int(scores[1] > scores[0]) ^ (domain == "against")
        rows.append(Comparison(prompt, texts[better], texts[1 - better], domain=domain))
    rows.append(Comparison("Question 0?", "the same", "the same"))
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    write_preferences(rows, path)
    return path


def evaluated(options: RewardEvalOptions):
    with Progress(0) as progress:
        return evaluate_reward_model(options, progress)


def test_the_whole_way(reward_folder: Path, pairs: Path, tmp_path: Path):
    new = tmp_path / "new.jsonl"
    rows = [Comparison(f"Other {n}?", "the wheel of a mill", "so kind") for n in range(5)]
    write_preferences([*rows, Comparison("Question 3?", "a", "so")], new)
    options = RewardEvalOptions(
        str(reward_folder), pairs, new, tmp_path / "out", max_tokens=128, leave_one_domain_out=True,
        base=str(reward_folder.parent / "base"), checked_pairs=8,
    )  # fmt: skip
    found = evaluated(options)
    script = "</td><script>alert(1)</script>"
    assert found.domains[script].accuracy.value == 1.0
    assert found.domains["against"].accuracy.value == 0.0
    assert found.overall.accuracy.value == 0.5
    assert found.dropped == {"identical": 1}
    assert (found.pairs, found.prompts) == (80, 40)
    assert {each.domain for each in found.left_out} == {script, "against"}
    assert found.new_labels is not None
    assert (found.new_labels.accuracy.pairs, found.new_known_prompts) == (5, 1)
    assert found.invariance.swap_probability < 0.05
    assert found.invariance.pairs == 8
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert record["overall"]["accuracy"]["value"] == 0.5
    assert record["schema_version"] == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["evaluation.json", "report.html"]

    with chromium() as browser:
        for scheme, width in (("light", 1200), ("dark", 420)):
            page, wrong = new_page(browser, scheme=scheme, width=width)
            page.goto((tmp_path / "out" / "report.html").as_uri())
            check_readable(page)
            text = page.inner_text("body")
            assert "not distinguishable from guessing" in text
            assert script in text
            assert page.locator("figure svg").count() == 2
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            assert wrong == []


class Leaning:
    """Scores that depend on who comes first in a batch."""

    def score(self, dialogues):
        return [
            float(len(dialogue[-1]["content"])) + (5.0 if at == 0 else 0.0) for at, dialogue in enumerate(dialogues)
        ]


def test_scores_that_depend_on_their_company_are_found():
    sides = [({"content": "x" * (n + 1)}, {"content": "y" * (n + 3)}) for n in range(4)]
    dialogues = [([one], [other]) for one, other in sides]
    scores = np.array([[len(one["content"]), len(other["content"])] for one, other in sides], dtype=float)
    found = invariance(Leaning(), dialogues, scores, temperature=1.0)
    assert found.swapped == 5.0  # the last pair's second side comes first there
    assert found.swapped_rankings == 0  # -2 becomes -7
    assert found.alone == 5.0
    assert found.swap_probability == pytest.approx(1 / (1 + np.exp(2)) - 1 / (1 + np.exp(7)))
    assert found.typical_margin == 2.0


def test_bad_input_is_one_clear_line_and_nothing_is_written(reward_folder: Path, pairs: Path, tmp_path: Path):
    good = RewardEvalOptions(str(reward_folder), pairs, out=tmp_path / "out", max_tokens=128)
    one_domain = tmp_path / "one.jsonl"
    write_preferences([Comparison(f"{n}?", "a", "b") for n in range(4)], one_domain)
    same = tmp_path / "same.jsonl"
    write_preferences([Comparison("One?", "a", "b"), Comparison("Two?", "the same", "the same")], same)
    refused = [
        (replace(good, model=str(tmp_path / "none")), "neither a folder nor a model"),
        (replace(good, pairs=tmp_path / "none.jsonl"), "cannot be read"),
        (replace(good, pairs=same), r"1 usable pairs on 1 prompts \(1 identical\); 2 prompts are needed"),
        (replace(good, pairs=one_domain, leave_one_domain_out=True), "needs a `domain` column with two domains"),
        (replace(good, leave_one_domain_out=True), "give --base"),
    ]
    for options, message in refused:
        with pytest.raises(ConfigError, match=message):
            evaluated(options)
    assert not (tmp_path / "out").exists()


def test_the_command_ends_with_two_and_one_line(reward_folder: Path, tmp_path: Path, capsys, monkeypatch):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "chosen": "b"}\n')
    monkeypatch.setattr("sys.argv", ["headrace", "reward-eval", str(reward_folder), "--pairs", str(file)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_score_that_is_not_finite_is_refused(reward_folder: Path, pairs: Path, tmp_path: Path):
    broken = tmp_path / "broken"
    model = AutoModelForSequenceClassification.from_pretrained(reward_folder)
    with torch.no_grad():
        model.score.weight.fill_(float("nan"))
    model.save_pretrained(broken)
    AutoTokenizer.from_pretrained(reward_folder).save_pretrained(broken)
    with pytest.raises(ConfigError, match=r"pairs.jsonl: usable pair 1 .* not finite"):
        evaluated(RewardEvalOptions(str(broken), pairs, out=tmp_path / "out", max_tokens=128))
    assert not (tmp_path / "out").exists()


def test_a_limit_draws_whole_prompts_first(reward_folder: Path, pairs: Path, tmp_path: Path):
    options = RewardEvalOptions(str(reward_folder), pairs, out=tmp_path / "out", max_tokens=128, limit=20)
    found = evaluated(options)
    assert (found.pairs, found.prompts) == (20, 10)
