"""Trains a small model on conversations.jsonl, each in one pass, and compares with N passes.

    make demo

Needs no GPU and no network. Everything it writes is in runs/demo.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from small_model import CONVERSATIONS, make_model, make_tokenizer, read_conversations
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, ProgressCallback

from onepass_trl import OnePassSFTConfig, OnePassSFTTrainer, load_conversations, render_passes
from onepass_trl.cli.verify import format_table
from onepass_trl.tools.verify import compare
from onepass_trl.versions import checkpointing_option

NUM_COMPARED = 3


class LossLines(ProgressCallback):
    """The progress bar of Trainer, with one short line for each log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if state.is_world_process_zero and "loss" in logs:
            loss = float(logs["loss"])
            self.training_bar.write(f"   step {state.global_step:3}   loss {loss:.3f}")


def train(output: Path, num_steps: int) -> Path:
    """Train a small model on the conversations and return the folder of the checkpoint."""
    conversations = read_conversations()
    tokenizer = make_tokenizer(conversations)
    model = make_model(tokenizer)
    for part in (tokenizer, model):
        part.save_pretrained(output / "untrained")
    turns = sum(m["role"] == "assistant" for c in conversations for m in c["messages"])
    print(
        f"1. Training a Qwen3 of {model.num_parameters() / 1e6:.1f} million parameters on "
        f"{len(conversations)} conversations with {turns} assistant turns, {num_steps} steps.\n"
        "   Later turns don't see the reasoning of earlier ones: N-pass needs one pass per turn,\n"
        "   OnePassSFTTrainer one per conversation.\n"
    )
    trainer = OnePassSFTTrainer(
        model,
        OnePassSFTConfig(
            output_dir=str(output / "trained"),
            max_steps=num_steps,
            max_length=4096,
            per_device_train_batch_size=1,
            learning_rate=4e-3,
            lr_scheduler_type="cosine",
            warmup_steps=10,
            adam_beta2=0.95,
            **{checkpointing_option(): False},
            logging_steps=max(num_steps // 6, 1),
            save_strategy="no",
            report_to="none",
            disable_tqdm=False,
            bf16=False,
            use_cpu=True,
        ),
        train_dataset=load_conversations(str(CONVERSATIONS)),
        processing_class=tokenizer,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(LossLines)
    trainer.train()
    trainer.save_model()
    return output / "trained"


def compare_with_n_pass(checkpoint: Path) -> None:
    """Print loss, gradients, tokens and time of both ways on the longest conversations."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    conversations = [
        render_passes(conversation["messages"], tokenizer, tools=conversation.get("tools"))
        for conversation in read_conversations()
    ]
    conversations.sort(key=lambda passes: -sum(map(len, passes)))
    print(f"\n2. One pass against N passes on the {NUM_COMPARED} longest: the same loss and")
    print("   gradients, to float32 rounding, from fewer tokens.\n")
    compare(model, conversations[0][:1])  # warm-up
    chosen = conversations[:NUM_COMPARED]
    print(format_table([compare(model, c) for c in tqdm(chosen, desc="compare", leave=False)]))


def ask_every_turn(checkpoint: Path) -> None:
    """Print in which turns of the conversations the checkpoint, in plain transformers, thinks."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    begins_to_think: list[list[bool]] = []  # by the number of the turn
    for conversation in read_conversations():
        messages, tools = conversation["messages"], conversation.get("tools")
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for number, index in enumerate(turns):
            prompt = tokenizer.apply_chat_template(
                messages[:index], tools=tools, add_generation_prompt=True, return_tensors="pt"
            )
            with torch.inference_mode():
                first = model(**prompt, logits_to_keep=1).logits[0, -1].argmax()
            begins_to_think += [[]] if number == len(begins_to_think) else []
            begins_to_think[number].append(tokenizer.decode(first) == "<think>")
    print(f"\n3. The checkpoint in {checkpoint} loads in plain transformers. In the context that a")
    print("   server gives it, it begins by thinking in")
    for number, thinks in enumerate(begins_to_think, start=1):
        print(f"   {sum(thinks):3} of {len(thinks)} answers of turn {number}")
    print("   Training on one rendering, without earlier reasoning, teaches it not to think in all")
    print("   turns but the last: examples/thinking_survives.py compares the two.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    for library in (transformers.utils.logging, datasets.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
    transformers.set_seed(0)
    checkpoint = train(args.output, args.steps)
    compare_with_n_pass(checkpoint)
    ask_every_turn(checkpoint)


if __name__ == "__main__":
    main()
