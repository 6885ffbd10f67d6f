"""A step on a ten-turn chat with three images: one pass encodes each once, N-pass in every turn
that sees it.

A step reads and processes the images, and is forward, loss and backward of a small Qwen3-VL; both
ways score with TRL's fused LM head.

    python benchmarks/bench_images.py --json benchmarks/results/images.json
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from command import add_turns, make_parser, parse, print_figures
from PIL import Image
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from onepass_trl import OnePassCollator, Pass, build_tree, linearize
from onepass_trl.attention.transformers_backend import set_attention, use_onepass_attention
from onepass_trl.data.collator import model_inputs
from onepass_trl.passes import ImageSource, ImageSpan
from onepass_trl.tools.bench.results import write
from onepass_trl.tools.bench.timing import seconds_of
from onepass_trl.tools.bench.workload import labelled, passes_of_turns, random_model
from onepass_trl.training import loss
from onepass_trl.vision import Vision, ordinary_inputs

PATCH, MERGE = 16, 2  # pixels; patches in each direction that are one token
SPECIAL = ("<pad>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
HIDDEN, VOCABULARY = 384, 4096


class ImageProcessor(Qwen3VLProcessor):
    """Qwen3-VL's processor without that of videos, which needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any) -> None:
        super().__init__(image_processor, tokenizer, None, **kwargs)


def make_vision() -> Vision:
    """Return what the processor makes of images."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({name: i for i, name in enumerate(SPECIAL)})),
        pad_token="<pad>",
        additional_special_tokens=list(SPECIAL[1:]),
    )
    size = {"shortest_edge": 1024, "longest_edge": 2**24}
    images = Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=MERGE, size=size)
    return Vision(ImageProcessor(images, tokenizer))


def make_model() -> PreTrainedModel:
    """Return a small Qwen3-VL with random weights, a fifth of them in the vision tower."""
    config = Qwen3VLConfig(
        text_config=dict(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=3 * HIDDEN,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=64,
            rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[12, 10, 10]),
        ),
        vision_config=dict(
            depth=4,
            hidden_size=192,
            intermediate_size=768,
            num_heads=3,
            patch_size=PATCH,
            spatial_merge_size=MERGE,
            out_hidden_size=HIDDEN,
            deepstack_visual_indexes=[1, 2],
        ),
        image_token_id=SPECIAL.index("<|image_pad|>"),
        video_token_id=SPECIAL.index("<|video_pad|>"),
        vision_start_token_id=SPECIAL.index("<|vision_start|>"),
        vision_end_token_id=SPECIAL.index("<|vision_end|>"),
    )
    return random_model(config, torch.float32)


def make_passes(args: argparse.Namespace, vision: Vision) -> list[Pass]:
    """Return the passes of a chat of random tokens with images at the start of some turns."""
    rng = np.random.default_rng(0)
    sources: list[ImageSource] = []

    def tokens(length: int) -> list[int]:
        return rng.integers(len(SPECIAL), VOCABULARY, length).tolist()

    def image() -> list[int]:
        file, shape = io.BytesIO(), (args.pixels, args.pixels, 3)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(file, "PNG")
        sources.append(ImageSource(content=file.getvalue()))
        start, end = map(SPECIAL.index, ("<|vision_start|>", "<|vision_end|>"))
        return [start, *vision.tokens(sources[-1]).tolist(), end]

    turns = [
        (
            [*(image() if turn in args.images else []), *tokens(args.user)],
            tokens(args.reasoning),
            tokens(args.response),
        )
        for turn in range(args.turns)
    ]
    passes = []
    for pass_ in passes_of_turns(turns):
        is_image = np.diff((pass_.token_ids == vision.placeholder_id).astype(int), prepend=0)
        borders = zip(np.flatnonzero(is_image > 0), np.flatnonzero(is_image < 0), strict=True)
        spans = [
            ImageSpan(int(begin), int(end), source)
            for (begin, end), source in zip(borders, sources, strict=False)
        ]
        passes.append(Pass(pass_.token_ids, pass_.trained, spans))
    return passes


def ways(
    model: PreTrainedModel, passes: list[Pass], vision: Vision
) -> dict[str, tuple[str, Callable[[], float]]]:
    """Return for each way its attention, and the step, which returns the loss."""
    num_trained = sum(pass_.num_trained for pass_ in passes)
    row, collator = linearize(build_tree(passes)), OnePassCollator(vision=vision, planes=True)

    def one_pass() -> float:
        batch = collator([row])
        log_probs = loss.forward(model, model_inputs(batch)).log_probs
        mean = loss.target_losses(log_probs, batch["weights"]).sum() / num_trained
        mean.backward()
        return mean.item()

    def n_pass() -> float:
        total = 0.0
        for pass_ in passes:
            text = {name: torch.tensor([values]) for name, values in labelled(pass_).items()}
            images = ordinary_inputs(pass_.token_ids, pass_.images, vision, model.device)
            outputs = model(**text, **images, use_cache=False, fused_lm_head=True)
            share = outputs.loss * (pass_.num_trained / num_trained)
            share.backward()
            total += share.item()
        return total

    return {"n_pass": ("sdpa", n_pass), "one_pass": ("onepass", one_pass)}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return what both ways encode, their times (the shortest of the repeats) and their losses."""
    vision, model = make_vision(), make_model()
    passes = make_passes(args, vision)
    row = linearize(build_tree(passes))
    use_onepass_attention(model)
    seconds: dict[str, list[float]] = {"n_pass": [], "one_pass": []}
    losses: dict[str, list[float]] = {"n_pass": [], "one_pass": []}
    with loss.fused_lm_head(model):
        for repeat in range(args.repeats + 1):  # the first to warm up
            for name, (attention, step) in ways(model, passes, vision).items():
                set_attention(model, attention)
                model.zero_grad(set_to_none=True)
                taken = seconds_of(
                    lambda step=step, name=name: losses[name].append(step()), model.device
                )
                if repeat:
                    seconds[name].append(taken)
    n_pass_tokens, n_pass_images = sum(map(len, passes)), sum(len(p.images) for p in passes)
    shortest = {name: min(taken) for name, taken in seconds.items()}
    return {
        "turns": len(passes),
        "image_tokens": row.images[0].end - row.images[0].begin,
        "n_pass_images": n_pass_images,
        "one_pass_images": len(row.images),
        "image_ratio": n_pass_images / len(row.images),
        "n_pass_tokens": n_pass_tokens,
        "one_pass_tokens": len(row),
        "token_ratio": n_pass_tokens / len(row),
        "repeats": args.repeats,
        **{f"{name}_min_seconds": taken for name, taken in shortest.items()},
        "speedup": shortest["n_pass"] / shortest["one_pass"],
        "largest_loss_difference": max(
            abs(one / n - 1) for one, n in zip(losses["one_pass"], losses["n_pass"], strict=True)
        ),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument(
        "--images", type=int, nargs="+", default=[0, 3, 6], help="the turns that begin with one"
    )
    parser.add_argument("--pixels", type=int, default=448, help="side of an image")
    parser.add_argument("--repeats", type=int, default=5)
    add_turns(parser)
    args = parse(parser, arguments)
    result = measure(args)
    print_figures(result)
    if args.json:
        write(args.json, "images", [result])


if __name__ == "__main__":
    main()
