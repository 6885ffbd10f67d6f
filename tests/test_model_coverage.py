"""The page of models says what the record says, and the record what a model is now."""

import json

import pytest
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.model_coverage import EXACT, PAGE, RECORD, REFUSED, classify, page_with_tables

MODELS = json.loads(RECORD.read_text("utf-8"))


def test_the_page_is_up_to_date():
    text = PAGE.read_text("utf-8")
    assert page_with_tables(text) == text, "run python -m tests.model_coverage --table"


def test_the_readme_has_the_numbers():
    kinds = [kind for kind, _ in MODELS["models"].values()]
    numbers = f"{kinds.count(EXACT)} are equal, {kinds.count(REFUSED)} refused"
    assert numbers in PAGE.parents[1].joinpath("README.md").read_text("utf-8")


def test_the_record_has_all_models():
    if transformers.__version__ != MODELS["transformers"]:
        pytest.skip(f"the record is of transformers {MODELS['transformers']}")
    assert MODELS["models"].keys() == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()


@pytest.mark.parametrize(
    "model_type", ["glm4_moe", "gemma4_text", "olmo3", "phi3", "bloom", "mllama", "nemotron"]
)
def test_a_model_is_what_the_record_says(model_type):
    kind, why = MODELS["models"][model_type]
    assert kind in (EXACT, REFUSED)
    assert classify(model_type) == (kind, why)
