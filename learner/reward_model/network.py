"""The network that becomes a reward model: a decoder with a score head, and which of its parameters are trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import inject_adapter_in_model
from peft.tuners.lora import Linear as AdaptedLinear
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from contracts.algorithm import LoraConfig
from contracts.seeds import derive_seed
from models.adapters import PREFIX, layer_kinds, peft_config
from models.reward import quiet_transformers

_ADAPTER = ("lora_A", "lora_B")


def initial_model(path: str, *, name: str, seed: int, labels: Sequence[str] = ("reward",)) -> Any:
    """`path` as a classifier of these labels in float32. A score head that is missing, or is one of other labels, is
    drawn from N(0, 1 / (H + 1)), which keeps first scores moderate (Stiennon et al. 2020, "Learning to summarize from
    human feedback"); rows of one draw differ, so the members of an ensemble start apart.

    Raises:
        ValueError: weights other than the head are missing, or the architecture has no `score` head.
    """
    try:
        with quiet_transformers():
            model, info = AutoModelForSequenceClassification.from_pretrained(
                path,
                num_labels=len(labels),
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # a head of other labels: drawn anew below
            )
    except (OSError, ValueError) as error:
        raise ValueError(f"base {name}: does not load as a sequence classifier ({error})") from error
    if "score" not in dict(model.named_children()):
        raise ValueError(f"base {name}: {type(model).__name__} has no `score` head over a decoder's last token")
    absent = set(info["missing_keys"]) | {key for key, *_ in info["mismatched_keys"]}
    if other := sorted(absent - {"score.weight"}):
        raise ValueError(f"base {name}: its files do not hold {', '.join(other)}")
    if absent:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            model.score.weight.normal_(0, (model.score.in_features + 1) ** -0.5, generator=generator)
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {label: at for at, label in enumerate(labels)}
    return model.eval()  # no dropout: both answers of a pair pass through one and the same network


def pad_apart_from_eos(tokenizer: Any, *, name: str) -> str:
    """Give the tokenizer a pad token that ends no text, and say which; "" where it has one.

    Others find the last token of a padded row by its pad id, as transformers' classifiers do, and would stop short at
    an EOS that the text ends with. A special token that is in the vocabulary and in no dialogue is taken.

    Raises:
        ValueError: there is none left.
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return ""
    dialogue = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rendered = tokenizer.apply_chat_template(dialogue, tokenize=True, return_dict=False, add_generation_prompt=True)
    used = {*rendered, tokenizer.eos_token_id, tokenizer.bos_token_id}
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    if not special - used:
        has = "pads with its end-of-sequence token" if tokenizer.pad_token_id is not None else "has no pad token"
        raise ValueError(
            f"base {name}: its tokenizer {has} and no other special token is free to pad with; add one to it "
            "(tokenizer.add_special_tokens) and save it beside the model"
        )
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(min(special - used))
    return str(tokenizer.pad_token)


def freeze(model: Any, *, trainable_layers: int | None, lora: LoraConfig | None, seed: int) -> None:
    """Leave to train: all of it; the last `trainable_layers` decoder layers, the final norm and the heads; or with
    `lora` adapters of all layers and the heads.

    Nothing below needs a gradient then, so autograd stores nothing for it. What is frozen goes to bf16 at once, as
    it will be saved.

    Raises:
        ValueError: the model has fewer layers, or no layers that LoRA's `target_modules` names.
    """
    if lora is not None:
        _add_adapters(model.base_model, lora, seed=seed)
    elif trainable_layers is not None:
        layers = decoder_layers(model)
        if trainable_layers > len(layers):
            raise ValueError(f"trainable_layers is {trainable_layers}, the model has {len(layers)} layers")
        embeddings = [child for child in model.base_model.children() if isinstance(child, nn.Embedding)]
        for module in [*embeddings, *layers[: len(layers) - trainable_layers]]:
            round_to_bfloat16(module.requires_grad_(False))


def decoder_layers(model: Any) -> nn.ModuleList:
    num_layers = model.config.num_hidden_layers
    lists = [child for child in model.base_model.children() if isinstance(child, nn.ModuleList)]
    layers = [child for child in lists if len(child) == num_layers]
    if len(layers) != 1:
        raise ValueError(f"trainable_layers: {type(model).__name__} has no single list of {num_layers} decoder layers")
    return layers[0]


def trained_parameters(model: Any) -> dict[str, nn.Parameter]:
    """By name, in the order of the model, the score head last."""
    named = {name: each for name, each in model.named_parameters() if each.requires_grad}
    return dict(sorted(named.items(), key=lambda item: item[0].startswith("score.")))


def round_to_bfloat16(module: nn.Module) -> None:
    """Parameters only: rotary frequencies are buffers and lose their meaning in bf16."""
    for parameter in module.parameters():
        parameter.data = parameter.data.bfloat16()


def _add_adapters(trunk: Any, lora: LoraConfig, *, seed: int) -> None:
    config = peft_config(lora, layer_kinds(trunk, lora.target_modules))
    round_to_bfloat16(trunk.requires_grad_(False))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "adapters"))
        inject_adapter_in_model(config, trunk)
    for name, parameter in trunk.named_parameters():
        if any(part in name for part in _ADAPTER):
            parameter.requires_grad_(True)
            parameter.data = parameter.data.float()
    trunk.eval()


def adapter_kinds(model: Any, lora: LoraConfig) -> tuple[str, ...]:
    return layer_kinds(model.base_model, lora.target_modules)


def take_adapters(model: Any) -> dict[str, Tensor]:
    """Merge the adapters into their layers, W + alpha / rank · B A in float32, and return them and the score head by
    PEFT's names. The model is an ordinary one afterwards."""
    prefix = f"{PREFIX}{model.base_model_prefix}."
    tensors = {
        prefix + name.replace(".default.weight", ".weight"): parameter.detach().clone()
        for name, parameter in model.base_model.named_parameters()
        if any(part in name for part in _ADAPTER)
    }
    tensors[f"{PREFIX}score.weight"] = model.score.weight.detach().clone()
    for name, layer in list(model.base_model.named_modules()):
        if isinstance(layer, AdaptedLinear):
            plain: Any = layer.get_base_layer()
            plain.weight.data = plain.weight.data.float() + layer.get_delta_weight("default").float()
            parent, _, last = name.rpartition(".")
            setattr(model.base_model.get_submodule(parent), last, plain)
    return tensors
