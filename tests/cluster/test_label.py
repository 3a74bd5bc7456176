"""`headrace label`: what it reads, where pairs come from, what it refuses, the whole command with two annotators."""

import json
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import experience_log
from cluster.label_command import LabelJob, check_labelling
from cluster.pair_sources import candidates
from contracts.config import ConfigError
from contracts.labelling import PairSource
from contracts.loading import load_labelling
from feedback.sampling import plan_to_predict
from feedback.store import DatasetQuery, Judgment, Store
from tests.command import Command
from tests.head import free_ports, ray_head_and_address
from tests.postgresql import Server
from tests.rollouts import scored_rollout


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def checked(folder: Path, **labelling: Any) -> LabelJob:
    settings = {"store": str(folder / "feedback.db"), "port": free_ports(1)[0], **labelling}
    (folder / "label.yaml").write_text(yaml.safe_dump({"labelling": settings}), encoding="utf-8")
    return check_labelling(load_labelling(folder / "label.yaml"))


def asked(folder: Path, name: str = "anna", *, votes: int = 99) -> list[tuple[str, set[str]]]:
    """What one annotator is asked, in order: prompt and the two texts."""
    found: list[tuple[str, set[str]]] = []
    with Store(folder / "feedback.db") as store:
        annotator, _ = store.register(name)
        while len(found) < votes and (given := store.next_task(annotator)):
            found.append((given.prompt, {given.response_a, str(given.response_b)}))
            store.set_active(annotator, False)  # the next one in the same order
            annotator, _ = store.register(f"{name} {len(found)}")
    return found


def test_a_file_with_the_section_alone_and_that_of_a_run_are_read(tmp_path: Path) -> None:
    alone = tmp_path / "label.yaml"
    alone.write_text("labelling: {store: votes.db}\n", encoding="utf-8")
    assert load_labelling(alone, ["labelling.required_votes=5"]).labelling.required_votes == 5
    run = {
        "output_dir": "run",
        "model": {"path": "base"},
        "prompts": {"path": "none.jsonl"},
        "rewards": [{"name": "none", "function": "none:none"}],
        "deadlines": {"start_s": 77.0},
        "labelling": {"store": "votes.db", "gold_rate": 0.2},
    }
    whole = tmp_path / "run.yaml"
    whole.write_text(yaml.safe_dump(run), encoding="utf-8")
    found = load_labelling(whole)
    assert (found.labelling.gold_rate, found.deadlines.start_s) == (0.2, 77.0)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"labeling": {"store": "x"}}, "labeling: unknown key, did you mean labelling?"),
        ({"ray": {}}, "labelling: required, but missing; docs/labelling.md has an example"),
        ({"labelling": {"store": "x", "gold_rat": 1}}, "labelling.gold_rat: unknown key, did you mean gold_rate?"),
        (
            {"labelling": {"store": "x", "pairs": [{}]}},
            "exactly one of file, run, evaluations and policy; there is none",
        ),
        (
            {"labelling": {"store": "x", "pairs": [{"file": "a", "run": "b"}]}},
            "exactly one of file, run, evaluations and policy; there are file and run",
        ),
    ],
)
def test_a_wrong_section_is_named(tmp_path: Path, data: dict[str, Any], said: str) -> None:
    path = tmp_path / "label.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load_labelling(path)
    assert said in str(error.value)


def test_pairs_of_a_file_become_tasks_once(tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {n}?", "response_a": f"first {n}", "response_b": f"second {n}"} for n in range(3)]
    rows += [
        {"prompt": "Old?", "chosen": "yes", "rejected": "no"},
        {"prompt": "Same?", "chosen": "x", "rejected": "x "},
    ]
    gold = [{"prompt": "1 + 1?", "chosen": "2", "rejected": "3"}]
    settings = {
        "pairs": [{"file": str(write_lines(tmp_path / "pairs.jsonl", rows))}],
        "gold": str(write_lines(tmp_path / "gold.jsonl", gold)),
        "asking": "as_given",
        "required_votes": 2,
    }
    first = checked(tmp_path, **settings)
    assert first.notes[0].endswith("gold.jsonl: 1 new gold checks")
    assert first.notes[1].endswith("pairs.jsonl: 4 new pairs; left out: identical 1")
    assert first.notes[2].startswith("nobody can sign in yet: headrace annotator NAME --store")
    again = checked(tmp_path, **settings)
    assert again.notes[1].endswith("0 new pairs, 4 were there already; left out: identical 1")
    with Store(tmp_path / "feedback.db") as store:
        assert store.totals().required_votes == 8
        anna, _ = store.register("anna")
        given = store.next_task(anna, gold_rate=1.0)
        assert given is not None
        assert {given.response_a, given.response_b} == {"2", "3"}
        right = Judgment("k", choice="a" if given.response_a == "2" else "b")
        store.submit(anna, given.task_id, right, lease_id=given.lease_id)
        assert store.gold_checks() == {"anna": (1, 1)}


def test_the_way_of_asking_orders_the_tasks(tmp_path: Path) -> None:
    alike = [
        {"prompt": "p0", "response_a": "one two three four five", "response_b": "one two three four six"},
        {"prompt": "p1", "response_a": "one two three", "response_b": "seven eight nine"},
        {"prompt": "p2", "response_a": "one two three four", "response_b": "one two three five"},
    ]
    source = [{"file": str(write_lines(tmp_path / "pairs.jsonl", alike))}]
    orders = {}
    for way in ("as_given", "varied", "random"):
        folder = tmp_path / way
        folder.mkdir()
        checked(folder, pairs=source, asking=way, required_votes=1)
        orders[way] = [prompt for prompt, _ in asked(folder)]
    assert orders["as_given"] == ["p0", "p1", "p2"]
    assert orders["varied"] == ["p1", "p2", "p0"]
    odd = [("o0", "ships sail at dawn"), ("o1", "cats sleep all day")]
    alike_many = [(f"m{number}", f"tea is better hot {number}") for number in range(6)]
    told = dict(odd + alike_many)
    rows = [{"prompt": p, "response_a": text, "response_b": "nothing of the kind"} for p, text in told.items()]
    file = str(write_lines(tmp_path / "odd.jsonl", rows))
    checked(tmp_path, pairs=[{"file": file}], asking="to_predict", required_votes=1)
    planned = [prompt for prompt, _ in asked(tmp_path)]
    order = plan_to_predict(list(told.values()), ["nothing of the kind"] * len(told))
    assert planned == [list(told)[index] for index in order]
    assert planned[0].startswith("m")  # its label tells most about the others
    drawn = set()
    for seed in range(8):
        folder = tmp_path / f"seed {seed}"
        folder.mkdir()
        checked(folder, pairs=source, asking="random", seed=seed, required_votes=1)
        drawn.add(tuple(prompt for prompt, _ in asked(folder)))
    assert len(drawn) > 2


def test_near_duplicates_are_bounded(tmp_path: Path) -> None:
    words = "the quick brown fox jumps over a lazy dog and runs into its dark forest beyond all hills of our land "
    words += "where mills grind corn while water falls from one wheel to another until night comes"
    rows = [{"prompt": words, "response_a": f"{words} {n}", "response_b": f"no {words}"} for n in range(5)]
    rows.append({"prompt": "something else", "response_a": "a", "response_b": "b"})
    source = [{"file": str(write_lines(tmp_path / "pairs.jsonl", rows))}]
    assert "3 new pairs; left out: near duplicate 3" in checked(tmp_path, pairs=source, near_duplicates=2).notes[0]


def test_responses_of_a_run_to_one_prompt_are_paired(tmp_path: Path) -> None:
    run = {
        "output_dir": str(tmp_path / "run"),
        "model": {"path": "base"},
        "prompts": {"path": str(write_lines(tmp_path / "p.jsonl", [{"prompt": "Why?", "id": "p0", "domain": "d"}]))},
        "rewards": [{"name": "none", "function": "none:none"}],
    }
    (tmp_path / "run" / "experience").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
    said = [("p0", "one", 0), ("p0", "two", 1), ("gone", "x", 0), ("gone", "y", 0)]
    batch = [
        scored_rollout(f"t{number}", prompt_id=prompt, response_text=text, versions=[0, version, version])
        for number, (prompt, text, version) in enumerate(said)
    ]
    experience_log.write(tmp_path / "run", 1, batch, {"step": 0})
    later = [scored_rollout("t9", prompt_id="p0", response_text="three", versions=[4, 4, 4])]
    experience_log.write(tmp_path / "run", 2, later, {"step": 1})
    dropped: Counter[str] = Counter()
    (found,) = candidates(PairSource(run=tmp_path / "run"), dropped)
    assert (found.prompt, found.prompt_name, found.domain, found.source) == ("Why?", "p0", "d", "versions")
    assert [(side.text, side.weights_version) for side in (found.first, found.second)] == [("one", 0), ("two", 1)]
    assert dropped == {"unknown prompt": 1}
    assert list(candidates(PairSource(run=tmp_path / "run", steps=1), Counter())) == []
    with pytest.raises(ConfigError, match="is no folder of a run: it has no config"):
        list(candidates(PairSource(run=tmp_path), Counter()))


def evaluation(path: Path, version: int, answers: dict[str, tuple[str, str]], **more: Any) -> Path:
    record = {"schema_version": 1, "version": version, "prompt_ids": list(answers)}
    record |= {
        "prompts": [prompt for prompt, _ in answers.values()],
        "responses": [text for _, text in answers.values()],
    }
    path.write_text(json.dumps(record | more), encoding="utf-8")
    return path


def test_two_evaluations_give_a_pair_for_each_prompt_of_both(tmp_path: Path) -> None:
    one = evaluation(tmp_path / "one.json", 0, {"p0": ("Why?", "so"), "p1": ("How?", "thus"), "p2": ("Who?", "me")})
    two = evaluation(
        tmp_path / "two.json", 9, {"p1": ("How?", "like this"), "p0": ("Why?", "because"), "p2": ("?", "I")}
    )
    dropped: Counter[str] = Counter()
    found = list(candidates(PairSource(evaluations=(one, two)), dropped))
    assert [(pair.prompt, pair.first.text, pair.second.text) for pair in found] == [
        ("Why?", "so", "because"),
        ("How?", "thus", "like this"),
    ]
    assert {(pair.first.weights_version, pair.second.weights_version) for pair in found} == {(0, 9)}
    assert dropped == {"prompt in one evaluation alone": 1}


@pytest.mark.parametrize(
    ("labelling", "said"),
    [
        ({"guidelines": "none.txt"}, "labelling.guidelines: none.txt cannot be read"),
        ({"pairs": [{"file": "none.jsonl"}]}, "none.jsonl: cannot be read: No such file"),
        ({"pairs": [{"run": "none"}]}, "labelling.pairs: none is no folder of a run"),
        ({"pairs": [{"evaluations": ["none.json", "none.json"]}]}, "labelling.pairs: none.json cannot be read"),
        ({"pairs": [{"policy": {"url": "http://127.0.0.1:1", "prompts": "none.jsonl"}}]}, "none.jsonl"),
        ({"store": "none://x"}, "labelling.store: none://x: its driver is not here"),
        ({"store": "postgresql+psycopg://nobody@127.0.0.1:1/none"}, "labelling.store: postgresql+psycopg://nobody@127"),
        ({"gold": "none.jsonl"}, "none.jsonl: cannot be read"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path: Path, labelling: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        checked(tmp_path, **labelling)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_broken_file_leaves_nothing_in_the_store(tmp_path: Path) -> None:
    good = [{"prompt": f"Question {n}?", "response_a": "x", "response_b": "y"} for n in range(2500)]
    path = write_lines(tmp_path / "pairs.jsonl", [*good, {"prompt": "half", "response_a": "x"}])
    with pytest.raises(ConfigError, match=r"pairs\.jsonl:2501: there is response_a but not the other response"):
        checked(tmp_path, pairs=[{"file": str(path)}])
    with Store(tmp_path / "feedback.db") as store:
        assert store.totals().open_tasks == 0


def test_a_damaged_evaluation_is_named(tmp_path: Path) -> None:
    good = evaluation(tmp_path / "good.json", 0, {"p0": ("Why?", "so")})
    short = evaluation(tmp_path / "short.json", 1, {"p0": ("Why?", "so")}, responses=[])
    old = evaluation(tmp_path / "old.json", 1, {"p0": ("Why?", "so")}, schema_version=99)
    (tmp_path / "other.json").write_text("{}", encoding="utf-8")
    for path, said in (
        (short, "is damaged: not as many responses as prompts"),
        (old, "is an evaluation of another Headrace"),
        (tmp_path / "other.json", "is no evaluation: write one with `headrace eval --output`"),
    ):
        with pytest.raises(ConfigError, match=said):
            list(candidates(PairSource(evaluations=(good, path)), Counter()))


def test_a_file_store_is_refused_on_a_cluster(tmp_path: Path) -> None:
    path = tmp_path / "label.yaml"
    settings = {"labelling": {"store": "votes.db", "port": free_ports(1)[0]}, "ray": {"address": "10.0.0.1:6379"}}
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"labelling\.store: votes\.db is a file of this machine"):
        check_labelling(load_labelling(path))
    assert not Path("votes.db").exists()


def call(port: int, path: str, token: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/api/{path}", json.dumps(body or {}).encode(), headers, method="POST"
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        found: dict[str, Any] = json.load(response)
    return found


@pytest.mark.slow
def test_two_people_label_until_ctrl_c_and_the_votes_become_a_file(tmp_path: Path, short_folder: Path) -> None:
    (port,) = free_ports(1)
    write_lines(tmp_path / "pairs.jsonl", [{"prompt": "Why?", "response_a": "good", "response_b": "bad"}])
    settings = {"store": "votes/feedback.db", "port": port, "required_votes": 2, "pairs": [{"file": "pairs.jsonl"}]}
    (tmp_path / "label.yaml").write_text(yaml.safe_dump({"labelling": settings}), encoding="utf-8")
    (tmp_path / "votes").mkdir()
    with Store(tmp_path / "votes" / "feedback.db") as store:
        tokens = [store.register(name)[1] for name in ("anna", "ben")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", str(short_folder))
        command = Command("label", "label.yaml", cwd=tmp_path)
    with command:
        command.until(lambda: f"http://127.0.0.1:{port}/" in command.output, "its address")
        for token in tokens:
            task = call(port, "next", token)["task"]
            side = "left" if task["responses"][0]["text"] == "good" else "right"
            vote = {"task_id": task["task_id"], "lease_id": task["lease_id"], "idempotency_key": "k", "choice": side}
            assert call(port, "judgments", token, vote)["repeated"] is False
            assert call(port, "next", token)["task"] is None
        command.ctrl_c()
        assert command.status() == 130, command.output
        assert command.processes.wait_gone() == []
    assert "2 of 2 votes are in votes/feedback.db" in command.output
    assert "Traceback" not in command.output
    with Command("preferences", "votes/feedback.db", "--to", "out.jsonl", cwd=tmp_path) as exporting:
        assert exporting.status() == 0, exporting.output
    (row,) = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert (row["prompt"], row["chosen"], row["rejected"], row["votes_chosen"]) == ("Why?", "good", "bad", 2)


@pytest.mark.slow
def test_on_a_cluster_two_people_label_into_a_postgresql(tmp_path: Path, postgresql_server: Server) -> None:
    """Both at once, over HTTP; the command ends, and the cluster is left with nothing of it."""
    (port,), place = free_ports(1), postgresql_server.new_database()
    rows = [{"prompt": f"Question {n}?", "response_a": f"good {n}", "response_b": f"bad {n}"} for n in range(12)]
    write_lines(tmp_path / "pairs.jsonl", rows)
    settings = {"store": place, "port": port, "required_votes": 2, "pairs": [{"file": "pairs.jsonl"}]}
    with Store(place) as store:
        tokens = [store.register(name)[1] for name in ("anna", "ben")]

    def label_all(token: str) -> int:
        votes = 0
        while (task := call(port, "next", token)["task"]) is not None:
            side = "left" if task["responses"][0]["text"].startswith("good") else "right"
            vote = {"task_id": task["task_id"], "lease_id": task["lease_id"], "idempotency_key": str(votes)}
            assert call(port, "judgments", token, vote | {"choice": side})["repeated"] is False
            votes += 1
        return votes

    with ray_head_and_address(tmp_path, num_cpus=2) as (_, address):
        run = {"labelling": settings, "ray": {"address": address}}
        (tmp_path / "label.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
        with Command("label", "label.yaml", cwd=tmp_path) as command:
            command.until(lambda: f"http://127.0.0.1:{port}/" in command.output, "its address")
            with ThreadPoolExecutor(2) as people:
                assert list(people.map(label_all, tokens)) == [12, 12]
            command.ctrl_c()
            assert command.status() == 130, command.output
            assert "24 of 24 votes are in" in command.output
            assert "Traceback" not in command.output
        with pytest.raises(OSError, match=r"refused|404"):
            call(port, "next", tokens[0])
    with Store(place) as store:
        votes = store.ballots()
        run_of = DatasetQuery(store.aggregate().aggregate_id)
        store.export_preferences("both", run_of, tmp_path / "out.jsonl")
    assert sorted(zip(votes.pairs_N.tolist(), votes.voters_N.tolist(), strict=True)) == [
        (pair, voter) for pair in range(12) for voter in range(2)
    ]
    pairs = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    said = {(row["prompt"], row["chosen"], row["rejected"], row["votes_chosen"]) for row in pairs}
    assert said == {(row["prompt"], row["response_a"], row["response_b"], 2) for row in rows}
