"""report=FILE.html and the sub-command `report`: the page of a batch run, as text; tests/web opens it in a browser."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import Fails
from helpers import IMAGES, TALL, TEXT, WIDE, cli_arguments, read, write

from janus_dola.programs import answer, report
from janus_dola.programs.results import Results

pytestmark = pytest.mark.usefixtures("loaded_once")


class Text(HTMLParser):
    """The text of a page, and its tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.parts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.parts.append(data)


def tables(path: Path) -> list[list[str]]:
    (table,) = re.findall(r'<table id="totals">.*?</table>', path.read_text(encoding="utf-8"), re.S)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>.*?</tr>", table, re.S)]


def report_arguments(folder: Path, name: str = "again.html") -> list[str]:
    return [f"prompts={folder / 'prompts.jsonl'}", f"output={folder / 'out.jsonl'}", f"report={folder / name}"]


def test_the_sub_command_writes_the_page_that_the_run_wrote(tmp_path: Path) -> None:
    html = "<script>alert(1)</script>"
    lines = [WIDE | {"id": html, "question": html, "answer": html}, TALL | {"alpha": 0.5}, TEXT | {"id": 7}, "broken"]
    write(tmp_path / "prompts.jsonl", lines)
    page = tmp_path / "new folder" / "run.html"
    assert answer.run(cli_arguments(tmp_path, "compare=true", f"report={page}")) == 1
    report.run(report_arguments(tmp_path))
    assert (tmp_path / "again.html").read_bytes() == page.read_bytes()
    found = Text(page.read_text(encoding="utf-8"))
    assert found.parts.count(html) == 3 and "script" not in dict(found.tags)  # id, question and answer, as text
    assert "alpha: 0.5" in found.parts
    assert {name for _, attrs in found.tags for name in attrs} & {"href", "srcset", "onload", "onerror"} == set()
    sources = [attrs["src"] or "" for tag, attrs in found.tags if tag == "img"]
    assert len(sources) == 2 and all(source.startswith("data:image/jpeg;base64,") for source in sources)


def test_a_run_in_progress(tmp_path: Path, capsys: Any) -> None:
    """Another process may be writing: its file is read, and not touched."""
    write(tmp_path / "prompts.jsonl", [TEXT | {"id": i} for i in range(4)])
    answer.run(cli_arguments(tmp_path))
    output = tmp_path / "out.jsonl"
    whole = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(whole[:2]) + whole[2][:-9])
    settings = json.loads((tmp_path / "out.jsonl.settings.json").read_text())
    before = output.read_bytes()
    capsys.readouterr()
    report.run(report_arguments(tmp_path))
    assert output.read_bytes() == before
    assert capsys.readouterr() == ("", f"{tmp_path / 'again.html'}: 2 answers, 0 errors\n")
    with Results(output, settings):
        report.run(report_arguments(tmp_path))
    assert "2 prompts answered, 2 to come" in (tmp_path / "again.html").read_text(encoding="utf-8")


def test_one_answer_each(tmp_path: Path) -> None:
    """Without compare there is nothing to be changed, gained or lost."""
    for name, on in (("on", True), ("off", False)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "prompts.jsonl", [TEXT | {"id": i, "answer": "Paris"} for i in range(3)])
        page = tmp_path / name / "run.html"
        answer.run(cli_arguments(tmp_path / name, f"use_dola_lm={on}", f"report={page}"))
        found = Text(page.read_text(encoding="utf-8"))
        assert [attrs["id"] for tag, attrs in found.tags if tag == "input"] == ["all"]
        assert found.parts.count(f"DoLa {name} ") == 3 and "mark" not in dict(found.tags)
        assert tables(page) == [["", "questions", "right, %", "95 %"], [f"DoLa {name}", "3", "0.0", "[0.0, 0.0]"]]
        assert ("layers" in found.parts) == on


def test_pope(tmp_path: Path) -> None:
    pope = {"image": "wide.png", "text": "Is it?"}
    splits = ["popular", "popular", "random", "random", "popular", None]
    lines = [pope | {"question_id": i, "label": ("yes", "no")[i % 2], "category": s} for i, s in enumerate(splits)]
    write(tmp_path / "prompts.jsonl", lines)
    answer.run(cli_arguments(tmp_path, "compare=true", f"image_root={IMAGES}", f"report={tmp_path / 'run.html'}"))
    assert all("no" not in line["text"].lower().split() for line in read(tmp_path / "out.jsonl").values())
    same = ["50.0", "100.0", "66.7", "100.0"]  # all are yes, of which half are right
    same += ["66.7", "80.0", "50.0", "66.7"]  # of three popular ones two are right
    head = ["precision", "recall", "F1", "“yes”", "popular, right", "popular, F1", "random, right", "random, F1"]
    assert [row[-8:] for row in tables(tmp_path / "run.html")] == [head, same, same]
    report.run([*report_arguments(tmp_path), f"image_root={IMAGES}"])
    assert (tmp_path / "again.html").read_bytes() == (tmp_path / "run.html").read_bytes()


def test_what_is_refused(tmp_path: Path, fails: Fails) -> None:
    write(tmp_path / "prompts.jsonl", [TEXT])
    assert "report must come with prompts and output" in fails(answer.run, "report=x.html", "question=What?")
    again = report_arguments(tmp_path, "prompts.jsonl")
    assert "report must end in .html, got" in fails(answer.run, *again)
    assert "report must end in .html, got" in fails(report.run, *again)
    assert "output must name a file, got ''" in fails(report.run, "prompts=x", "report=x.html")
    assert "out.jsonl.settings.json beside it" in fails(report.run, *report_arguments(tmp_path))
    answer.run(cli_arguments(tmp_path))
    write(tmp_path / "prompts.jsonl", [WIDE])
    assert "prompts must be the file that" in fails(report.run, *report_arguments(tmp_path))
    assert not (tmp_path / "again.html").exists()


@pytest.mark.parametrize("size", [(4000, 30), (30, 4000), (10, 10)])
def test_pictures_are_small(tmp_path: Path, size: tuple[int, int]) -> None:
    from PIL import Image

    from janus.utils.io import load_image

    Image.new("RGBA", size, (250, 10, 10, 255)).save(tmp_path / "x.png")
    picture = load_image(report.thumbnail(str(tmp_path / "x.png")))  # type: ignore[arg-type]
    assert max(picture.size) == min(max(size), 160)
    assert picture.getpixel((0, 0))[0] > 200 > 60 > picture.getpixel((0, 0))[1]  # type: ignore[index]
    assert report.thumbnail(str(tmp_path / "none.png")) is None
