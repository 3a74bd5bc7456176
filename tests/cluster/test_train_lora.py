"""A whole run with LoRA on the tiny model: adapters alone are published, kept and resumed from."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.cluster.test_train import Ended, check_experience, end, headrace, steps, write_config, write_project
from tests.command import Command, rows

pytestmark = pytest.mark.slow
STEPS = 8


@dataclass
class Finished:
    folder: Path
    interrupted: Ended
    resumed: Ended

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"


@pytest.fixture(scope="module")
def finished(tiny_model: Path, short_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run with a critic of its own and max_lag_steps 1 that met a Ctrl-C, was resumed and lost its rollout actor."""
    folder = tmp_path_factory.mktemp("lora")
    config = write_project(folder, tiny_model) | {"steps": STEPS, "streaming": {"max_lag_steps": 1}}
    config["algorithm"] |= {"critic": "separate"}
    config["training"] |= {"lora": {"rank": 4, "alpha": 8}, "learning_rate": 1e-2, "value_learning_rate": 1e-2}
    write_config(folder, config)
    run_dir = folder / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", str(short_folder))
        with Command("train", "config.yaml", cwd=folder) as command:
            command.until(lambda: steps(run_dir) >= 3, "step 3")
            command.ctrl_c()
            interrupted = end(command, run_dir)
        with Command("train", "config.yaml", "resume=true", cwd=folder) as command:
            command.until(lambda: steps(run_dir) >= 5, "step 5")
            for process in command.processes.alive("ray::RolloutActor"):
                process.kill()
            resumed = end(command, run_dir)
    return Finished(folder, interrupted, resumed)


def test_it_ends_well_and_leaves_no_process(finished: Finished) -> None:
    assert finished.interrupted.status == 130, finished.interrupted.output
    assert finished.resumed.status == 0, finished.resumed.output
    assert finished.interrupted.left == finished.resumed.left == []
    assert "lost: " in finished.resumed.output  # the rollout actor, replaced


def test_versions_and_lags_are_those_of_any_run(finished: Finished) -> None:
    check_experience(finished.run_dir, max_lag_steps=1)


def test_engines_sample_what_the_learner_computes(finished: Finished) -> None:
    """Also after the resume and in the replaced actor: behaviour log-probs are those of the version they name."""
    for row in rows(finished.run_dir / "metrics.jsonl"):
        if row["lag_steps_max"] == 0:
            assert row["behavior_logprob_gap_mean"] < 0.05, row["step"]


def test_adapters_alone_are_published(finished: Finished, tiny_model: Path) -> None:
    dense = sum(2 * tensor.numel() for tensor in load_file(tiny_model / "model.safetensors").values())
    adapter = load_file(
        finished.run_dir / "checkpoints" / f"step-{STEPS:06d}" / "policy_adapter/adapter_model.safetensors"
    )
    for row in rows(finished.run_dir / "metrics.jsonl"):
        assert row["broadcast_bytes"] == sum(2 * tensor.numel() for tensor in adapter.values()) < dense / 5
        assert row["broadcast_bytes_dense"] == dense


def test_checkpoints_hold_the_adapter_and_the_merged_policy(
    finished: Finished, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = finished.run_dir / "checkpoints" / f"step-{STEPS:06d}"
    named = json.loads((saved / "MANIFEST.json").read_text())["files"]
    assert {"policy/model.safetensors", "policy_adapter/adapter_model.safetensors"} <= named.keys()
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, saved / "policy_adapter").merge_and_unload().state_dict()
    policy = load_file(saved / "policy" / "model.safetensors")
    assert all(torch.equal(merged[name].bfloat16(), tensor) for name, tensor in policy.items())
    start = load_file(tiny_model / "model.safetensors")
    assert any(not torch.equal(start[name], tensor) for name, tensor in policy.items())
    status, _, err = headrace(capsys, "export", saved, "--to", tmp_path / "exported")
    assert status == 0, err
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert all(torch.equal(exported[name], tensor) for name, tensor in policy.items())
