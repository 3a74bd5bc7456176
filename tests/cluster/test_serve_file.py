"""A Serve config file, as `serve deploy` and a RayService send it to a cluster: the policy, and what scores for it."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from cluster.serve_file import application, reward
from contracts.config import ConfigError
from tests.cluster.test_train import write_config, write_project
from tests.head import free_ports, ray_head

ROOT = Path(__file__).parents[2]
MANIFEST = ROOT / "cluster" / "kuberay" / "rayservice.yaml"
START_S = 300.0


def served(folder: Path, model: Path) -> str:
    serving = {"replicas": {"num_cpus": 0.5, "kv_cache_gib": 0.1, "max_running": 4}}
    rewards = [{"name": "short", "function": "judges_of_test:brevity"}]
    changes = {"output_dir": str(folder / "run"), "rewards": rewards, "serving": serving}
    write_config(folder, write_project(folder, model) | changes)
    return str(folder / "config.yaml")


def test_the_manifest_holds_a_serve_config_of_the_application_that_training_finds() -> None:
    config = yaml.safe_load(yaml.safe_load(MANIFEST.read_text(encoding="utf-8"))["spec"]["serveConfigV2"])
    schema = ServeDeploySchema.model_validate(config)
    names = [each.name for each in schema.applications]
    assert names == ["headrace-serving-policy", "headrace-serving-policy-score-helpful"]
    assert [each.import_path for each in schema.applications] == [
        f"cluster.serve_file:{builder.__name__}" for builder in (application, reward)
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": None}, "args.config: required"),
        ({"component": "kindness"}, "args.component is 'kindness', rewards are: short"),
        ({"overrides": ["serving.host=0.0.0.0"]}, "so others can reach it"),
        ({"overrides": ["serving.gate.prompts=held_out.jsonl"]}, "serving.gate: not from a Serve config file"),
    ],
)
def test_what_cannot_be_served_is_refused(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    given = {"config": served(tmp_path, tiny_model)} | changes
    with pytest.raises(ConfigError, match=message):
        (reward if "component" in given else application)({k: v for k, v in given.items() if v is not None})


@pytest.mark.slow
def test_serve_deploy_brings_up_the_policy_and_its_score(tiny_model: Path, tmp_path: Path) -> None:
    args = {"config": served(tmp_path, tiny_model)}
    (port,) = free_ports(1)
    modules = os.pathsep.join([str(ROOT), str(tmp_path)])
    name, environment = "headrace-serving-policy", {"env_vars": {"PYTHONPATH": modules}}
    policy = {"import_path": "cluster.serve_file:application", "args": args, "runtime_env": environment}
    short = {"import_path": "cluster.serve_file:reward", "args": args | {"component": "short"}}
    config = {
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {"name": name, "route_prefix": "/", **policy},
            {"name": f"{name}-score-short", "route_prefix": None, "runtime_env": environment, **short},
        ],
    }
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    url = f"http://127.0.0.1:{port}"
    with ray_head(tmp_path, num_cpus=4) as head:
        serve = Path(sys.executable).with_name("serve")
        subprocess.run([serve, "deploy", "serve.yaml", "--address", head], cwd=tmp_path, check=True, timeout=120)
        until_up(url)
        chat = {"model": "policy", "max_tokens": 4, "messages": [{"role": "user", "content": "What is 1?"}]}
        answer = asked(f"{url}/v1/chat/completions", chat)
        assert answer["weights_version"] == 0
        score = asked(f"{url}/v1/score", {"prompt": "What is 1?", "response": "eee"})
        assert score["components"][0]["score"] == 0.25


def until_up(url: str) -> None:
    expires = time.monotonic() + START_S
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=10):
                return
        except (OSError, urllib.error.URLError):
            assert time.monotonic() < expires, f"nobody serves at {url}"
            time.sleep(0.5)


def asked(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        found: dict[str, Any] = json.load(response)
    return found
