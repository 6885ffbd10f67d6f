"""Conversations with images, one pass each.

python examples/train_on_images.py --model Qwen/Qwen3-VL-2B-Instruct

Each conversation shows two drawings, in its first and third turn, and has four turns about them.
"""

import argparse
import random
from typing import Any

from datasets import Dataset
from PIL import Image, ImageDraw

from onepass_trl import OnePassSFTConfig, OnePassSFTTrainer

COLORS = ("red", "green", "blue", "orange", "purple")


def draw(rng: random.Random) -> tuple[Image.Image, str, int]:
    """Return a drawing of some squares of one color, the color and their number."""
    color, number = rng.choice(COLORS), rng.randint(1, 5)
    image = Image.new("RGB", (32 * number + 32, 64), "white")
    for place in range(number):
        left = 32 * place + 20
        ImageDraw.Draw(image).rectangle((left, 20, left + 20, 44), fill=color)
    return image, color, number


def ask(text: str, with_image: bool) -> dict[str, Any]:
    """Return a question, about a new image or the last one."""
    parts = [{"type": "image"}] if with_image else []
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def tell(text: str) -> dict[str, Any]:
    """Return an answer."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def make_record(seed: int) -> dict[str, Any]:
    """Return a conversation of four turns about two drawings."""
    rng = random.Random(seed)
    (first, color, number), (second, other_color, other_number) = draw(rng), draw(rng)
    return {
        "messages": [
            ask("Which color is it?", with_image=True),
            tell(f"It is {color}."),
            ask("How many squares are there?", with_image=False),
            tell(str(number)),
            ask("And here?", with_image=True),
            tell(f"{other_number}, in {other_color}."),
            ask("How many in both?", with_image=False),
            tell(f"{number} and {other_number} are {number + other_number}."),
        ],
        "images": [first, second],
    }


def main() -> None:
    """Train on drawings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a model of the Hub, or a folder")
    parser.add_argument("--output", default="runs/images")
    parser.add_argument("--records", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    trainer = OnePassSFTTrainer(
        options.model,
        OnePassSFTConfig(
            options.output,
            packing=True,
            max_length=2048,
            max_steps=options.steps,
            logging_steps=1,
            learning_rate=1e-4,
        ),
        train_dataset=Dataset.from_list([make_record(seed) for seed in range(options.records)]),
    )
    trainer.train()


if __name__ == "__main__":
    main()
