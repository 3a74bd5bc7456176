"""More than one rank: processes beside this one, each with the whole model and a share of every batch.

This process is rank 0; what it says, stops for and writes is what counts. The others get everything that decides the
weights when they start, so nothing is sent afterwards but gradients.
"""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from learner.ranks import LOOPBACK, join
from learner.reward_model.fitting import FitInputs, Interrupted, fit

RANK_S = 300.0  # a rank loads its model, gets through its share of a batch, or ends


def fit_on_ranks(
    inputs: FitInputs, *, say: Callable[[str], None], should_stop: Callable[[], bool] = lambda: False
) -> Any:
    """`fitting.fit` on `num_ranks` processes of this machine. Raises as it does; no process stays.

    Sums of gradients are rounded in another order than on one rank, so other ranks give other last bits.
    """
    size = inputs.config.num_ranks
    if size == 1:
        return fit(inputs, say=say, should_stop=should_stop)
    threads = torch.get_num_threads()
    each = max(1, threads // size)
    port = _free_port()
    context = multiprocessing.get_context("spawn")
    others = [
        context.Process(target=_other_rank, args=(inputs, rank, port, each), daemon=True) for rank in range(1, size)
    ]
    for process in others:
        process.start()
    try:
        torch.set_num_threads(each)
        model = _fit_as(0, inputs, port, say=say, should_stop=should_stop)
        for process in others:
            process.join(RANK_S)
        return model
    finally:
        torch.set_num_threads(threads)
        for process in others:
            if process.is_alive():
                process.kill()
                process.join(RANK_S)


def _other_rank(inputs: FitInputs, rank: int, port: int, threads: int) -> None:
    """In a process of its own. Rank 0 tells what ended the training: the same, or a collective without this rank."""
    torch.set_num_threads(threads)
    try:
        _fit_as(rank, inputs, port, say=lambda line: None)
    except (Interrupted, RuntimeError, ValueError):
        raise SystemExit(1) from None


def _fit_as(
    rank: int,
    inputs: FitInputs,
    port: int,
    *,
    say: Callable[[str], None],
    should_stop: Callable[[], bool] = lambda: False,
) -> Any:
    device = f"{inputs.device}:{rank}" if inputs.device == "cuda" else inputs.device
    size = inputs.config.num_ranks
    ranks = join(rank, size, address=LOOPBACK, port=port, device=torch.device(device), timeout_s=RANK_S)
    try:
        return fit(replace(inputs, device=device), say=say, should_stop=should_stop, ranks=ranks)
    finally:
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])
