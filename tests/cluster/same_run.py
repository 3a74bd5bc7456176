"""Whether two runs are the same, bit for bit: what they trained on, what they learned, where they stand at the end."""

import json
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from learner import checkpoint as checkpoints
from tests.command import rows

# What a step's row says of the time that it took, and of deliveries: not the same when it is done again.
TIMES = "time step_s wait_s learn_s publish_s generate_s score_s queue_blocked_s samples_per_s learner_busy_fraction \
rollout_idle_fraction generation_paused_s broadcast_keyframe_bytes"


def differences(one: Path, other: Path, *, scratch: Path) -> list[str]:
    """What is not the same in two run folders, times aside; [] where everything is."""
    found: list[str] = []
    nothing: tuple[str, Any] = ("nothing", None)
    pairs = zip_longest(_facts(one, scratch / "one"), _facts(other, scratch / "other"), fillvalue=nothing)
    for (name, value), (other_name, other_value) in pairs:
        if name != other_name:
            return [*found, f"{name} is in one run where the other has {other_name}"]
        same = torch.equal(value, other_value) if isinstance(value, torch.Tensor) else value == other_value
        if not same:
            found.append(name)
    return found


def _facts(run: Path, scratch: Path) -> Iterator[tuple[str, Any]]:
    """Name and value of all that has to be the same, in a fixed order. Floats as their bits."""
    for row in rows(run / "metrics.jsonl"):
        kept = {name: value for name, value in row.items() if name not in TIMES.split()}
        yield f"metrics of step {row['step']}", json.dumps(kept, sort_keys=True)
    for path in sorted((run / "experience").glob("step-*.parquet")):
        yield f"experience/{path.name}", pq.read_table(path).replace_schema_metadata(None)
    for name in ("evaluation_before.json", "evaluation.json"):
        yield name, (run / name).read_bytes() if (run / name).exists() else None
    yield "quarantine.jsonl", (run / "quarantine.jsonl").read_bytes()
    saved = checkpoints.finished(run)[-1]
    checkpoints.verify(saved)
    yield "last checkpoint", saved.path.name
    for path in sorted(saved.policy.glob("*.safetensors")):
        yield f"policy/{path.name}", path.read_bytes()
    for name in ("run.json", "learner.json"):
        yield f"state/{name}", (saved.state / name).read_bytes()
    yield "state/queue.parquet", pq.read_table(saved.state / "queue.parquet")
    yield from _tensors(saved.state / "learner", scratch)


def _tensors(folder: Path, scratch: Path) -> Iterator[tuple[str, Any]]:
    """Masters and optimizer moments, whole, however they were cut among ranks."""
    scratch.mkdir(parents=True, exist_ok=True)
    dcp_to_torch_save(folder, scratch / "state.pt")
    state = torch.load(scratch / "state.pt", weights_only=True)
    yield from sorted(_flat(state, "state/learner"), key=lambda leaf: leaf[0])


def _flat(value: Any, name: str) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in _flat(item, f"{name}/{key}")]
    if isinstance(value, (list, tuple)):
        return [leaf for index, item in enumerate(value) for leaf in _flat(item, f"{name}/{index}")]
    if isinstance(value, torch.Tensor):
        value = value.contiguous().view(-1).view(torch.uint8)  # equal as bits, not as numbers
    return [(name, value)]
