"""Names, tooltips and help pages: English says what the schemas say, Chinese has all of it too."""

from __future__ import annotations

import ast
import functools
import json
import re
from pathlib import Path

import comfyui_modelopt
import pytest
from comfy.samplers import KSampler
from comfyui_modelopt.devtools import locales
from comfyui_modelopt.nodes import NODES
from comfyui_modelopt.quantize.candidates import CANDIDATES

ROOT = Path(comfyui_modelopt.__file__).parent
DOCS = ROOT / "web" / "docs"
SCHEMAS = {node.define_schema().node_id: node.define_schema() for node in NODES}
# what a Chinese reader knows by these letters, as in ComfyUI's own Chinese
LETTERS = {"cfg", "clip", "vae", *CANDIDATES}
HAN = re.compile(r"[\u4e00-\u9fff]")
# the page compiles names and descriptions as messages of vue-i18n, where these mean something
SYNTAX = re.compile(r"[{}@|]")
LANGUAGES = ("en", "zh")
NONE = ""  # of an input without a default
SECTIONS = {
    "en": ("Inputs", "Outputs", "Typical mistakes", "See also"),
    "zh": ("输入", "输出", "常见错误", "另请参阅"),
}
EVERY_PAGE = pytest.mark.parametrize(
    ("node_id", "language"), [(one, language) for one in SCHEMAS for language in LANGUAGES]
)


def read(language: str, name: str) -> dict:
    path = ROOT / "locales" / language / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def leaves(texts: dict, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], str]:
    found = {}
    for name, value in texts.items():
        here = (*path, name)
        found |= leaves(value, here) if isinstance(value, dict) else {here: value}
    return found


def page_path(node_id: str, language: str) -> Path:
    """English is what the page falls back to in any other language."""
    return DOCS / f"{node_id}.md" if language == "en" else DOCS / node_id / f"{language}.md"


@functools.cache
def page(node_id: str, language: str) -> str:
    return page_path(node_id, language).read_text(encoding="utf-8")


def section(node_id: str, language: str, number: int) -> str:
    title = SECTIONS[language][number]
    return re.split(r"^## ", page(node_id, language), flags=re.MULTILINE)[
        [None, *SECTIONS[language]].index(title)
    ].removeprefix(title)


def rows(text: str) -> list[list[str]]:
    """Cells of the first table, without its head."""
    table = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    lines = table[0].splitlines()[2:] if table else []
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def code(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def messages(node_id: str, language: str) -> list[str]:
    """The messages that the mistakes' section explains."""
    return re.findall(r"^- `([^`]+)`[:：]", section(node_id, language, 2), re.MULTILINE)


# --- locales ---


@pytest.mark.parametrize(
    ("name", "made"), [("nodeDefs", locales.node_defs), ("main", locales.main_texts)]
)
def test_english_is_what_the_schemas_say(name, made):
    text = (ROOT / "locales" / "en" / f"{name}.json").read_text(encoding="utf-8")
    assert text == locales.written(made(NODES)), "run `python dev.py locales`"


def test_every_node_input_and_output_is_explained():
    for path, text in leaves(locales.node_defs(NODES)).items():
        assert text.strip(), path
    for schema in SCHEMAS.values():
        for name, one in locales.inputs_of(schema):
            assert one.tooltip, (schema.node_id, name)


def test_options_of_options_are_among_them():
    names = {name for name, _ in locales.inputs_of(SCHEMAS["ModelOptQuantize"])}
    assert {"format", "format.algorithm", "format.algorithm.alpha", "format.weights"} <= names
    assert "format_algorithm_alpha" in read("en", "nodeDefs")["ModelOptQuantize"]["inputs"]


def test_an_option_of_several_formats_is_explained_for_all_of_them():
    tips = {
        one.tooltip
        for name, one in locales.inputs_of(SCHEMAS["ModelOptQuantize"])
        if name == "format.algorithm"
    }
    merged = read("en", "nodeDefs")["ModelOptQuantize"]["inputs"]["format_algorithm"]["tooltip"]
    words = [set(re.findall(r"(\w+): ", tip)) for tip in tips]
    assert len(tips) > 1
    assert set(re.findall(r"(\w+): ", merged)) == set().union(*words)
    assert merged.count("mse: ") == 1


@pytest.mark.parametrize("name", ["nodeDefs", "main"])
def test_chinese_is_complete(name):
    english, chinese = leaves(read("en", name)), leaves(read("zh", name))
    assert english.keys() == chinese.keys()
    for path, text in chinese.items():
        if path[-1] == "name" and english[path] in LETTERS:
            assert text.lower() == english[path], path
        else:
            assert HAN.search(text), (path, text)


def test_chinese_names_the_same_options_and_numbers():
    english, chinese = leaves(read("en", "nodeDefs")), leaves(read("zh", "nodeDefs"))
    for path, text in english.items():
        options = re.findall(r"(?:^|[.;] )([a-z]\w*(?: only| \+ \w+)?): ", text)
        for word in [*options, *code(text), *re.findall(r"\d+", text)]:
            assert word in chinese[path], (path, word)


@pytest.mark.parametrize("language", LANGUAGES)
def test_texts_are_no_syntax_to_the_page(language):
    for path, text in leaves(read(language, "nodeDefs")).items():
        assert path[-1] == "tooltip" or not SYNTAX.search(text), path


def test_files_are_those_of_the_nodes():
    pages = {path.relative_to(DOCS) for path in DOCS.rglob("*.md")}
    wanted = {
        page_path(node_id, language).relative_to(DOCS)
        for node_id in SCHEMAS
        for language in LANGUAGES
    }
    assert pages == wanted


# --- help pages ---


@EVERY_PAGE
def test_page_names_every_input(node_id, language):
    inputs = {}
    for name, one in locales.inputs_of(SCHEMAS[node_id]):
        inputs.setdefault(name, []).append(one)
    found = rows(section(node_id, language, 0))
    shown = [code(cell.split("<br>")[0])[-1] for cell, _ in found]
    assert shown == [name.split(".")[-1] for name in inputs]
    named = read(language, "nodeDefs")[node_id]["inputs"]
    for (cell, meaning), (name, ones) in zip(found, inputs.items(), strict=True):
        label, kind, *default = cell.split("<br>")
        assert meaning and (language == "en") != bool(HAN.search(meaning)), name
        assert named[name.replace(".", "_")]["name"] in label, name
        given = {default_of(one) for one in ones}
        if given == {NONE}:
            assert not default, name
        elif len(given) == 1 and (value := given.pop()) is not None:
            assert code(*default) == [value], name
        for bound in ("min", "max"):
            value = getattr(ones[0], bound, None)
            assert value in (None, 2**64 - 1) or number(value) in kind, (name, bound)


def default_of(one) -> str | None:
    """A default as the pages write it; None for one that they say in words."""
    default, options = getattr(one, "default", None), getattr(one, "options", None)
    if default is None:
        return options[0].key if options and hasattr(options[0], "key") else NONE
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, str):
        return None if "\n" in default or not default else default
    return number(default)


def number(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)


@EVERY_PAGE
def test_page_names_every_option(node_id, language):
    words = code(page(node_id, language))
    for name, one in locales.inputs_of(SCHEMAS[node_id]):
        options = getattr(one, "options", None) or ()
        if options in (KSampler.SAMPLERS, KSampler.SCHEDULERS):
            continue
        if options and not hasattr(options[0], "key") and one.default is None:
            continue  # a list of the machine's files
        for option in options:
            assert getattr(option, "key", option) in words, (name, option)


@EVERY_PAGE
def test_page_names_every_output(node_id, language):
    outputs = SCHEMAS[node_id].outputs or ()
    found = rows(section(node_id, language, 1))
    assert [code(cell)[-1] for cell, _ in found] == [one.display_name for one in outputs]
    for cell, meaning in found:
        assert meaning and (language == "en") != bool(HAN.search(meaning)), cell


@EVERY_PAGE
def test_page_title_and_links(node_id, language):
    """The page looks for pictures beside web/docs, and opens other links relative to itself, where
    nothing of ours lies."""
    text = page(node_id, language)
    title = read(language, "nodeDefs")[node_id]["display_name"]
    assert text.startswith(f"# {title}\n")
    targets = re.findall(r"(!?)\[[^\]]*\]\(([^)]+)\)", text)
    assert ("!", f"pictures/{node_id}.png") in targets
    for picture, target in targets:
        relative = not re.match(r"https?://", target)
        assert not relative or (picture and target == f"pictures/{node_id}.png"), target
    other = {read(language, "nodeDefs")[one]["display_name"] for one in SCHEMAS} - {title}
    seen = re.findall(r"^- \*\*(.+?)\*\*[:：]", section(node_id, language, 3), re.MULTILINE)
    assert seen and set(seen) <= other


@pytest.mark.parametrize("node_id", SCHEMAS)
def test_both_languages_say_the_same(node_id):
    both = [page(node_id, language) for language in LANGUAGES]
    assert messages(node_id, "en") == messages(node_id, "zh")
    for mark in ("\n- ", "\n|", "\n## ", "\n\n"):
        assert both[0].count(mark) == both[1].count(mark), mark
    assert set(code(both[0])) == set(code(both[1]))


# --- messages ---


ROOMS = ("formats", "kernels", "loaders", "nodes", "quantize", "utils")
COMMANDS = ("conversion", "devtools", "convert.py", "dev.py")


@functools.cache
def strings_of_the_code(rooms: tuple[str, ...] = ROOMS) -> tuple[str, ...]:
    """Every string in what raises or reports, a value within one as a NUL."""
    found = []
    for room in rooms:
        for path in [ROOT / room, *(ROOT / room).rglob("*.py")]:
            if path.suffix != ".py":
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [getattr(part, "value", None) for part in node.values]
                    found.append("".join(p if isinstance(p, str) else "\0" for p in parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return tuple(found)


def is_said(message: str, rooms: tuple[str, ...] = ROOMS) -> bool:
    """`…` stands for any values."""
    pattern = re.compile("[^\n]*?".join(map(re.escape, message.strip("…").split("…"))))
    return any(pattern.search(text) for text in strings_of_the_code(rooms))


@pytest.mark.parametrize("node_id", SCHEMAS)
def test_messages_are_those_of_the_code(node_id):
    for message in messages(node_id, "en"):
        assert len(message.replace("…", "")) > 12, message
        assert is_said(message), message


def test_a_message_that_nobody_raises_is_found():
    assert is_said("a skip pattern must match a layer, … matches none of …")
    assert not is_said("a skip pattern must match a node, … matches none of …")


# of the README's table: what ComfyUI, its page, torch, ModelOpt and argparse say
OF_OTHERS = {
    "Could not acquire lock on database",
    "Error while deserializing header",
    "Failed to convert an input value",
    "File name too long",
    "IMPORT FAILED",
    "Inserted … quantizers",
    "KeyError",
    "Missing Models",
    "Node 2.0 only",
    "Port 8188 is already in use",
    "Required input is missing",
    "Return type mismatch between linked nodes",
    "SyntaxError",
    "Torch not compiled with CUDA enabled",
    "Value not in list",
    "Value … bigger than max of …",
    "Value … smaller than min of …",
    "Weights only load failed",
    "You need pytorch with cu130 or higher",
    "does not contain a valid clip or text encoder model",
    "invalid choice",
    "invalid int value",
    "not allowed with argument",
    "not found. The custom node may not be installed",
    "the following arguments are required",
    "transformers … is not tested with current version of modelopt",
    "unrecognized arguments",
}
# and what is put together of several strings
COMPOSED = {
    "16 bits, compiled: not measured",
    "a LoRA must be a whole file of weights",
    "a calibration file must have a modelopt_calibration header",
    "a checkpoint must be a whole file of weights",
    "an int8 convolution kernel needs compute capability 8.0",
    "dequantized: fp8 needs compute capability 8.9",
    "exact reference: the … convolution kernel needs Triton: …",
    "needs in_features divisible by …",
    "needs the UNet (… GB) and room for its calls … ran out",
    "pictures need positive, negative, latent_image",
    "the computer's memory has … GB free and ran out",
    "the file must lie in ComfyUI's diffusion_models folder",
    "the file must lie in ComfyUI's modelopt_calibration folder",
}


def test_the_table_of_errors_quotes_what_is_said():
    """A flag before the rule stands for any."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.partition("\n## Troubleshooting\n")[2].partition("\n## ")[0]
    cells = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| ")]
    quoted = {one for cell in cells for one in re.findall(r'"([^"]+)"', cell)}
    assert len(quoted) > 100 and quoted > OF_OTHERS | COMPOSED
    rules = {re.sub(r"^--[a-z-]+ ", "", one) for one in quoted - OF_OTHERS - COMPOSED}
    strange = sorted(one for one in rules if not is_said(one, ROOMS + COMMANDS))
    assert not strange, strange
