"""The template families that are tested: a template, its tokens, and how its answers are parsed.

TRL ships the templates, but for three of `templates/` here. Each is tested with the real tokenizer
of its family where one is at hand, and else with the family's tokens added to another one.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.chat import response_templates as parsing

_HERE = Path(__file__).parent


def trl_template_file(name: str) -> Path:
    """Return the file of a chat template that TRL may ship, without importing TRL."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "chat_templates" / f"{name}.jinja"


def trl_template(name: str) -> str:
    """Return the Jinja source of a chat template that TRL ships."""
    return trl_template_file(name).read_text("utf-8")


@dataclass(frozen=True)
class Tokens:
    """The tokens of a family; several of them are one text, separated by blanks.

    Attributes:
        special: Its special tokens.
        plain: Its added tokens that aren't special.
        bos: The token that begins a text, if the template writes one.
        eos: The tokenizer's own end token.
        ends: Every token that ends a turn, the eos token if empty.
        folder: The folder of a real tokenizer.
        is_own: Whether that tokenizer is the family's; else the family's tokens are added to it.
    """

    special: str
    plain: str = ""
    bos: str | None = None
    eos: str = "<|im_end|>"
    ends: str = ""
    folder: str = "qwen3"
    is_own: bool = False


@dataclass(frozen=True)
class Case:
    """A family as it is tested.

    Attributes:
        name: What the family is called in tables.
        template: The template: TRL's of this name, or one of ``templates/``.
        tokens: The family's tokens.
        kwargs: Template arguments with which turns have reasoning.
        reasoning: Whether the template has a place for reasoning.
        parser: The response template, None for TRL's.
        edit: Text of the template, and what replaces it.
        misreading: Why TRL's parser doesn't read texts with quotes, brackets and line ends.
        takes_parts: Whether servers give contents as lists of parts.
        takes_text_arguments: Whether servers give the arguments of calls as JSON text.
    """

    name: str
    template: str
    tokens: Tokens
    kwargs: dict[str, Any] = field(default_factory=dict, hash=False)
    reasoning: bool = True
    parser: dict[str, Any] | None = field(default=None, hash=False)
    edit: tuple[str, str] | None = None
    misreading: str | None = None
    takes_parts: bool = False
    takes_text_arguments: bool = False

    @property
    def slug(self) -> str:
        """The name for a file."""
        return self.name.lower().replace(" ", "-").replace("(", "").replace(")", "")

    def template_text(self) -> str:
        """Return the Jinja source."""
        own = _HERE / "templates" / f"{self.template}.jinja"
        text = own.read_text("utf-8") if own.exists() else trl_template(self.template)
        if self.edit:
            assert self.edit[0] in text
            text = text.replace(*self.edit)
        return text


_THINK = "<think> </think> <tool_call> </tool_call>"
_CHATML = Tokens("<|endoftext|> <|im_start|> <|im_end|>", _THINK)
_QWEN = replace(_CHATML, is_own=True)
_DEEPSEEK = Tokens(
    "<｜begin▁of▁sentence｜> <｜end▁of▁sentence｜>",
    "<think> </think> <｜User｜> <｜Assistant｜>",
    bos="<｜begin▁of▁sentence｜>",
    eos="<｜end▁of▁sentence｜>",
    folder="deepseek-r1",
    is_own=True,
)
_HARMONY = Tokens(
    "<|start|> <|end|> <|message|> <|channel|> <|call|> <|return|>",
    eos="<|return|>",
    ends="<|return|> <|call|>",
    folder="gpt-oss",
    is_own=True,
)
_GLM = Tokens(
    "[gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|> <|endoftext|>",
    _THINK,
    eos="<|endoftext|>",
    ends="<|user|> <|observation|>",
)
_GEMMA4 = Tokens(
    "<bos> <eos> <|turn> <turn|> <|tool> <tool|> <|tool_call> <tool_call|> <|tool_response> "
    '<tool_response|> <|channel> <channel|> <|think|> <|"|>',
    bos="<bos>",
    eos="<eos>",
    ends="<turn|> <|tool_response>",
)
_GEMMA = Tokens(
    "<bos> <eos> <start_of_turn> <end_of_turn>", bos="<bos>", eos="<eos>", ends="<end_of_turn>"
)
_LFM = Tokens(
    "<|startoftext|> <|im_start|> <|im_end|> <|tool_call_start|> <|tool_call_end|> "
    "<|tool_list_start|> <|tool_list_end|> <|tool_response_start|> <|tool_response_end|>",
    "<think> </think>",
    bos="<|startoftext|>",
)
_MUSE = Tokens(
    "<|begin_of_text|> <|start|> <|message|> <|eom|> <|eot|>",
    bos="<|begin_of_text|>",
    eos="<|eot|>",
)
_PHI = Tokens(
    "<|endoftext|> <|system|> <|user|> <|assistant|> <|end|>", eos="<|endoftext|>", ends="<|end|>"
)
_LLAMA = Tokens(
    "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>",
    bos="<|begin_of_text|>",
    eos="<|eot_id|>",
)
_COHERE = Tokens(
    "<BOS_TOKEN> <|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|> "
    "<|SYSTEM_TOKEN|> <|START_RESPONSE|> <|END_RESPONSE|>",
    bos="<BOS_TOKEN>",
    eos="<|END_OF_TURN_TOKEN|>",
)
_VISION = Tokens(
    "<|begin_of_text|> <|im_start|> <end_of_utterance>",
    bos="<|begin_of_text|>",
    eos="<end_of_utterance>",
)
_MISTRAL = Tokens(
    "<s> </s> [INST] [/INST] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CALLS] [TOOL_RESULTS] "
    "[/TOOL_RESULTS]",
    bos="<s>",
    eos="</s>",
)

# Qwen3-Thinking-2507: Qwen3's template with a prompt that opens the reasoning.
_ALWAYS_THINKING = (
    "{%- if enable_thinking is defined and enable_thinking is false %}\n"
    "        {{- '<think>\\n\\n</think>\\n\\n' }}\n"
    "    {%- endif %}",
    "{{- '<think>\\n' }}",
)
_ON = {"enable_thinking": True}
_LFM_MARKS = "TRL's parser takes quotes, brackets and `, name(` in texts for its marks"
_GEMMA4_VERSIONS = ("gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5")

CASES = {
    case.name: case
    for case in [
        Case("Qwen3", "qwen3", _QWEN),
        Case(
            "Qwen3-Thinking-2507",
            "qwen3",
            _QWEN,
            parser=parsing.QWEN3,
            edit=_ALWAYS_THINKING,
        ),
        Case("Qwen3-Instruct-2507", "qwen3_instruct_2507", _QWEN, reasoning=False),
        Case("Qwen3-VL (text)", "qwen3_vl", _QWEN, reasoning=False),
        Case("Qwen3.5 think", "qwen3_5_think", _CHATML),
        Case("Qwen3.5 nothink", "qwen3_5_nothink", _CHATML, _ON),
        Case("Qwen3.6", "qwen3_6", _CHATML),
        Case("Qwen3.8", "qwen3_8", _CHATML),
        Case(
            "DeepSeek-R1-distill",
            "deepseek_r1_distill",
            _DEEPSEEK,
            parser=parsing.DEEPSEEK_V3,  # TRL's doesn't know the prompt after tool outputs
            takes_text_arguments=True,
        ),
        Case(
            "DeepSeek-V3",
            "deepseekv3",
            _DEEPSEEK,
            parser=parsing.DEEPSEEK_V3,
            takes_text_arguments=True,
        ),
        Case(
            "DeepSeek-V3.1 (form)",
            "deepseek_v3_1",
            _DEEPSEEK,
            {"thinking": True},
            parser=parsing.DEEPSEEK_V3_1,
            takes_text_arguments=True,
        ),
        Case("QwQ (form)", "qwq", _QWEN, parser=parsing.QWEN3),
        Case("gpt-oss", "gptoss", _HARMONY),
        Case("GLM-4 MoE", "glm4moe", _GLM),
        Case("Nemotron 3 nano", "nemotron_3_nano", _CHATML),
        Case("Nemotron 3 super", "nemotron_3_super", _CHATML),
        Case("Nemotron 3 ultra", "nemotron_3_ultra", _CHATML),
        Case("Nemotron 3.5 lightning", "nemotron_3_5_lightning", _CHATML),
        *(
            Case(name.replace("gemma4", "Gemma 4").replace("_", " "), name, _GEMMA4, _ON)
            for name in _GEMMA4_VERSIONS
        ),
        Case("DiffusionGemma", "diffusion_gemma", _GEMMA4, _ON, parser=parsing.GEMMA4),
        Case("LFM2.5", "lfm2_2_5", _LFM, misreading=_LFM_MARKS),
        Case("LFM2.5 v2", "lfm2_2_5_v2", _LFM, misreading=_LFM_MARKS),
        Case("LFM2.5-VL (text)", "lfm2_2_5_vl", _LFM, misreading=_LFM_MARKS),
        Case("Muse Glimmer", "muse_glimmer", _MUSE, parser=parsing.MUSE),
        Case(
            "LFM2",
            "lfm2",
            _LFM,
            reasoning=False,
            parser=parsing.plain("<|im_start|>assistant\n", "<|im_end|>"),
        ),
        Case("LFM2 v2", "lfm2_v2", _LFM, reasoning=False, misreading=_LFM_MARKS),
        Case("Qwen2.5", "qwen2_5", _QWEN, reasoning=False),
        Case(
            "Phi-3",
            "phi3",
            _PHI,
            reasoning=False,
            parser=parsing.plain("<|assistant|>\n", "<|end|>"),
        ),
        Case(
            "Phi-3.5",
            "phi3_5",
            _PHI,
            reasoning=False,
            parser=parsing.plain("<|assistant|>\n", "<|end|>"),
        ),
        Case(
            "Llama 3",
            "llama3",
            _LLAMA,
            reasoning=False,
            parser=parsing.plain("<|end_header_id|>\n\n", "<|eot_id|>"),
        ),
        Case("Llama 3.1", "llama3_1", _LLAMA, reasoning=False),
        Case("Llama 3.2", "llama3_2", _LLAMA, reasoning=False),
        Case("Mistral (form)", "mistral", _MISTRAL, reasoning=False, parser=parsing.MISTRAL),
        Case(
            "Cohere",
            "cohere",
            _COHERE,
            reasoning=False,
            parser=parsing.plain("<|CHATBOT_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
        ),
        Case(
            "Cohere2",
            "cohere2",
            _COHERE,
            reasoning=False,
            parser=parsing.plain("<|START_RESPONSE|>", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
        ),
        Case(
            "Gemma",
            "gemma",
            _GEMMA,
            reasoning=False,
            parser=parsing.plain("<start_of_turn>model\n", "<end_of_turn>"),
        ),
        Case(
            "Gemma 3",
            "gemma3",
            _GEMMA,
            reasoning=False,
            parser=parsing.plain("<start_of_turn>model\n", "<end_of_turn>"),
        ),
        Case(
            "Qwen2.5-VL (text)",
            "qwen2_5_vl",
            _QWEN,
            reasoning=False,
            parser=parsing.plain("<|im_start|>assistant\n", "<|im_end|>"),
        ),
        *(
            Case(
                f"{name} (text)",
                template,
                _VISION,
                reasoning=False,
                parser=parsing.plain("Assistant:", "<end_of_utterance>"),
                takes_parts=True,
            )
            for name, template in (("SmolVLM", "smolvlm"), ("Idefics 3", "idefics3"))
        ),
        Case(
            "LLaVA-NeXT (text)",
            "llava_next",
            Tokens("<s> </s>", bos="<s>", eos="</s>"),
            reasoning=False,
            parser=parsing.plain("[/INST]", "</s>"),
            takes_parts=True,
        ),
    ]
}

TRAINING = {
    name: replace(
        case,
        name=f"{name}, for training",
        template=f"{case.template}_training",
        # TRL knows originals by their text, and parses what both write.
        parser=case.parser or parsing.of_trl(case.template_text()),
        takes_text_arguments=False,  # those for training take dicts, as the others do
    )
    for name, case in CASES.items()
    if case.edit is None
    and case.template != "deepseek_r1_distill"  # it takes reasoning in the content alone
    and trl_template_file(f"{case.template}_training").exists()
}
"""The versions for training that TRL ships, by the names of their families."""
