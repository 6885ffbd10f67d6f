"""Which causal language models and multimodal models of transformers train text in one pass: each
one that a tiny random model can be made of is compared with N-pass, and goes through the trainer.
The record is what docs/models.md shows.

python -m tests.model_coverage            # compares all models, 8 minutes
python -m tests.model_coverage emu3 llava # compares these, and leaves the record of others
python -m tests.model_coverage --table    # writes the tables only
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import resource
import signal
import sys
import textwrap
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from datasets import Dataset, disable_progress_bars
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from onepass_trl import OnePassSFTConfig, OnePassSFTTrainer, Pass
from onepass_trl.attention.model_check import check_model, reference_attention
from onepass_trl.attention.transformers_backend import set_attention
from onepass_trl.tools.model_class import AutoModel
from onepass_trl.tools.verify import compare
from tests.chat.tokenizers import small_tokenizer
from tests.conversations import as_record, random_chat
from tests.models import COMMON, LATENT, MODELS, MOE, WINDOW, make_model, random_model
from tests.pages import with_part

MODELS_OF_TEXT, MODELS_OF_IMAGES = "models", "image_text_models"
AUTO_MODELS: dict[str, AutoModel] = {
    MODELS_OF_TEXT: AutoModelForCausalLM,
    MODELS_OF_IMAGES: AutoModelForImageTextToText,
}
MODEL_TYPES = {
    MODELS_OF_TEXT: MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODELS_OF_IMAGES: MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}
TITLES = {
    MODELS_OF_TEXT: "Causal language models",
    MODELS_OF_IMAGES: "Multimodal models, on text",
}
RECORD = Path(__file__).with_name("model_coverage.json")
PAGE = Path(__file__).parents[1] / "docs" / "models.md"
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-6, 1e-4
SECONDS, BYTES, PARAMETERS = 120, 8 * 2**30, 50_000_000  # at most, for a model

EXACT, REFUSED, DIFFERS, UNTRIED = "exact", "refused", "differs", "not tried"

# Small values for whatever of these a configuration has.
SIZES: dict[str, Any] = {
    **COMMON,
    **MOE,
    **{name: value for name, value in LATENT.items() if name != "num_key_value_heads"},
    **dict.fromkeys(("n_embd", "d_model", "emb_dim"), 32),
    **dict.fromkeys(("n_inner", "ffn_dim", "ffn_hidden_size", "d_ff"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("n_layer", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("n_head", "num_heads", "n_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    "n_positions": 512,
    "head_dim": 16,
    "sliding_window": WINDOW,
    "q_lora_rank": 24,
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_num_experts": 4,
    "moe_k": 2,
    "shared_expert_intermediate_size": 24,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 512,
    **dict.fromkeys(("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
    **dict.fromkeys(("attention_probs_dropout_prob", "hidden_dropout_prob"), 0.0),
    **dict.fromkeys(("dropout", "activation_dropout", "residual_dropout"), 0.0),
}
# What some need in addition, or instead.
_ALL_HEADS = dict(num_key_value_heads=4)
_SHARED_KEYS = dict(
    num_hidden_layers=4,
    layer_types=["sliding_attention", "full_attention"] * 2,
    num_kv_shared_layers=2,
)
OTHERWISE: dict[str, dict[str, Any]] = {
    "axk1": _ALL_HEADS,
    "codegen": dict(rotary_dim=4),
    "cohere_compass_text": dict(layer_types=["full_attention", "sliding_attention"]),
    "deepseek_v2": _ALL_HEADS,
    "dots3_note_text": _ALL_HEADS,
    "gemma3n_text": _SHARED_KEYS,
    "gemma4_unified_text": dict(**_SHARED_KEYS, head_dim=8, global_head_dim=8),
    "glm4_moe_lite": _ALL_HEADS,
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]], window_size=WINDOW),
    "gptj": dict(rotary_dim=4),
    "helium": dict(head_dim=8),
    "longcat_flash": dict(**_ALL_HEADS, ffn_hidden_size=48, expert_ffn_hidden_size=24),
    "minicpm3": _ALL_HEADS,
    "sarvam_mla": _ALL_HEADS,
    "youtu": _ALL_HEADS,
    "zaya": dict(num_experts_per_tok=1),
}
_TESTED = {settings["model_type"]: name for name, settings in MODELS.items()}
_VISION = dict(
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    depth=1,
    num_heads=2,
    out_hidden_size=32,
)
_AUDIO = dict(
    d_model=16,
    encoder_layers=1,
    encoder_attention_heads=2,
    encoder_ffn_dim=16,
    output_dim=32,
    num_hidden_layers=1,
    downsample_hidden_size=16,
)


def _planes(time: int, height: int, width: int) -> dict[str, Any]:
    """Return rotary embeddings of this many frequencies for each plane of positions."""
    sections = [time, height, width]
    return dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=sections))


# What the parts of multimodal models need in addition, or instead.
_ROTARY = dict(rope_type="default", rope_theta=1e4)
_SAM = dict(
    **_VISION,
    output_channels=16,
    global_attn_indexes=[0],
    mlp_dim=16,
    image_size=64,
    downsample_channels=[16, 16],
)
_COHERE2 = dict(COMMON, model_type="cohere2", sliding_window=WINDOW)
PARTS: dict[str, dict[str, Any]] = {
    "apertus1p5": dict(
        text_config=dict(vocab_size=270_000),
        vision_config=dict(embed_dim=8, latent_channels=8, base_channels=32, num_res_blocks=1),
    ),
    "aya_vision": dict(text_config=_COHERE2),
    "chameleon": dict(vocabulary_map={"<image>": 5}),
    "cohere_compass": dict(
        text_config=dict(
            layer_types=["full_attention", "sliding_attention"],
            rope_parameters=dict(full_attention=_ROTARY, sliding_attention=_ROTARY),
        )
    ),
    "cohere2_vision": dict(text_config=_COHERE2),
    "cosmos3_edge": dict(text_config=_planes(2, 3, 3)),
    "deepseek_ocr2": dict(
        text_config=dict(num_experts_per_tok=2, mlp_layer_types=["dense", "sparse"]),
        vision_config=dict(sam_config=_SAM, encoder_config=COMMON),
    ),
    "diffusion_gemma": dict(text_config=dict(top_k_experts=2)),
    "emu3": dict(vq_config=dict(codebook_size=16, base_channels=32), vocabulary_map={"<image>": 5}),
    "ernie4_5_vl_moe": dict(
        text_config=dict(moe_intermediate_size=[24, 24], **_planes(1, 1, 2)),
    ),
    "glm4v": dict(text_config=_planes(2, 1, 1)),
    "glm4v_moe": dict(text_config=_planes(1, 1, 0)),
    "glm5_next": dict(text_config=dict(num_key_value_heads=4, qk_rope_head_dim=0)),
    "glm_ocr": dict(text_config=_planes(2, 1, 1)),
    "granite4_vision": dict(
        deepstack_layer_map=[],
        spatial_target_layers=[],
        downsample_rate="1/2",
        text_config=dict(hidden_size=64),
        vision_config=dict(hidden_size=64),
    ),
    "hunyuan_vl": dict(text_config=_planes(2, 3, 3)),
    "hy_v4_vl": dict(text_config=_planes(2, 1, 1)),
    "hyperclovax_vision_v2": dict(text_config=dict(COMMON, model_type="hyperclovax")),
    "inkling2": dict(vision_config=dict(text_hidden_size=32)),
    "inkling2_loop": dict(vision_config=dict(text_hidden_size=32)),
    "janus": dict(
        vq_config=dict(embed_dim=8, num_embeddings=16, base_channels=32, latent_channels=8)
    ),
    "mistral4": dict(num_key_value_heads=4),
    "molmo2": dict(
        vision_config=dict(num_key_value_heads=2, head_dim=8),
        adapter_config=dict(
            vision_feature_layer=[0, 0],
            num_key_value_heads=2,
            head_dim=8,
            text_hidden_size=32,
        ),
    ),
    "muse_spark": dict(
        audio_config=dict(
            hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], out_hidden_size=32, num_hidden_layers=4
        ),
        text_config=dict(moe_hidden_size=24),
        out_hidden_size=64,
        projector_hidden_size=32,
    ),
    "nemotron_h_omni": dict(
        text_config={**COMMON, **MODELS.get("nemotron_h", {})},  # which older versions lack
        vision_config=dict(video_temporal_patch_size=2),
    ),
    "paddleocr_vl": dict(text_config=_planes(2, 3, 3)),
    "paligemma": dict(text_config=dict(COMMON, model_type="gemma", head_dim=16)),
    "qwen2_5_omni_thinker": dict(text_config=_planes(2, 1, 1), audio_config=_AUDIO),
    "qwen2_5_vl": dict(text_config=_planes(2, 1, 1)),
    "qwen2_vl": dict(text_config=_planes(2, 1, 1), vision_config=dict(embed_dim=16)),
    "qwen3_omni_moe_thinker": dict(text_config=_planes(2, 3, 3), audio_config=_AUDIO),
    "unlimited_ocr": dict(vision_config=dict(sam_config=_SAM, encoder_config=_VISION)),
}


def make_tiny_model(model_type: str, auto: AutoModel = AutoModelForCausalLM) -> PreTrainedModel:
    """Return a random model of this type, as small as its configuration's usual names allow."""
    if auto is AutoModelForCausalLM and model_type in _TESTED:
        return make_model(_TESTED[model_type])
    kind = CONFIG_MAPPING[model_type]
    settings = _sizes_of(kind)
    if "text_config" in kind.sub_configs or auto is AutoModelForImageTextToText:
        settings |= _parts_of(kind)
    for name, value in PARTS.get(model_type, {}).items():
        is_part = name in kind.sub_configs
        settings[name] = {**(settings[name] or {}), **value} if is_part else value
    config = kind(**settings)
    with torch.device("meta"):
        size = auto.from_config(copy.deepcopy(config)).num_parameters()
    if size > PARAMETERS:
        raise MemoryError(f"{size:,} parameters")
    return random_model(config, auto=auto)


def _parts_of(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    """Return small values for the configurations that a multimodal one consists of."""
    parts: dict[str, Any] = {}
    for name, part in kind.sub_configs.items():
        if name.startswith("audio"):
            parts[name] = None
        elif name != "text_config":
            parts[name] = dict(_VISION)  # which some configurations change
        elif part in CONFIG_MAPPING.values():
            tested = MODELS.get(_TESTED.get(part.model_type, ""), {})
            parts[name] = {**_sizes_of(part), **tested, "model_type": part.model_type}
        else:  # of any text model
            parts[name] = {**COMMON, **MODELS["qwen3"]}
    return parts


def _sizes_of(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    known = {name for base in kind.__mro__ for name in getattr(base, "__annotations__", {})}
    sizes = {**SIZES, **OTHERWISE.get(kind.model_type, {})}
    return {
        name: value
        for name, value in sizes.items()
        if name in known and kind.attribute_map.get(name) not in SIZES
    }


def classify(model_type: str, auto: AutoModel = AutoModelForCausalLM) -> tuple[str, str]:
    """Return what a model type is (EXACT, REFUSED, DIFFERS or UNTRIED), and why."""
    stage = UNTRIED
    signal.alarm(SECONDS)
    try:
        model = make_tiny_model(model_type, auto)
        stage = DIFFERS
        check_model(model)
        stage = UNTRIED
        set_attention(model, reference_attention(model))
        model(input_ids=torch.arange(8)[None], use_cache=False).logits.sum().backward()
        stage = DIFFERS  # by itself the model runs
        passes = random_chat(4)
        comparison = compare(model, passes)
        trained = training_loss(model, passes)
    except Exception as error:
        if "one pass" in str(error) or "one-pass" in str(error):
            return REFUSED, reason(str(error))
        return stage, f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    differences = comparison.loss_difference, comparison.gradient_difference
    in_training = abs(trained / comparison.n_pass_loss - 1)
    if comparison.agrees(LOSS_TOLERANCE, GRADIENT_TOLERANCE) and in_training <= LOSS_TOLERANCE:
        return EXACT, ""
    return DIFFERS, ", ".join(f"{difference:.0e}" for difference in (*differences, in_training))


def training_loss(model: PreTrainedModel, passes: list[Pass]) -> float:
    """Return the loss of these passes in the trainer as it is by default, after its backward."""
    with TemporaryDirectory() as folder:
        args = OnePassSFTConfig(
            folder,
            max_length=None,
            report_to="none",
            use_cpu=True,
            bf16=False,
            router_aux_loss_coef=0.0,
        )
        trainer = OnePassSFTTrainer(
            model,
            args,
            train_dataset=Dataset.from_list([as_record(passes)]),
            processing_class=small_tokenizer("qwen3"),
        )
        batch = trainer.data_collator(list(trainer.train_dataset))
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
    return loss.item()


def reason(message: str) -> str:
    """Return why a model is refused, in a few words."""
    if kinds := re.findall(r"(?:: |; )'?(\w+)'? in layers? \d", message):
        return f"layers of {kinds[0]}"
    for part, words in {
        "doesn't hand what it gets on": "attention that isn't handed visible_end",
        "pass position_ids": "attention with a window that isn't handed position_ids",
        "attention cannot be replaced": "attention outside transformers' attention interface",
        "AttentionInterface": "attention outside transformers' attention interface",
        "not causal": "attention that isn't causal",
        "encoder-decoder": "an encoder-decoder",
        "of its attention mask": "computes with its attention mask",
        "chunked": "chunked attention",
        "its own rule": "a mask of its own",
        "describes a whole row": "attention to keys of another sequence",
        "no backbone": "no backbone for the fused LM head to call",
        "besides its backbone": "weights between backbone and LM head",
        "expected the same of both": "a text model that scales its logits, in a class that doesn't",
    }.items():
        if part in message:
            return words
    return message


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"took more than {SECONDS} seconds")


def _prepare_worker() -> None:
    warnings.filterwarnings("ignore")
    disable_progress_bars()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    signal.signal(signal.SIGALRM, _too_long)


def _classified(task: tuple[str, str]) -> tuple[str, str, tuple[str, str]]:
    group, model_type = task
    return group, model_type, classify(model_type, AUTO_MODELS[group])


def cover(chosen: Sequence[str]) -> dict[str, Any]:
    """Return the record: what each model type is, and why.

    Args:
        chosen: the types to compare, for which the record that there is is changed; none for all.
    """
    unknown = set(chosen) - {model_type for types in MODEL_TYPES.values() for model_type in types}
    if unknown:
        raise SystemExit(f"transformers has no such model types: {', '.join(sorted(unknown))}")
    record = json.loads(RECORD.read_text("utf-8")) if chosen else {}
    tasks = [
        (group, model_type)
        for group, types in MODEL_TYPES.items()
        for model_type in types
        if not chosen or model_type in chosen
    ]
    results = {group: dict(record.get(group, {})) for group in MODEL_TYPES}
    with get_context("spawn").Pool(2, _prepare_worker, maxtasksperchild=10) as pool:
        for group, model_type, result in pool.imap_unordered(_classified, tasks):
            results[group][model_type] = result
            print(group, model_type, *result, file=sys.stderr, flush=True)
    found = {group: dict(sorted(types.items())) for group, types in results.items()}
    return {"transformers": transformers.__version__, **found}


def tables(record: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the page that the record decides."""
    yield f"transformers {record['transformers']}."
    for group, title in TITLES.items():
        yield from ("", f"## {title}", "")
        yield from _table(record[group])


def _table(results: dict[str, tuple[str, str]]) -> Iterator[str]:
    by_kind: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for model_type, (kind, why) in results.items():
        by_kind[kind][why].append(f"`{model_type}`")
    exact = by_kind[EXACT][""]
    yield _wrapped(f"**{len(exact)} of {len(results)} equal N-pass:** {', '.join(exact)}")
    yield ""
    refused = by_kind[REFUSED]
    number = sum(map(len, refused.values()))
    yield f"**{number} are refused**, with an error before training or in its first step:"
    yield ""
    yield "| for | model types |"
    yield "|---|---|"
    for why, names in sorted(refused.items(), key=lambda item: -len(item[1])):
        yield f"| {why} | {', '.join(names)} |"
    yield ""
    untried = sorted(name for names in by_kind[UNTRIED].values() for name in names)
    yield f"**{len(untried)} were not tried**: no tiny model could be made that runs by itself."
    yield _wrapped(", ".join(untried))
    assert not by_kind[DIFFERS], by_kind[DIFFERS]


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def page_with_tables(page: str) -> str:
    """Return the page with the tables of the record."""
    text = "\n".join(tables(json.loads(RECORD.read_text("utf-8"))))
    return with_part(page, "models", f"\n{text}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", help="model types to compare; none for all")
    parser.add_argument("--table", action="store_true", help="write the tables only")
    args = parser.parse_args()
    if not args.table:
        RECORD.write_text(json.dumps(cover(args.types), indent=1) + "\n", "utf-8")
    PAGE.write_text(page_with_tables(PAGE.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
