"""docs/chat_formats.md: its tables are current, its example works."""

import re

from onepass_trl.chat import render_passes
from onepass_trl.chat.families import registry
from tests.chat import single_renderings
from tests.chat.table import PAGE, page_with_tables
from tests.chat.tokenizers import small_tokenizer, texts

TEXT = PAGE.read_text("utf-8")


def test_tables_are_current():
    assert page_with_tables(TEXT) == TEXT, "run python -m tests.chat.table"


def test_the_example_works(monkeypatch):
    monkeypatch.setattr(registry, "_registered", [])
    [code] = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    exec(compile(code, PAGE.name, "exec"), {})
    tokenizer = small_tokenizer("phi3")
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}"
        "{% else %}<oracle>{{ m.content }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<oracle>{% endif %}"
    )
    messages = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "reasoning_content": "Two and two.", "content": "}4"},
    ]
    kwargs = {"chat_template": template}
    [item] = render_passes(messages, tokenizer, chat_template_kwargs=kwargs)
    assert texts(tokenizer, item) == ("<|user|>2+2?<oracle>", "{Two and two.}}4<|end|>")


def test_the_table_of_single_renderings_is_current():
    page = single_renderings.PAGE.read_text("utf-8")
    assert single_renderings.page_with_table(page) == page, (
        "run python -m tests.chat.single_renderings"
    )
