"""README.md, README.zh-CN.md and docs/: links, figures and keys are right; commands and snippets do what they say."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import MISSING, fields
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import CHECKPOINT, GOLDEN
from helpers import read, write

from janus_dola import programs
from janus_dola.programs.options import DEFAULT, PROGRAMS, ModelConfig, read_config

pytestmark = pytest.mark.usefixtures("loaded_once")

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "README.zh-CN.md")
DOCS = tuple(sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in (*READMES, *DOCS)}
HAN = r"[\u3000-\u30ff\u3400-\u9fff\uff00-\uffef]"
# Commands that no test types, by how they begin, and why.
NOT_TYPED = {
    "make demo": "test_make_demo_prints_what_is_shown types its rule",
    "make serve": "a server, of an environment of its own; tests/vllm asks it",
    "make web": "a server, of an environment of its own; tests/web asks it",
    "source ": "changes the reader's shell",
    "pip install ": "needs a package registry",
    "accelerate launch ": "needs published weights and eight GPUs; tests/eval runs the harness",
    "janus-dola web ": "a server; tests/web asks it",
    "janus-dola prompts=FILE.jsonl output=ANSWERS.jsonl batch_size=8 workers=2": "needs Ray; tests/workers runs it",
    "janus-dola prompts=FILE.jsonl output=ANSWERS.jsonl model_path=FOLDER engine=vllm": "tests/vllm runs it",
    "vllm serve ": "a server; tests/vllm asks it",
    "transformers serve ": "a server; tests/serve asks it",
    "curl ": "needs the server; tests/vllm asks it",
}
SMALL = (f"model_path={CHECKPOINT}", "device=cpu", "generation.max_new_tokens=6")


def without_fences(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)


def blocks(text: str) -> list[str]:
    """The indented blocks of code, without their indentation and comments."""
    found = re.findall(r"(?:^    .*\n)+", without_fences(text), re.M)
    return [re.sub(r" +# .*$", "", re.sub(r"^    ", "", block, flags=re.M), flags=re.M) for block in found]


def commands(name: str) -> list[str]:
    """What a reader types. Indented lines go on with the command before them."""
    found: list[str] = []
    for block in blocks(TEXTS[name]):
        if block.startswith("$ "):  # with what it prints
            found += re.findall(r"^\$ (.*)$", block, re.M)
        elif not block.startswith("janus/ "):  # the tree
            found += re.split(r"\n(?! )", re.sub(r"\\\n +", "", block).strip())
    return found


def snippets(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", TEXTS[name], re.S)


def typed(name: str) -> list[str]:
    """Those of its commands that a test types."""
    return [line for line in commands(name) if not line.startswith(tuple(NOT_TYPED))]


def test_both_say_the_same() -> None:
    """Up to what is prose: the Chinese has the same code, the same figures in its tables, and the same links."""
    english, chinese = (TEXTS[name] for name in READMES)
    assert "[简体中文](README.zh-CN.md)" in english[:200] and "[English](README.md)" in chinese[:200]
    assert snippets(READMES[0]) == snippets(READMES[1])
    assert commands(READMES[0]) == commands(READMES[1])
    for ours, theirs in zip(blocks(english), blocks(chinese), strict=True):
        if "janus_dola/" in ours:  # the tree, whose notes are prose
            names = [re.findall(r"^ *[\w./]+|\b\w+\.py\b|\w+/(?= )", block, re.M) for block in (ours, theirs)]
            assert names[0] == names[1]
        else:
            assert ours == theirs
    assert len(re.findall(r"^## ", english, re.M)) == len(re.findall(r"^## ", chinese, re.M))
    for pattern in (r"(?<!`)`([^`\n]+)`(?!`)", r"\]\((?!README)([^)]+)\)", r'src="([^"]+)"'):
        prose = [re.sub(r"```.*?```", "", text, flags=re.S) for text in (english, chinese)]
        assert sorted(re.findall(pattern, prose[0])) == sorted(re.findall(pattern, prose[1])), pattern
    rows = [re.findall(r"^\|.*\|$", text, re.M) for text in (english, chinese)]
    figures = [[re.findall(r"\d[\d.,–-]*\d|\d", row) for row in table] for table in rows]
    assert figures[0] == figures[1] and len(figures[0]) == 6
    assert len(re.findall(HAN, chinese)) > 500 and not re.findall(HAN, english.replace("简体中文", ""))
    assert not any(re.findall(HAN, TEXTS[name]) for name in DOCS)


def paragraphs(name: str) -> list[str]:
    """The prose, without code, tables, headings, and the targets of links."""
    text = re.sub(r"^(    |\||#|<).*$", "", without_fences(TEXTS[name]), flags=re.M)
    return [
        re.sub(r"`[^`]+`|\]\([^)]*\)|arXiv [\d.]+", "", part) for part in re.split(r"\n\s*\n", text) if part.strip()
    ]


def figures_in(text: str) -> list[str]:
    """Numbers, but for those in names, such as 7B and H100."""
    return re.findall(r"(?<![A-Za-z\d.-])\d+(?:[.,]\d+)*(?![A-Za-z\d])", text)


@pytest.mark.parametrize("name", READMES)
def test_the_first_five_minutes_are_short(name: str) -> None:
    assert len(TEXTS[name].splitlines()) <= 110
    assert all(len(figures_in(part)) <= 2 for part in paragraphs(name)), name


@pytest.mark.parametrize("name", READMES)
def test_figures_are_those_of_the_pages_that_have_them(name: str) -> None:
    """The demo's of its card, costs of benchmarks."""
    card = (ROOT / "demo" / "checkpoint" / "README.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\*\*1500 descriptions of the test set\*\*:\n\n(.*?)\n\n", card, re.M | re.S)
    exact = dict(re.findall(r"DoLa, bucket (\d), α 0\.1\*{0,2} \| ([+-][\d.]+) ", table))
    (honest,) = [part for part in paragraphs(name) if "picked" in part or "挑" in part]
    assert [f"+{figures_in(honest)[0]}", f"-{figures_in(honest)[1]}"] == [exact["0"], exact["2"]]
    benchmarks = figures_in((ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8"))
    costs = [figures_in(row.split("|", 2)[2]) for row in re.findall(r"^\| \dB.*$", TEXTS[name], re.M)]
    assert len(costs) == 4 and {figure for row in costs for figure in row} <= set(benchmarks)


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r'\]\(([^)]+)\)|src="([^"]+)"', TEXTS[name]):
        path, _, section = "".join(target).partition("#")
        if path.startswith("https://"):
            continue
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), path
        if section:
            headings = re.findall(r"^#+ (.*)$", without_fences(file.read_text(encoding="utf-8")), re.M)
            assert section in [re.sub(r"[^\w\s-]", "", line.lower()).replace(" ", "-") for line in headings], target


def test_the_keys_of_programs_are_those_of_the_dataclasses() -> None:
    """All of them, each with its default."""
    modules = [import_module(f"janus_dola.programs.{name}") for name in PROGRAMS]
    schemas = [getattr(m, f"{name.capitalize()}Config") for m, name in zip(modules, PROGRAMS, strict=True)]
    given = yaml.safe_load(DEFAULT.read_text(encoding="utf-8"))
    defaults: dict[str, list[Any]] = {}
    for key in (key for schema in schemas for key in fields(schema)):
        default = key.default if key.default_factory is MISSING else key.default_factory()
        defaults.setdefault(key.name, []).append(default)
        defaults[key.name] += [given[key.name]] if key.name in given else []
    rows = [
        re.split(r" (?<!\\)\| ", row) for row in re.findall(r"^\| (`\w+` \|.*) \|$", TEXTS["docs/programs.md"], re.M)
    ]
    assert {row[0].strip("`") for row in rows} == defaults.keys()
    for name, default, _ in rows:
        value = "" if default == "required" else yaml.safe_load(default.strip("`").replace("\\|", "|"))
        assert value in defaults[name.strip("`")], name


def test_every_command_is_typed_or_listed() -> None:
    assert {name for name in TEXTS if snippets(name)} == {*READMES, "docs/python.md", "docs/serving.md"}
    found = [line for name in TEXTS for line in commands(name)]
    assert all(line.startswith("janus-dola") for name in TEXTS for line in typed(name))
    assert all(any(line.startswith(start) for line in found) for start in NOT_TYPED)
    rules = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {rule for text in TEXTS.values() for rule in re.findall(r"`make ([\w-]+)`|^    make ([\w-]+)", text, re.M)}
    assert {"".join(rule) for rule in named} <= rules


def test_make_demo_prints_what_is_shown(tmp_path: Path) -> None:
    """Up to the seconds."""
    (rule,) = re.findall(r"^demo: .*\n\t\.venv/bin/python (.*)$", (ROOT / "Makefile").read_text(), re.M)
    command = [sys.executable, *shlex.split(rule.replace("outputs", str(tmp_path)))]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT, check=True)
    printed = done.stdout.replace(str(tmp_path), "outputs")
    for name in READMES:
        (shown,) = [block for block in blocks(TEXTS[name]) if block.startswith("$ make demo\n")]
        seconds = r"\d\.\d{4} seconds"
        assert re.sub(seconds, "", "$ make demo\n" + printed) == re.sub(seconds, "", shown)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the pages name, which is the working directory."""
    shutil.copy(GOLDEN / "expected" / "images" / "wide.png", tmp_path / "cat.png")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    asked = {"images": ["cat.png"], "question": "What is on the sofa?"}
    write(tmp_path / "FILE.jsonl", [asked, {"question": "What is in the image?"}])
    write(tmp_path / "val.jsonl", [asked | {"answer": "A cat."}, {"question": "Is it?", "answer": "Yes."}])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def type_it(command: str, monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    """Runs a program of ours as its line has it, with a checkpoint and a length for a test over what the line says."""
    program, *arguments = shlex.split(command)
    assert program == "janus-dola"
    monkeypatch.setattr(sys, "argv", ["janus-dola", *arguments, *more])
    with pytest.raises(SystemExit) as exit_:
        programs.main()
    assert exit_.value.code in (0, None)  # None is 0


def test_the_commands_run(here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the English, which are those of the Chinese."""
    one, many, calibrate = (
        next(line for line in commands("README.md") if part in line)
        for part in ("cat.png", "output=ANSWERS", " calibrate ")
    )
    (config,) = [argument for argument in shlex.split(one) if argument.startswith("config=")]
    assert read_config(ModelConfig, [config]).model_path == "deepseek-ai/Janus-Pro-7B"
    type_it(one, monkeypatch, *SMALL)
    answer = capsys.readouterr().out.strip()
    type_it(many, monkeypatch, *SMALL)
    lines = read(here / "ANSWERS.jsonl")
    assert list(lines) == ["line 1", "line 2"] or list(lines) == ["line 2", "line 1"]
    assert lines["line 1"]["text"] == answer
    assert "DoLa changed" in (here / "REPORT.html").read_text(encoding="utf-8")
    type_it(calibrate, monkeypatch, *SMALL)
    assert "bucket 2" in capsys.readouterr().out and (here / "mine.yaml").is_file()


@pytest.mark.parametrize("name", [name for name in TEXTS if name not in READMES and typed(name)])
def test_the_commands_of_docs_run(name: str, here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the page, each with the files that those before it wrote."""
    for example in re.findall(r"```json\n(.*?)```", TEXTS[name], re.S):
        write(here / "FILE.jsonl", [json.loads(line) for line in example.splitlines()])
    for line in typed(name):
        _, *arguments = shlex.split(line)
        small: tuple[str, ...] = SMALL
        if arguments[0] in ("report", "--help"):
            small = ()
        elif arguments[0] == "draw":
            small = SMALL[:2]
        elif arguments[0] == "export":
            small = SMALL[:1] if "config=" in line else ()
        type_it(line, monkeypatch, *small)
        printed = capsys.readouterr().out
        for key, _, value in (argument.partition("=") for argument in arguments if "=" in argument):
            assert key not in ("output", "report", "out", "trace") or (here / value).exists(), line
            if key == "report":
                page = (here / value).read_text(encoding="utf-8")
                if "compare=true" in arguments:
                    assert "DoLa changed" in page, line
                else:
                    answers = [answer["text"] for answer in read(here / "ANSWERS.jsonl").values()]
                    assert all(escape(text.split()[0]) in page for text in answers), line
        assert "calibrate" not in arguments or "bucket 2" in printed
        assert "--help" not in arguments or "bucket_id" in printed
    if name == "docs/programs.md":
        lines = read(here / "ANSWERS.jsonl").values()
        assert len(lines) == 3 and all("correct" in line for line in lines)


def test_the_served_answers_are_the_demos(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the space in front. The requests need the server, which tests/vllm compares with the wrapper."""
    text = TEXTS["docs/serving.md"]
    (shown,), (keys,) = re.findall(r"```text\n(.*?)```", text, re.S), re.findall(r'"vllm_xargs": (.*)}', text)
    monkeypatch.chdir(ROOT)
    for question, dola in (("Is there a blue ring in the image?", {}), ("Describe the image.", json.loads(keys))):
        assert f'"text": "{question}"' in text
        given = [f"{key}={value}" for key, value in dola.items()]
        type_it(f"janus-dola image=demo/images/scene.png question='{question}'", monkeypatch, "device=cpu", *given)
    assert shown == "".join(f" {line}\n" for line in capsys.readouterr().out.splitlines())


def small_snippet(name: str) -> str:
    """The README's, on the test's checkpoint."""
    (code,) = snippets(name)
    for part, instead in (
        ('"deepseek-ai/Janus-Pro-7B"', json.dumps(str(CHECKPOINT))),
        (".to(torch.bfloat16).cuda()", ""),  # to(bfloat16) rounds the rotary frequencies, too; from_pretrained does not
        ("max_new_tokens=512", "max_new_tokens=12"),
    ):
        assert code.count(part) == 1
        code = code.replace(part, instead)
    return code


def test_the_snippet_answers_as_the_command_does(here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    exec(compile(small_snippet("README.md"), "README.md", "exec"), {})
    printed = capsys.readouterr().out.strip()
    (one,) = [line for line in commands("README.md") if "cat.png" in line]
    small = (f"model_path={CHECKPOINT}", "device=cpu", "generation.max_new_tokens=12")
    type_it(one, monkeypatch, *small)
    assert capsys.readouterr().out.strip() == printed != ""


def test_the_snippets_of_python_run(here: Path, capsys: Any) -> None:
    """In order, after the README's, whose answer those without DoLa's keys repeat."""
    names: dict[str, Any] = {}
    exec(compile(small_snippet("README.md"), "README.md", "exec"), names)
    for code in snippets("docs/python.md"):
        exec(compile(code.replace('"max_new_tokens": 512', '"max_new_tokens": 12'), "docs/python.md", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) >= 7  # the README's answer, three rows, the layers, two scores
    alone, trace = names["baseline"][0].tolist(), names["trace"]
    assert names["configs"][2].use_dola_lm is False and trace.layers.shape[1] == names["outputs"].shape[1]
    assert alone and (here / "trace.png").is_file() and (here / "trace.jsonl").is_file()
    assert names["scores"].shape[0] == 3  # a configuration each
