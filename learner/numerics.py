"""What decides the last bits of the learner's arithmetic, apart from its inputs: software, threads, ranks, device."""

from __future__ import annotations

import os

import torch

from contracts.software import installed, processor
from contracts.workers import LearnerConfig


def numerics(workers: LearnerConfig, *, threads: int) -> dict[str, str]:
    """Of this process, as a rank of `workers` with so many compute threads.

    Two learners for which this is equal compute the same bits from the same batches (proved on CPU; on a GPU some
    kernels add in an order of their own).
    """
    versions = {name: installed(name) or "not installed" for name in ("headrace", "torch", "transformers")}
    on_gpu = workers.num_gpus > 0
    device = torch.cuda.get_device_name() if on_gpu else torch.backends.cpu.get_cpu_capability()
    return {
        **versions,
        "processor": processor(),
        "learner_device": device,
        "learner_ranks": str(workers.num_ranks),
        "learner_threads": str(threads),
    }


def threads_of(workers: LearnerConfig) -> int:
    """Compute threads of a rank on this machine."""
    return workers.threads or max(1, (os.cpu_count() or 1) // workers.num_ranks)
