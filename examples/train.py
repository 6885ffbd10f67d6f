"""`SFTTrainer`, one pass per conversation.

python examples/train.py --model Qwen/Qwen3-0.6B --data examples/conversations.jsonl

Before, it was ``from trl import SFTConfig, SFTTrainer``, and the same code with those names.
"""

import argparse

from onepass_trl import OnePassSFTConfig, OnePassSFTTrainer, load_conversations

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", required=True, help="a model of the Hub, or a folder")
parser.add_argument("--data", required=True, help="a .jsonl file of conversations")
parser.add_argument("--output", default="runs/train")
parser.add_argument("--steps", type=int, default=100)
options = parser.parse_args()

trainer = OnePassSFTTrainer(
    options.model,
    OnePassSFTConfig(options.output, packing=True, max_length=4096, max_steps=options.steps),
    train_dataset=load_conversations(options.data),
)
trainer.train()
trainer.save_model()
