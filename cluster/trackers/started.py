"""The trackers that a configuration asks for."""

from __future__ import annotations

from collections.abc import Callable

from cluster.trackers.tensorboard import TensorBoard
from cluster.trackers.tracker import Tracker, Trackers
from cluster.trackers.weights_and_biases import WeightsAndBiases
from contracts.config import Config


def start_trackers(
    config: Config,
    *,
    last_row: int | None,
    on_lost: Callable[[str, str], None],
    tell: Callable[[str], None],
) -> Trackers:
    """Start them; `last_row` is the last step of a resumed run that has a row already, None for a fresh run."""
    asked, trackers = config.logging, list[Tracker]()
    if asked.tensorboard:
        purge_step = None if last_row is None else last_row + 1
        trackers.append(TensorBoard(config.output_dir / "tensorboard", purge_step=purge_step))
    if asked.wandb is not None:
        settings = config.model_dump(mode="json")
        resumed = last_row is not None
        trackers.append(
            WeightsAndBiases(
                asked.wandb, config.output_dir, settings=settings, resumed=resumed, deadline_s=asked.deadline_s
            )
        )
    return Trackers(trackers, deadline_s=asked.deadline_s, on_lost=on_lost, tell=tell)
