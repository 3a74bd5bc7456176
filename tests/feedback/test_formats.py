"""Preference files: what is written is read back, what others write is read, what is wrong is named."""

import gzip
import json
import re
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contracts.config import ConfigError
from contracts.records import Comparison
from feedback import exports
from feedback.formats import read_preferences, read_unpaired, split_by_prompt, write_preferences, write_unpaired
from feedback.quality import UnpairedLabel

HH = Path(__file__).parents[3] / "shared" / "data" / "hh_harmless_pairs.jsonl.gz"
USER, ASSISTANT = "user", "assistant"


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def read_one(tmp_path: Path, row: object) -> Comparison:
    (comparison,), dropped = read_preferences(write_lines(tmp_path / "one.jsonl", row))
    assert dropped == {}
    return comparison


def test_parquet_comes_back_as_it_went(tmp_path: Path):
    rows = [
        Comparison("Wie geht's? 🙂", "gut ", " schlecht", "p1", "chat", 0.875, 4, 1),
        Comparison("line\nbreak\u2028", "x", "y", "p2"),
    ]
    path = tmp_path / "run=1" / "preferences.parquet"
    write_preferences(rows, path)
    assert read_preferences(path) == (rows, {})
    assert [entry.name for entry in path.parent.iterdir()] == ["preferences.parquet"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "preferences.parquet"
    write_preferences([Comparison("p", "x", "y", "1")], path)
    with pytest.raises(pa.ArrowException):
        write_preferences([Comparison("p", 3, "y")], path)  # type: ignore[arg-type]
    assert len(read_preferences(path)[0]) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["preferences.parquet"]


def test_plain_rows_and_gzip(tmp_path: Path):
    row = {
        "prompt": "Sky?",
        "chosen": "Blue. ",
        "rejected": "Green.",
        "domain": "facts",
        "probability": 0.75,
        "other": [],
    }
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(row).encode()))
    (read,), dropped = read_preferences(path)
    assert (read.prompt, read.chosen, read.rejected, read.domain, read.probability) == (
        "Sky?", "Blue. ", "Green.", "facts", 0.75
    )  # fmt: skip
    assert dropped == {}


def test_prompt_ids_are_kept_or_hashed_from_the_prompt(tmp_path: Path):
    sides = {"chosen": "x", "rejected": "y"}
    rows = [
        {"prompt": "p", "prompt_id": 7, **sides},
        {"prompt": "p", **sides},
        {"prompt": "p", **sides},
        {"prompt": "q", **sides},
    ]
    ids = [c.prompt_id for c in read_preferences(write_lines(tmp_path / "rows.jsonl", *rows))[0]]
    assert ids[0] == "7"
    assert ids[1] == ids[2] == "148de9c5a7a44d19"  # sha256 of "p"
    assert ids[3] != ids[1]


@pytest.mark.parametrize(
    "row",
    [
        {  # TRL, explicit prompt
            "prompt": [message(USER, "Sky?")],
            "chosen": [message(ASSISTANT, "Blue.")],
            "rejected": [message(ASSISTANT, "Green.")],
        },
        {  # TRL, implicit prompt
            "chosen": [message(USER, "Sky?"), message(ASSISTANT, "Blue.")],
            "rejected": [message(USER, "Sky?"), message(ASSISTANT, "Green.")],
        },
        {  # UltraFeedback: the prompt as text and in front of both sides
            "prompt": "Sky?",
            "chosen": [message(USER, "Sky?"), message(ASSISTANT, "Blue.")],
            "rejected": [message(USER, "Sky?"), message(ASSISTANT, "Green.")],
        },
        {"prompt": [message(USER, "Sky?")], "chosen": "Blue.", "rejected": "Green."},
        {"chosen": "\n\nHuman: Sky?\n\nAssistant: Blue.", "rejected": "\n\nHuman: Sky?\n\nAssistant: Green."},
    ],
    ids=["explicit", "implicit", "repeated", "mixed", "HH"],
)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_one_question_is_its_text(tmp_path: Path, row: dict, suffix: str):
    path = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        write_lines(path, row)
    else:
        pq.write_table(pa.Table.from_pylist([row]), path)
    (read,), _ = read_preferences(path)
    assert (read.prompt, read.chosen, read.rejected) == ("Sky?", "Blue.", "Green.")


def test_earlier_turns_stay_in_the_prompt(tmp_path: Path):
    turns = [message("system", "Be kind."), message(USER, "Hi"), message(ASSISTANT, "Hello"), message(USER, "Sky?")]
    row = {"prompt": turns, "chosen": [message(ASSISTANT, "Blue.")], "rejected": [message(ASSISTANT, "Green.")]}
    assert read_one(tmp_path, row).prompt == "System: Be kind.\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Sky?"
    row["prompt"] = [message(USER, "Look up."), message(USER, "Sky?")]
    assert read_one(tmp_path, row).prompt == "Look up.\n\nSky?"


def test_hh_prompts_end_at_a_turn_not_inside_an_answer(tmp_path: Path):
    shared = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Sky?"
    row = {"chosen": f"{shared}\n\nAssistant: It is blue.", "rejected": f"{shared}\n\nAssistant: It is\n\ngreen."}
    read = read_one(tmp_path, row)
    assert read.prompt == shared.strip()
    assert (read.chosen, read.rejected) == ("It is blue.", "It is\n\ngreen.")


def test_unusable_rows_are_counted(tmp_path: Path):
    path = write_lines(
        tmp_path / "rows.jsonl",
        {"prompt": "p", "chosen": "same", "rejected": " same\n"},
        {"prompt": "p", "chosen": "x", "rejected": "  "},
        {"prompt": " ", "chosen": "x", "rejected": "y"},
        {"prompt": "p", "chosen": "x", "rejected": "y", "probability": 0.5},
        {"chosen": "\n\nHuman: p\n\nAssistant: x", "rejected": "\n\nHuman: q\n\nAssistant: y"},
        {"chosen": "\n\nHuman: p\n\nAssistant: x", "rejected": "\n\nHuman: p"},
        "",
        {"prompt": "p", "chosen": "x", "rejected": "y"},
    )
    kept, dropped = read_preferences(path)
    assert [row.probability for row in kept] == [0.5, 1.0]
    assert dropped == {"identical": 1, "empty": 2, "different prompts": 1, "no response": 1}


FINE = {"prompt": "p", "chosen": "x", "rejected": "y"}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"prompt": "p", "chosen": ', "not a line of JSON"),
        ("[1, 2]", "a row is an object"),
        ({"prompt": "p", "chosen": "x"}, "'rejected' is missing, there are: chosen, prompt"),
        ({"prompt": "p", "chosen": None, "rejected": "y"}, "'chosen' is missing"),
        (
            {"chosen": "The sky is blue.", "rejected": "The sky is green."},
            "no 'prompt', and 'chosen' is not a dialogue",
        ),
        ({"prompt": "p", "chosen": "x", "rejected": 3}, "'chosen' is neither text nor a list"),
        ({"prompt": 3, "chosen": "x", "rejected": "y"}, "'prompt' is neither text nor a list"),
        (
            {**FINE, "chosen": [message("robot", "x")], "rejected": [message(ASSISTANT, "y")]},
            "role 'robot', allowed are",
        ),
        ({**FINE, "chosen": [message(ASSISTANT, None)], "rejected": []}, "'content of chosen' is None"),  # type: ignore[arg-type]
        ({**FINE, "probability": 0.3}, "probability is 0.3, allowed is 0.5 to 1"),
        ('{"prompt": "p", "chosen": "x", "rejected": "y", "probability": NaN}', "probability is nan"),
        ({**FINE, "domain": ["x"]}, "'domain' is"),
        ({**FINE, "votes_chosen": -1}, "votes_chosen is -1"),
        ('{"prompt": "\\ud800", "chosen": "x", "rejected": "y"}', "half a surrogate pair"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: object, problem: str):
    path = write_lines(tmp_path / "rows.jsonl", FINE, "", line)
    with pytest.raises(ConfigError, match=re.escape(f"{path}:3: ") + ".*" + re.escape(problem)):
        read_preferences(path)


def test_files_that_cannot_be_read_are_named(tmp_path: Path):
    broken = {name: tmp_path / name for name in ("gone.jsonl", "cut.jsonl.gz", "no.parquet", "rows.csv", "latin.jsonl")}
    broken["cut.jsonl.gz"].write_bytes(gzip.compress(b"{}" * 1000)[:-12])
    broken["no.parquet"].write_bytes(b"not parquet")
    broken["latin.jsonl"].write_bytes('{"prompt": "\xfc"}'.encode("latin-1"))
    for path in broken.values():
        with pytest.raises(ConfigError, match=re.escape(str(path))):
            read_preferences(path)


def test_parquet_names_missing_columns_and_rows(tmp_path: Path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": ["p"], "chosen": ["x"]}), path)
    with pytest.raises(ConfigError, match=r"rows\.parquet: column 'rejected' is missing, there are: prompt, chosen"):
        read_preferences(path)
    pq.write_table(pa.Table.from_pylist([FINE, {**FINE, "chosen": None}]), path)
    with pytest.raises(ConfigError, match=r"rows\.parquet:2: 'chosen' is missing"):
        read_preferences(path)
    pq.write_table(pa.Table.from_pylist([FINE]).replace_schema_metadata({"headrace_schema_version": "99"}), path)
    with pytest.raises(ConfigError, match="schema version 99"):
        read_preferences(path)


@pytest.mark.skipif(not HH.exists(), reason="the HH-RLHF pairs are not beside this checkout (shared/data)")
def test_hh_rlhf(tmp_path: Path):
    kept, dropped = read_preferences(HH)
    # four pairs of the set answer different dialogues: nothing says which answer is better to one prompt
    assert dropped == {"different prompts": 4, "empty": 2}
    assert len(kept) + 6 == 1802
    with gzip.open(HH, "rt", encoding="utf-8") as lines:
        first = json.loads(next(lines))
    for side, text in (("chosen", kept[0].chosen), ("rejected", kept[0].rejected)):
        assert first[side].endswith(f"\n\nAssistant: {text}")
        assert first[side].strip() == f"{kept[0].prompt}\n\nAssistant: {text}"
    single = sum(not c.prompt.startswith("Human: ") for c in kept)
    assert 0 < single < len(kept)
    assert all("\n\nHuman:" not in c.chosen and "\n\nAssistant:" not in c.chosen for c in kept)
    write_preferences(kept, tmp_path / "hh.parquet")
    assert read_preferences(tmp_path / "hh.parquet") == (kept, {})
    train, held_out = split_by_prompt(kept, 0.2, seed=0)
    assert not {c.prompt for c in train} & {c.prompt for c in held_out}


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl", "rows.jsonl.gz", "rows"])
@pytest.mark.parametrize("layout", ["plain", "conversational"])
def test_every_format_and_layout_comes_back_as_it_went(tmp_path: Path, name: str, layout: str):
    if name == "rows":
        pytest.importorskip("datasets")
    prompts = ["Sky?", "Human: alone", "Human: Hi\n\nAssistant: Yes\n\nHuman: Sky?", "System: \n\nHuman: a\n\nb\u2028"]
    rows = [Comparison(prompt, f"x{i} ", "y", f"p{i}", "chat", 0.875, 4, 1) for i, prompt in enumerate(prompts)]
    write_preferences(rows, tmp_path / "of" / name, layout=layout)  # type: ignore[arg-type]
    assert read_preferences(tmp_path / "of" / name) == (rows, {})
    labels = [UnpairedLabel(prompt, f"x{i} ", i % 2 == 0, f"p{i}", 2, 3) for i, prompt in enumerate(prompts)]
    write_unpaired(labels, tmp_path / "on" / name, layout=layout)  # type: ignore[arg-type]
    assert read_unpaired(tmp_path / "on" / name) == (labels, {})
    assert [entry.name for entry in (tmp_path / "on").iterdir()] == [name]


def test_conversational_rows_are_those_of_trl(tmp_path: Path):
    rows = [Comparison("System: Be kind.\n\nHuman: Sky?", "Blue.", "Green.")]
    write_preferences(rows, tmp_path / "rows.jsonl", layout="conversational")
    row = json.loads((tmp_path / "rows.jsonl").read_text(encoding="utf-8"))
    assert row["prompt"] == [message("system", "Be kind."), message(USER, "Sky?")]
    assert (row["chosen"], row["rejected"]) == ([message(ASSISTANT, "Blue.")], [message(ASSISTANT, "Green.")])
    with pytest.raises(ValueError, match="layout is 'chat', allowed is plain or conversational"):
        write_preferences(rows, tmp_path / "rows.jsonl", layout="chat")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"rows\.csv: written are"):
        write_preferences(rows, tmp_path / "rows.csv")


def test_datasets_folders_need_the_package_and_a_new_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [Comparison("p", "x", "y")]
    monkeypatch.setattr(exports.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="need the package datasets: pip install datasets"):
        write_preferences(rows, tmp_path / "rows")
    monkeypatch.undo()
    pytest.importorskip("datasets")
    (tmp_path / "rows").mkdir()
    with pytest.raises(ConfigError, match="rows: is there already"):
        write_preferences(rows, tmp_path / "rows")
    with pytest.raises(ConfigError, match="rows: cannot be read"):
        read_preferences(tmp_path / "rows")


def test_what_is_alike_after_truncation_is_left_out(tmp_path: Path):
    path = write_lines(tmp_path / "rows.jsonl", {"prompt": "p", "chosen": "long x", "rejected": "long y"}, FINE)
    kept, dropped = read_preferences(path, truncate=lambda text: text[:4])
    assert (len(kept), dropped) == (1, {"identical after truncation": 1})
    assert kept[0].chosen == "x"


def rows_of(*prompts: str, prompt_id: str = "") -> list[Comparison]:
    return [Comparison(prompt, f"x{i}", "y", prompt_id or prompt.strip()) for i, prompt in enumerate(prompts)]


def test_split_keeps_a_prompt_together():
    rows = rows_of(*[f"question {i % 50}" for i in range(400)])
    train, held_out = split_by_prompt(rows, 0.2, seed=1)
    assert Counter(c.prompt_id for c in held_out) == dict.fromkeys({c.prompt_id for c in held_out}, 8)
    assert (len(train), len(held_out)) == (320, 80)
    assert [c for c in rows if c in train] == train


def test_split_joins_rows_by_text_and_by_id():
    chain = (
        rows_of("one", "two", prompt_id="A") + rows_of("two ", "three", prompt_id="B") + rows_of("three", prompt_id="C")
    )
    for seed in range(20):
        train, held_out = split_by_prompt(chain + rows_of("else"), 0.5, seed=seed)
        assert sorted((len(train), len(held_out))) == [1, 5]


def test_split_is_seeded_and_blind_to_the_order_of_rows():
    rows = rows_of(*[f"question {i}" for i in range(30)])
    train, held_out = split_by_prompt(rows, 0.3, seed=1)
    assert split_by_prompt(rows, 0.3, seed=1) == (train, held_out)
    assert split_by_prompt(rows[::-1], 0.3, seed=1) == (train[::-1], held_out[::-1])
    assert split_by_prompt(rows, 0.3, seed=2) != (train, held_out)


def test_split_leaves_neither_side_empty():
    for fraction in (0.01, 0.99):
        train, held_out = split_by_prompt(rows_of("one", "two"), fraction, seed=0)
        assert (len(train), len(held_out)) == (1, 1)
    with pytest.raises(ValueError, match="a split needs two prompts"):
        split_by_prompt(rows_of("one", "one"), 0.5, seed=0)
    with pytest.raises(ValueError, match="fraction is 1"):
        split_by_prompt(rows_of("one", "two"), 1, seed=0)
