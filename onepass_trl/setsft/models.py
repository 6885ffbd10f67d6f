"""The model, template and adapter of `SetSFTTrainer`, which get the forking tokens before TRL's
trainer sees them."""

from __future__ import annotations

from copy import copy
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, set_seed
from trl.trainer.utils import create_model_from_path

from onepass_trl.setsft.config import SetSFTConfig
from onepass_trl.training.arguments import one_pass_model_kwargs


def load_model(model_id: str, args: SetSFTConfig, quantization_config: Any) -> PreTrainedModel:
    """Return the model as ``SFTTrainer`` would load it: it has to get its tokens before that."""
    set_seed(args.seed)
    kwargs = one_pass_model_kwargs(args.model_init_kwargs)
    if quantization_config is not None:
        if "quantization_config" in kwargs:
            raise ValueError(
                "quantization_config is given twice, as an argument and in model_init_kwargs: "
                "give it once"
            )
        kwargs["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        kwargs["device_map"] = None
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    return create_model_from_path(model_id, **kwargs)


def read_template(path: str) -> str:
    """Return the chat template of a file, as ``SFTTrainer`` would read it."""
    if not path.endswith((".jinja", ".j2")):
        raise ValueError(
            f"chat_template_path={path!r} names a tokenizer, whose template would come with tokens "
            "of its own after the forking tokens are there. Give the template as a .jinja file, or "
            "call trl.clone_chat_template on the model and its tokenizer first, and pass both"
        )
    return Path(path).read_text(encoding="utf-8")


def with_trained_embeddings(peft_config: Any, model: PreTrainedModel, token_ids: list[int]) -> Any:
    """Return the configuration of an adapter that also trains the forking tokens' embeddings.

    Only their input embeddings have to be: forking tokens are given, never generated.
    """
    if peft_config is None or getattr(peft_config, "is_prompt_learning", False):
        return peft_config  # OnePassSFTTrainer refuses the latter
    if not hasattr(peft_config, "trainable_token_indices"):
        raise ValueError(
            f"{type(peft_config).__name__} can't train single embeddings, so the forking tokens "
            "would stay alike. Use an adapter with trainable_token_indices, such as LoraConfig"
        )
    embeddings = model.get_input_embeddings()
    path = next(name for name, module in model.named_modules() if module is embeddings)
    if any(path.endswith(name) for name in peft_config.modules_to_save or ()):
        return peft_config  # all embeddings are trained
    peft_config = copy(peft_config)
    given = peft_config.trainable_token_indices or {}
    indices = given if isinstance(given, dict) else {path.split(".")[-1]: given}
    key = next((name for name in indices if path.endswith(name)), path.split(".")[-1])
    indices = {**indices, key: sorted({*indices.get(key, ()), *token_ids})}
    peft_config.trainable_token_indices = indices
    return peft_config


def give_bias(head: Any) -> None:
    """Give a head that PEFT wrapped the ``bias`` that TRL's fused LM head reads.

    The wrapper of trained embeddings, which takes the place of a head tied to them, hands on only
    the weight.
    """
    if head is not None and not hasattr(head, "bias"):
        head.register_parameter("bias", getattr(head.original_module, "bias", None))
