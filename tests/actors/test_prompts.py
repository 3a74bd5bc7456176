"""Prompt files, their split, the chat template, and the resumable order."""

import gzip
import json
import subprocess
import sys
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jinja2 import TemplateError

from actors.prompts import PromptRow, PromptStream, read_rows, render, split
from contracts.config import ConfigError
from contracts.records import Prompt


def write_lines(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def test_jsonl_rows_keep_ids_domains_and_further_columns(tmp_path):
    file = write_lines(
        tmp_path / "p.jsonl",
        '{"prompt": "What is a weir?", "id": 7, "domain": "water", "answer": [1, 2]}',
        "",
        '{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "And a sluice?"}]}',
    )
    first, second = read_rows(file)
    assert first == PromptRow(
        "7", [{"role": "user", "content": "What is a weir?"}], f"{file}:1", "water", {"answer": [1, 2]}
    )
    assert second.source == f"{file}:3"  # blank lines count
    assert second.text == "And a sluice?"
    assert [message["role"] for message in second.messages] == ["system", "user"]


def test_gzip_bom_and_parquet_give_the_same_rows(tmp_path):
    records = [{"prompt": "naïve café ☕", "domain": "x", "level": 3}, {"prompt": "two", "domain": "", "level": 4}]
    text = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    (tmp_path / "a.jsonl").write_text("\ufeff" + text, encoding="utf-8")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(text)
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "c.parquet")

    def content(name):
        return [(row.prompt_id, row.text, row.domain, row.columns) for row in read_rows(tmp_path / name)]

    assert content("a.jsonl") == content("b.jsonl.gz") == content("c.parquet")
    assert content("a.jsonl")[0][1:] == ("naïve café ☕", "x", {"level": 3})


def test_hashed_ids_do_not_depend_on_process_or_place_and_repetitions_are_numbered(tmp_path):
    file = write_lines(tmp_path / "p.jsonl", '{"prompt": "a"}', '{"prompt": "b"}', '{"prompt": "a"}')
    ids = [row.prompt_id for row in read_rows(file)]
    assert ids[2] == ids[0] + "-2"
    assert len(set(ids)) == 3
    code = f"from actors.prompts import read_rows; print([r.prompt_id for r in read_rows({str(file)!r})])"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert other.stdout.strip() == str(ids)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "x"', "not valid JSON"),
        ('["x"]', "this is a list"),
        ("{}", "this row has neither"),
        ('{"prompt": null}', "this row has neither"),
        ('{"prompt": "x", "messages": []}', "this row has both"),
        ('{"prompt": "  "}', "the prompt is empty"),
        ('{"prompt": 5}', "prompt is text, not int"),
        ('{"messages": []}', "not empty list"),
        ('{"messages": "hi"}', "not str"),
        ('{"messages": ["hi"]}', "messages[0] needs a role"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "one of system, user, assistant"),
        ('{"messages": [{"role": "user"}]}', "messages[0].content is text, not nothing"),
        ('{"messages": [{"role": "user", "content": ""}]}', "the last message is empty"),
        (
            '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}',
            "the last message is from assistant",
        ),
        ('{"prompt": "x", "id": 1.5}', "id is text or a whole number, not float"),
        ('{"prompt": "x", "id": true}', "not bool"),
        ('{"prompt": "x", "id": ""}', "not empty str"),
        ('{"prompt": "x", "domain": 3}', "domain is text, not int"),
        ('{"prompt": "\\ud800"}', "surrogate"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, line, message):
    file = write_lines(tmp_path / "p.jsonl", '{"prompt": "fine"}', line)
    with pytest.raises(ConfigError) as caught:
        read_rows(file)
    assert str(caught.value).startswith(f"{file}:2: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_duplicate_id_names_both_lines(tmp_path):
    file = write_lines(
        tmp_path / "p.jsonl", '{"prompt": "a", "id": "k"}', '{"prompt": "b"}', '{"prompt": "c", "id": "k"}'
    )
    with pytest.raises(ConfigError, match=rf"p\.jsonl:3: id 'k' is already used at {file}:1$"):
        read_rows(file)


def test_broken_utf8_names_line_and_byte(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_bytes(b'{"prompt": "ok"}\n{"prompt": "\xff"}\n')
    with pytest.raises(ConfigError, match=r"p\.jsonl:2: not UTF-8 text \(byte 13"):
        read_rows(file)


def test_parquet_rows_are_numbered_from_one(tmp_path):
    pq.write_table(pa.table({"prompt": ["a", None]}), tmp_path / "p.parquet")
    with pytest.raises(ConfigError, match=r"p\.parquet:2: give `prompt`"):
        read_rows(tmp_path / "p.parquet")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "cannot be read: No such file"),
        ("none.parquet", None, "cannot be read: No such file"),
        ("empty.jsonl", b"", "holds no prompts"),
        ("empty.parquet", b"", "damaged"),
        ("cut.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 50)[:-12], "damaged"),
        ("plain.jsonl.gz", b'{"prompt": "a"}\n', "damaged"),
        ("x.parquet", b"PAR1 nonsense", "damaged"),
        ("x.csv", b"prompt\na\n", ".jsonl, .jsonl.gz and .parquet"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, name, content, message):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_rows(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert message in str(caught.value)


def test_a_folder_is_refused_with_advice(tmp_path):
    with pytest.raises(ConfigError, match="is a folder; name one prompt file"):
        read_rows(tmp_path)


def row(text, prompt_id=None):
    return PromptRow(prompt_id or text, [{"role": "user", "content": text}], "file:1")


def test_split_never_shares_a_text_even_when_it_is_repeated():
    rows = [row(f"q{i % 30}", f"id{i}") for i in range(90)] + [row(" Q3  ", "variant")]
    train, held_out = split(rows, eval_count=10, seed=0)
    assert len(held_out) == 10
    assert len(train) >= 3 * 20
    assert not {r.text.strip().lower() for r in train} & {r.text.strip().lower() for r in held_out}


def test_split_depends_on_seed_and_content_not_on_order():
    rows = [row(f"q{i}") for i in range(40)]
    held_out = {r.text for r in split(rows, eval_count=8, seed=1)[1]}
    assert {r.text for r in split(rows[::-1], eval_count=8, seed=1)[1]} == held_out
    assert {r.text for r in split(rows, eval_count=8, seed=2)[1]} != held_out


def test_split_with_a_file_of_its_own_trains_on_none_of_it():
    rows, eval_rows = [row(f"q{i}") for i in range(10)], [row(f"q{i}", f"e{i}") for i in range(6, 14)]
    train, held_out = split(rows, eval_rows=eval_rows, eval_count=3, seed=0)
    assert [r.text for r in train] == [f"q{i}" for i in range(6)]
    assert len(held_out) == 3
    assert all(r.prompt_id.startswith("e") for r in held_out)
    assert len(split(rows, eval_rows=eval_rows, eval_count=64, seed=0)[1]) == 8


def test_split_without_evaluation_keeps_everything():
    rows = [row("a"), row("b")]
    assert split(rows, eval_count=0, seed=0) == (rows, [])


def test_split_refuses_to_leave_nothing_to_train_on():
    with pytest.raises(ConfigError, match=r"eval_count 3 leaves nothing to train on: .* 3 distinct prompts"):
        split([row("a"), row("b"), row("c"), row("c", "again")], eval_count=3, seed=0)
    with pytest.raises(ConfigError, match="eval_path holds every prompt"):
        split([row("a")], eval_rows=[row("A"), row("b")], eval_count=1, seed=0)


class CharTokenizer:
    """One token a character; records what it was asked for."""

    def __init__(self):
        self.conversations = []

    def apply_chat_template(self, conversation, **options):
        assert options == {"tokenize": True, "add_generation_prompt": True, "return_dict": False}
        self.conversations.append(conversation)
        if conversation[-1]["content"] == "refused":
            raise TemplateError("no such\nthing")
        return [ord(letter) for message in conversation for letter in message["content"]]


def test_render_puts_the_system_message_into_tokens_only():
    own = PromptRow(
        "2", [{"role": "system", "content": "S"}, {"role": "user", "content": "yo"}], "file:2", "d", {"n": 1}
    )
    prompts, skipped = render([row("hi", "1"), own], CharTokenizer(), system="sys", max_prompt_tokens=10)
    assert skipped == 0
    assert prompts[0] == Prompt("1", [ord(c) for c in "syshi"], "hi", [{"role": "user", "content": "hi"}])
    assert prompts[1] == Prompt("2", [ord(c) for c in "Syo"], "yo", own.messages, "d", {"n": 1})


def test_render_skips_and_counts_what_is_too_long():
    prompts, skipped = render(
        [row("abc"), row("abcd"), row("a" * 9)], CharTokenizer(), system=None, max_prompt_tokens=3
    )
    assert ([p.text for p in prompts], skipped) == (["abc"], 2)
    with pytest.raises(ConfigError, match=r"all 2 are longer than 3 tokens \(the shortest has 4"):
        render([row("abcd"), row("abcde")], CharTokenizer(), system=None, max_prompt_tokens=3)


def test_render_names_the_row_that_a_template_refuses():
    with pytest.raises(ConfigError, match="file:1: the model's chat template refuses it: no such thing"):
        render([row("refused")], CharTokenizer(), system=None, max_prompt_tokens=3)


def test_render_gives_the_ids_of_the_template_with_a_real_tokenizer():
    from tests.tiny import build_tiny_tokenizer

    tokenizer = build_tiny_tokenizer()
    # " \n" and the doubled spaces would not survive a decode-encode round trip in many tokenizers.
    text = "What  is the best\n way?"
    [prompt], _ = render([row(text)], tokenizer, system="Be kind.", max_prompt_tokens=200)
    start, end = (tokenizer.get_vocab()[token] for token in ("<|im_start|>", "<|im_end|>"))

    def turn(role, content):
        return [start, *tokenizer.encode(f"{role}\n{content}", add_special_tokens=False), end]

    newline = tokenizer.encode("\n", add_special_tokens=False)
    expected = [*turn("system", "Be kind."), *newline, *turn("user", text), *newline]
    expected += [start, *tokenizer.encode("assistant\n", add_special_tokens=False)]
    assert prompt.tokens == expected
    assert all(type(token) is int for token in prompt.tokens)


def prompts_of(count):
    return [Prompt(f"p{i}", [i], f"text {i}", [{"role": "user", "content": f"text {i}"}]) for i in range(count)]


def draw(stream, count):
    return [stream.next().prompt_id for _ in range(count)]


def test_each_epoch_is_a_permutation_and_a_new_one():
    stream = PromptStream(prompts_of(20), seed=3)
    epochs = [draw(stream, 20) for _ in range(3)]
    assert all(Counter(epoch) == Counter(f"p{i}" for i in range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert draw(PromptStream(prompts_of(20), seed=3), 20) == epochs[0]
    assert draw(PromptStream(prompts_of(20), seed=4), 20) != epochs[0]


@pytest.mark.parametrize("consumed", [0, 3, 7, 8, 25])
def test_a_restored_stream_goes_on_where_the_other_stood(consumed):
    stream = PromptStream(prompts_of(7), seed=5)
    draw(stream, consumed)
    state = json.loads(json.dumps(stream.state()))
    expected = draw(stream, 20)
    resumed = PromptStream(prompts_of(7), seed=5)
    draw(resumed, 2)  # whatever it did before does not matter
    resumed.restore(state)
    assert draw(resumed, 20) == expected


def test_a_changed_prompt_file_is_refused():
    state = PromptStream(prompts_of(7), seed=5).state()
    with pytest.raises(ValueError, match="the prompt file, or its order, has changed"):
        PromptStream(prompts_of(8), seed=5).restore(state)
    with pytest.raises(ValueError, match="has changed"):
        PromptStream(prompts_of(7)[::-1], seed=5).restore(state)
    with pytest.raises(ValueError, match="seed 5, this run has 6"):
        PromptStream(prompts_of(7), seed=6).restore(state)
    with pytest.raises(ValueError, match="prompt 9 of 7"):
        PromptStream(prompts_of(7), seed=5).restore(state | {"position": 9})
    with pytest.raises(ValueError, match="at least one"):
        PromptStream([], seed=0)


def test_importing_prompts_does_not_import_transformers():
    code = (
        "import sys, actors.prompts; print([m for m in ('transformers', 'torch', 'ray', 'vllm') if m in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert loaded.stdout.strip() == "[]"
