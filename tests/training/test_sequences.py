"""Datasets of single sequences train as with TRL's trainer: the same loss on the same records.

``python -m tests.training.test_sequences`` prints both, for docs/migrating.md.
"""

import tempfile
from functools import partial

import pytest
import torch
from datasets import Dataset, IterableDataset
from trl import SFTConfig, SFTTrainer

from onepass_trl import OnePassSFTConfig, OnePassSFTTrainer
from onepass_trl.versions import Since
from tests.chat.tokenizers import small_tokenizer
from tests.conversations import as_record, random_chat
from tests.models import make_model
from tests.training.conversations import history

TEXTS = ["One and one is two.", "Zwei und zwei ist vier, wie jeder weiß.", "3 + 3 = 6", "Eight."]
IDS = [list(range(5, 5 + n)) for n in (12, 30, 7, 21)]


def masks(*spans):
    return [
        [int(b <= i < e) for i in range(len(ids))] for ids, (b, e) in zip(IDS, spans, strict=True)
    ]


COMPLETED = masks((4, 12), (10, 30), (2, 7), (20, 21))
ASSISTANT = masks((6, 10), (0, 30), (3, 5), (1, 21))
LABELS = [
    [i if mask else -100 for i, mask in zip(ids, masks, strict=True)]
    for ids, masks in zip(IDS, COMPLETED, strict=True)
]
FORMS = {
    "text": dict(text=TEXTS),
    "text_field": dict(body=TEXTS),
    "prompt": dict(prompt=["Say:\n", "Sag:\n", "Count.\n", ""], completion=TEXTS),
    "ids": dict(input_ids=IDS),
    "labels": dict(input_ids=IDS, labels=LABELS),
    "completion_mask": dict(input_ids=IDS, completion_mask=COMPLETED),
    "assistant_masks": dict(input_ids=IDS, assistant_masks=ASSISTANT),
    "both_masks": dict(input_ids=IDS, completion_mask=COMPLETED, assistant_masks=ASSISTANT),
}


def losses(trainer_class, config_class, tokenizer, folder, columns, *, stream=False, **options):
    formatting_func = options.pop("formatting_func", None)
    settings = dict(
        output_dir=str(folder),
        report_to="none",
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        max_steps=2,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        gradient_checkpointing=False,
        save_strategy="no",
    )
    dataset = Dataset.from_dict(columns)
    trainer = trainer_class(
        make_model("qwen3", vocab_size=len(tokenizer)),
        config_class(**{**settings, **options}),
        train_dataset=dataset.to_iterable_dataset() if stream else dataset,
        eval_dataset=dataset,
        processing_class=tokenizer,
        formatting_func=formatting_func,
    )
    trainer.train()
    return [*history(trainer, "loss"), trainer.evaluate()["eval_loss"]]


@pytest.mark.parametrize(
    ("form", "options"),
    [
        *((form, {}) for form in FORMS if form != "text_field"),
        pytest.param(
            "text_field",
            dict(dataset_text_field="body"),
            marks=pytest.mark.skipif(
                not Since("trl", "1.15").installed,
                reason="TRL appended the end token to the column `text` alone",
            ),
        ),
        ("prompt", dict(completion_only_loss=False)),
        ("completion_mask", dict(completion_only_loss=True)),
        ("both_masks", dict(completion_only_loss=True)),
        ("text", dict(max_length=6)),
        ("text", dict(max_length=64, packing=True)),
        ("labels", dict(stream=True)),
    ],
)
def test_the_loss_is_that_of_trl(form, options, tiny_tokenizer, tmp_path):
    expected_options = {"max_length": None, **options}
    packing = expected_options.pop("packing", False)  # which would need FlashAttention there
    ours, theirs = (
        losses(*classes, tiny_tokenizer, tmp_path, FORMS[form], **chosen)
        for classes, chosen in (
            ((OnePassSFTTrainer, OnePassSFTConfig), {**options, "packing": packing}),
            ((SFTTrainer, SFTConfig), expected_options),
        )
    )
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_a_formatting_function_makes_text_of_anything(tiny_tokenizer, tmp_path):
    def formatted(record):
        return f"{record['question']} {record['answer']}"

    columns = dict(question=["a?", "b?"], answer=["c", "d"], unused=[1, 2])
    arguments = (tiny_tokenizer, tmp_path, columns)
    options = dict(max_length=None, formatting_func=formatted)
    ours = losses(OnePassSFTTrainer, OnePassSFTConfig, *arguments, **options)
    assert ours == pytest.approx(losses(SFTTrainer, SFTConfig, *arguments, **options), rel=1e-6)

    with pytest.raises(ValueError, match="formatting_func returned list for a record"):
        losses(
            OnePassSFTTrainer, OnePassSFTConfig, *arguments, formatting_func=lambda record: ["a"]
        )


@pytest.mark.skipif(
    not Since("datasets", "5.0").installed,
    reason="a stream keeps columns that its first record lacks",
)
def test_forms_may_be_mixed(train):
    """Each record says what it is: a pass each of text and of ids, and a conversation's passes."""
    records = [
        {"text": TEXTS[0]},
        {"input_ids": IDS[0], "labels": LABELS[0]},
        as_record(random_chat(2)),
    ]

    def generate():
        yield from records

    trainer = train(dataset=IterableDataset.from_generator(generate), max_steps=1)
    assert [int(row["num_turns"]) for row in trainer.train_dataset] == [1, 1, 2]
    trainer.train()


@pytest.mark.parametrize("completion_only", [None, True])
def test_the_completion_is_predicted_from_the_prompt_as_served(
    train, tiny_tokenizer, completion_only
):
    """Where tokens merge across the seam, TRL trains another context than inference has."""
    prompt, completion = "What is th", "e answer?"
    merged = tiny_tokenizer(prompt + completion)["input_ids"]
    served = tiny_tokenizer(prompt)["input_ids"]
    assert merged[: len(served)] != served
    dataset = Dataset.from_list([{"prompt": prompt, "completion": completion}])
    [row] = train(dataset=dataset, completion_only_loss=completion_only).train_dataset
    assert row["input_ids"][: len(served)].tolist() == served
    targets = row["shift_labels"][torch.as_tensor(row["shift_labels"]) != -100]
    assert tiny_tokenizer.decode(targets) == completion + tiny_tokenizer.eos_token


def main():
    lines = ["| columns | `SFTTrainer` | `OnePassSFTTrainer` |", "|---|---|---|"]
    for form, columns in FORMS.items():
        options = {"dataset_text_field": "body"} if form == "text_field" else {}
        with tempfile.TemporaryDirectory() as folder:
            found = [
                losses(*classes, small_tokenizer("qwen3"), folder, columns, **options)
                for classes in (
                    (SFTTrainer, partial(SFTConfig, max_length=None)),
                    (OnePassSFTTrainer, OnePassSFTConfig),
                )
            ]
        cells = (", ".join(f"{loss:.6f}" for loss in one) for one in found)
        names = ", ".join(f"`{column}`" for column in columns)
        lines.append(f"| {names} | {' | '.join(cells)} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
