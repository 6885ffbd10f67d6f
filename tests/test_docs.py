"""What README.md and docs/ say can be run as it is, and what they name exists."""

import ast
import copy
import doctest
import functools
import importlib
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
import trl
import yaml
from datasets import Dataset
from packaging.requirements import Requirement

import onepass_trl.setsft  # before TRL is changed below: it holds subclasses
from onepass_trl.chat.families import registry
from onepass_trl.cli import VERBS, main
from onepass_trl.cli.sft import make_parser
from tests.chats import CHATS, write_jsonl
from tests.conversations import as_record, random_chat
from tests.images import make_image, make_image_model, make_processor
from tests.model_coverage import EXACT, RECORD
from tests.models import MODELS
from tests.pages import (
    NOT_RUN,
    PAGES,
    PROGRAMS,
    REPOSITORY,
    anchors_of,
    blocks_of,
    commands_of,
    links_of,
    paths_of,
    prose_of,
)
from tests.reference_pages import API_PAGE, COMMANDS_PAGE, named_in, page_with_parts

DOCS = REPOSITORY / "docs"
README = (REPOSITORY / "README.md").read_text()
# Each is a marked exception that no test can run.
MOST_NOT_RUN = 2
COMMANDS = [
    pytest.param(command, id=place) for page in PAGES for place, command in commands_of(page)
]
# Models whose type isn't their name.
OTHERWISE_NAMED = {"Granite 4": "granitemoehybrid", "Ling 3": "bailing_hybrid"}
PLACEHOLDERS = {"MODEL", "Qwen/Qwen3-0.6B"}
# What makes a command a short one on the CPU.
FLAGS = dict.fromkeys(
    ("sft", "setsft"),
    "--model_name_or_path {model} --max_steps 1 --report_to none --save_strategy no --use_cpu "
    "--bf16 False --dtype float32 --max_length 512 --gradient_accumulation_steps 1 "
    "--per_device_train_batch_size 1 --eval_strategy no",
)
FLAGS["bench"] = "--use_cpu --repeats 1"


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A folder, the current one, in which the commands find what they name."""
    monkeypatch.chdir(tmp_path)
    Path("examples").symlink_to(REPOSITORY / "examples")
    make_image(40, 24).save("chart.png")
    write_jsonl(Path("chats.jsonl"), CHATS)
    write_jsonl(Path("passes.jsonl"), [as_record(random_chat(2, vocab_size=300))])
    return tmp_path


class TestCode:
    """The blocks of a page are one program, which may take some names for granted."""

    @pytest.mark.parametrize(
        "page",
        [page for page in PAGES if any(b.language in ("python", "pycon") for b in blocks_of(page))],
        ids=lambda page: page.stem,
    )
    def test_it_runs_and_prints_what_is_said(
        self, page, workspace, monkeypatch, tiny_tokenizer, tiny_model_dir
    ):
        # TRL's default of bf16 needs an accelerator; ours is off without one.
        config = functools.partial(trl.SFTConfig, use_cpu=True, bf16=False)
        monkeypatch.setattr(trl, "SFTConfig", config)
        monkeypatch.setattr(registry, "_registered", [])
        tokenizer = copy.deepcopy(tiny_tokenizer)  # one that was saved after set fine-tuning
        tokenizer.add_tokens([f"<think{i}>" for i in range(1, 7)], special_tokens=True)
        names = {
            "model": str(tiny_model_dir),
            "dataset": Dataset.from_list(CHATS[:1]),
            "tokenizer": tokenizer,
            "messages": CHATS[0]["messages"][:-1],
        }
        if page.stem == "images":
            names |= {"model": make_image_model("qwen3_5"), "processor": make_processor("qwen3_5")}
        for block in blocks_of(page):
            if block.not_run:
                continue
            if block.language == "python":
                code = "\n" * (block.line - 1) + block.text
                exec(compile(code, str(page), "exec"), names)
                if "trainer" in names:
                    assert len(names["trainer"].train_dataset) == 1
            elif block.language == "pycon":
                run_session(block, names)

    def test_sessions_that_print_something_else_fail(self):
        block = blocks_of(DOCS / "how_it_works.md")[0]
        block.text = block.text.replace("\n21\n", "\n20\n")
        with pytest.raises(AssertionError, match=r"Got:\n +21"):
            run_session(block, {})

    @pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
    def test_other_blocks_are_known(self, page):
        for block in blocks_of(page):
            assert block.language in ("", "python", "pycon", "pyi", "sh", "yaml", "text"), block
            if block.language == "yaml":
                assert yaml.safe_load(block.text), block

    def test_few_blocks_are_not_run(self):
        texts = [page.read_text("utf-8") for page in PAGES]
        assert sum(len(NOT_RUN.findall(text)) for text in texts) <= MOST_NOT_RUN
        assert sum(bool(block.not_run) for page in PAGES for block in blocks_of(page)) == sum(
            len(NOT_RUN.findall(text)) for text in texts
        )


def run_session(block, names):
    """Run the lines that begin with >>> and compare what they print."""
    session = doctest.DocTestParser().get_doctest(
        block.text, {}, str(block), str(block.page), block.line - 1
    )
    session.globs = names
    output = []
    doctest.DocTestRunner(verbose=False).run(session, out=output.append, clear_globs=False)
    assert not output, "".join(output)


class TestCommands:
    def test_there_are_some_of_each_program(self):
        programs = {param.values[0].split()[0] for param in COMMANDS}
        assert {"make", "onepass-trl", "pip", "accelerate"} <= programs <= set(PROGRAMS)

    @pytest.mark.parametrize("command", [c for c in COMMANDS if "onepass-trl " in c.values[0]])
    def test_verbs_run(self, command, workspace, monkeypatch, tiny_model_dir):
        """As written, but on a tiny model; training takes one step, and its launcher no process."""
        program, verb, *words = shlex.split(command)
        assert program == "onepass-trl"
        words = [str(tiny_model_dir) if word in PLACEHOLDERS else word for word in words]
        if verb == "bench" and not words:
            words += ["--turns=2", "--user=20", "--reasoning=50", "--response=30"]
        words += FLAGS.get(verb, "").format(model=tiny_model_dir).split()
        monkeypatch.setattr("accelerate.commands.launch.launch_command", train_in_this_process)
        assert main([verb, *words]) == 0

    @pytest.mark.parametrize("command", [c for c in COMMANDS if "onepass-trl " not in c.values[0]])
    def test_the_others_name_what_exists(self, command, workspace):
        program, *words = shlex.split(command)
        globals()[f"check_{program}"](words)

    @pytest.mark.parametrize(
        "path", sorted((REPOSITORY / "examples").rglob("*.yaml")), ids=lambda path: path.stem
    )
    def test_the_headers_of_examples_are_understood(self, path, workspace, monkeypatch):
        launched = []
        header = re.match(r"(?:#.*\n)+", path.read_text())[0]
        commands = re.findall(rf"^# +((?:{'|'.join(PROGRAMS)}) .*)", header, flags=re.MULTILINE)
        assert commands
        monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)
        for command in commands:
            program, *words = shlex.split(command)
            if program == "onepass-trl":
                assert main([*words, "--use_cpu", "--bf16=False"]) == 0
            else:
                assert program == "accelerate"
                check_accelerate(words)
        assert all(options.module for options in launched)

    def test_verbs_named_in_passing_exist(self):
        for page in PAGES:
            for verb in re.findall(r"`onepass-trl (\w+)", page.read_text("utf-8")):
                assert verb in {*VERBS, "verb"}, page
            for target in re.findall(r"`make ([\w-]+)", page.read_text("utf-8")):
                assert target in make_targets(), page

    def test_targets_that_workflows_make_exist(self):
        workflows = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))
        named = {
            target
            for path in workflows
            for target in re.findall(r"\bmake ([\w-]+)", path.read_text("utf-8"))
        }
        assert {"test", "check", "docs"} <= named <= make_targets()


def train_in_this_process(options):
    """Stand in for accelerate's launcher, which would start processes."""
    assert options.module
    module = importlib.import_module(options.training_script)
    assert module.train(options.training_script_args) == 0


def make_targets():
    lines = re.findall(
        r"^([\w-]+(?: [\w-]+)*):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE
    )
    return {target for line in lines for target in line.split()}


def check_make(words):
    targets = [word for word in words if "=" not in word]
    assert set(targets) <= set(make_targets())


def check_pip(words):
    assert words[0] == "install"
    flags = {"--no-build-isolation", "--no-deps", "-e"}
    for word in words[1:]:
        if word.startswith("-"):
            assert word in flags
        elif word == "dist/*.whl":
            assert "wheel" in make_targets()
        elif word.startswith("."):
            extras = re.findall(r"\w+", word)
            known = (REPOSITORY / "pyproject.toml").read_text()
            assert all(re.search(rf"^{extra} = \[", known, re.MULTILINE) for extra in extras)
        else:
            Requirement(word)


def check_python(words):
    """A script's flags must be some that it adds; a module must exist."""
    if words[0] == "-m":
        if words[1] == "pip":
            return check_pip(words[2:])
        assert importlib.util.find_spec(words[1])
        return None
    script = (REPOSITORY / words[0]).read_text()
    flags = [word.split("=")[0] for word in words[1:] if word.startswith("-")]
    assert all(f'"{flag}"' in script for flag in flags)
    return None


def check_accelerate(words):
    """The launcher's flags and file, the module, and the module's own flags are understood."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    assert words[0] == "launch"
    options = launch_command_parser().parse_args(words[1:])
    assert options.module
    if options.config_file:
        load_config_from_file(options.config_file)
    parser = importlib.import_module(options.training_script).make_parser()
    flags = [*options.training_script_args, "--use_cpu", "--bf16=False"]
    parser.parse_args_and_config(flags, fail_with_unknown_args=True)


def check_torchrun(words):
    from torch.distributed.run import get_args_parser

    options = get_args_parser().parse_args(words)
    assert options.module
    parser = importlib.import_module(options.training_script).make_parser()
    flags = [*options.training_script_args, "--use_cpu", "--bf16=False"]
    parser.parse_args_and_config(flags, fail_with_unknown_args=True)


class TestNames:
    """What pages link to and name. mkdocs checks the links again, as they are in the site."""

    @pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
    def test_links_lead_somewhere(self, page):
        for link in links_of(page):
            path, _, anchor = link.partition("#")
            target = (page.parent / path) if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors_of(target), link

    def test_anchors_are_those_of_github(self):
        anchors = anchors_of(REPOSITORY / "benchmarks" / "README.md")
        assert "what-estimate-predicts" in anchors
        assert "onepass_trltree_attention" in anchors_of(API_PAGE)

    @pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
    def test_paths_exist(self, page):
        # In ARCHITECTURE.md a path begins where its line is.
        bases = ["", "onepass_trl", "csrc", "csrc/cuda", "csrc/cuda/sm90", "tests"]
        for path in paths_of(page):
            assert any(list((REPOSITORY / base).glob(path.rstrip("/"))) for base in bases), path

    @pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
    def test_lines_are_at_most_100_columns_wide(self, page):
        """Except for what can't be wrapped: tables, headings, images, code, generated parts."""
        text = re.sub(
            r"^<!-- (?!not run).*? -->$.*?^<!-- end.*? -->$",
            "",
            prose_of(page),
            flags=re.DOTALL | re.MULTILINE,
        )
        wide = [line for line in text.splitlines() if len(line) > 100]
        assert not [line for line in wide if not re.match(r"\||#|!\[|    ", line)]

    def test_the_python_page_has_every_public_name(self):
        documented = []
        for path in named_in(API_PAGE.read_text("utf-8"), "api"):
            module, _, name = path.rpartition(".")
            documented.append(getattr(importlib.import_module(module), name))
        for name in set(onepass_trl.__all__) - {"__version__"}:
            assert getattr(onepass_trl, name) in documented, name

    def test_every_option_in_the_table_exists(self):
        table = README.split("### Additional options")[1].split("\n\n")[1]
        options = re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE)
        flags = make_parser().format_help()
        assert options == [
            "train_on",
            "max_length",
            "overflow",
            "invalid_turns",
            "null_arguments",
            "ignored_columns",
            "chat_template_kwargs",
            "verify_rendering",
            "verify_model",
            "attention_impl",
        ]
        assert all(f"--{option}" in flags for option in options)

    def test_models_named_as_tested_are_tested(self):
        """Hybrid ones by `tests/models.py`, whose models are all named; others by the record."""
        record = json.loads(RECORD.read_text("utf-8"))["models"]
        named, hybrid = models_of("Models"), models_of("Hybrid models")
        assert {record[model_type][0] for model_type in named} == {EXACT}
        assert hybrid <= MODELS.keys() <= named | hybrid

    def test_names_of_models_are_read_as_model_types(self):
        assert {"gemma2", "gemma3", "gemma4", "qwen3_moe", "gpt_oss"} <= models_of("Models")
        assert {"qwen3_5", "granitemoehybrid", "lfm2_moe"} <= models_of("Hybrid models")


def models_of(row):
    """Return the model types that README.md's row of supported models names."""
    cell = re.search(rf"^\| {row} \| [^:|]*: ([^|]*) \|", README, flags=re.MULTILINE)[1]
    cell = re.sub(r" \([^)]*\)| and others", "", cell)
    types = set()
    for name in re.split(r", | and ", cell):
        if series := re.fullmatch(r"(\w+) (\d) to (\d)", name):
            first, last = int(series[2]), int(series[3])
            types |= {f"{series[1].lower()}{number}" for number in range(first, last + 1)}
        else:
            types.add(OTHERWISE_NAMED.get(name) or re.sub(r"\W", "_", name.lower()))
    return types


class TestTroubleshooting:
    """A heading of the third order is a message of the package; … means any text."""

    HEADINGS = re.findall(
        r"^### (.*)$", (DOCS / "troubleshooting.md").read_text("utf-8"), flags=re.MULTILINE
    )

    @pytest.mark.parametrize("heading", HEADINGS)
    def test_the_message_is_one_of_the_package(self, heading):
        quoted = re.fullmatch(r"`+ ?(.*?) ?`+", heading)
        assert quoted, "a heading is a message in backticks"
        assert occurs(quoted[1], messages_of_the_package()), quoted[1]

    def test_a_changed_message_is_noticed(self):
        messages = messages_of_the_package()
        assert occurs("max_length must be at least … or None", messages)
        assert not occurs("max_length must be at most … or None", messages)
        assert not occurs("…", messages)

    def test_no_heading_is_repeated(self):
        assert len(set(self.HEADINGS)) == len(self.HEADINGS) > 30


def occurs(quoted, messages):
    """Return whether the pieces of the quotation are in one message, in order."""
    pieces = [piece.strip() for piece in quoted.split("…") if piece.strip()]
    pattern = re.compile(".*?".join(map(re.escape, pieces)), re.DOTALL)
    return sum(map(len, pieces)) >= 12 and any(map(pattern.search, messages))


@functools.cache
def messages_of_the_package():
    """All texts of the package but docstrings, with … for what is filled in."""
    texts = []
    for path in sorted((REPOSITORY / "onepass_trl").rglob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        inner = {
            id(child)
            for node in ast.walk(tree)
            if isinstance(node, (ast.JoinedStr, ast.Expr))
            for child in ast.iter_child_nodes(node)
        }
        texts += [
            text_of(node)
            for node in ast.walk(tree)
            if isinstance(node, (ast.Constant, ast.JoinedStr)) and id(node) not in inner
        ]
    return texts


def text_of(node):
    if isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
        return "".join(parts)
    return re.sub(r"%[sdrg]", "…", node.value) if isinstance(node.value, str) else ""


@pytest.fixture(scope="module")
def hooks():
    return load(DOCS / "hooks.py")


class TestOnGitHub:
    """A page under docs/ is read as it is there: nothing in it waits for mkdocs."""

    @pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
    def test_it_has_no_syntax_of_mkdocs(self, page):
        found = re.search(
            r"--8<--|^(?::::|!!!|\?\?\?|===) .*|\{ ?[:#.].*\}", prose_of(page), flags=re.MULTILINE
        )
        assert not found, found[0]

    @pytest.mark.parametrize("page", [COMMANDS_PAGE, API_PAGE], ids=lambda page: page.stem)
    def test_generated_parts_are_current(self, page):
        text = page.read_text("utf-8")
        assert page_with_parts(page, text) == text, "run python -m tests.reference_pages"

    def test_each_verb_has_a_section_and_its_flags(self):
        text = COMMANDS_PAGE.read_text("utf-8")
        assert re.findall(r"^## (.*)$", text, flags=re.MULTILINE) == list(VERBS)
        assert named_in(text, "flags") == list(VERBS)


class TestSite:
    def test_each_name_gets_its_docstring(self, hooks):
        text = API_PAGE.read_text("utf-8")
        page = hooks.with_docstrings(text)
        names = re.findall(r"^::: ([\w.]+)$", page, flags=re.MULTILINE)
        assert names == named_in(text, "api")
        assert "<!--" not in page
        assert "```" not in page

    def test_links_out_of_the_site_become_paths(self, hooks):
        source = COMMANDS_PAGE
        settled = hooks.with_links("[a](../examples/sft.yaml) [b](../ARCHITECTURE.md#x)", source)
        assert settled == "a (`examples/sft.yaml`) [b](architecture.md#x)"
        assert hooks.with_links("[a](../README.md#x)", source) == "[a](index.md#x)"
        page = REPOSITORY / "benchmarks" / "README.md"
        assert hooks.with_links("![a](../docs/figures/row.svg)", page) == "![a](figures/row.svg)"
        with pytest.raises(ValueError, match="which doesn't exist"):
            hooks.with_links("[a](../examples/none.yaml)", source)

    def test_what_a_browser_would_fetch_is_noticed(self, hooks):
        class page:
            class file:
                src_uri = "index.md"

        assert (
            hooks.on_post_page('<a href="https://arxiv.org">', page)
            == '<a href="https://arxiv.org">'
        )
        for text in ('<script src="https://x.y/z.js">', '<link href="//x.y" rel="stylesheet">'):
            with pytest.raises(ValueError, match="from elsewhere"):
                hooks.on_post_page(text, page)

    def test_the_figures_are_current(self):
        figures = load(DOCS / "figures.py")
        for name, draw in figures.FIGURES.items():
            assert (DOCS / "figures" / name).read_text() == draw(), "run python docs/figures.py"


def load(path):
    spec = importlib.util.spec_from_file_location(f"docs_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
