"""Checkpoints from others: what is in them is read, what they say is never run."""

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict

from learner.plain_state import PlainPlanner, PlainReader


class Touch:
    """Unpickled without a limit it creates a file: any other code could stand here."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def state() -> dict[str, Any]:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.125)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "half": torch.ones(2, dtype=torch.bfloat16), "name": "ppo"}


@pytest.fixture
def checkpoint(tmp_path: Path, state: dict[str, Any]) -> Path:
    folder = tmp_path / "learner"
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def load(folder: Path, state: dict[str, Any]) -> None:
    dcp.load(state, storage_reader=PlainReader(folder), planner=PlainPlanner(), no_dist=True)


def test_what_was_saved_comes_back(checkpoint: Path, state: dict[str, Any]) -> None:
    blank = {
        "model": {name: torch.zeros_like(tensor) for name, tensor in state["model"].items()},
        "optimizer": zeroed(state["optimizer"]),
        "half": torch.zeros(2, dtype=torch.bfloat16),
        "name": "",
    }
    load(checkpoint, blank)
    assert blank["name"] == "ppo"
    assert blank["half"].tolist() == [1, 1]
    assert blank["optimizer"]["param_groups"][0]["lr"] == 0.125
    for name, tensor in state["model"].items():
        assert torch.equal(blank["model"][name], tensor)
        assert torch.equal(blank["optimizer"]["state"][name]["exp_avg"], state["optimizer"]["state"][name]["exp_avg"])
        assert blank["optimizer"]["state"][name]["exp_avg"].any()


def zeroed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: zeroed(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [zeroed(inner) for inner in value]
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    return type(value)() if isinstance(value, int | float) else value


def test_torch_itself_runs_what_the_metadata_say(checkpoint: Path, state: dict[str, Any], tmp_path: Path) -> None:
    """Why the reader is not torch's own."""
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Touch(tmp_path / "run")))
    with pytest.raises(AttributeError):
        dcp.FileSystemReader(checkpoint).read_metadata()
    assert (tmp_path / "run").exists()


def hidden(path: Path) -> bytes:
    """Reaches the same function by a dotted name through a module that is allowed."""
    name = b"torch.distributed.checkpoint.filesystem\nos.mkdir\n"
    return b"\x80\x04c" + name + b"(" + pickle.dumps(str(path), protocol=0)[:-1] + b"tR."


ATTACKS: dict[str, Callable[[Path], bytes]] = {
    "an object": lambda path: pickle.dumps(Touch(path)),
    "within a record": lambda path: pickle.dumps({"state_dict_metadata": [Touch(path)]}),
    "by a dotted name": hidden,
    "by a function of a torch module": lambda path: b"ctorch\nload\n(V" + str(path).encode() + b"\ntR.",
    "builtins": lambda path: b"cbuiltins\neval\n(V__import__('os').mkdir('" + str(path).encode() + b"')\ntR.",
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_metadata_with_code_are_refused(attack: Callable[[Path], bytes], checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / ".metadata").write_bytes(attack(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"\.metadata: not the metadata of a checkpoint: it names"):
        PlainReader(checkpoint).read_metadata()
    assert not (tmp_path / "run").exists()


def test_damaged_metadata_are_named(checkpoint: Path) -> None:
    whole = (checkpoint / ".metadata").read_bytes()
    (checkpoint / ".metadata").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"\.metadata: not the metadata of a checkpoint"):
        PlainReader(checkpoint).read_metadata()


def test_a_value_with_code_is_refused(tmp_path: Path) -> None:
    """torch loads values that are no tensors without a limit."""
    folder, ran = tmp_path / "learner", tmp_path / "run"
    dcp.save({"value": Value(ran)}, checkpoint_id=folder, no_dist=True)
    with pytest.raises(dcp.api.CheckpointException, match="value: not a tensor or a plain value"):
        load(folder, {"value": io.BytesIO()})
    assert not ran.exists()


class Value(Touch):
    """`Touch`, as a value of a state."""
