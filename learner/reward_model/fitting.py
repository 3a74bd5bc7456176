"""The optimizer's steps: AdamW on float32 masters, bf16 compute, warm-up then cosine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from contracts.reward_model import RewardModelConfig
from learner.ranks import Ranks
from learner.reward_model.batches import bucketed_batches, label_scores, micro_batches, pair_scores
from learner.reward_model.examples import Example, TokenLabel, TokenPair
from learner.reward_model.losses import bradley_terry_loss, centring_loss, label_loss
from learner.reward_model.network import freeze, initial_model, trained_parameters
from learner.reward_model.training_state import load_state, save_state

WARMUP_FRACTION = 0.1
MAX_GRAD_NORM = 1.0
STATE_FILE = "training.safetensors"


class Interrupted(RuntimeError):
    """The training was asked to stop and can be resumed from its checkpoint."""


@dataclass(frozen=True)
class Checkpointing:
    """Where an interrupted training keeps its state, and what tells it from others. An existing state is resumed."""

    folder: Path
    every_steps: int
    identity: dict[str, Any]

    @property
    def file(self) -> Path:
        return self.folder / STATE_FILE


@dataclass(frozen=True)
class FitInputs:
    """Everything that decides the trained weights; each rank gets all of it.

    weights_NL: how often each example counts for each row of the score head, whose `labels` they are. `base` is what
    errors call `base_path`. class_weights: of bad and of good labels.
    """

    base_path: str
    base: str
    labels: list[str]
    examples: list[Example]
    weights_NL: Tensor
    class_weights: tuple[float, float]
    config: RewardModelConfig
    seed: int
    device: str
    checkpointing: Checkpointing | None


def fit(
    inputs: FitInputs,
    *,
    say: Callable[[str], None],
    should_stop: Callable[[], bool] = lambda: False,
    ranks: Ranks | None = None,
) -> Any:
    """The model that minimises the loss; with `ranks` a collective, in which each rank computes a share of each batch.

    Everything that is drawn depends on the seed and the step alone, so a resumed training ends bit for bit as one that
    was not interrupted, on as many ranks.

    Raises:
        RuntimeError: the loss stopped being finite, or another rank died.
        Interrupted: `should_stop` of any rank said so; the state is in the checkpoint.
        ValueError: a base or layers that cannot be trained, a checkpoint that is damaged or another training's.
    """
    config, checkpointing = inputs.config, inputs.checkpointing
    model = initial_model(inputs.base_path, name=inputs.base, seed=inputs.seed, labels=inputs.labels).to(inputs.device)
    freeze(model, trainable_layers=config.trainable_layers, lora=config.lora, seed=inputs.seed)
    batches = batches_of(inputs)
    parameters = trained_parameters(model)
    optimizer = _optimizer(parameters, config)
    done = 0
    if checkpointing is not None and checkpointing.file.exists():
        done = load_state(checkpointing.file, parameters, optimizer, identity=checkpointing.identity)
        say(f"reward model: resumed after step {done} of {len(batches)}")
    started = time.monotonic()
    for step, batch in enumerate(batches[done:], done + 1):
        mine = batch if ranks is None else batch[ranks.rank :: ranks.size]
        loss = backward(
            model,
            [inputs.examples[row] for row in mine],
            inputs.weights_NL[mine],
            config,
            class_weights=inputs.class_weights,
            step_examples=len(batch),
        )
        loss, stop = _together(loss, should_stop(), parameters, ranks)
        if not math.isfinite(loss):
            raise RuntimeError(f"reward model: loss {loss} in step {step}; lower learning_rate or head_learning_rate")
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), MAX_GRAD_NORM)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate_share(step - 1, len(batches))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % max(1, len(batches) // 20) == 0 or step == len(batches):
            say(f"reward model: step {step} of {len(batches)}, loss {loss:.3f}, {time.monotonic() - started:.0f} s")
        stop = stop and step < len(batches)
        if checkpointing is not None:
            due = stop or step % checkpointing.every_steps == 0 or step == len(batches)
            if due and (ranks is None or ranks.rank == 0):
                save_state(checkpointing.file, parameters, optimizer, step=step, identity=checkpointing.identity)
        if stop:
            raise Interrupted(f"after step {step} of {len(batches)}")
    return model


def batches_of(inputs: FitInputs) -> list[list[int]]:
    """Rows of each step, epoch after epoch."""
    lengths = [example.longest for example in inputs.examples]
    return [
        batch
        for epoch in range(inputs.config.epochs)
        for batch in bucketed_batches(lengths, inputs.config.batch_size, seed=inputs.seed + epoch)
    ]


def _together(
    loss: float, stop: bool, parameters: dict[str, torch.nn.Parameter], ranks: Ranks | None
) -> tuple[float, bool]:
    """Sum gradients and losses over the ranks; stop where any of them is to."""
    if ranks is None:
        return loss, stop
    for parameter in parameters.values():
        if parameter.grad is None:  # a small last batch leaves some rank without examples
            parameter.grad = torch.zeros_like(parameter)
        ranks.sum_(parameter.grad)
    both = ranks.sum_(torch.tensor([loss, float(stop)], dtype=torch.float64, device=ranks.device))
    return float(both[0]), bool(both[1] > 0)


def backward(
    model: Any,
    examples: Sequence[Example],
    weights_BL: Tensor,
    config: RewardModelConfig,
    *,
    class_weights: tuple[float, float] = (1.0, 1.0),
    step_examples: int | None = None,
) -> float:
    """Gradients of these examples in micro-batches that add up to the whole, and their loss.

    The denominator is the examples of the optimizer step (default: these), times the members, which thereby share one
    learning rate.
    """
    num_examples = float((len(examples) if step_examples is None else step_examples) * config.members)
    total = 0.0
    for kind, part_loss in ((TokenPair, _pair_loss), (TokenLabel, partial(_label_loss, class_weights=class_weights))):
        places = [place for place, example in enumerate(examples) if isinstance(example, kind)]
        some: list[Any] = [examples[place] for place in places]
        for part in micro_batches(some):
            weights = weights_BL[[places[at] for at in part]].to(model.device)
            loss = part_loss(model, [some[at] for at in part], weights, config, num_examples=num_examples)
            loss.backward()
            total += loss.item()
    return total


def _pair_loss(
    model: Any, pairs: Sequence[TokenPair], weights_BL: Tensor, config: RewardModelConfig, *, num_examples: float
) -> Tensor:
    with torch.autocast(model.device.type, dtype=torch.bfloat16):
        chosen_BL, rejected_BL = pair_scores(model, pairs)
    loss = bradley_terry_loss(
        chosen_BL - rejected_BL,
        _probabilities(pairs, model.device),
        num_pairs=num_examples,
        margin=config.margin,
        label_smoothing=config.label_smoothing,
        flip_rate=config.flip_rate,
        weights_B=weights_BL,
    )
    if not config.centring:
        return loss
    return loss + config.centring * centring_loss(chosen_BL, rejected_BL, num_pairs=num_examples, weights_B=weights_BL)


def _label_loss(
    model: Any,
    labels: Sequence[TokenLabel],
    weights_BL: Tensor,
    config: RewardModelConfig,
    *,
    num_examples: float,
    class_weights: tuple[float, float],
) -> Tensor:
    with torch.autocast(model.device.type, dtype=torch.bfloat16):
        scores_BL = label_scores(model, labels)
    return label_loss(
        scores_BL,
        _probabilities(labels, model.device),
        num_labels=num_examples,
        class_weights=class_weights,
        label_smoothing=config.label_smoothing,
        flip_rate=config.flip_rate,
        weights_B=weights_BL,
    )


def _probabilities(examples: Sequence[Example], device: torch.device) -> Tensor:
    """[B, 1], to stand beside every row of the score head."""
    return torch.tensor([[example.probability] for example in examples], device=device)


def rate_share(step: int, num_steps: int) -> float:
    """Share of the peak learning rate in `step` (from 0): linear warm-up over the first tenth, then cosine to 0."""
    warmup = max(1, round(WARMUP_FRACTION * num_steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup + 1) / (num_steps - warmup + 1)))


def _optimizer(parameters: dict[str, torch.nn.Parameter], config: RewardModelConfig) -> torch.optim.AdamW:
    head = [each for name, each in parameters.items() if name.startswith("score.")]
    trunk = [each for name, each in parameters.items() if not name.startswith("score.")]
    groups = [
        {"params": trunk, "lr": config.learning_rate, "peak": config.learning_rate},
        {"params": head, "lr": config.head_learning_rate, "peak": config.head_learning_rate},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
