"""README.md and README.zh-CN.md: the same commands, code, figures and links; and the commands do what they say."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import CHECKPOINT, GOLDEN
from helpers import read, write

from janus_dola import programs
from janus_dola.programs.options import ModelConfig, read_config

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "README.zh-CN.md")
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in READMES}
HAN = r"[\u3000-\u30ff\u3400-\u9fff\uff00-\uffef]"


def blocks(text: str) -> list[str]:
    """The indented blocks of code, without their indentation and comments."""
    found = re.findall(r"(?:^    .*\n)+", text, re.M)
    return [re.sub(r" +# .*$", "", re.sub(r"^    ", "", block, flags=re.M), flags=re.M) for block in found]


def commands(name: str) -> list[str]:
    """What a reader types, a line each."""
    pattern = r"^(?:\$ )?((?:make|\.venv/bin/python|python|janus-dola|accelerate|pip) .*)$"
    return [line for block in blocks(TEXTS[name]) for line in re.findall(pattern, block, re.M)]


def snippets(name: str) -> list[str]:
    """That of the library, and that of the server's client."""
    return re.findall(r"```python\n(.*?)```", TEXTS[name], re.S)


def test_both_say_the_same() -> None:
    """Up to what is prose: the Chinese has the same code, the same figures in its tables, and the same links."""
    english, chinese = (TEXTS[name] for name in READMES)
    assert "[简体中文](README.zh-CN.md)" in english[:200] and "[English](README.md)" in chinese[:200]
    assert snippets(READMES[0]) == snippets(READMES[1])
    assert commands(READMES[0]) == commands(READMES[1])
    for ours, theirs in zip(blocks(english), blocks(chinese), strict=True):
        if "janus_dola/" in ours:  # the tree, whose notes are prose
            names = [re.findall(r"^[\w./]+|\b\w+\.py\b|\w+/(?= )", block, re.M) for block in (ours, theirs)]
            assert names[0] == names[1]
        else:
            assert ours == theirs
    assert len(re.findall(r"^## ", english, re.M)) == len(re.findall(r"^## ", chinese, re.M))
    for pattern in (r"(?<!`)`([^`\n]+)`(?!`)", r"\]\((?!README)([^)]+)\)", r'src="([^"]+)"'):
        prose = [re.sub(r"```.*?```", "", text, flags=re.S) for text in (english, chinese)]
        assert sorted(re.findall(pattern, prose[0])) == sorted(re.findall(pattern, prose[1])), pattern
    rows = [re.findall(r"^\|.*\|$", text, re.M) for text in (english, chinese)]
    figures = [[re.findall(r"\d[\d.,–-]*\d|\d", row) for row in table] for table in rows]
    assert figures[0] == figures[1] and len(figures[0]) > 15
    assert len(re.findall(HAN, chinese)) > 1500 and not re.findall(HAN, english.replace("简体中文", ""))


@pytest.mark.parametrize("name", READMES)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r'\]\(([^)]+)\)|src="([^"]+)"', TEXTS[name]):
        path = "".join(target)
        assert path.startswith("https://") or (ROOT / path).exists(), path


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
    """A folder with the files that the READMEs name, which is the working directory."""
    shutil.copy(GOLDEN / "expected" / "images" / "wide.png", tmp_path / "cat.png")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    asked = {"images": ["cat.png"], "question": "What is on the sofa?"}
    write(tmp_path / "FILE.jsonl", [asked, {"question": "What is in the image?"}])
    write(tmp_path / "val.jsonl", [asked | {"answer": "A cat."}, {"question": "Is it?", "answer": "Yes."}])
    (tmp_path / "FILE").write_text("alpha: 0.2\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def type_it(command: str, monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    """Runs a program of ours as its line has it, with a checkpoint and a length for a test over what the line says."""
    program, *arguments = shlex.split(command)
    if program == ".venv/bin/python":
        assert arguments.pop(0) == "inference_dola.py"
    monkeypatch.setattr(sys, "argv", ["janus-dola", *arguments, *more])
    with pytest.raises(SystemExit) as exit_:
        programs.main()
    assert exit_.value.code == 0


@pytest.mark.parametrize("name", READMES)
def test_the_commands_run(name: str, here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    small = (f"model_path={CHECKPOINT}", "device=cpu", "generation.max_new_tokens=6")
    one, many, report = (
        next(line for line in commands(name) if part in line) for part in ("cat.png", "batch_size=8", " report ")
    )
    assert read_config(ModelConfig, [shlex.split(one)[2]]).model_path == "deepseek-ai/Janus-Pro-7B"
    type_it(one, monkeypatch, *small)
    answer = capsys.readouterr().out.strip()
    type_it(many, monkeypatch, *small)
    lines = read(here / "ANSWERS.jsonl")
    assert list(lines) == ["line 1", "line 2"] or list(lines) == ["line 2", "line 1"]
    assert lines["line 1"]["text"] == answer
    type_it(report, monkeypatch)
    assert answer.split()[0] in (here / "REPORT.html").read_text(encoding="utf-8")
    (keys,) = re.findall(r"`(compare=true report=\S+)`", TEXTS[name])
    (here / "REPORT.html").unlink()
    type_it(many.replace("ANSWERS", "BOTH"), monkeypatch, *small, *keys.split())
    assert "DoLa changed" in (here / "REPORT.html").read_text(encoding="utf-8")
    calibrate, look = (
        next(line for line in commands(name) if part in line) for part in (" calibrate ", "mine.yaml use")
    )
    type_it(calibrate, monkeypatch, *small)
    assert "bucket 2" in capsys.readouterr().out and (here / "mine.yaml").is_file()
    type_it(look, monkeypatch, *small)
    assert "DoLa changed" in (here / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", READMES)
def test_the_snippet_answers_as_the_command_does(
    name: str, here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _ = snippets(name)
    for typed, instead in (
        ('"deepseek-ai/Janus-Pro-7B"', json.dumps(str(CHECKPOINT))),
        (".to(torch.bfloat16).cuda()", ""),  # to(bfloat16) rounds the rotary frequencies, too; from_pretrained does not
        ("max_new_tokens=512", "max_new_tokens=12"),
    ):
        assert code.count(typed) == 1
        code = code.replace(typed, instead)
    exec(compile(code, name, "exec"), {})
    printed = capsys.readouterr().out.strip()
    (one,) = [line for line in commands(name) if "cat.png" in line]
    small = (f"model_path={CHECKPOINT}", "device=cpu", "generation.max_new_tokens=12")
    type_it(one, monkeypatch, *small)
    assert capsys.readouterr().out.strip() == printed != ""
