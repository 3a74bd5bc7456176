"""From judged rows to a folder: split, train, calibrate, save, load again, judge."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from contracts.records import Comparison
from contracts.reward_model import RewardModelConfig
from feedback.quality import UnpairedLabel
from learner.reward_model.examples import Examples, Row, examples
from learner.reward_model.fitting import Checkpointing, FitInputs
from learner.reward_model.heads import Heads
from learner.reward_model.measures import HeldOut, held_out
from learner.reward_model.network import pad_apart_from_eos
from learner.reward_model.rank_processes import fit_on_ranks
from learner.reward_model.saving import save, write_card
from learner.reward_model.split import Split, class_weights, of_head, split_rows
from models.bundled import resolve
from models.reward import RewardModel, load_tokenizer
from models.reward_card import files_sha256, sha256


@dataclass(frozen=True)
class RewardModelReport:
    """What training gave. Held-out numbers are those of the saved folder, loaded again as replicas load it; they are
    of the first head, and `heads` has them all."""

    train_pairs: int
    train_labels: int
    calibration_rows: int
    held_out_pairs: int  # labels among them
    held_out_prompts: int
    dropped: dict[str, int]  # by reason
    held_out_accuracy: float
    held_out_accuracy_low: float  # 95 % interval over prompts
    held_out_accuracy_high: float
    held_out_loss: float  # nats a row
    held_out_calibrated_loss: float
    heads: dict[str, dict[str, float]]
    score_mean: float
    score_std: float
    temperature: float  # of the score, which is divided by score_std
    seconds: float
    reward_version: str


def train_reward_model(
    comparisons: Sequence[Comparison],
    config: RewardModelConfig,
    *,
    labels: Sequence[UnpairedLabel] = (),
    base: str,
    output_dir: Path,
    seed: int,
    threads: int | None = None,
    on_progress: Callable[[str], None] | None = None,
    device: str = "cpu",
    checkpoint_dir: Path | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> RewardModelReport:
    """Train on `comparisons` and `labels`, write a Hugging Face folder with a reward_card.json to `output_dir`.

    Whole prompts are held out, never rows. A causal `base` gets small random score heads; a classifier of the same
    labels keeps its own. The folder appears complete or not at all. `threads` is torch's, for the duration of the call.
    With `checkpoint_dir` the training leaves its state there, goes on from one that it finds, and `should_stop` ends it
    after a step; the folder goes when the model is written.

    Raises:
        ValueError: too few usable rows, labels of one class, a head without rows, `output_dir` in use, `base` without
            tokenizer, chat template or loadable weights, more `trainable_layers` than the model has, scores that are
            not finite, a checkpoint of another training.
        RuntimeError: the loss stopped being finite, or a rank died.
        Interrupted: `should_stop` said so.
    """
    if output_dir.exists() and any(output_dir.iterdir()):
        raise ValueError(f"output_dir {output_dir} is not empty: a reward model is never overwritten")
    started = time.monotonic()
    say = on_progress or (lambda line: None)
    base_path = resolve(base)
    tokenizer = load_tokenizer(base_path, name=base)
    if pad := pad_apart_from_eos(tokenizer, name=base):
        say(f"reward model: pads with {pad}, as the base has no pad token that differs from its end of sequence")
    heads = Heads(config.heads, config.members)
    usable = examples(comparisons, labels, tokenizer, heads=heads, max_tokens=config.max_tokens)
    split = split_rows(usable, config, heads, seed=seed)
    identity = _identity(comparisons, labels, base=base, base_path=base_path, seed=seed, device=device)
    with _threads(threads), _appearing_whole(output_dir) as folder:
        identity["threads"] = torch.get_num_threads()
        checkpointing = None
        if checkpoint_dir is not None:
            decisive = config.model_dump(mode="json", exclude={"checkpoint_steps"})
            checkpointing = Checkpointing(checkpoint_dir, config.checkpoint_steps, identity | {"config": decisive})
        inputs = FitInputs(
            base_path=base_path,
            base=base,
            labels=heads.labels,
            examples=usable.of(split.train),
            weights_NL=heads.weights(
                [row.domain for row in split.train],
                [row.prompt.strip() for row in split.train],
                bootstrap=config.bootstrap,
                seed=seed,
            ),
            class_weights=class_weights(usable, split, config, heads),
            config=config,
            seed=seed,
            device=device,
            checkpointing=checkpointing,
        )
        model = fit_on_ranks(inputs, say=say, should_stop=should_stop)
        save(
            model,
            tokenizer,
            folder,
            config=config,
            heads=heads,
            base=base_path,
            trained_on=inputs.examples,
            calibrated_on={name: usable.of(of_head(split.calibrate, heads, name)) for name in heads.names},
        )
        write_card(folder, tokenizer, config, heads=heads, identity=identity)
        del model  # before its copy is loaded

        models = RewardModel.load_heads(str(folder), device=device, max_tokens=config.max_tokens)
        judged = {name: held_out(models[name], of_head(split.held_out, heads, name)) for name in heads.names}
        report = _report(usable, split, models, judged, seconds=time.monotonic() - started)
        write_card(folder, tokenizer, config, heads=heads, identity=identity, metrics=asdict(report))
    if checkpoint_dir is not None:
        shutil.rmtree(checkpoint_dir, ignore_errors=True)
    return report


def _identity(
    comparisons: Sequence[Comparison],
    labels: Sequence[UnpairedLabel],
    *,
    base: str,
    base_path: str,
    seed: int,
    device: str,
) -> dict[str, Any]:
    """What a model was trained from: the same in its card and in the checkpoint of an interrupted training."""
    folder = Path(base_path)
    rows: list[Row] = [*comparisons, *labels]
    return {
        "base": base,
        "base_sha256": files_sha256(sorted(folder.glob("*.safetensors"))) if folder.is_dir() else None,
        "dataset_sha256": sha256(json.dumps(asdict(row), sort_keys=True).encode() for row in rows),
        "seed": seed,
        "torch": torch.__version__,
        "device": device,
    }


def _report(
    usable: Examples,
    split: Split,
    models: Mapping[str, RewardModel],
    judged: Mapping[str, HeldOut],
    *,
    seconds: float,
) -> RewardModelReport:
    first = next(iter(models))
    found = judged[first]
    labels = sum(isinstance(row, UnpairedLabel) for row in split.train)
    return RewardModelReport(
        train_pairs=len(split.train) - labels,
        train_labels=labels,
        calibration_rows=len(split.calibrate),
        held_out_pairs=len(split.held_out),
        held_out_prompts=found.prompts,
        dropped=usable.dropped,
        held_out_accuracy=found.accuracy,
        held_out_accuracy_low=found.accuracy_low,
        held_out_accuracy_high=found.accuracy_high,
        held_out_loss=found.loss,
        held_out_calibrated_loss=found.calibrated_loss,
        heads={name: asdict(each) | {"temperature": models[name].temperature} for name, each in judged.items()},
        score_mean=models[first].score_mean,
        score_std=models[first].score_std,
        temperature=models[first].temperature,
        seconds=seconds,
        reward_version=models[first].version,
    )


@contextmanager
def _appearing_whole(output_dir: Path) -> Iterator[Path]:
    """A scratch folder beside `output_dir`, which takes its name if nothing fails."""
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{output_dir.name}-", suffix=".partial", dir=output_dir.parent))
    try:
        yield scratch
        scratch.chmod(0o755)  # mkdtemp's folders are private
        os.rename(scratch, output_dir)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
