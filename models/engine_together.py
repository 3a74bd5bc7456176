"""Requests to an engine, and many of them given to its core at once, so that its batches do not depend on timing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from models.engine_update import answer

if TYPE_CHECKING:
    from vllm import CompletionOutput, SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.output_processor import RequestOutputCollector


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


async def add_while_paused(
    llm: AsyncLLM, requests: Sequence[SamplingRequest], *, lora_request: LoRARequest | None, expires: float
) -> list[RequestOutputCollector | ValueError]:
    """Pause, hand over all requests one after the other, resume; a ValueError for each that is refused.

    The core reads one queue: what was sent before the call that resumes it is in its waiting list by then, and a
    core that is paused takes requests in but starts none.

    Raises WeightsError when `expires` (monotonic seconds) has passed, vLLM's EngineDeadError when the core has died;
    then it may have stayed paused.
    """
    from vllm import TokensPrompt
    from vllm.exceptions import VLLMValidationError

    await answer(llm, llm.pause_generation(mode="keep", clear_cache=False), "pause_generation", expires)
    added: list[RequestOutputCollector | ValueError] = []
    for request in requests:
        prompt = TokensPrompt(prompt_token_ids=request.prompt_tokens)
        add = llm.add_request(request.request_id, prompt, request.params(), lora_request=lora_request)
        try:
            added.append(await answer(llm, add, "add_request", expires))
        except (ValueError, VLLMValidationError) as error:
            added.append(ValueError(str(error)))
    await answer(llm, llm.resume_generation(), "resume_generation", expires)
    return added


async def last_output(collector: RequestOutputCollector) -> CompletionOutput:
    """Waits for the response without a deadline."""
    from vllm import RequestOutput

    while True:
        output = await collector.get()
        if isinstance(output, RequestOutput) and output.finished:
            return output.outputs[0]
