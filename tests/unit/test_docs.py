"""The pages are correct: links resolve, commands are valid, blocks parse, generated parts are current."""

from __future__ import annotations

import ast
import json
import re
import types
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from docs import PAGES, ROOT, Block, anchors, as_module, blocks, code_spans, commands, links, prose

from parallelmind import cli
from parallelmind.config import FrozenConfig, TrainConfig, resolve
from parallelmind.errors import UserError
from tools import source_files
from tools.marked import filled
from tools.reference import COMMANDS, PAGE, anchor, reference
from workloads.common.read_config import read_config
from workloads.sweep.config import SweepConfig

TARGETS = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
PROJECT_FOLDERS = "platform workloads serving experiments benchmarks docs tools tests".split()
LIBRARY = ROOT / "platform" / "parallelmind"
ALL_BLOCKS = [block for page in PAGES for block in blocks(page)]
RUN = {"data_path": "train.jsonl", "validation_path": "held_out.jsonl"}
# Stands in for a configuration file of the reader.
REQUIRED = {TrainConfig: RUN, SweepConfig: {"train": RUN, "space": {"lora_rank": [4, 8]}}}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def of(*languages: str) -> pytest.MarkDecorator:
    chosen = [block for block in ALL_BLOCKS if block.language in languages]
    return pytest.mark.parametrize("block", chosen, ids=str)


@pages
def test_links_resolve(page: Path) -> None:
    for link in links(page):
        name, _, anchor_name = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor_name:
            assert anchor_name in anchors(target), f"{page.name}: {link}: no such heading"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_named_files_and_modules_exist(page: Path) -> None:
    for span in code_spans(page):
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", span) and is_project_path(span, page):
            folders = (ROOT, LIBRARY, page.parent)
            assert any((folder / span).exists() for folder in folders), f"{page.name}: no file {span}"
        elif re.fullmatch(
            r"(parallelmind|workloads|serving|benchmarks|tools|experiments)(\.(?!json)\w+)+", span
        ):
            assert is_importable(span), f"{page.name}: no module or attribute {span}"


def is_project_path(span: str, page: Path) -> bool:
    """Whether a code span names a file of this project. migration.md also names files of another one."""
    first, separator, _ = span.partition("/")
    if separator:
        return first in PROJECT_FOLDERS or bool(first and (LIBRARY / first).is_dir())
    return span.endswith(".py") and span != "__init__.py" and page.name != "migration.md"


def is_importable(name: str) -> bool:
    """Whether a dotted name is a module or an attribute of one."""
    module, _, attribute = name.rpartition(".")
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # the parent is a module, not a package
        return hasattr(import_module(module), attribute)


def test_architecture_names_definitions_of_the_right_files() -> None:
    """Names in the column next to the files, and names in "`name` in `file`", are defined in these files."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = [
        [spans(cell) for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"
    ]
    places = [(row[-1], row[-2]) for row in rows if len(row) == 4 and row[-2]]
    places += [([name], [file]) for name, file in re.findall(r"`([\w.]+)` in `([\w./]+\.py)`", text)]
    assert len(places) > 40
    for names, files in places:
        undefined = set(names) - set().union(*map(definitions, files))
        assert not undefined, f"{undefined}: not in {files}"


def spans(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def definitions(file: str) -> set[str]:
    """Return the module-level names of a file, and `Class.method` of its classes."""
    path = next(folder / file for folder in (ROOT, LIBRARY) if (folder / file).is_file())
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.ClassDef):
            methods = (item for item in node.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef))
            names |= {f"{node.name}.{method.name}" for method in methods}
    return names


@of("bash", "sh", "shell")
def test_commands_are_valid(block: Block) -> None:
    for words in map(as_module, commands(block)):
        if words[0] == "make":
            unknown = [word for word in words[1:] if "=" not in word and word not in TARGETS]
            assert not unknown, f"{block}: make {unknown}"
        if "-m" in words and words[words.index("-m") - 1].endswith("python"):
            check_module(block, words[words.index("-m") + 1 :])


def check_module(block: Block, words: list[str]) -> None:
    """Fail for a module that does not exist, an unknown field, and an invalid value."""
    module, arguments = words[0], words[1:]
    assert find_spec(module), f"{block}: no module {module}"
    if cli.wants_help(arguments):
        return
    if (kind := COMMANDS.get(" ".join([module, *arguments[:1]]))) is not None:
        arguments = arguments[1:]
    elif (kind := COMMANDS.get(module)) is None:  # a module without fields
        return
    try:
        parse(block, kind, arguments)
    except UserError as error:
        raise AssertionError(f"{block}: {' '.join(words)}: {error}") from error


def parse(block: Block, kind: type[FrozenConfig], arguments: list[str]) -> None:
    positionals, dotlist = cli.split_args([cli.switched(kind, item) for item in arguments])
    if kind not in REQUIRED:
        if positionals and "data_path" in kind.flat_fields():  # --inspect FILE
            dotlist.append(f"data_path={positionals.pop()}")
        assert not positionals, f"{block}: {positionals}"
        resolve(kind, {}, dotlist)
    elif positionals and (shown := shown_experiments(block).get(positionals[0])) is not None:
        assert isinstance(shown, kind)
        resolve(kind, shown.model_dump(mode="json"), dotlist)
    elif positionals and positionals[0].endswith(".yaml"):
        resolve(kind, REQUIRED[kind], dotlist)
    else:
        read_config(kind, arguments)


def shown_experiments(block: Block) -> dict[str, FrozenConfig]:
    """Return the configs of experiments on the page: Python blocks whose first line names their file."""
    configs = {}
    for other in blocks(block.file):
        if other.language == "python" and (name := re.match(r"# experiments/(\w+)\.py\n", other.text)):
            module = types.ModuleType(name[1])
            exec(compile(other.text, str(other), "exec"), module.__dict__)
            configs[name[1]] = module.config()
    return configs


@of("python")
def test_python_compiles_and_its_imports_resolve(block: Block) -> None:
    tree = ast.parse(block.text, str(block))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            exec(compile(ast.Module([node], []), str(block), "exec"), {})


@of("json", "jsonl")
def test_json_parses(block: Block) -> None:
    """A block holds one value, or one value per line."""
    try:
        json.loads(block.text)
    except json.JSONDecodeError:
        assert [json.loads(line) for line in block.text.splitlines()], block


@of("yaml")
def test_yaml_parses(block: Block) -> None:
    assert list(yaml.safe_load_all(block.text)), block


def test_parsing_of_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    shell = "make test  # all\npython -m x \\\n  a=1\ncat <<'END'\nnot a command\nEND\n"
    page.write_text(f"# A page\n\n```bash\n{shell}```\n\n```\nplain\n```\n")
    parsed = blocks(page)
    assert [(block.language, block.line) for block in parsed] == [("bash", 4), ("", 13)]
    assert list(commands(parsed[0])) == [["make", "test"], ["python", "-m", "x", "a=1"], ["cat", "<<END"]]
    assert anchors(page) == {"a-page"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("python -m workloads.train demo lora_rnak=8", "did you mean lora_rank"),
        ("python -m workloads.evaluate tax data_path=x pool=0", "pool=0"),
        ("python -m workloads.nothing", "no module"),
        ("parallelmind train demo lora_rnak=8", "did you mean lora_rank"),
        ("parallelmind nothing", "no module"),
        (".venv/bin/python -m serving port=8000", "lora_path"),
    ],
)
def test_an_invalid_command_fails(line: str, message: str) -> None:
    block = Block("bash", f"{line}\n", PAGES[0], 1)
    with pytest.raises(AssertionError, match=message):
        test_commands_are_valid(block)


def outline(page: Path) -> list[str]:
    """Return the markers of headings and table rows, in order."""
    return re.findall(r"^(#+(?= )|\|)", prose(page), re.MULTILINE)


@pytest.mark.parametrize("name", ["README", "docs/quickstart", "docs/pos2d"])
def test_pages_in_chinese_have_the_structure_of_the_english_ones(name: str) -> None:
    """Both have the same code blocks, headings of each level and table rows."""
    english, chinese = ROOT / f"{name}.md", ROOT / f"{name}.zh-CN.md"
    assert [(b.language, b.text) for b in blocks(chinese)] == [(b.language, b.text) for b in blocks(english)]
    assert outline(chinese) == outline(english)


def test_the_list_of_source_files_is_current() -> None:
    page = source_files.PAGE.read_text(encoding="utf-8")
    assert filled(page, source_files.PART, source_files.source_files()) == page, "run make docs"


def test_the_reference_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), "run make docs"


def test_links_within_the_reference_resolve() -> None:
    assert {anchor(name) for name in COMMANDS} <= anchors(PAGE)


def test_every_field_has_a_description() -> None:
    for kind in COMMANDS.values():
        assert [text.name for text in cli.field_texts(kind) if not text.meaning] == []
