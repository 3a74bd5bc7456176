"""The newest checkpoint is damaged: a resumed run takes the one before, and says so."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.resume import resumption
from cluster.run_log import RunLog, write_json
from contracts.config import ConfigError
from learner import checkpoint as checkpoints
from learner.checkpoint import Checkpoint
from tests.rollouts import scored_rollout


def write(run_dir: Path, step: int) -> Checkpoint:
    folder = checkpoints.begin(run_dir, step)
    write_json(folder / "state" / "run.json", {"step": step})
    (folder / "state" / "learner.json").write_text("{}")
    return checkpoints.finish(folder, step, keep=5)


def truncated_manifest(saved: Checkpoint) -> str:
    manifest = saved.path / "MANIFEST.json"
    manifest.write_bytes(manifest.read_bytes()[:40])
    return "step-000004/MANIFEST.json: not a readable manifest"


def missing_file(saved: Checkpoint) -> str:
    (saved.state / "learner.json").unlink()
    return "step-000004/state/learner.json: named in the manifest, but missing"


def changed_file(saved: Checkpoint) -> str:
    (saved.state / "learner.json").write_text("[]")
    return "step-000004/state/learner.json: differs from the manifest"


def wrong_hash(saved: Checkpoint) -> str:
    manifest = saved.path / "MANIFEST.json"
    content = json.loads(manifest.read_text())
    content["files"]["state/run.json"] = "0" * 64
    manifest.write_text(json.dumps(content))
    return "step-000004/state/run.json: differs from the manifest"


class Said:
    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.notes: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def note(self, text: str) -> None:
        self.notes.append(text)


def resumed(run_dir: Path, said: Said) -> Any:
    config: Any = SimpleNamespace(output_dir=run_dir)
    preflight: Any = SimpleNamespace(resume_step=4)
    return resumption(config, preflight, said)  # type: ignore[arg-type]


@pytest.mark.parametrize("damage", [truncated_manifest, missing_file, changed_file, wrong_hash])
def test_the_checkpoint_before_is_taken_and_said_so(tmp_path: Path, damage: Callable[[Checkpoint], str]) -> None:
    write(tmp_path, 2)
    problem = damage(write(tmp_path, 4))
    log = RunLog(tmp_path, resume_step=None)
    for step in (3, 4):  # logged since: trained again, not sampled again
        log.experience(step, [scored_rollout(f"t{step}")], {"step": step, "leases": {"counts": {"quarantined": 0}}})
    log.close()
    said = Said()
    found = resumed(tmp_path, said)
    assert (found.step, found.last_logged, found.state["step"]) == (2, 4, 4)
    (warning,) = said.warnings
    assert warning.startswith("passed over a damaged checkpoint: ")
    assert problem in warning
    assert problem in found.problems[0]  # what the `resume` event carries
    assert said.notes == ["resuming after step 4, 2 from the experience log"]


def test_where_none_is_whole_the_run_is_refused(tmp_path: Path) -> None:
    problem = missing_file(write(tmp_path, 4))
    with pytest.raises(ConfigError, match=f"no checkpoint is whole: .*{problem}"):
        resumed(tmp_path, Said())
