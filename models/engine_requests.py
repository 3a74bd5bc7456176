"""What an engine is asked for, one response, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from models.engine_adapters import Adapter

if TYPE_CHECKING:
    from vllm import CompletionOutput, SamplingParams


@dataclass(frozen=True)
class SamplingRequest:
    """One response to sample; nothing but temperature shapes the distribution, 0 is greedy."""

    request_id: str
    prompt_tokens: list[int]
    max_tokens: int
    temperature: float
    seed: int | None = None
    stop_token_ids: list[int] | None = None

    def params(self) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=self.temperature,
            max_tokens=self.max_tokens,
            seed=self.seed,
            stop_token_ids=self.stop_token_ids,
            # Top-p and top-k would renormalise the log-probs; the trainer's are not.
            top_p=1.0,
            top_k=0,
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )


@dataclass(frozen=True)
class Generation:
    """One response. The three lists have one entry per token, sampled ones only: an EOS that
    the policy sampled is the last token, a response cut at its limit has none.

    `behavior_logprobs` are natural logs after temperature, under the weights named by
    `weights_versions`. `finish_reason` is "stop" (EOS or a stop token), "length" or "abort".
    """

    response_tokens: list[int]
    behavior_logprobs: list[float]
    weights_versions: list[int]
    finish_reason: str


def generation_of(output: CompletionOutput, adapter: Adapter | None) -> Generation:
    """What vLLM says of a response that is finished; of an engine for adapters every token is its adapter's."""
    tokens = list(output.token_ids)
    logprobs = [choices[token].logprob for token, choices in zip(tokens, output.logprobs or [], strict=True) if choices]
    versions: list[int] = []
    for span in output.weight_versions or []:
        versions += [adapter.version if adapter else int(span.version)] * (span.end - span.start)
    # Short lists would shift log-probs or versions to other tokens.
    assert len(tokens) == len(logprobs) == len(versions), (tokens, logprobs, versions)
    return Generation(tokens, logprobs, versions, output.finish_reason or "abort")
