"""The slow way: transformers alone, one sequence at a time, in fp32."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


@cache
def _load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.inference_mode()
def response_logprobs(folder: Path, prompt: list[int], response: list[int], *, temperature: float) -> list[float]:
    """log_softmax(logits / temperature) of each response token."""
    logits_TV = _load(folder)(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    logprobs_TV = (logits_TV / temperature).log_softmax(-1)
    return [float(logprobs_TV[t, token]) for t, token in enumerate(response)]
