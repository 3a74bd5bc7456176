"""Train a Bradley-Terry reward model on comparisons, evaluate it on prompts it has not seen, and save it.

B rows of a batch, T tokens, H hidden size. The two dialogues of a pair share their prompt: where the architecture
allows it they are one row, [prompt | rest of chosen | rest of rejected], in which neither answer sees the other.
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification

from contracts.config import RewardModelConfig
from contracts.records import Comparison
from feedback.formats import split_by_prompt
from models.bundled import resolve
from models.reward import RewardModel, load_tokenizer, pad_right, quiet_loading, raw_scores, render, score_head

CARD_SCHEMA_VERSION = 1
MICRO_BATCH_TOKENS = 4096  # padded tokens that one forward pass may hold, more only for a single longer pair
NORMALISATION_PAIRS = 64  # training pairs whose 128 scores give score_mean and score_std
MIN_TRAIN_PAIRS = 2
WARMUP_FRACTION = 0.1
MAX_GRAD_NORM = 1.0
# Attention alone mixes tokens, and SDPA takes a mask [B, 1, T, T] as it is; other architectures get two rows a pair.
SHARED_PROMPT_MODELS = ("llama", "qwen2", "qwen3")


@dataclass(frozen=True)
class RewardModelReport:
    """What training gave. Held-out numbers are those of the saved folder, loaded again as replicas load it."""

    train_pairs: int
    held_out_pairs: int
    held_out_prompts: int
    dropped_empty: int  # a side without text
    dropped_identical: int  # both sides the same tokens after truncation
    held_out_accuracy: float
    held_out_accuracy_low: float  # 95 % interval over prompts
    held_out_accuracy_high: float
    held_out_loss: float  # nats a pair
    score_mean: float
    score_std: float
    seconds: float
    reward_version: str


@dataclass(frozen=True)
class TokenPair:
    """Both rendered dialogues of a comparison, and the probability that chosen is the better one."""

    chosen: list[int]
    rejected: list[int]
    probability: float

    @property
    def shared_tokens(self) -> int:
        """Length of the common prefix."""
        shortest = min(len(self.chosen), len(self.rejected))
        return next((t for t in range(shortest) if self.chosen[t] != self.rejected[t]), shortest)


def train_reward_model(
    comparisons: Sequence[Comparison],
    config: RewardModelConfig,
    *,
    base: str,
    output_dir: Path,
    seed: int,
    threads: int | None = None,
    on_progress: Callable[[str], None] | None = None,
    device: str = "cpu",
) -> RewardModelReport:
    """Train on `comparisons`, write a Hugging Face folder with a reward_card.json to `output_dir`.

    Whole prompts are held out, never rows. float32 masters of what is trained, bf16 compute, AdamW, warm-up then
    cosine. A causal `base` gets a small random score head; a one-label classifier keeps its own. The folder appears
    complete or not at all. `threads` is torch's, for the duration of the call.

    Raises:
        ValueError: too few usable pairs, `output_dir` in use, `base` without tokenizer, chat template or loadable
            weights, more `trainable_layers` than the model has.
        RuntimeError: the loss stopped being finite.
    """
    if output_dir.exists() and any(output_dir.iterdir()):
        raise ValueError(f"output_dir {output_dir} is not empty: a reward model is never overwritten")
    started = time.monotonic()
    say = on_progress or (lambda line: None)
    base_path = resolve(base)
    tokenizer = load_tokenizer(base_path, name=base)
    usable, pairs, dropped = token_pairs(comparisons, tokenizer, max_tokens=config.max_tokens)
    train, held_out = _split(usable, dropped, config, seed=seed)
    with _threads(threads), _appearing_whole(output_dir) as folder:
        model = initial_model(base_path, name=base, seed=seed).to(device)
        freeze_lower_layers(model, config.trainable_layers)
        train_pairs = [pairs[comparison] for comparison in train]
        fit(model, train_pairs, config, seed=seed, say=say)
        _save(model, tokenizer, folder, train_pairs)
        del model  # before its copy is loaded

        reward_model = RewardModel.load(str(folder), device=device, max_tokens=config.max_tokens)
        report = RewardModelReport(
            train_pairs=len(train),
            held_out_pairs=len(held_out),
            dropped_empty=dropped["empty"],
            dropped_identical=dropped["identical"],
            score_mean=reward_model.score_mean,
            score_std=reward_model.score_std,
            reward_version=reward_model.version,
            **evaluate(reward_model, held_out),
            seconds=time.monotonic() - started,
        )
        _write_card(folder, report, config, base=base, seed=seed, comparisons=comparisons)
    return report


def token_pairs(
    comparisons: Sequence[Comparison], tokenizer: Any, *, max_tokens: int
) -> tuple[list[Comparison], dict[Comparison, TokenPair], Counter[str]]:
    """The usable comparisons in order, each rendered, and how many were dropped: `empty` (a side without text) or
    `identical` (the same tokens after truncation, which teach nothing)."""
    dropped: Counter[str] = Counter()
    spoken = [c for c in comparisons if c.chosen.strip() and c.rejected.strip()]
    dropped["empty"] = len(comparisons) - len(spoken)
    chosen = render(tokenizer, [dialogue(c.prompt, c.chosen) for c in spoken], max_tokens=max_tokens)
    rejected = render(tokenizer, [dialogue(c.prompt, c.rejected) for c in spoken], max_tokens=max_tokens)
    usable, pairs = [], {}
    for comparison, better, worse in zip(spoken, chosen, rejected, strict=True):
        if better == worse:
            dropped["identical"] += 1
        else:
            usable.append(comparison)
            pairs[comparison] = TokenPair(better, worse, comparison.probability)
    return usable, pairs, dropped


def dialogue(prompt: str, response: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def bradley_terry_loss(margins_B: Tensor, probabilities_B: Tensor, *, num_pairs: int) -> Tensor:
    """-Σ [p · log σ(d) + (1 - p) · log σ(-d)] / num_pairs, in nats, a scalar.

    margins_B: d, score of chosen less score of rejected; probabilities_B: p, that chosen is better; num_pairs: pairs
    in the optimizer step. Bradley & Terry 1952; Christiano et al. 2017, "Deep RL from human preferences", eq. 1.
    """
    losses_B = probabilities_B * logsigmoid(margins_B) + (1 - probabilities_B) * logsigmoid(-margins_B)
    return -losses_B.sum() / num_pairs


def accuracy(margins: Sequence[float], probabilities: Sequence[float]) -> float:
    """Share of pairs ranked like the majority. Split votes (0.5) do not count, equal scores count half."""
    decided = [(d if p > 0.5 else -d) for d, p in zip(margins, probabilities, strict=True) if p != 0.5]
    return sum(1.0 if d > 0 else 0.5 if d == 0 else 0.0 for d in decided) / len(decided) if decided else 0.5


def wilson_interval(share: float, count: int, *, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share of `count` independent trials (Wilson 1927); (0, 1) without any."""
    if count == 0:
        return 0.0, 1.0
    center = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, center - half), min(1.0, center + half)


def evaluate(reward_model: RewardModel, comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Held-out fields of `RewardModelReport`. Prompts, not pairs, count as independent, so that the interval stays
    honest where one prompt has many pairs."""
    scores = reward_model.score(
        [dialogue(c.prompt, c.chosen) for c in comparisons] + [dialogue(c.prompt, c.rejected) for c in comparisons]
    )
    chosen, rejected = scores[: len(comparisons)], scores[len(comparisons) :]
    margins = [(c - r) * reward_model.score_std for c, r in zip(chosen, rejected, strict=True)]
    probabilities = [c.probability for c in comparisons]
    share = accuracy(margins, probabilities)
    num_prompts = len({c.prompt_id or c.prompt for c in comparisons if c.probability != 0.5})
    low, high = wilson_interval(share, num_prompts)
    loss = bradley_terry_loss(torch.tensor(margins), torch.tensor(probabilities), num_pairs=len(comparisons))
    return {
        "held_out_prompts": num_prompts,
        "held_out_accuracy": share,
        "held_out_accuracy_low": low,
        "held_out_accuracy_high": high,
        "held_out_loss": loss.item(),
    }


def initial_model(path: str, *, name: str, seed: int) -> Any:
    """`path` as a one-label classifier in float32. A missing score head is drawn from N(0, 1 / (H + 1)), which keeps
    first scores moderate (Stiennon et al. 2020, "Learning to summarize from human feedback").

    Raises:
        ValueError: weights other than the head are missing, or the architecture has no `score` head.
    """
    try:
        with quiet_loading():
            model, info = AutoModelForSequenceClassification.from_pretrained(
                path, num_labels=1, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, ValueError) as error:
        raise ValueError(f"base {name}: does not load as a sequence classifier ({error})") from error
    if "score" not in dict(model.named_children()):
        raise ValueError(f"base {name}: {type(model).__name__} has no `score` head over a decoder's last token")
    if other := sorted(info["missing_keys"] - {"score.weight"}):
        raise ValueError(f"base {name}: its files do not hold {', '.join(other)}")
    if info["missing_keys"]:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            model.score.weight.normal_(0, (model.score.in_features + 1) ** -0.5, generator=generator)
    return model.eval()  # no dropout: both answers of a pair pass through one and the same network


def freeze_lower_layers(model: Any, trainable_layers: int | None) -> None:
    """Leave the last `trainable_layers` decoder layers, the final norm and the head to train; None: everything.

    Nothing below needs a gradient then, so autograd stores nothing for it. What is frozen goes to bf16 at once, as
    it will be saved.

    Raises:
        ValueError: the model has fewer layers.
    """
    if trainable_layers is None:
        return
    layers = decoder_layers(model)
    if trainable_layers > len(layers):
        raise ValueError(f"trainable_layers is {trainable_layers}, the model has {len(layers)} layers")
    embeddings = [child for child in model.base_model.children() if isinstance(child, nn.Embedding)]
    for module in [*embeddings, *layers[: len(layers) - trainable_layers]]:
        _round_to_bfloat16(module.requires_grad_(False))


def decoder_layers(model: Any) -> nn.ModuleList:
    num_layers = model.config.num_hidden_layers
    lists = [child for child in model.base_model.children() if isinstance(child, nn.ModuleList)]
    layers = [child for child in lists if len(child) == num_layers]
    if len(layers) != 1:
        raise ValueError(f"trainable_layers: {type(model).__name__} has no single list of {num_layers} decoder layers")
    return layers[0]


def fit(
    model: Any, pairs: Sequence[TokenPair], config: RewardModelConfig, *, seed: int, say: Callable[[str], None]
) -> None:
    """Minimise the Bradley-Terry loss in place. Raises RuntimeError once it is not finite."""
    lengths = [max(len(pair.chosen), len(pair.rejected)) for pair in pairs]
    batches = [
        batch
        for epoch in range(config.epochs)
        for batch in bucketed_batches(lengths, config.batch_size, seed=seed + epoch)
    ]
    optimizer = _optimizer(model, config)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_share(step, len(batches)))
    started = time.monotonic()
    for step, batch in enumerate(batches, 1):
        loss = _backward(model, [pairs[row] for row in batch])
        if not math.isfinite(loss):
            raise RuntimeError(f"reward model: loss {loss} in step {step}; lower learning_rate or head_learning_rate")
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % max(1, len(batches) // 20) == 0 or step == len(batches):
            say(f"reward model: step {step} of {len(batches)}, loss {loss:.3f}, {time.monotonic() - started:.0f} s")


def bucketed_batches(lengths: Sequence[int], batch_size: int, *, seed: int, bucket_batches: int = 8) -> list[list[int]]:
    """Every row once, in batches of like length in random order: shuffle, sort within buckets of `bucket_batches`
    batches, cut, shuffle the batches. The last batch may be smaller."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    size = batch_size * bucket_batches
    buckets = [sorted(shuffled[at : at + size], key=lambda row: lengths[row]) for at in range(0, len(shuffled), size)]
    batches = [bucket[at : at + batch_size] for bucket in buckets for at in range(0, len(bucket), batch_size)]
    return [batches[at] for at in torch.randperm(len(batches), generator=generator).tolist()]


def rate_share(step: int, num_steps: int) -> float:
    """Share of the peak learning rate in `step` (from 0): linear warm-up over the first tenth, then cosine to 0."""
    warmup = max(1, round(WARMUP_FRACTION * num_steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup + 1) / (num_steps - warmup + 1)))


def pair_scores(model: Any, pairs: Sequence[TokenPair]) -> tuple[Tensor, Tensor]:
    """Raw scores (chosen_B, rejected_B) in float32, equal to those of each dialogue by itself up to rounding."""
    if not shares_prompts(model):
        scores_2B = raw_scores(model, *pad_right([p.chosen for p in pairs] + [p.rejected for p in pairs]))
        return scores_2B[: len(pairs)], scores_2B[len(pairs) :]
    tokens_BT, positions_BT, allowed_BTT, ends_B2 = (x.to(model.device) for x in pack_pairs(pairs))
    hidden_BTH = model.base_model(
        input_ids=tokens_BT, position_ids=positions_BT, attention_mask=allowed_BTT[:, None], use_cache=False
    ).last_hidden_state
    rows_B = torch.arange(len(pairs), device=model.device)
    return score_head(model, hidden_BTH[rows_B, ends_B2[:, 0]]), score_head(model, hidden_BTH[rows_B, ends_B2[:, 1]])


def shares_prompts(model: Any) -> bool:
    config = model.config
    plain = config.model_type in SHARED_PROMPT_MODELS and config.to_dict().get("sliding_window") is None
    return plain and config._attn_implementation == "sdpa"


def pack_pairs(pairs: Sequence[TokenPair]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One row a pair: common prefix, rest of chosen, rest of rejected.

    Returns tokens_BT; positions_BT, which continue from the prefix in either rest; allowed_BTT, true where query [1]
    may see key [2]: backwards, in its own part or the prefix; ends_B2, the last tokens of chosen and rejected.
    """
    tokens_BT, mask_BT = pad_right([p.chosen + p.rejected[p.shared_tokens :] for p in pairs])
    positions_BT = torch.arange(tokens_BT.shape[1]).repeat(len(pairs), 1)
    parts_BT = torch.where(mask_BT == 1, 0, 3)  # 0 prefix, 1 chosen, 2 rejected, 3 padding
    ends_B2 = torch.empty(len(pairs), 2, dtype=torch.long)
    for row, pair in enumerate(pairs):
        shared, middle, end = pair.shared_tokens, len(pair.chosen), int(mask_BT[row].sum())
        parts_BT[row, shared:middle] = 1
        parts_BT[row, middle:end] = 2
        positions_BT[row, middle:end] -= middle - shared
        ends_B2[row, 0] = middle - 1
        ends_B2[row, 1] = end - 1 if end > middle else shared - 1
    same_BTT = parts_BT[:, :, None] == parts_BT[:, None, :]
    allowed_BTT = (same_BTT | (parts_BT == 0)[:, None, :]).tril()
    return tokens_BT, positions_BT, allowed_BTT, ends_B2


def _backward(model: Any, pairs: Sequence[TokenPair]) -> float:
    """Gradients of one optimizer step in micro-batches that add up to the whole; its loss."""
    total = 0.0
    for part in _micro_batches(pairs):
        with torch.autocast(model.device.type, dtype=torch.bfloat16):
            chosen_B, rejected_B = pair_scores(model, part)
        probabilities_B = torch.tensor([pair.probability for pair in part], device=model.device)
        loss = bradley_terry_loss(chosen_B - rejected_B, probabilities_B, num_pairs=len(pairs))
        loss.backward()
        total += loss.item()
    return total


def _micro_batches(pairs: Sequence[TokenPair]) -> Iterator[list[TokenPair]]:
    """Runs of pairs whose padded tokens, prompts counted twice, stay within MICRO_BATCH_TOKENS."""
    part: list[TokenPair] = []
    longest = 0
    for pair in pairs:
        longest = max(longest, len(pair.chosen), len(pair.rejected))
        if part and 2 * longest * (len(part) + 1) > MICRO_BATCH_TOKENS:
            yield part
            part, longest = [], max(len(pair.chosen), len(pair.rejected))
        part.append(pair)
    yield part


def _optimizer(model: Any, config: RewardModelConfig) -> torch.optim.AdamW:
    head = list(model.score.parameters())
    trunk = [parameter for parameter in model.base_model.parameters() if parameter.requires_grad]
    groups = [{"params": trunk, "lr": config.learning_rate}, {"params": head, "lr": config.head_learning_rate}]
    return torch.optim.AdamW(groups, weight_decay=0.0)


@torch.no_grad()
def _save(model: Any, tokenizer: Any, folder: Path, pairs: Sequence[TokenPair]) -> None:
    """bf16 weights and the mean and deviation that those weights give on training pairs."""
    _round_to_bfloat16(model)
    model.score.float()  # exact, and what scoring uses
    sample = pairs[:: max(1, len(pairs) // NORMALISATION_PAIRS)][:NORMALISATION_PAIRS]
    scores = torch.cat([torch.cat(pair_scores(model, part)) for part in _micro_batches(sample)]).cpu()
    model.score.bfloat16()
    model.register_buffer("score_mean", scores.mean())
    model.register_buffer("score_std", scores.std().clamp(min=1e-6))  # equal scores must not divide by 0
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _round_to_bfloat16(module: nn.Module) -> None:
    """Parameters only: rotary frequencies are buffers and lose their meaning in bf16."""
    for parameter in module.parameters():
        parameter.data = parameter.data.bfloat16()


def _split(
    usable: Sequence[Comparison], dropped: Counter[str], config: RewardModelConfig, *, seed: int
) -> tuple[list[Comparison], list[Comparison]]:
    several = len({comparison.prompt.strip() for comparison in usable}) > 1
    train, held_out = split_by_prompt(usable, config.held_out_fraction, seed=seed) if several else (list(usable), [])
    if len(train) < MIN_TRAIN_PAIRS or not held_out:
        raise ValueError(
            f"{len(train)} usable comparisons to train on and {len(held_out)} held out (dropped: {dropped['empty']} "
            f"with an empty side, {dropped['identical']} with identical sides): needed are at least "
            f"{MIN_TRAIN_PAIRS} and 1, on different prompts"
        )
    return train, held_out


def _write_card(
    folder: Path,
    report: RewardModelReport,
    config: RewardModelConfig,
    *,
    base: str,
    seed: int,
    comparisons: Sequence[Comparison],
) -> None:
    tokenizer_files = sorted([*folder.glob("tokenizer*"), *folder.glob("chat_template*")])
    rows = (json.dumps(asdict(comparison), sort_keys=True).encode() for comparison in comparisons)
    card = {
        "schema_version": CARD_SCHEMA_VERSION,
        "base": base,
        "tokenizer_sha256": _sha256(file.read_bytes() for file in tokenizer_files),
        "dataset_sha256": _sha256(rows),
        "loss": "bradley-terry with soft targets",
        "seed": seed,
        "config": config.model_dump(mode="json"),
        "metrics": asdict(report),
        "reward_version": report.reward_version,
    }
    (folder / "reward_card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def _sha256(parts: Iterator[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


@contextmanager
def _appearing_whole(output_dir: Path) -> Iterator[Path]:
    """A scratch folder beside `output_dir`, which takes its name if nothing fails."""
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{output_dir.name}-", dir=output_dir.parent))
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
