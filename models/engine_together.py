"""Many requests given to an engine core at once, so that its batches do not depend on timing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from models.engine_requests import SamplingRequest
from models.engine_update import answer

if TYPE_CHECKING:
    from vllm import CompletionOutput
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.output_processor import RequestOutputCollector


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
