"""Whole runs of the `headrace` command on the tiny model: real Ray, Serve and vLLM in a subprocess.

A run takes half a minute to start, so each serves several tests; the fixtures say what happens in it.
"""

import itertools
import json
import math
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.cli import main
from cluster.preflight.run_folder import finished_checkpoints
from learner import checkpoint as checkpoints
from models.weights import digest
from tests.command import Command, rows
from tests.curves import documented_curves, offline_runs

# A reward function lives in the user's working directory. What it raises is the reason for quarantine.
JUDGE = '''
def letter_e(prompts, responses, *, poison, **columns):
    """Share of the letter e."""
    if any(poison):
        raise ValueError("a poisoned prompt")
    return [response.lower().count("e") / max(1, len(response)) for response in responses]

def brevity(prompts, responses):
    return [1.0 / (1 + len(response)) for response in responses]

def broken(prompts, responses):
    raise RuntimeError("the judge is on strike")
'''
STEPS = 20
# From DESIGN.md: what others rely on.
METRICS = """
step weights_version reward_mean kl_to_reference entropy policy_loss value_loss clip_fraction
explained_variance response_tokens_mean truncated_fraction lag_steps_max learner_busy_fraction
rollout_idle_fraction broadcast_bytes broadcast_bytes_dense generation_paused_s samples_per_s step_s
"""
COLUMNS = """
trajectory_id prompt_id group_id prompt_tokens response_tokens behavior_logprobs weights_versions
reference_logprobs reward reward_components reward_version finish_reason actor_id
"""


@dataclass
class Ended:
    """What a command left behind."""

    status: int
    output: str
    left: list[str]
    metrics: bytes = b""
    checkpoints: list[int] = field(default_factory=list)


def write_project(folder: Path, model: Path) -> dict[str, Any]:
    """Prompts and judges in `folder`, and a configuration for them. One of 16 training prompts is poisoned."""
    (folder / "judges_of_test.py").write_text(JUDGE)
    write_prompts(
        folder / "prompts.jsonl", [{"prompt": f"Question {i}?", "id": i, "poison": i == 3} for i in range(16)]
    )
    write_prompts(
        folder / "held_out.jsonl", [{"prompt": f"What is {i}?", "id": f"e{i}", "poison": i == 0} for i in range(17)]
    )
    return {
        "output_dir": "run",
        "steps": STEPS,
        "model": {"path": str(model), "max_context_tokens": 128},
        "prompts": {"path": "prompts.jsonl", "eval_path": "held_out.jsonl"},
        "rewards": [{"name": "letter", "function": "judges_of_test:letter_e"}],
        "sampling": {"max_response_tokens": 24},
        "rollout": {"kv_cache_gib": 0.1, "max_concurrent": 32},
        "algorithm": {"kl_coef": 0.0},
        "training": {
            "batch_size": 32,
            "samples_per_prompt": 2,
            "epochs": 3,
            "minibatches": 2,
            "learning_rate": 1e-3,
            "value_learning_rate": 1e-3,
            "dtype": "float32",
        },
        "checkpoint": {"every_steps": 4},
        "ray": {"dashboard": False, "object_store_gib": 0.2},
    }


def write_prompts(path: Path, prompts: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts), encoding="utf-8")


def write_config(folder: Path, config: dict[str, Any]) -> str:
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return "config.yaml"


def end(command: Command, run_dir: Path) -> Ended:
    status = command.status()
    left = command.processes.wait_gone()
    metrics = (run_dir / "metrics.jsonl").read_bytes()
    return Ended(status, command.output, left, metrics, finished_checkpoints(run_dir))


def steps(run_dir: Path) -> int:
    return len(rows(run_dir / "metrics.jsonl"))


@pytest.fixture(scope="module", autouse=True)
def _ray_folder(short_folder: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", str(short_folder))
        yield


@dataclass
class Finished:
    """A run with max_lag_steps 1 that met a Ctrl-C, went on with resume=true, lost its rollout actor, and ended."""

    folder: Path
    interrupted: Ended
    resumed: Ended

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("finished")
    config = write_project(folder, tiny_model) | {"streaming": {"max_lag_steps": 1}}
    config["logging"] = {"wandb": {"mode": "offline", "project": "tests"}}
    write_config(folder, config)
    run_dir = folder / "run"
    with Command("train", "config.yaml", cwd=folder) as command:
        command.until(lambda: steps(run_dir) >= 5, "step 5")
        command.ctrl_c()
        interrupted = end(command, run_dir)
    with Command("train", "config.yaml", "resume=true", cwd=folder) as command:
        command.until(lambda: steps(run_dir) >= 8, "step 8")
        for process in command.processes.alive("ray::RolloutActor"):
            process.kill()
        resumed = end(command, run_dir)
    return Finished(folder, interrupted, resumed)


def experience(run_dir: Path) -> dict[int, list[dict[str, Any]]]:
    """Rows of the experience log by step."""
    files = sorted((run_dir / "experience").iterdir())
    return {int(file.stem.removeprefix("step-")): pq.read_table(file).to_pylist() for file in files}


def check_experience(run_dir: Path, *, max_lag_steps: int) -> None:
    """What holds for the log of every run; lags are computed from the versions of the tokens."""
    metrics = {row["step"]: row for row in rows(run_dir / "metrics.jsonl")}
    logged = experience(run_dir)
    assert list(logged) == list(metrics) == list(range(1, len(metrics) + 1))
    trained = 0
    for step, batch in logged.items():
        training_version = step - 1
        lags = [training_version - min(row["weights_versions"]) for row in batch]
        assert min(lags) >= 0
        assert max(lags) <= max_lag_steps
        assert metrics[step]["lag_steps_max"] == max(lags)
        trained += len(batch)
        assert metrics[step]["trajectories_trained"] == trained
        for row in batch:
            assert set(COLUMNS.split()) <= set(row)
            tokens = len(row["response_tokens"])
            assert 0 < tokens <= 24
            for name in ("behavior_logprobs", "weights_versions", "reference_logprobs"):
                assert len(row[name]) == tokens
            assert all(logprob <= 0 and math.isfinite(logprob) for logprob in row["behavior_logprobs"])
            assert max(row["weights_versions"]) <= training_version
            assert row["finish_reason"] in ("stop", "length")
            assert row["trajectory_id"].startswith(row["group_id"])
    ids = [row["trajectory_id"] for batch in logged.values() for row in batch]
    assert len(set(ids)) == len(ids)


def test_runs_end_with_the_status_of_their_end_and_leave_no_process(finished: Finished) -> None:
    assert finished.interrupted.status == 130, finished.interrupted.output
    assert finished.resumed.status == 0, finished.resumed.output
    assert finished.interrupted.left == finished.resumed.left == []


def test_ctrl_c_writes_a_checkpoint_of_the_last_step(finished: Finished) -> None:
    last = json.loads(finished.interrupted.metrics.splitlines()[-1])["step"]
    assert 5 <= last < STEPS
    assert finished.interrupted.checkpoints[-1] == last
    assert f"stopped after step {last}; continue with: headrace train config.yaml resume=true" in (
        finished.interrupted.output
    )


def test_resuming_leaves_no_seam(finished: Finished) -> None:
    assert finished.resumed.metrics.startswith(finished.interrupted.metrics)
    assert steps(finished.run_dir) == STEPS
    check_experience(finished.run_dir, max_lag_steps=1)
    # It went on with what the checkpoint held: no version, and no response of the queue, is taken back.
    assert any(
        min(row["weights_versions"]) < step - 1 for step, batch in experience(finished.run_dir).items() for row in batch
    )


def test_every_metric_is_there_and_finite(finished: Finished) -> None:
    metrics = rows(finished.run_dir / "metrics.jsonl")
    for row in metrics:
        assert [name for name in [*METRICS.split(), "reward/letter"] if not math.isfinite(row[name])] == []
    for row, step in zip(metrics, itertools.count(1), strict=False):
        assert row["weights_version"] == row["step"] == step
        fates = [row[f"trajectories_{fate}"] for fate in ("trained", "quarantined", "expired")]
        assert 0 <= row["trajectories_issued"] - sum(fates) <= 4 * 32
        assert 0 < row["broadcast_bytes"] <= row["broadcast_bytes_dense"]
        assert 0 < row["response_tokens_mean"] <= 24


def test_rewards_in_metrics_are_those_of_the_log(finished: Finished) -> None:
    for row, batch in zip(rows(finished.run_dir / "metrics.jsonl"), experience(finished.run_dir).values(), strict=True):
        assert row["reward_mean"] == pytest.approx(sum(entry["reward"] for entry in batch) / len(batch))
        for entry in batch:
            text = entry["response_text"].lower()
            assert entry["reward"] == pytest.approx(text.count("e") / max(1, len(text)))
            assert dict(entry["reward_components"]) == {"letter": entry["reward"]}


def test_the_reward_rises(finished: Finished) -> None:
    rewards = [row["reward_mean"] for row in rows(finished.run_dir / "metrics.jsonl")]
    assert sum(rewards[-3:]) / 3 > 1.5 * sum(rewards[:3]) / 3
    evaluation = json.loads((finished.run_dir / "evaluation.json").read_text(encoding="utf-8"))
    metric = next(metric for metric in evaluation["metrics"] if metric["name"] == "reward/letter")
    assert metric["difference"]["low"] > 0
    assert evaluation["num_prompts"] == 16
    assert (evaluation["weights_version_before"], evaluation["weights_version_after"]) == (0, STEPS)


def test_the_documented_way_through_the_experience_log_works(
    finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    """The Python of docs/run-directory.md, on this run."""
    page = (Path(__file__).parents[2] / "docs" / "run-directory.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) == 4
    code = "\n".join(blocks).replace("runs/quickstart", str(finished.run_dir))
    exec(compile(code, "run-directory.md", "exec"), {})
    said = capsys.readouterr().out
    best = max(row["reward"] for batch in experience(finished.run_dir).values() for row in batch)
    assert f"reward {best} of" in said
    assert re.search(r"prompt \S+ in group g\d+ sampled by rollout-\d+\ntoken by token: \[\(\d+, \d+, -", said)
    assert re.search(r"trained in step \d+ with \d+ others", said)
    assert re.search(r"[1-9]\d*\.\d\d% of the values of model", said)
    assert re.search(r"rollout-1 took over [1-9]\d*\.\d s after rollout-0 died", said)


def test_a_raising_reward_function_sends_the_sample_to_quarantine(finished: Finished) -> None:
    quarantined = rows(finished.run_dir / "quarantine.jsonl")
    assert quarantined
    assert {row["prompt_id"] for row in quarantined} == {"3"}
    for row in quarantined:
        assert "reward component letter: ValueError: a poisoned prompt" in row["reason"]
    trained = {row["trajectory_id"] for batch in experience(finished.run_dir).values() for row in batch}
    assert not trained & {row["trajectory_id"] for row in quarantined}


def test_a_killed_rollout_actor_is_replaced_in_the_middle_of_a_run(finished: Finished) -> None:
    assert "rollout-0 lost" in finished.resumed.output
    served = {row["actor_id"] for batch in experience(finished.run_dir).values() for row in batch}
    assert served == {"rollout-0", "rollout-1"}


def test_the_event_log_tells_both_lives_of_the_run(finished: Finished) -> None:
    events = rows(finished.run_dir / "events.jsonl")
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)
    assert {frozenset(event) for event in events} == {
        frozenset(["time", "event", "who", "cause", "consequence", "node", "step", "schema_version"])
    }
    kinds = [event["event"] for event in events]
    phases = [event["consequence"] for event in events if event["event"] == "phase"]
    assert phases.count("The command") == phases.count("The first training response") == 2  # one each life
    quiet = [kind for kind in kinds if kind not in ("phase", "rollover", "checkpoint", "quarantine")]
    starts = ["start"] * 5  # the run, its rollout actor, learner, reference model, reward component; in any order
    assert quiet == [*starts, "signal", "end", *starts, "resume", "death", "restart", "end"]
    by_kind = {kind: [event for event in events if event["event"] == kind] for kind in set(kinds)}

    stopped = json.loads(finished.interrupted.metrics.splitlines()[-1])["step"]
    signalled, resumed = by_kind["signal"][0], by_kind["resume"][0]
    assert (signalled["cause"], signalled["consequence"]) == ("SIGINT", "ends after this step, with a checkpoint")
    assert resumed["consequence"].startswith(f"goes on after step {stopped}: ")
    assert resumed["step"] == stopped
    assert [event["cause"] for event in by_kind["end"]] == ["", ""]

    death, restart = by_kind["death"][0], by_kind["restart"][0]
    assert (death["who"], restart["who"], restart["cause"]) == ("rollout-0", "rollout-1", "rollout-0 was lost")
    assert death["cause"]
    assert death["node"] == restart["node"] == "127.0.0.1"
    assert 8 <= death["step"] <= restart["step"] <= STEPS

    # One line for each version and engine that took it; what a dying engine took may have no line.
    took = [
        (event["who"], re.findall(r"serves version (\d+)", event["consequence"])[0]) for event in by_kind["rollover"]
    ]
    assert len(set(took)) == len(took)
    assert {version for _, version in took} >= {str(version) for version in range(1, stopped)}
    written = [event["consequence"].split(" is whole")[0] for event in by_kind["checkpoint"]]
    assert written == [f"step-{step:06d}" for step in sorted({*range(4, STEPS + 1, 4), stopped})]
    kept = {row["trajectory_id"] for row in rows(finished.run_dir / "quarantine.jsonl")}
    assert kept <= {event["who"] for event in by_kind["quarantine"]}
    page = (finished.run_dir / "report.html").read_text(encoding="utf-8")
    assert "rollout-0 on 127.0.0.1" in page
    assert "goes on after step" in page


def test_checkpoints_are_whole_and_load(finished: Finished) -> None:
    assert finished.resumed.checkpoints == [16, STEPS]
    saved, problems = checkpoints.newest_whole(finished.run_dir)
    assert saved is not None
    assert problems == []
    manifest = json.loads((saved.path / "MANIFEST.json").read_text(encoding="utf-8"))
    assert (manifest["schema_version"], manifest["step"]) == (1, STEPS)
    assert {"policy/model.safetensors", "policy/config.json", "state/learner.json"} <= set(manifest["files"])
    assert AutoTokenizer.from_pretrained(saved.policy).chat_template
    model = AutoModelForCausalLM.from_pretrained(saved.policy)
    assert all(tensor.dtype == torch.bfloat16 and tensor.isfinite().all() for tensor in model.parameters())


def test_the_run_directory_holds_what_design_names(finished: Finished) -> None:
    written = {path.name for path in finished.run_dir.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "experience", "checkpoints", "tensorboard", "report.html"} <= written
    assert not list(finished.run_dir.rglob("*.partial"))
    resolved = yaml.safe_load((finished.run_dir / "config.yaml").read_text(encoding="utf-8"))
    assert resolved["streaming"]["max_lag_steps"] == 1
    assert resolved["sampling"]["temperature"] == 1.0
    assert "reward/letter" in (finished.run_dir / "report.html").read_text(encoding="utf-8")
    assert list((finished.run_dir / "tensorboard").iterdir())


def test_weights_and_biases_has_one_run_with_every_step(finished: Finished) -> None:
    runs = offline_runs(finished.run_dir)
    assert [run.run_id for run, _, _ in runs] == [runs[0][0].run_id] * 2
    logged = [step for _, rows_of_run, _ in runs for step in rows_of_run]
    assert logged == [row["step"] for row in rows(finished.run_dir / "metrics.jsonl")]
    assert [status for _, _, status in runs] == [0, 0]


def test_every_curve_of_a_run_is_explained(finished: Finished) -> None:
    explained = documented_curves()
    written = {key for row in rows(finished.run_dir / "metrics.jsonl") for key in row}
    assert {key for key in written - explained if not key.startswith("reward/")} == set()


@pytest.mark.slow
def test_eval_scores_a_checkpoint_as_its_run_did(finished: Finished) -> None:
    """Also the proof that vLLM loads a checkpoint, and that it holds what the engines served."""
    with Command(
        "eval", f"run/checkpoints/step-{STEPS:06d}", "--prompts", "held_out.jsonl", "--output", "eval.json",
        cwd=finished.folder,
    ) as command:  # fmt: skip
        assert command.status() == 0, command.output
        assert command.processes.wait_gone() == []
        assert f"Version {STEPS} on 16 prompts" in command.output
    evaluation = json.loads((finished.folder / "eval.json").read_text(encoding="utf-8"))
    after = json.loads((finished.run_dir / "evaluation.json").read_text(encoding="utf-8"))
    metrics = {metric["name"]: metric["after"]["mean"] for metric in after["metrics"]}
    assert evaluation["version"] == STEPS
    assert len(evaluation["prompt_ids"]) == 16
    assert set(evaluation["values"]) == set(metrics)
    # The same prompts, seeds and weights; sampling differs where other batch shapes round another way.
    rewards = evaluation["values"]["reward/letter"]
    assert sum(rewards) / len(rewards) == pytest.approx(metrics["reward/letter"], abs=0.05)


def test_export_copies_a_policy_that_loads(finished: Finished, tmp_path: Path) -> None:
    folder = finished.run_dir / "checkpoints" / f"step-{STEPS:06d}"
    with Command("export", folder, "--to", tmp_path / "policy", cwd=tmp_path) as command:
        assert command.status() == 0, command.output
        assert f"wrote {tmp_path / 'policy'}" in command.output
    exported, saved = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "policy", folder / "policy"))
    for name, tensor in saved.state_dict().items():
        assert torch.equal(tensor, exported.state_dict()[name])


def test_replay_gives_the_weights_of_an_asynchronous_run_bit_for_bit(finished: Finished, tmp_path: Path) -> None:
    """From the checkpoint of step 16: sampled a version behind, on a rollout actor and on the one that replaced it."""
    with Command("replay", finished.run_dir, "--step", str(STEPS), "--to", tmp_path / "again", cwd=tmp_path) as command:
        assert command.status() == 0, command.output
        assert command.processes.wait_gone() == []
    assert "4 of 4 steps checked against the digests of what the run published: equal" in command.output
    assert f"equal to {finished.run_dir}/checkpoints/step-{STEPS:06d}" in command.output
    replayed = load_file(tmp_path / "again" / "model.safetensors")
    saved = load_file(finished.run_dir / "checkpoints" / f"step-{STEPS:06d}" / "policy" / "model.safetensors")
    assert replayed.keys() == saved.keys()
    assert all(torch.equal(replayed[name].view(torch.int16), each.view(torch.int16)) for name, each in saved.items())
    assert digest(saved) == rows(finished.run_dir / "metrics.jsonl")[-1]["weights_digest"]
    assert AutoTokenizer.from_pretrained(tmp_path / "again").chat_template


@pytest.fixture(scope="module")
def on_policy(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """max_lag_steps 0, a reward model from a preference file beside a function, nothing held out, adaptive KL."""
    folder = tmp_path_factory.mktemp("on-policy")
    config = write_project(folder, tiny_model) | {
        "steps": 2,
        "prompts": {"path": "prompts.jsonl", "eval_count": 0},
        "preferences": {"path": "preferences.jsonl", "reward_model": {"batch_size": 4, "max_tokens": 128}},
        "rewards": [
            {"name": "friendly", "model": "preferences", "weight": 0.5},
            {"name": "letter", "function": "judges_of_test:letter_e", "weight": 2.0},
        ],
        "logging": {"tensorboard": False},
    }
    config["training"] |= {"samples_per_prompt": 1}
    config["algorithm"] = {"kl_coef": 0.1, "kl_target": 5.0, "truncation": "bootstrap"}
    pairs = [{"prompt": f"Question {i}?", "chosen": f"Yes, {i}.", "rejected": f"No {i}!"} for i in range(10)]
    write_prompts(folder / "preferences.jsonl", [*pairs, {"prompt": "x", "chosen": "same", "rejected": "same "}])
    write_config(folder, config)
    with Command("train", "config.yaml", cwd=folder) as command:
        return folder / "run", end(command, folder / "run")


@pytest.mark.slow
def test_workers_are_added_while_the_learner_waits(tiny_model: Path, tmp_path: Path) -> None:
    config = write_project(tmp_path, tiny_model) | {"streaming": {"max_lag_steps": 1}, "steps": 300}
    config["rollout"] |= {"max_concurrent": 4, "autoscale": {"max_workers": 2, "interval_s": 2}}
    config["training"] |= {"epochs": 1, "minibatches": 1}
    write_config(tmp_path, config)
    run_dir = tmp_path / "run"
    with Command("train", "config.yaml", cwd=tmp_path) as command:
        command.until(lambda: "workers: 2 wanted" in command.output, "a second worker")
        command.ctrl_c()
        ended = end(command, run_dir)
    assert (ended.status, ended.left) == (130, [])
    (scale,) = [event for event in rows(run_dir / "events.jsonl") if event["event"] == "scale"]
    assert re.fullmatch(r"the learner waits for \d+% of the time, the engines are full", scale["cause"])
    assert scale["consequence"] == "1 -> 2 are wanted"


def test_with_no_lag_every_token_is_of_the_trained_version(on_policy: tuple[Path, Ended]) -> None:
    run_dir, ended = on_policy
    assert ended.status == 0, ended.output
    assert ended.left == []
    check_experience(run_dir, max_lag_steps=0)
    first = experience(run_dir)[1]
    # Before the first update policy and reference are one model; the engine and the replica compute in bf16.
    errors = [
        abs(a - b) for row in first for a, b in zip(row["behavior_logprobs"], row["reference_logprobs"], strict=True)
    ]
    assert sum(errors) / len(errors) < 0.03


def test_a_preference_file_trains_the_reward_model(on_policy: tuple[Path, Ended]) -> None:
    run_dir, _ = on_policy
    preferences = json.loads((run_dir / "preferences.json").read_text(encoding="utf-8"))
    assert preferences["simulated"] is False
    assert preferences["dropped"] == {"identical": 1}
    assert preferences["reward_model"]["train_pairs"] + preferences["reward_model"]["held_out_pairs"] == 10
    assert pq.read_table(run_dir / "preferences.parquet").num_rows == 10
    version = preferences["reward_model"]["reward_version"]
    for row in itertools.chain(*experience(run_dir).values()):
        components = dict(row["reward_components"])
        assert row["reward"] == pytest.approx(0.5 * components["friendly"] + 2 * components["letter"])
        assert row["reward_version"] == f"{version}+judges_of_test:letter_e"


def test_a_run_without_held_out_prompts_still_reports(on_policy: tuple[Path, Ended]) -> None:
    run_dir, _ = on_policy
    assert json.loads((run_dir / "evaluation.json").read_text(encoding="utf-8"))["num_prompts"] == 0
    assert (run_dir / "report.html").exists()
    assert not (run_dir / "tensorboard").exists()


@pytest.fixture(scope="module")
def simulated(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """Preferences from simulated voters, max_lag_steps 2, a judge; ended by SIGTERM after its first steps."""
    folder = tmp_path_factory.mktemp("simulated")
    config = write_project(folder, tiny_model) | {
        "steps": 1000,
        "streaming": {"max_lag_steps": 2},
        "preferences": {
            "simulate": {
                "gold": "judges_of_test:brevity",
                "pairs": 16,
                "votes_per_pair": 3,
                "voters": {"careful": {"count": 3, "accuracy": 0.95}},
            },
            "reward_model": {"batch_size": 4, "max_tokens": 128},
        },
        "rewards": [{"name": "friendly", "model": "preferences"}],
        "evaluation": {"judges": [{"name": "short", "function": "judges_of_test:brevity"}]},
    }
    write_config(folder, config)
    with Command("train", "config.yaml", cwd=folder) as command:
        command.until(lambda: steps(folder / "run") >= 3, "step 3")
        command.terminate()
        return folder / "run", end(command, folder / "run")


@pytest.mark.slow
def test_sigterm_writes_a_checkpoint_first(simulated: tuple[Path, Ended]) -> None:
    run_dir, ended = simulated
    assert ended.status == 143, ended.output
    assert ended.left == []
    assert ended.checkpoints[-1] == steps(run_dir)
    check_experience(run_dir, max_lag_steps=2)


@pytest.mark.slow
def test_simulated_voters_train_the_reward_model(simulated: tuple[Path, Ended]) -> None:
    run_dir, _ = simulated
    preferences = json.loads((run_dir / "preferences.json").read_text(encoding="utf-8"))
    assert preferences["simulated"] is True
    # Neither asked nor imported; a policy that knows nothing writes a NUL now and then.
    asked = 16 - sum(preferences["dropped"].get(reason, 0) for reason in ("identical", "bad_text"))
    assert (preferences["pairs"], preferences["votes"]) == (16, 3 * asked)
    assert preferences["agreement_with_gold"] > 0.6
    dropped = sum(preferences["dropped"].values())
    assert pq.read_table(run_dir / "preferences.parquet").num_rows + dropped == 16
    before = json.loads((run_dir / "evaluation_before.json").read_text(encoding="utf-8"))
    assert before["roles"]["gold/short"] == "gold"


@pytest.mark.slow
def test_a_reward_that_always_raises_ends_the_run_with_its_reason(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("broken")
    config = write_project(folder, tiny_model) | {
        "prompts": {"path": "prompts.jsonl", "eval_count": 0},
        "rewards": [{"name": "strict", "function": "judges_of_test:broken"}],
    }
    write_config(folder, config)
    with Command("train", "config.yaml", cwd=folder) as command:
        ended = end(command, folder / "run")
    assert ended.status == 1, ended.output
    assert ended.left == []
    last_line = ended.output.splitlines()[-1]
    assert "error: TooManyBad" in last_line
    assert "reward component strict: RuntimeError: the judge is on strike" in last_line
    assert len(rows(folder / "run" / "quarantine.jsonl")) >= 4
    assert ended.metrics == b""


@pytest.mark.slow
def test_ctrl_c_while_models_load_ends_at_once(tiny_model: Path, tmp_path: Path) -> None:
    write_config(tmp_path, write_project(tmp_path, tiny_model))
    with Command("train", "config.yaml", cwd=tmp_path) as command:
        command.until(lambda: bool(command.processes.alive("ray::RolloutActor")), "a rollout actor")
        command.ctrl_c()
        ended = end(command, tmp_path / "run")
    assert ended.status == 130, ended.output
    assert ended.left == []
    assert (ended.metrics, ended.checkpoints) == (b"", [])
    assert ended.output.splitlines()[-1] == "stopped at once; continue with: headrace train config.yaml resume=true"
    assert "Traceback" not in ended.output


def headrace(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """The command in this process: (exit status, stdout, stderr)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["headrace", *map(str, arguments)])
        patch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit) as ended:
            main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


@pytest.fixture
def project(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path, write_project(tmp_path, tiny_model))
    (tmp_path / "torn.jsonl").write_text('{"prompt": "fine"}\n\n{"prompt": \n')
    (tmp_path / "mute.jsonl").write_text('{"prompt": "fine"}\n{"question": "where is the prompt?"}\n')
    return tmp_path


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.learning_rat=1e-6", "config.yaml: training.learning_rat: unknown key, did you mean learning_rate?"),
        ("steps=many", "config.yaml: steps: input should be a valid integer"),
        ("steps", "override 'steps': write key=value"),
        ("prompts.path=none.jsonl", "none.jsonl: cannot be read: No such file or directory"),
        ("prompts.path=torn.jsonl", "torn.jsonl:3: not valid JSON"),
        ("prompts.path=mute.jsonl", "mute.jsonl:2: give `prompt` (text) or `messages` (a list)"),
        ("model.path=nowhere", "model.path nowhere: no such folder"),
        ("model.max_context_tokens=1024", "model.max_context_tokens 1024: "),
        ("output_dir=prompts.jsonl", "output_dir prompts.jsonl: "),
        ("resume=true", "output_dir run: there is no run to resume"),
        ("rewards=[{name: x, function: judges_of_test:none}]", "rewards.0.function judges_of_test:none: "),
        ("rewards=[{name: x, function: no_module:none}]", "rewards.0.function no_module:none: cannot be imported"),
        (
            "rewards=[{name: x, model: preferences}]",
            "config.yaml: rewards: model is `preferences`, but there is no preferences",
        ),
        ("training.lora={target_modules: [q_proj, query]}", "training.lora.target_modules: model.path "),
        ("training.lora={rank: 513}", "config.yaml: training.lora.rank: input should be less than or equal to 512"),
        ("training.batch_size=33", "config.yaml: training: batch_size 33 is not divisible by samples_per_prompt 2"),
    ],
)
def test_bad_input_is_one_line_and_status_2_and_nothing_written(
    project: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    before = files(project)
    status, out, err = headrace(capsys, "train", "config.yaml", override)
    assert status == 2, err
    assert out == ""
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
    changed = {path for path in before.items() ^ files(project).items() if "__pycache__" not in path[0]}
    assert {path for path, _ in changed} - {str(project)} == set()


def test_another_runs_folder_is_refused(finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(finished.folder)
        before = files(finished.run_dir)
        status, _, err = headrace(capsys, "train", "config.yaml")
        assert (status, err) == (
            2,
            "error: output_dir run holds another run: choose another, remove it, or continue it with resume=true\n",
        )
        shutil.copytree(finished.run_dir / "checkpoints" / f"step-{STEPS:06d}" / "policy", finished.folder / "other")
        status, _, err = headrace(capsys, "train", "config.yaml", "resume=true", "model.path=other")
        assert status == 2
        assert err.startswith("error: resume: not the run of run/config.yaml, these may not change (model.path: ")
        assert err.count("\n") == 1
        assert files(finished.run_dir) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "none.yaml"), "none.yaml: cannot be read: No such file or directory"),
        (("eval", "nowhere", "--prompts", "prompts.jsonl"), "nowhere: not a checkpoint"),
        (("eval", "step-000001", "--prompts", "prompts.jsonl"), "step-000001: not a whole checkpoint"),
        (("export", "step-000001", "--to", "new"), "step-000001: not a whole checkpoint"),
        (("export", "step-000001", "--to", "prompts.jsonl"), "--to prompts.jsonl: exists already"),
    ],
)
def test_wrong_files_of_other_commands_are_named(
    project: Path, capsys: pytest.CaptureFixture[str], arguments: Sequence[str], message: str
) -> None:
    status, out, err = headrace(capsys, *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith(f"error: {message}")


@pytest.mark.parametrize("command", ["", "train", "doctor", "eval", "export", "replay"])
def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str], command: str) -> None:
    status, out, _ = headrace(capsys, *filter(None, [command]), "--help")
    assert status == 0
    assert f"Usage: headrace {command}".strip() in out


def test_doctor_finds_no_fault_where_the_tests_run(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = headrace(capsys, "doctor")
    assert status == 0, out
    assert "vLLM" in out
