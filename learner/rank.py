"""One rank of the learner: a Ray actor with its shard of policy, critic and optimizer.

It consumes what the group sends, in order, and waits for nothing but the other ranks in collectives, each for at most
`deadlines.rank_s`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import ray
import torch
from torch import Tensor
from transformers import AutoTokenizer

from contracts.algorithm import AlgorithmConfig, TrainingConfig
from contracts.disk import DiskFull, is_full
from contracts.records import ScoredRollout, WeightsUpdate
from contracts.workers import LearnerConfig
from learner.numerics import numerics, threads_of
from learner.ppo import PPOLearner
from learner.publish import Publisher, WeightsRefs
from learner.rank_state import load_state, save_policy, save_policy_adapter, save_state
from learner.ranks import join

# Fresh blocks for every large tensor cost a third of a step in page faults: freed memory is kept, in huge pages, and
# in one arena, because calls of an actor run in a thread. OpenMP threads that sleep between two operations, as all
# other workers' do, cost the learner another third: they spin for about a millisecond first.
TRAINING_ENVIRONMENT = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "GOMP_SPINCOUNT": "300000",
}


def training_environment() -> dict[str, str]:
    """For processes that train; what the person's environment sets has precedence."""
    return {name: os.environ.get(name, value) for name, value in TRAINING_ENVIRONMENT.items()}


@dataclass(frozen=True)
class LearnerSettings:
    """What a rank needs to build its part of the learner.

    `weights_dtype` is what engines compute in, and so what they are sent; `weights_key` signs it.
    """

    model_path: str
    critic_path: str | None
    algorithm: AlgorithmConfig
    training: TrainingConfig
    temperature: float
    max_response_tokens: int
    total_steps: int
    seed: int
    mask_older_than: int | None = None
    weights: Literal["delta", "dense"] = "delta"
    weights_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    weights_key: bytes | None = None


@ray.remote(concurrency_groups={"health": 1, "keyframes": 1})  # type: ignore[call-overload]
class LearnerRank:
    """One rank: a process with its shard of policy, critic and optimizer."""

    def __init__(self, settings: LearnerSettings, workers: LearnerConfig, rank: int, timeout_s: float) -> None:
        torch.set_num_threads(threads_of(workers))
        self._settings, self._workers, self._rank, self._timeout_s = settings, workers, rank, timeout_s
        self._learner: PPOLearner | None = None
        # An adapter is a few percent of the weights, and none of its values stays: it is sent whole.
        dense = settings.weights == "dense" or settings.training.lora is not None
        self._publisher = Publisher(key=settings.weights_key, dense=dense)

    def address(self) -> tuple[str, int]:
        """Where this rank could listen; rank 0 does."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def load(self, address: tuple[str, int], state: str | None) -> int:
        """Join the others and load the model, and `state` (a checkpoint's folder) into it. Returns its parameters."""
        device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
        host, port = address
        ranks = join(
            self._rank, self._workers.num_ranks, address=host, port=port, device=device, timeout_s=self._timeout_s
        )
        settings = self._settings
        self._learner = PPOLearner(
            settings.model_path,
            settings.algorithm,
            settings.training,
            temperature=settings.temperature,
            max_response_tokens=settings.max_response_tokens,
            total_steps=settings.total_steps,
            seed=settings.seed,
            critic_path=settings.critic_path,
            ranks=ranks,
            mask_older_than=settings.mask_older_than,
        )
        if state is not None:
            load_state(self._learner, Path(state))
        return sum(parameter.numel() for parameter in self._learner.policy.parameters())

    def step(self, batch: Sequence[ScoredRollout], training_version: int) -> dict[str, float]:
        return self._loaded.step(batch, training_version=training_version)

    def seed(self, version: int, rounded: bool) -> None:
        """The engines hold the current weights as `version`, `rounded` to a checkpoint's bf16; a collective."""
        tensors, adapter_of = self._outgoing(rounded=rounded)
        if self._rank == 0:
            self._publisher.seed(tensors, version=version, adapter_of=adapter_of)
        else:
            _gather(tensors)

    def publish(self, version: int) -> tuple[WeightsUpdate, WeightsRefs] | None:
        """Rank 0 puts what changed, with LoRA the adapter, into the object store; the others help to gather."""
        tensors, adapter_of = self._outgoing()
        if self._rank == 0:
            return self._publisher.publish(tensors, version=version, adapter_of=adapter_of)
        _gather(tensors)
        return None

    @ray.method(concurrency_group="keyframes")
    def keyframe(self) -> tuple[WeightsUpdate, WeightsRefs]:
        """Rank 0: the last published version, complete in itself; made while the other ranks and a step go on.

        Raises:
            RuntimeError: this rank has published none, nor been told which one the engines hold.
        """
        return self._publisher.keyframe()

    def save(self, folder: str) -> None:
        """Write `policy/`, with LoRA `policy_adapter/`, and `state/` below `folder`.

        Raises:
            DiskFull: this rank found no room.
        """
        learner, base = self._loaded, self._settings.model_path
        self.save_policy(folder)
        self._together(lambda: save_policy_adapter(learner, Path(folder, "policy_adapter"), base=base))
        self._together(lambda: save_state(learner, Path(folder, "state")))

    def save_policy(self, folder: str) -> None:
        """Write `policy/` alone below `folder`.

        Raises:
            DiskFull: this rank found no room.
        """
        tokenizer = AutoTokenizer.from_pretrained(self._settings.model_path)
        self._together(lambda: save_policy(self._loaded, Path(folder, "policy"), tokenizer))

    def numerics(self) -> dict[str, str]:
        return numerics(self._workers, threads=torch.get_num_threads())

    @ray.method(concurrency_group="health")
    def progress(self) -> int:
        """Passes through the model so far; answered while another call runs."""
        return 0 if self._learner is None else self._learner.passes

    @ray.method(concurrency_group="health")
    def node(self) -> tuple[str, str]:
        """The address of the machine, and Ray's id of the node."""
        context = ray.get_runtime_context()
        return ray.util.get_node_ip_address(), context.get_node_id()

    @ray.method(concurrency_group="health")
    def pid(self) -> int:
        return os.getpid()

    def _together(self, write: Callable[[], None]) -> None:
        """Write on all ranks or fail on all: one that went on alone would mix up the collectives of later calls."""
        error: Exception | None = None
        try:
            write()
        # Whatever it is, the other ranks must hear of it before it is raised.
        except Exception as problem:  # noqa: BLE001
            error = problem
        ranks = self._loaded.ranks
        failed = ranks.max_(torch.tensor(float(error is not None), device=ranks.device)).item()
        if error is not None and is_full(error):
            raise DiskFull("the learner found no space left on its disk") from error
        if error is not None:
            raise error
        if failed:
            raise RuntimeError("another rank of the learner could not write")

    def _outgoing(self, *, rounded: bool = False) -> tuple[Iterator[tuple[str, Tensor]], int | None]:
        """What engines are sent, gathered tensor by tensor, and for an adapter the bytes of what it adapts."""
        learner, dtype = self._loaded, getattr(torch, self._settings.weights_dtype)
        if self._settings.training.lora is not None:
            adapter = learner.adapter_weights()
            return ((name, tensor.bfloat16()) for name, tensor in adapter.items()), learner.dense_bytes(dtype)
        tensors = learner.weights_one_by_one(torch.bfloat16 if rounded else dtype)
        return ((name, tensor.to(dtype)) for name, tensor in tensors), None

    @property
    def _loaded(self) -> PPOLearner:
        if self._learner is None:
            raise RuntimeError(f"learner rank {self._rank} was asked to work before it loaded its model")
        return self._learner


def _gather(tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Take part in the collectives of a rank that uses the tensors."""
    for _ in tensors:
        pass
