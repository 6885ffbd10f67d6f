"""Real conversations with real tokenizers: a sample here, all of them in `coverage.json`."""

from __future__ import annotations

import functools
import json

import pytest

from tests.chat.coverage import FILES, RECORD, cover, read_conversations
from tests.chat.families import CASES, TRAINING
from tests.chat.tokenizers import SHARED, SHARED_REASON, make_real_tokenizer

pytestmark = [
    pytest.mark.shared,
    pytest.mark.long("onepass_trl/chat", "onepass_trl/data", "tests/chat"),
    pytest.mark.skipif(not SHARED.is_dir(), reason=SHARED_REASON),
]
# One conversation in this number of them.
SAMPLED = {"maths_chat": 30, "tool_chat": 6, "agent_short": 15, "agent_long": 6}


@functools.cache
def sample():
    return [row for file, step in SAMPLED.items() for row in read_conversations(file)[3::step]]


@pytest.mark.parametrize(
    ("name", "case"),
    [*CASES.items(), *TRAINING.items()],
    ids=[case.name for case in (*CASES.values(), *TRAINING.values())],
)
def test_family(name, case):
    record = json.loads(RECORD.read_text("utf-8"))[name]
    covered = cover(case, make_real_tokenizer(case), sample())
    assert covered.refused.keys() <= record["refused"].keys()
    assert covered.misread.keys() <= record["misread"].keys()
    assert covered.rendered > 0
    assert covered.equal_contexts == covered.stopped == covered.rendered
    assert covered.round_trips == covered.rendered - sum(covered.misread.values())


def test_the_record_is_of_all_conversations():
    record = json.loads(RECORD.read_text("utf-8"))
    assert list(record) == list(CASES)
    for counts in record.values():
        assert counts["num_turns"] == sum(FILES.values())
        rendered = counts["num_turns"] - sum(counts["refused"].values())
        assert counts["equal_contexts"] == counts["stopped"] == rendered
        assert counts["round_trips"] == rendered - sum(counts["misread"].values())
