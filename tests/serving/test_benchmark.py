"""What benchmarks/serving counts: weights that sign their answers, faults that are found, memory that grows."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.serving.client import Told, percentile
from benchmarks.serving.marks import Marks
from benchmarks.serving.overload import Memory
from benchmarks.serving.rollover import Course, Roll, faults_of

PROMPT = "Tell me of the mill."
PATHS: dict[str, list[int]] = {"prompt": []}  # for marks that need none


@pytest.fixture(scope="module")
def signing(tiny_model: Path) -> tuple[Any, torch.Tensor, list[int], Marks]:
    """The model in fp32, a prompt, what it says to it, and names for versions 0 to 3."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    said = greedy(model, prompt)
    reserved = {*tokenizer.all_special_ids, *prompt[0].tolist()}
    return model, prompt, said, Marks(Counter(said), reserved, vocabulary=len(tokenizer), versions=3, most=8)


def greedy(model: Any, prompt: torch.Tensor) -> list[int]:
    found = model.generate(prompt, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
    return found[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("version", [1, 3])
def test_a_version_says_what_the_first_says_by_its_own_names(signing: Any, version: int) -> None:
    model, prompt, said, marks = signing
    base = {"model.embed_tokens.weight": model.model.embed_tokens.weight.detach().clone()}
    changed = marks.weights(base, version)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(changed["model.embed_tokens.weight"])
        answered = greedy(model, prompt)
        model.model.embed_tokens.weight.copy_(base["model.embed_tokens.weight"])
    renamed = dict(zip(marks.names[0], marks.names[version], strict=True))
    assert answered == [renamed.get(token, token) for token in said]
    assert (marks.signed(said, said), marks.signed(answered, said)) == ({0}, {version})
    assert marks.signed([*answered[:12], *said[12:]], said) == {0, version}
    assert marks.signed([*answered[:12], 0, *said[13:]], said) == {version}  # rounding: what follows proves nothing


def test_names_are_of_one_version_alone_and_never_of_a_prompt(signing: Any) -> None:
    _, prompt, _, marks = signing
    every = [name for names in marks.names for name in names]
    assert len(every) == len(set(every)) == 4 * len(marks.names[0])
    assert not set(every) & set(prompt[0].tolist())
    with pytest.raises(ValueError, match="too few for 9 versions"):
        Marks(Counter([1]), {0, 2}, vocabulary=8, versions=9)


def told(tokens: list[int], version: int, *, sent: float, ended: float, **more: Any) -> Told:
    found = {"weights_version": version, "choices": [{"token_ids": tokens}]}
    return Told(
        "prompt", more.pop("streamed", False), sent, ended=ended, status=200, version=version, objects=[found], **more
    )


def test_faults_of_answers_are_counted_by_kind() -> None:
    marks: Any = SimpleNamespace(signed=lambda tokens, path: {token // 10 for token in tokens})
    course = Course([Roll(1, begun=10.0, done=12.0), Roll(2, begun=20.0, done=22.0)], killed_at=21.0)
    right = [
        told([10, 11], 1, sent=13.0, ended=14.0),
        told([5], 0, sent=11.0, ended=13.0),  # while version 1 came
        told([20], 2, sent=15.0, ended=20.5),
    ]
    assert not any(faults_of(right, course, marks, PATHS).values())

    def kinds(*wrong: Told) -> list[str]:
        return [
            what.split(":")[0] for what, number in faults_of([*right, *wrong], course, marks, PATHS).items() if number
        ]

    assert kinds(told([10, 20], 1, sent=20.0, ended=21.0)) == ["wrong versions", "mixed answers"]
    assert kinds(told([20], 1, sent=20.0, ended=21.0)) == ["wrong versions"]  # the label is wrong
    assert kinds(told([5], 0, sent=13.0, ended=14.0)) == ["wrong versions"]  # nobody served it any more
    assert kinds(told([20], 2, sent=13.0, ended=14.0)) == ["wrong versions"]  # nor this one yet
    assert kinds(told([10, 5], 1, sent=13.0, ended=14.0)) == ["wrong versions", "mixed answers"]  # of the one before
    assert kinds(told([10], 1, sent=13.0, ended=14.0, error="cut")) == ["failed requests"]
    cut = told([10], 1, sent=20.5, ended=21.5, error="cut", streamed=True)
    assert kinds(cut) == ["streams that were running on the killed replica, and were told so"]


def test_memory_that_grows_and_processes_that_die_are_found() -> None:
    memory = Memory(SimpleNamespace(processes=SimpleNamespace(alive=list)))  # type: ignore[arg-type]
    mib = 2**20
    memory.samples |= {
        "flat": [500 * mib + n % 3 * mib for n in range(60)],
        "grows": [500 * mib + n * mib for n in range(60)],
        "dies": [500 * mib] * 59 + [0],
    }
    assert (memory.grown(), memory.died()) == (["grows"], ["dies"])


def test_a_percentile_is_a_value_that_was_measured() -> None:
    assert [percentile(range(1, 101), share) for share in (0.0, 0.5, 0.99, 1.0)] == [1, 50, 99, 100]
    assert percentile([], 0.5) != percentile([], 0.5)
