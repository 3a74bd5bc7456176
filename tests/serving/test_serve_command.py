"""`headrace serve`: what it serves first, what it refuses, and a whole application on a tiny model."""

import http.client
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from cluster.application import Application, check_application, gate_prompts
from cluster.serve_command import check_serving, find_policy
from contracts.config import Config, ConfigError
from contracts.loading import validate
from contracts.serving import ServingConfig
from learner import checkpoint as checkpoints
from models.engine_adapters import AdapterSettings
from serving.records import StartWeights
from tests.cluster.test_train import write_config, write_project
from tests.command import Command
from tests.head import free_ports
from tests.tiny import build_tiny_model, build_tiny_tokenizer


def config_of(folder: Path, changes: dict[str, Any] | None = None, **settings: Any) -> Config:
    data = {
        "output_dir": str(folder / "run"),
        "model": {"path": "base"},
        "prompts": {"path": "none.jsonl"},
        "rewards": [{"name": "none", "function": "json:dumps"}],
        "serving": settings,
    }
    return validate(data | (changes or {}), source="tests/serving")


def write_checkpoint(run_dir: Path, step: int) -> checkpoints.Checkpoint:
    folder = checkpoints.begin(run_dir, step)
    (folder / "policy").mkdir(parents=True)
    (folder / "policy" / "model.safetensors").write_bytes(b"weights of step %d" % step)
    return checkpoints.finish(folder, step, keep=9)


def test_the_newest_whole_checkpoint_is_served_and_its_step_is_its_version(tmp_path: Path) -> None:
    config, run_dir = config_of(tmp_path), tmp_path / "run"
    start, _, notes = find_policy(config, ServingConfig())
    assert start == StartWeights("base", 0)
    assert notes == [f"{run_dir} has no checkpoint: serving base"]

    write_checkpoint(run_dir, 4)
    newest = write_checkpoint(run_dir, 8)
    assert find_policy(config, ServingConfig())[0] == StartWeights(str(newest.policy), 8)

    (newest.policy / "model.safetensors").write_bytes(b"damaged")
    start, _, notes = find_policy(config, ServingConfig())
    assert (Path(start.path).parent.name, start.version) == ("step-000004", 4)
    assert notes[0].endswith("differs from the manifest")


def test_a_checkpoint_or_a_folder_may_be_named(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    saved = write_checkpoint(tmp_path / "other", 12)
    write_checkpoint(tmp_path / "run", 99)
    assert find_policy(config, ServingConfig(model=str(saved.path)))[0] == StartWeights(str(saved.policy), 12)
    assert find_policy(config, ServingConfig(model="plain"))[0] == StartWeights("plain", 0)
    (saved.policy / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="not a whole checkpoint"):
        find_policy(config, ServingConfig(model=str(saved.path)))


def test_of_a_run_with_lora_the_adapter_is_served_so_that_others_can_follow(tmp_path: Path) -> None:
    config = config_of(tmp_path, {"training": {"lora": {"rank": 4}}})
    lora = config.training.lora
    assert lora is not None
    assert find_policy(config, ServingConfig())[0] == StartWeights("base", 0, adapters=AdapterSettings(lora))
    newest = write_checkpoint(tmp_path / "run", 8)
    initial = AdapterSettings(lora, str(newest.adapter.resolve()))
    assert find_policy(config, ServingConfig())[:2] == (StartWeights("base", 8, adapters=initial), "model.path")
    named = find_policy(config, ServingConfig(model=str(newest.path)))[0]
    assert named == StartWeights(str(newest.policy), 8)  # merged, as it would be exported


def test_a_gate_that_could_not_judge_is_refused(tmp_path: Path) -> None:
    prompts, (port,) = tmp_path / "gate.jsonl", free_ports(1)

    def check(changes: dict[str, Any] | None = None, *, trains_reward: bool = False, **gate: Any) -> Application:
        config = config_of(tmp_path, changes, port=port, gate={"prompts": str(prompts)} | gate)
        return check_application(config, trains_reward=trains_reward)

    with pytest.raises(ConfigError, match=r"serving\.gate\.prompts: .*gate\.jsonl: cannot be read: No such file"):
        check()
    prompts.write_text('{"prompt": ""}\n')
    with pytest.raises(ConfigError, match=r"serving\.gate\.prompts: .*gate\.jsonl:1: the prompt is empty"):
        check()
    rows = [json.dumps({"prompt": "mill " * each, "answer": each}) for each in (1, 2, 200)]
    prompts.write_text("\n".join(rows))
    with pytest.raises(ConfigError, match=r"serving\.gate\.max_response_tokens 1023 leaves no room for a prompt in"):
        check(max_response_tokens=1023)
    learned = {"rewards": [{"name": "learned", "model": "preferences"}], "preferences": {"path": "none.jsonl"}}
    with pytest.raises(ConfigError, match=r"serving\.gate: learned is the reward model of `preferences`, and .* none"):
        check(learned)
    assert check(learned, trains_reward=True).components[0].name == "learned"
    assert len(check(num_prompts=2).gate_rows) == 2

    tokenizer = build_tiny_tokenizer()
    kept, notes = gate_prompts(check(max_response_tokens=900), tokenizer)
    assert [prompt.columns for prompt in kept] == [{"answer": 1}, {"answer": 2}]
    assert notes == ["the gate judges with 2 prompts, serving.gate.num_prompts is 32, 1 are longer than 123 tokens"]
    with pytest.raises(ConfigError, match=r"serving\.gate\.prompts .*gate\.jsonl: each is longer than 3 tokens"):
        gate_prompts(check(max_response_tokens=1020), tokenizer)


def test_what_cannot_be_served_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HEADRACE_API_KEYS", raising=False)
    with pytest.raises(ConfigError, match=r"serving\.host is 0\.0\.0\.0, so others can reach it: set serving\.keys"):
        check_serving(config_of(tmp_path, host="0.0.0.0", port=free_ports(1)[0]))
    with pytest.raises(ConfigError, match=r"model\.path base: no such folder"):
        check_serving(config_of(tmp_path, port=free_ports(1)[0]))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"cannot listen on 127\.0\.0\.1:{port}: Address already in use; set"):
            check_serving(config_of(tmp_path, port=port))


class Client:
    """Plain HTTP to the application."""

    def __init__(self, port: int) -> None:
        self._port = port

    def begin(self, method: str, path: str, body: dict[str, Any] | None = None) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
        return connection.getresponse()

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        response = self.begin(method, path, body)
        return response.status, json.loads(response.read())


@pytest.mark.slow
def test_a_policy_is_served_until_it_is_stopped_and_then_what_runs_is_finished(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    project = write_project(tmp_path, build_tiny_model(tmp_path / "tiny", tied=True))
    project["serving"] = {"port": port, "replicas": {"kv_cache_gib": 0.1}}
    project["reward_workers"] = {"num_cpus": 0.1, "threads": 1}
    client = Client(port)
    question = {"model": "policy", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "seed": 1}
    with Command("serve", write_config(tmp_path, project), cwd=tmp_path) as command:
        command.until(lambda: f"http://127.0.0.1:{port}/v1" in command.output, "its address")
        status, answered = client.ask("POST", "/v1/chat/completions", question)
        assert (status, answered["weights_version"]) == (200, 0), answered
        assert answered["usage"]["completion_tokens"] <= 8
        assert client.ask("GET", "/v1/models")[1]["data"][0]["id"] == "policy"
        assert client.ask("POST", "/v1/chat/completions", question | {"model": "other"})[0] == 404
        assert client.ask("POST", "/v1/completions", {"model": "policy", "prompt": "mill " * 400})[0] == 400

        stream = client.begin("POST", "/v1/chat/completions", question | {"stream": True, "max_tokens": 90})
        assert stream.readline().startswith(b"data: {")
        command.ctrl_c()
        events = stream.read().decode().split("\n\n")
        assert events[-2] == "data: [DONE]"
        assert command.status() == 130, command.output
        assert command.processes.wait_gone() == []
    assert "Traceback" not in command.output
