"""What a run writes can be read back, and a resumed run continues it as if nothing had happened."""

import json
import time

import pyarrow.parquet as pq
import pytest

from cluster.run_log import RunLog, write_json
from contracts.events import Event
from contracts.records import experience_records
from tests.rollouts import scored_rollout

# DESIGN.md, "Run directory".
COLUMNS = {
    "trajectory_id", "prompt_id", "group_id", "prompt_tokens", "response_tokens", "behavior_logprobs",
    "weights_versions", "reference_logprobs", "reward", "reward_components", "reward_version", "finish_reason",
    "actor_id",
}  # fmt: skip


def log(run_dir, resume_step=None):
    return RunLog(run_dir, resume_step=resume_step)


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write_steps(run_dir, last):
    writes = log(run_dir)
    for step in range(1, last + 1):
        writes.experience(step, [scored_rollout(f"t{step}")], {"step": step})
        writes.metrics({"step": step, "reward_mean": 0.5 * step})
    writes.close()


def resumed(run_dir, step):
    log(run_dir, resume_step=step).close()
    return [row["step"] for row in rows(run_dir / "metrics.jsonl")]


def experience_files(run_dir):
    return sorted(path.name for path in (run_dir / "experience").iterdir())


def test_experience_has_the_promised_columns_and_comes_back(tmp_path):
    batch = [
        scored_rollout("t0", behavior=[-0.5, -0.25, -2.0], versions=[3, 3, 4], reward=0.1),
        scored_rollout("t1", response=[2], finish_reason="length", response_text="naïve ☕\u2028"),
    ]
    writes = log(tmp_path)
    writes.experience(12, batch, {})
    writes.close()
    path = tmp_path / "experience" / "step-000012.parquet"
    table = pq.read_table(path)
    assert set(table.column_names) >= COLUMNS
    assert table.schema.metadata[b"headrace_schema_version"] == b"1"
    assert table.num_rows == 2
    assert table.column("weights_versions").to_pylist() == [[3, 3, 4], [0]]
    assert experience_records(table) == batch
    assert experience_files(tmp_path) == ["step-000012.parquet"]


def test_an_experience_file_is_whole_or_not_there(tmp_path, monkeypatch):
    writes = log(tmp_path)

    def full_disk(table, path, **options):
        path.write_bytes(b"PAR1")
        raise OSError("no space left on device")

    monkeypatch.setattr(pq, "write_table", full_disk)
    with pytest.raises(OSError, match="no space"):
        writes.experience(1, [scored_rollout()], {})
    writes.close()
    assert not (tmp_path / "experience" / "step-000001.parquet").exists()


def test_metrics_are_readable_at_any_moment_one_object_a_line(tmp_path):
    writes = log(tmp_path)
    writes.metrics({"step": 1, "reward/höflich": 0.25})
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 1, "reward/höflich": 0.25}]
    writes.metrics({"step": 2, "reward/höflich": 0.5})
    assert len(rows(tmp_path / "metrics.jsonl")) == 2
    writes.close()


def test_resuming_cuts_rows_and_files_past_the_step(tmp_path):
    write_steps(tmp_path, 5)
    assert resumed(tmp_path, 3) == [1, 2, 3]
    assert experience_files(tmp_path) == [f"step-00000{step}.parquet" for step in (1, 2, 3)]


def test_resuming_at_the_last_step_cuts_nothing(tmp_path):
    write_steps(tmp_path, 3)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert resumed(tmp_path, 3) == [1, 2, 3]
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert len(experience_files(tmp_path)) == 3


def test_every_step_appears_once_after_resuming(tmp_path):
    write_steps(tmp_path, 5)
    again = log(tmp_path, resume_step=3)
    for step in (4, 5, 6):
        again.experience(step, [scored_rollout(f"again-{step}")], {})
        again.metrics({"step": step})
    again.close()
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    names = [pq.read_table(path)["trajectory_id"][0].as_py() for path in sorted((tmp_path / "experience").iterdir())]
    assert names == ["t1", "t2", "t3", "again-4", "again-5", "again-6"]


def test_a_last_line_cut_off_anywhere_is_dropped(tmp_path):
    write_steps(tmp_path, 2)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    last = json.dumps({"step": 3, "reward/höflich": 1.5}, ensure_ascii=False).encode()
    for length in range(1, len(last)):  # in the middle of the ö too
        path.write_bytes(whole + last[:length])
        assert resumed(tmp_path, 3) == [1, 2]
    path.write_bytes(whole + last)  # only the line's end is missing
    assert resumed(tmp_path, 3) == [1, 2, 3]
    assert path.read_bytes() == whole + last + b"\n"


def test_a_new_run_cuts_nothing(tmp_path):
    assert resumed(tmp_path, 0) == []


def test_unfinished_checkpoints_go(tmp_path):
    partial = tmp_path / "checkpoints" / "step-000004.partial"
    whole = tmp_path / "checkpoints" / "step-000003"
    partial.mkdir(parents=True)
    whole.mkdir()
    (whole / "MANIFEST.json").touch()
    resumed(tmp_path, 3)
    assert (partial.exists(), whole.exists()) == (False, True)


def bad(writes, trajectory_id, step, response="text"):
    writes.quarantine(step=step, trajectory_id=trajectory_id, prompt_id="p0", reason="reward is nan", response=response)


def test_a_quarantined_trajectory_is_kept_with_its_reason(tmp_path):
    writes = log(tmp_path)
    bad(writes, "t9", 4, response="line\u2028 two\nthree ☕")
    writes.close()
    assert rows(tmp_path / "quarantine.jsonl") == [
        {
            "trajectory_id": "t9",
            "prompt_id": "p0",
            "step": 4,
            "reason": "reward is nan",
            "response": "line\u2028 two\nthree ☕",
            "schema_version": 1,
        }
    ]


def test_a_resumed_run_issues_the_same_ids_again_so_their_quarantine_rows_go(tmp_path):
    writes = log(tmp_path)
    bad(writes, "t1", 2, response="a\u2028b")  # a line separator in the text is not the end of the row
    bad(writes, "t2", 3)
    writes.close()
    with (tmp_path / "quarantine.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"trajectory_id": "t3", "st')
    again = log(tmp_path, resume_step=2)
    bad(again, "t2", 3)
    again.close()
    kept = rows(tmp_path / "quarantine.jsonl")
    assert [(row["trajectory_id"], row["step"]) for row in kept] == [("t1", 2), ("t2", 3)]
    assert kept[0]["response"] == "a\u2028b"


def test_json_files_are_replaced_whole(tmp_path):
    path = tmp_path / "evaluation.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    write_json(path, {"ö": 2})
    assert json.loads(path.read_text(encoding="utf-8")) == {"ö": 2}
    assert [each.name for each in tmp_path.iterdir()] == ["evaluation.json"]


def test_events_carry_time_step_and_schema_and_outlive_a_resume(tmp_path):
    writes = log(tmp_path)
    before = time.time()
    writes.event(Event("start", "the run"))
    writes.metrics({"step": 1})
    writes.metrics({"step": 2})
    writes.event(Event("death", "rollout-0", "naïve\u2028 ☕ \ud800", "another is started", "10.0.0.7"))
    writes.close()
    first, second = kept = rows(tmp_path / "events.jsonl")
    assert before <= first.pop("time") <= second["time"] <= time.time()
    nothing = {"cause": "", "consequence": "", "node": ""}
    assert first == {"event": "start", "who": "the run", **nothing, "step": 0, "schema_version": 1}
    assert (second["event"], second["who"], second["step"], second["node"]) == ("death", "rollout-0", 2, "10.0.0.7")
    assert second["cause"] == "naïve\u2028 ☕ \ud800"

    again = log(tmp_path, resume_step=1)  # step 2 is done again; that an actor died in it stays true
    again.event(Event("resume", "the run"))
    again.close()
    assert [(row["event"], row["step"]) for row in rows(tmp_path / "events.jsonl")] == [
        ("start", 0),
        ("death", 2),
        ("resume", 1),
    ]
    assert rows(tmp_path / "events.jsonl")[1] == kept[1]


def test_an_event_is_in_the_file_before_the_call_returns(tmp_path):
    writes = log(tmp_path)
    for count in range(1, 4):
        writes.event(Event("rollover", "rollout-0", "x" * 20_000))
        assert len(rows(tmp_path / "events.jsonl")) == count
    writes.close()


def test_an_event_cut_off_by_a_crash_takes_no_other_with_it(tmp_path):
    writes = log(tmp_path)
    writes.event(Event("start", "the run"))
    writes.close()
    path = tmp_path / "events.jsonl"
    whole = path.read_bytes()
    for cut in (whole[:1], whole[:-1]):
        path.write_bytes(whole + cut)
        again = log(tmp_path, resume_step=0)
        again.event(Event("resume", "the run"))
        again.close()
        first, torn, last = path.read_bytes().splitlines()
        assert (first, torn) == (whole.rstrip(), cut)
        assert json.loads(last)["event"] == "resume"
    log(tmp_path, resume_step=0).close()
    assert len(path.read_bytes().splitlines()) == 3  # nothing was cut off: nothing is added


def test_a_quarantined_trajectory_is_an_event_too(tmp_path):
    writes = log(tmp_path)
    bad(writes, "t9", 4)
    writes.close()
    (event,) = rows(tmp_path / "events.jsonl")
    assert (event["event"], event["who"], event["cause"]) == ("quarantine", "t9", "reward is nan")
