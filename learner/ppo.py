"""One step of the learner on one rank: score the batch, fix targets, clipped epochs. Torch only, no Ray.

B responses, T response tokens, U = T + 1, n response tokens of a micro-batch. Every rank sees the whole batch, computes
the same targets, and works on its share of the micro-batches; sums over ranks give each the same metrics.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from contracts.algorithm import AlgorithmConfig, TrainingConfig
from contracts.records import ScoredRollout
from contracts.seeds import derive_seed
from learner.actor_critic import ActorCritic, Losses, Scores
from learner.experience import Experience, MicroBatch, plan_micro_batches, to_experience
from learner.lora import adapter_names, adapters, add_adapters, merged
from learner.loss import entropy_bonus, kl_penalty_loss, policy_loss, token_weights, value_loss
from learner.metrics import batch_metrics, lag_metrics, update_metrics
from learner.normalise import RunningMoments
from learner.ranks import Ranks, alone, shard, whole
from learner.targets import Predictions, Targets, critic_targets, group_targets, needs_predictions, shaped_scores
from models.projection import EntropyMode, Stats, add_stats


class PPOLearner:
    """Policy, critic, optimizer and everything else that a checkpoint of the learner holds, on one rank."""

    def __init__(
        self,
        model_path: str,
        algorithm: AlgorithmConfig,
        training: TrainingConfig,
        *,
        temperature: float,
        max_response_tokens: int,
        total_steps: int,
        seed: int,
        critic_path: str | None = None,
        ranks: Ranks | None = None,
        mask_older_than: int | None = None,
    ) -> None:
        self.algorithm = algorithm
        self.training = training
        self.temperature = temperature
        self.max_response_tokens = max_response_tokens
        self.total_steps = total_steps
        self.seed = seed
        self.mask_older_than = mask_older_than  # steps; older tokens are left out of the loss
        self.ranks = ranks or alone(torch.device("cpu"))
        self.policy = ActorCritic.load(
            model_path,
            has_critic=algorithm.has_critic,
            critic_path=critic_path or model_path if algorithm.critic == "separate" and algorithm.has_critic else None,
            packing=training.packing,
        )
        if training.lora is not None:
            add_adapters(self.policy, training.lora, dtype=getattr(torch, training.dtype), seed=seed)
        self.policy.to(self.ranks.device)
        shard(
            self.policy,
            self.ranks,
            dtype=training.dtype,
            activation_checkpointing=training.activation_checkpointing,
        )
        self.kl_coef = algorithm.kl_coef
        self.step_count = 0
        self.skipped_in_row = 0
        self.passes = 0  # through the model, as a sign of life
        self.reward_moments = RunningMoments()
        self.value_moments = RunningMoments()
        trained = [(name, p) for name, p in self.policy.named_parameters() if p.requires_grad]
        critic = [p for name, p in trained if not name.startswith("policy.")]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for name, p in trained if name.startswith("policy.")], "base_lr": training.learning_rate},
                *([{"params": critic, "base_lr": training.value_learning_rate}] if critic else []),
            ],
            lr=training.learning_rate,
            weight_decay=training.weight_decay,
            fused=True,
        )
        for parameter in (p for group in self.optimizer.param_groups for p in group["params"]):
            # From the start: torch makes them where a state is first saved, by a step that Adam counts.
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), device=self.ranks.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def step(self, batch: Sequence[ScoredRollout], *, training_version: int) -> dict[str, float]:
        """Train on one batch; a collective.

        Returns:
            metrics, always finite, the same on every rank.

        Raises:
            ValueError: a record that cannot be trained on; names the trajectory.
            ArithmeticError: `training.max_skipped_steps` steps in a row had no finite gradient.
        """
        oldest = 0 if self.mask_older_than is None else training_version - self.mask_older_than
        experience = to_experience(batch, token_budget=self.training.micro_batch_tokens, oldest_version=oldest)
        if self.algorithm.monitor_kl and experience.reference_logprobs_BT is None:
            raise ValueError("trajectories without reference_logprobs, which only algorithm.monitor_kl false allows")
        minibatches = self._minibatches(experience, training_version)
        predicted = None
        if needs_predictions(self.algorithm, num_updates=len(minibatches)):
            predicted = self._predict(experience, minibatches[: len(minibatches) // self.training.epochs])
        if predicted is None or all(values.isfinite().all() for values in predicted):
            targets = self._targets(experience, predicted)
            stats: Counter[str] = Counter()
            for rows in minibatches:
                add_stats(stats, self._update(experience, targets, rows))
            stats = self._over_ranks(stats)
        else:  # the weights themselves give NaN: no target can be fixed, and none of the statistics may see it
            predicted, targets = None, None
            stats = Counter(minibatches=len(minibatches), skipped_minibatches=len(minibatches))
        metrics = batch_metrics(experience, predicted, targets, stats, normaliser=self.value_moments)
        self._count_skipped(stats, training_version)
        if self.skipped_in_row == 0:
            self._adapt_kl(metrics["kl_to_reference"], len(experience))
        self.step_count += 1
        return (
            metrics
            | update_metrics(stats)
            | lag_metrics(batch, training_version, oldest_version=oldest)
            | {"kl_coef": self.kl_coef}
        )

    def _minibatches(self, experience: Experience, training_version: int) -> list[list[int]]:
        """Rows of each update, whole groups together, in an order that the seed and the step decide."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "minibatches", training_version))
        groups = experience.groups_B
        num_groups = int(groups.max()) + 1
        minibatches = []
        for _ in range(self.training.epochs):
            order = torch.randperm(num_groups, generator=generator)
            for part in order.tensor_split(self.training.minibatches):
                rows = [row for group in part.tolist() for row in (groups == group).nonzero().flatten().tolist()]
                if rows:
                    minibatches.append(rows)
        return minibatches

    def _predict(self, experience: Experience, minibatches: Sequence[list[int]]) -> Predictions:
        """The proximal pass, in the micro-batches of the first epoch: its first ratios are exactly 1."""
        num_rows, width = experience.mask_BT.shape
        predicted = Predictions(*(torch.zeros(num_rows, width + extra) for extra in (0, 0, 1)))
        with torch.no_grad():
            for micro in (micro for rows in minibatches for micro in self._share(experience, rows)):
                scores = self.policy(*self.inputs(experience, micro), temperature=self.temperature)
                self.passes += 1
                assert isinstance(scores, Scores)
                if micro.counts:
                    _put(predicted.logprobs_BT, scores.logprobs_N, experience, micro.rows)
                    _put(predicted.entropy_BT, scores.entropy_N, experience, micro.rows)
                    if len(scores.values_M):
                        _put(predicted.values_BU, self._denormalised(scores.values_M), experience, micro.rows)
        return Predictions(*(self._summed(values) for values in predicted))

    def _targets(self, experience: Experience, predicted: Predictions | None) -> Targets:
        scores_B = shaped_scores(
            experience, self.algorithm, max_response_tokens=self.max_response_tokens, moments=self.reward_moments
        )
        if not self.algorithm.has_critic:
            return group_targets(experience, predicted, scores_B, self.algorithm, kl_coef=self.kl_coef)
        assert predicted is not None
        targets = critic_targets(experience, predicted, scores_B, self.algorithm, kl_coef=self.kl_coef)
        if self.algorithm.normalise_values:
            self._take_in(targets.returns_BT, experience.mask_BT)
        return targets

    def _update(self, experience: Experience, targets: Targets, rows: list[int]) -> dict[str, Any]:
        """One optimizer step. Losses of the micro-batches, over all ranks, add up to that of the minibatch."""
        self.optimizer.zero_grad(set_to_none=True)
        stats: Counter[str] = Counter()
        minibatch = _Minibatch(self, experience, targets, rows)
        micros = self._share(experience, rows)
        for number, micro in enumerate(micros, start=1):
            self.policy.set_requires_gradient_sync(number == len(micros))  # type: ignore[operator]
            add_stats(stats, minibatch.backward(micro))
        norm = whole(nn.utils.clip_grad_norm_(self.policy.parameters(), self.training.max_grad_norm))
        finite = bool(norm.isfinite())
        if finite:
            self._set_learning_rates()
            self.optimizer.step()
        first = self.ranks.rank == 0  # what every rank counts alike is counted once
        counts = {"minibatches": float(first), "skipped_minibatches": float(first and not finite)}
        return (dict(stats) | {"grad_norm_sum": float(norm) * first} if finite else {}) | counts

    def _share(self, experience: Experience, rows: list[int]) -> list[MicroBatch]:
        """This rank's micro-batches of a minibatch; as many as every other rank's."""
        plan = plan_micro_batches(
            experience,
            rows,
            token_budget=self.training.micro_batch_tokens,
            num_ranks=self.ranks.size,
            packing=self.training.packing,
        )
        return plan[self.ranks.rank]

    def inputs(self, experience: Experience, micro: MicroBatch) -> tuple[Any, Tensor]:
        tokens_n = experience.tokens(micro.rows).to(self.ranks.device)
        return experience.layout(micro.rows, self.training.packing), tokens_n

    def _set_learning_rates(self) -> None:
        factor = learning_rate_factor(self.step_count, self.training, total_steps=self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor

    def _count_skipped(self, stats: Mapping[str, Any], training_version: int) -> None:
        self.skipped_in_row = self.skipped_in_row + 1 if stats["skipped_minibatches"] == stats["minibatches"] else 0
        if self.skipped_in_row >= self.training.max_skipped_steps:
            raise ArithmeticError(
                f"step {training_version + 1}: the gradient of no minibatch was finite, for the "
                f"{self.skipped_in_row}. step in a row (training.max_skipped_steps)"
            )

    def _adapt_kl(self, kl_per_response: float, num_responses: int) -> None:
        """Proportional controller in log space (Ziegler et al. 2019, section 2.2)."""
        if self.algorithm.kl_target is not None:
            error = min(max(kl_per_response / self.algorithm.kl_target - 1, -0.2), 0.2)
            self.kl_coef *= 1 + error * num_responses / self.algorithm.kl_horizon

    def _take_in(self, returns_BT: Tensor | None, mask_BT: Tensor) -> None:
        """PopArt (van Hasselt et al. 2016): new statistics, and a head that predicts the same as before."""
        assert returns_BT is not None
        assert self.policy.value_head is not None
        old_mean, old_std = self.value_moments.standardisation()
        self.value_moments.update(returns_BT, mask_BT)
        new_mean, new_std = self.value_moments.standardisation()
        self.policy.value_head.rescale_(old_mean=old_mean, old_std=old_std, new_mean=new_mean, new_std=new_std)

    def _denormalised(self, values: Tensor) -> Tensor:
        mean, std = self.value_moments.standardisation()
        return values * std + mean if self.algorithm.normalise_values else values

    def normalised(self, values: Tensor) -> Tensor:
        """Values or returns in the units that the critic predicts."""
        mean, std = self.value_moments.standardisation()
        return (values - mean) / std if self.algorithm.normalise_values else values

    def _summed(self, values: Tensor) -> Tensor:
        """Each row was put in by one rank."""
        return self.ranks.sum_(values.to(self.ranks.device)).cpu()

    def _over_ranks(self, stats: Counter[str]) -> Counter[str]:
        names = sorted(stats)
        numbers = torch.tensor([float(stats[name]) for name in names], dtype=torch.float64, device=self.ranks.device)
        sums, largest = self.ranks.sum_(numbers.clone()).tolist(), self.ranks.max_(numbers.clone()).tolist()
        return Counter(
            {
                name: high if name.endswith("_max") else total
                for name, total, high in zip(names, sums, largest, strict=True)
            }
        )

    def weights(self) -> dict[str, Tensor]:
        """The policy's whole tensors by checkpoint name, adapters merged; a tied output projection is left out.

        A collective.
        """
        if self.training.lora is not None:
            return merged(self._policy_state(), self.training.lora, _detached)
        return dict(self.weights_one_by_one(None))

    def weights_one_by_one(self, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
        """`weights` without LoRA in `dtype` (None: the masters'), gathered when their turn comes.

        Each step is a collective: every rank goes through all of them.
        """
        for name, tensor in self._policy_state().items():
            # Rounded before it is gathered: half the bytes between the ranks, and the same bits.
            yield name, _detached(tensor if dtype is None else tensor.to(dtype))

    def _policy_state(self) -> dict[str, Tensor]:
        tied = self.policy.tied()
        return {name: tensor for name, tensor in self.policy.policy.state_dict().items() if name not in tied}

    def adapter_weights(self) -> dict[str, Tensor]:
        """The policy's whole adapter by PEFT's names, fp32; nothing without LoRA. A collective."""
        return adapters(self.policy.policy.state_dict(), _detached)

    def dense_bytes(self, dtype: torch.dtype) -> int:
        """What all weights of the policy take in `dtype`."""
        state = self._policy_state()
        adapter = adapter_names(state)
        return dtype.itemsize * sum(tensor.numel() for name, tensor in state.items() if name not in adapter)

    def counters(self) -> dict[str, Any]:
        """Everything in the state that is not a tensor, and the algorithm that it belongs to."""
        return {
            "algorithm": self.algorithm.name,
            "kl_coef": self.kl_coef,
            "step_count": self.step_count,
            "skipped_in_row": self.skipped_in_row,
            "reward_moments": self.reward_moments.state(),
            "value_moments": self.value_moments.state(),
        }

    def restore_counters(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError for the state of another algorithm."""
        if state["algorithm"] != self.algorithm.name:
            raise ValueError(f"checkpoint of algorithm {state['algorithm']}, this is {self.algorithm.name}")
        self.kl_coef = state["kl_coef"]
        self.step_count = state["step_count"]
        self.skipped_in_row = state["skipped_in_row"]
        self.reward_moments.restore(state["reward_moments"])
        self.value_moments.restore(state["value_moments"])


class _Minibatch:
    """The loss of one optimizer step, micro-batch by micro-batch."""

    def __init__(self, learner: PPOLearner, experience: Experience, targets: Targets, rows: list[int]) -> None:
        self.learner, self.experience, self.targets = learner, experience, targets
        trained_bT = experience.trained_BT[rows]
        self.num_tokens = max(1, int(trained_bT.sum()))
        self.weights_BT = torch.zeros(experience.trained_BT.shape)
        self.weights_BT[rows] = token_weights(
            trained_bT,
            aggregation=learner.algorithm.aggregation,
            max_tokens=learner.max_response_tokens,
        ).float()
        self.entropy: EntropyMode = "off"
        if learner.algorithm.entropy_coef > 0:
            self.entropy = "loss"
        elif targets.proximal_logprobs_BT is None:
            self.entropy = "metric"

    def backward(self, micro: MicroBatch) -> dict[str, Any]:
        """Add the gradients of a micro-batch; returns its statistics."""
        learner, config = self.learner, self.learner.algorithm
        counts = float(micro.counts)
        batch, tokens_n = learner.inputs(self.experience, micro)
        losses = learner.policy(
            batch, tokens_n, temperature=learner.temperature, loss=self._policy_loss(micro), entropy=self.entropy
        )
        assert isinstance(losses, Losses)
        total, stats = losses.policy, dict(losses.stats)
        if config.has_critic:
            value, value_stats = self._value_loss(losses.values_M, micro)
            total = total + config.value_coef * counts * value
            stats |= value_stats | {"value_loss": value.detach()}
        total.backward()
        learner.passes += 1
        return {name: number * counts for name, number in stats.items()}

    def _policy_loss(self, micro: MicroBatch) -> Any:
        config = self.learner.algorithm
        flat = {
            name: self.experience.flat(values_BT, micro.rows).to(self.learner.ranks.device)
            for name, values_BT in {
                "behavior": self.targets.behavior_logprobs_BT,
                "advantages": self.targets.advantages_BT,
                "weights": self.weights_BT,
                "reference": self.experience.reference_logprobs_BT,
                "proximal": self.targets.proximal_logprobs_BT,
                "mask": self.experience.trained_BT,
            }.items()
            if values_BT is not None
        }

        def loss(logprobs_n: Tensor, entropy_n: Tensor, part: slice) -> tuple[Tensor, Stats]:
            of = {name: values[None, part] for name, values in flat.items()}
            logprobs_1n, mask_1n = logprobs_n[None], of["mask"]
            shared: dict[str, Any] = {"num_tokens": self.num_tokens, "token_weights_BT": of["weights"]}
            total, stats = policy_loss(
                logprobs_1n,
                of.get("proximal", logprobs_1n.detach()),
                of["behavior"],
                of["advantages"],
                mask_1n,
                clip_low=config.clip_low,
                clip_high=config.clip_high,
                behavior_weight_cap=config.behavior_weight_cap,
                **shared,
            )
            stats["policy_loss"] = total.detach()
            if config.kl_in_loss and self.learner.kl_coef > 0:
                penalty, _ = kl_penalty_loss(
                    logprobs_1n, of["reference"], mask_1n, estimator=config.kl_estimator, **shared
                )
                total = total + self.learner.kl_coef * penalty
                stats["kl_loss"] = penalty.detach()
            if config.entropy_coef > 0:
                total = total + config.entropy_coef * entropy_bonus(entropy_n[None], mask_1n, **shared)
            gap_1n = (logprobs_1n - of["behavior"]).detach()
            stats |= {
                "entropy_sum": entropy_n.detach().sum(),
                "reference_kl_sum": (logprobs_1n - of.get("reference", logprobs_1n)).detach().sum(),
                "behavior_gap_sum": gap_1n.abs().sum(),
                "behavior_gap_max": gap_1n.abs().max(),
            }
            return total * float(micro.counts), stats

        return loss

    def _value_loss(self, values_M: Tensor, micro: MicroBatch) -> tuple[Tensor, Stats]:
        learner, experience, targets = self.learner, self.experience, self.targets
        assert targets.values_BT is not None
        assert targets.returns_BT is not None
        lengths = torch.tensor([len(experience.responses[row]) for row in micro.rows])
        behind = (lengths + 1).cumsum(0) - 1
        values_n = values_M[_all_but(len(values_M), behind)]
        old_n, returns_n = (
            learner.normalised(experience.flat(each, micro.rows)).to(values_M.device)
            for each in (targets.values_BT, targets.returns_BT)
        )
        return value_loss(
            values_n[None],
            old_n[None],
            returns_n[None],
            experience.flat(experience.trained_BT, micro.rows)[None].to(values_M.device),
            clip=learner.algorithm.value_clip,
            num_tokens=self.num_tokens,
        )


def learning_rate_factor(step: int, training: TrainingConfig, *, total_steps: int) -> float:
    """What multiplies the learning rates in step `step` (from 0): linear warm-up, then the schedule towards 0."""
    if step < training.warmup_steps:
        return (step + 1) / (training.warmup_steps + 1)
    progress = min(1.0, (step - training.warmup_steps) / max(1, total_steps - training.warmup_steps))
    if training.schedule == "linear":
        return 1 - progress
    return 0.5 * (1 + math.cos(math.pi * progress)) if training.schedule == "cosine" else 1.0


def _put(into: Tensor, values: Tensor, experience: Experience, rows: Sequence[int]) -> None:
    """Values of `rows`, end to end, to their places in [B, T] or [B, U]."""
    extra = into.shape[1] - experience.mask_BT.shape[1]
    parts = values.float().cpu().split([len(experience.responses[row]) + extra for row in rows])
    for row, part in zip(rows, parts, strict=True):
        into[row, : len(part)] = part


def _detached(tensor: Tensor) -> Tensor:
    return whole(tensor).detach()


def _all_but(length: int, left_out: Tensor) -> Tensor:
    kept = torch.ones(length, dtype=torch.bool)
    kept[left_out] = False
    return kept
