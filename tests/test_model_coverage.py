"""The page of models says what the record says, and the record what a model is now."""

import json

import pytest
import transformers

from tests.model_coverage import (
    AUTO_MODELS,
    EXACT,
    MODEL_TYPES,
    MODELS_OF_IMAGES,
    MODELS_OF_TEXT,
    PAGE,
    RECORD,
    REFUSED,
    classify,
    page_with_tables,
)

FOUND = json.loads(RECORD.read_text("utf-8"))


def test_the_page_is_up_to_date():
    text = PAGE.read_text("utf-8")
    assert page_with_tables(text) == text, "run python -m tests.model_coverage --table"


@pytest.mark.parametrize("group", MODEL_TYPES)
def test_the_readme_has_the_numbers(group):
    kinds = [kind for kind, _ in FOUND[group].values()]
    numbers = f"{kinds.count(EXACT)} are equal, {kinds.count(REFUSED)} refused"
    assert numbers in PAGE.parents[1].joinpath("README.md").read_text("utf-8")


@pytest.mark.parametrize("group", MODEL_TYPES)
def test_the_record_has_all_models(group):
    if transformers.__version__ != FOUND["transformers"]:
        pytest.skip(f"the record is of transformers {FOUND['transformers']}")
    assert FOUND[group].keys() == MODEL_TYPES[group].keys()


@pytest.mark.parametrize(
    ("group", "model_type"),
    [
        *((MODELS_OF_TEXT, name) for name in ("glm4_moe", "gemma4_text", "olmo3", "phi3")),
        *((MODELS_OF_TEXT, name) for name in ("bloom", "mllama", "nemotron")),
        *((MODELS_OF_IMAGES, name) for name in ("qwen3_5", "qwen3_vl", "glm4v", "gemma3")),
        *((MODELS_OF_IMAGES, name) for name in ("lfm3_vl", "paligemma")),
    ],
)
def test_a_model_is_what_the_record_says(group, model_type):
    kind, why = FOUND[group][model_type]
    assert kind in (EXACT, REFUSED)
    assert classify(model_type, AUTO_MODELS[group]) == (kind, why)
