"""Conversations as messages, for the tests of everything that renders them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {n} plus {n}?"},
            {"role": "assistant", "reasoning_content": "Double it.", "content": f"{2 * n}."},
            {"role": "user", "content": "And one more?"},
            {
                "role": "assistant",
                "reasoning_content": f"{2 * n} and 1.",
                "content": f"{2 * n + 1}.",
            },
        ]
    }
    for n in range(8)
]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is two plus two?"},
    {"role": "assistant", "reasoning_content": "Let me think.", "content": "The answer is four."},
    {"role": "user", "content": "And three more?"},
    {"role": "assistant", "reasoning_content": "First, add.", "content": "It is seven."},
]
TWO_TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "reasoning_content": "Two and two.", "content": "4"},
    {"role": "user", "content": "And 3+3?"},
    {"role": "assistant", "reasoning_content": "Three and three.", "content": "6"},
]
CALL = {
    "type": "function",
    "function": {"name": "search", "arguments": {"query": "träge", "limit": 3}},
}
TOOL_TURNS = [
    {"role": "user", "content": "Search."},
    {"role": "assistant", "reasoning_content": "I search.", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "search", "content": "found"},
    {"role": "assistant", "reasoning_content": "It is there.", "content": "Found it."},
]


def write_jsonl(path: Path, records: Iterable[Any]) -> Path:
    """Write each record as a line of JSON, and return the path."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
