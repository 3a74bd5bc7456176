"""`headrace train` with `serving.start`: the policy is served while it trains, and on."""

import http.client
import json
import time
from pathlib import Path
from typing import Any

import pytest

from cluster import capacity
from cluster.commands.until_signal import how_to_continue
from cluster.outliving import check_served
from cluster.preflight.run_folder import finished_checkpoints
from cluster.train import Outcome
from contracts.config import Config, ConfigError
from contracts.loading import validate
from tests.cluster.test_train import steps, write_config, write_project
from tests.command import Command, rows
from tests.head import free_ports, ray_head

QUESTION = {"model": "policy", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}


def ask(port: int, method: str = "POST", path: str = "/v1/chat/completions", body: Any = QUESTION) -> Any:
    """What it answers with 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(
        method, path, json.dumps(body) if method == "POST" else None, {"Content-Type": "application/json"}
    )
    response = connection.getresponse()
    answered = json.loads(response.read())
    connection.close()
    assert response.status == 200, answered
    return answered


def served_version(port: int) -> int:
    answered = ask(port)
    assert answered["usage"]["completion_tokens"] <= 4
    return int(answered["weights_version"])


def until_served(port: int, version: int, timeout_s: float = 60.0) -> None:
    expires = time.monotonic() + timeout_s
    while (served := served_version(port)) != version:
        assert time.monotonic() < expires, f"version {served} is served, not {version}"
        time.sleep(0.5)


def served_project(folder: Path, model: Path, port: int, **serving: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    section = {"start": True, "port": port, "replicas": {"kv_cache_gib": 0.1, "num_cpus": 0.1}} | serving
    return write_project(folder, model) | {"serving": section, "reward_workers": {"num_cpus": 0.1, "threads": 1}}


@pytest.fixture
def config(tmp_path: Path) -> Any:
    """(changes) -> Config of a run that starts its application."""

    def make(**changes: Any) -> Config:
        data = served_project(tmp_path, Path("base"), free_ports(1)[0]) | changes
        return validate(data, source="test")

    return make


def test_what_cannot_be_served_beside_training_is_refused(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEADRACE_API_KEYS", raising=False)
    rewards = [{"name": "length", "function": "json:dumps"}]
    assert check_served(config(serving=None)) is None
    assert check_served(config(serving={"start": False, "host": "0.0.0.0"})) is None
    with pytest.raises(ConfigError, match=r"serving\.model: with serving\.start the policy in training is served"):
        check_served(config(serving={"start": True, "model": "base"}))
    with_adapters = check_served(config(training={"lora": {}}, rewards=rewards))
    assert with_adapters is not None
    assert [each.name for each in with_adapters.components] == ["length"]
    with pytest.raises(ConfigError, match=r"serving\.host is 0\.0\.0\.0, so others can reach it"):
        check_served(config(serving={"start": True, "host": "0.0.0.0", "port": free_ports(1)[0]}))
    learned = {"rewards": [*rewards, {"name": "learned", "model": "preferences"}], "preferences": {"path": "p.jsonl"}}
    served = check_served(config(**learned))
    assert served is not None
    assert [component.name for component in served.components] == ["length", "learned"]  # trained before it starts


def test_the_engines_of_the_application_are_reserved_too(config: Any) -> None:
    engines = {"replicas": {"num_cpus": 2, "max_replicas": 3, "resources": {"fast": 1}}, "pinned": [4, 5]}
    gate = {"prompts": "prompts.jsonl"}
    run = config(serving={"start": True, "gate": gate, **engines}, reward_workers={"num_cpus": 0.5, "num_replicas": 2})
    alone, both = capacity.resources_asked(run), capacity.resources_asked(run, served=run.serving)
    assert both["CPU"] - alone["CPU"] == 6 * 2 + 1 * 2 * 0.5  # three replicas, two pinned, the gate; its own scorers
    assert both["fast"] == 6


def test_a_run_that_has_finished_is_not_told_to_continue(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    assert how_to_continue(tmp_path, Path("c.yaml"), Outcome(9, finished=False)).startswith("stopped after step 9; ")
    assert how_to_continue(tmp_path, Path("c.yaml"), Outcome(9, finished=True)) == (
        "training finished after step 9; the policy is not served any more"
    )


@pytest.mark.slow
def test_the_policy_is_served_while_it_trains_and_on(tiny_model: Path, tmp_path: Path) -> None:
    (port,), run_dir = free_ports(1), tmp_path / "run"
    write_config(tmp_path, served_project(tmp_path, tiny_model, port))
    with Command("train", "config.yaml", "steps=500", cwd=tmp_path) as command:
        command.until(lambda: steps(run_dir) >= 1, "step 1")
        assert f"OpenAI API: http://127.0.0.1:{port}/v1 (model policy)" in command.output
        command.until(lambda: served_version(port) >= 1, "version 1 is served")
        command.ctrl_c()  # ends both
        assert command.status() == 130, command.output
        assert command.processes.wait_gone() == []
        assert "stopped after step" in command.output
        assert "still serving" not in command.output
    stopped_at = finished_checkpoints(run_dir)[-1]
    last = stopped_at + 10

    with Command("train", "config.yaml", "resume=true", f"steps={last}", cwd=tmp_path) as command:
        command.until(lambda: "OpenAI API" in command.output, "its address")
        seen = [served_version(port)]
        assert seen == [stopped_at]  # what training goes on from
        while f"Training finished; still serving at http://127.0.0.1:{port}" not in command.output:
            assert not command.has_ended, command.output
            seen.append(served_version(port))
            time.sleep(0.2)
        assert seen == sorted(seen)
        assert len(set(seen)) >= 3
        until_served(port, last)
        history = ask(port, "GET", "/v1/versions")["history"]
        assert [row["version"] for row in history if row["status"] == "published"][-1] == last
        assert (run_dir / "evaluation.json").exists()
        assert command.processes.alive("ray::RolloutActor") == []  # of training nothing is left
        assert served_version(port) == last
        command.ctrl_c()
        assert command.status() == 130, command.output
        assert command.processes.wait_gone() == []
        assert f"training finished after step {last}; the policy is not served any more" in command.output
        assert "Traceback" not in command.output
    events = rows(run_dir / "events.jsonl")
    assert [event["event"] for event in events if event["who"] == "the serving application"] == ["start", "start"]
    assert [event["consequence"] for event in events if event["event"] == "signal"] == [
        "ends after this step, with a checkpoint",
        "stops serving when the answers that are being written have ended",
    ]


@pytest.mark.slow
def test_adapters_are_served_while_they_are_trained_and_alone(tiny_model: Path, tmp_path: Path) -> None:
    (port,), run_dir = free_ports(1), tmp_path / "run"
    project = served_project(tmp_path, tiny_model, port)
    project["training"] |= {"lora": {"rank": 4, "alpha": 8}}
    write_config(tmp_path, project | {"steps": 6})
    with Command("train", "config.yaml", cwd=tmp_path) as command:
        command.until(lambda: "OpenAI API" in command.output, "its address")
        assert served_version(port) in range(7)
        command.until(lambda: "Training finished; still serving" in command.output, "the training's end")
        until_served(port, 6)
        status = ask(port, "POST", "/v1/versions/rollback", {"version": 0})["status"]
        assert (status["current"], status["versions"]) == (0, list(range(7)))
        until_served(port, 0)
        ask(port, "POST", "/v1/versions/pin", {"version": "4"})
        until_served(port, 4)
        ask(port, "POST", "/v1/versions/pin", {"version": "latest"})
        until_served(port, 6)
        command.ctrl_c()
        assert command.status() == 130, command.output
        assert command.processes.wait_gone() == []
    assert not [event for event in rows(run_dir / "events.jsonl") if event["event"] == "refusal"]
    assert not list((run_dir / "serving" / "weights").glob("*-delta.frames"))

    with Command("serve", "config.yaml", cwd=tmp_path) as command:
        command.until(lambda: "OpenAI API" in command.output, "its address")
        assert served_version(port) == 6
        command.ctrl_c()
        assert command.status() == 130, command.output
        assert command.processes.wait_gone() == []
    assert "Traceback" not in command.output


@pytest.mark.slow
def test_on_a_cluster_the_application_outlives_the_run(tiny_model: Path, tmp_path: Path) -> None:
    (port,), run_dir = free_ports(1), tmp_path / "runs" / "tiny"
    folder = tmp_path / "project"
    project = served_project(folder, tiny_model, port) | {"output_dir": str(run_dir), "steps": 3}
    write_config(folder, project)
    with ray_head(tmp_path, num_cpus=8) as head:
        with Command("submit", "config.yaml", "--address", head, cwd=folder) as command:
            assert command.status() == 0, command.output
            assert f"the application stays on the cluster and serves at http://127.0.0.1:{port}" in command.output
        until_served(port, 3)
        with Command("submit", "config.yaml", "resume=true", "steps=5", "--address", head, cwd=folder) as command:
            assert command.status() == 0, command.output
            assert "headrace-serving-policy runs on this cluster already" in command.output
        until_served(port, 5)
