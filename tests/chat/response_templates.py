"""How answers are parsed in families for which TRL has no response template.

Written from the formats themselves, not from this package's rendering: they are the oracle of the
round trip. See transformers' documentation of `parse_response` for the form.
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

from trl import chat_template_utils as trl_templates

_ROLE = {"role": "assistant"}
_CALL = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}


def of_trl(template: str) -> dict[str, Any]:
    """Return TRL's response template for a chat template that it knows."""
    tokenizer: Any = SimpleNamespace(chat_template=template)
    found: dict[str, Any] = trl_templates.add_response_schema(tokenizer).response_template
    return found


QWEN3: dict[str, Any] = trl_templates.qwen3_template
GEMMA4: dict[str, Any] = trl_templates.gemma4_template


def plain(prompt: str, end: str) -> dict[str, Any]:
    """Return the template of a family whose answers are text from `prompt` to `end`."""
    content = {"close_pattern": re.escape(end) + r"\s*", "content": "text"}
    return {"defaults": _ROLE, "start_anchor": prompt, "fields": {"content": content}}


def _deepseek(anchor: str, call_open: str, call_close: str) -> dict[str, Any]:
    return {
        "defaults": _ROLE,
        "start_anchor_pattern": anchor,
        "fields": {
            "reasoning_content": {
                "open_pattern": r"<think>\n?|(?=[\s\S]*?</think>)",
                "close_pattern": r"</think>\s*",
                "content": "text",
            },
            "tool_calls": {
                "open_pattern": r"(?:<｜tool▁calls▁begin｜>|\n)?<｜tool▁call▁begin｜>" + call_open,
                "close_pattern": call_close + r"<｜tool▁call▁end｜>(?:<｜tool▁calls▁end｜>)?",
                "repeats": True,
                "content": "json",
                "transform": _CALL,
            },
            "content": {"close_pattern": r"<｜end▁of▁sentence｜>", "content": "text"},
        },
    }


DEEPSEEK_V3 = _deepseek(
    r"<｜Assistant｜>(?:<think>\n)?|<｜tool▁outputs▁end｜>",
    r"function<｜tool▁sep｜>(?P<name>[^\n]+)\n```json\n",
    r"\n```",
)
DEEPSEEK_V3_1 = _deepseek(
    r"<｜Assistant｜>(?:</?think>)?|<｜tool▁output▁end｜>", r"(?P<name>[^<]+)<｜tool▁sep｜>", ""
)

MUSE: dict[str, Any] = {
    "defaults": _ROLE,
    "start_anchor": "<|start|>assistant",
    "fields": {
        "reasoning_content": {
            "open": " to=self<|message|>",
            "close_pattern": r"<\|eom\|>(?:<\|start\|>assistant)?",
            "content": "text",
        },
        "tool_calls": {
            "open_pattern": r" to=(?P<name>[^<]+)<\|message\|>"
            r'<atem:function_calls>\n<atem:invoke name="[^"]*">\n',
            "close_pattern": r"</atem:invoke>\n</atem:function_calls>"
            r"(?:<\|eom\|><\|start\|>assistant|<\|eot\|>)",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {
                "tag_pattern": r'<atem:parameter name="(?P<key>[^"]+)">'
                r"(?P<value>.*?)</atem:parameter>\n",
                "value_parser": {"name": "text"},
            },
            "transform": _CALL,
        },
        "content": {
            "open": " to=user<|message|>",
            "close_pattern": r"<\|eot\|>",
            "content": "text",
        },
    },
}

MISTRAL: dict[str, Any] = {
    "defaults": _ROLE,
    "start_anchor_pattern": r"\[/(?:INST|TOOL_RESULTS)\]",
    "fields": {
        "tool_calls": {
            "open_pattern": r'(?:\[TOOL_CALLS\]\[|, (?=\{"name": "))'
            r'\{"name": "(?P<name>[^"]+)", "arguments": ',
            "close_pattern": r"\}(?=, \{\"name\": |\]</s>)(?:\]</s>)?",
            "repeats": True,
            "content": "json",
            "transform": _CALL,
        },
        "content": {"close_pattern": r"</s>", "content": "text"},
    },
}
