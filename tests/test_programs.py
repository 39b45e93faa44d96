"""The programs as a user finds them: help, sub-commands, the wheel, and logits that are not numbers."""

import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHECKPOINT, Fails

from janus_dola import DoLaConfig, DoLaJanusWrapper, programs
from janus_dola.programs import answer, calibrate, export, options, report
from janus_dola.programs.options import read_config

pytestmark = pytest.mark.usefixtures("loaded_once")

ROOT = Path(__file__).parents[1]
TEXT = [f"model_path={CHECKPOINT}", "device=cpu", "generation.max_new_tokens=4", "question=What?"]


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize(
    ("run", "says", "does_not_say"),
    [
        (
            answer.run,
            [
                "programs: answer, calibrate, draw, export, report, web",
                "bucket_id: 2  ",
                "# 0, 1, 2: candidates",
                "prompts: null",
            ],
            ["alphas"],
        ),
        (
            calibrate.run,
            ["alphas=[0.1,0.3]", "alphas: [0.1]                     # values of DoLa's alpha to try", "model_path:"],
            ["stream:", "compare:"],
        ),
        (report.run, ["compare=true", "# where to write the page"], ["stream:", "alphas"]),
        (
            export.run,
            ["janus-dola export out=FOLDER", "a folder, or a name on the hub", "custom_generate="],
            ["stream", "device"],
        ),
    ],
)
def test_help(capsys: Any, run: Any, says: list[str], does_not_say: list[str], flag: str) -> None:
    """What the program does, its keys with their comments, examples; exit code 0."""
    with pytest.raises(SystemExit) as exit_:
        run([*TEXT, flag])
    out, err = capsys.readouterr()
    assert exit_.value.code is None and err == ""
    assert all(text in out for text in says) and not any(text in out for text in does_not_say)


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["answer", *TEXT], "answer"),
        (TEXT, "answer"),
        (["calibrate", "data="], "calibrate"),
        (["report"], "report"),
    ],
)
def test_sub_commands(monkeypatch: pytest.MonkeyPatch, capsys: Any, argv: list[str], name: str) -> None:
    monkeypatch.setattr(sys, "argv", ["janus-dola", *argv])
    with pytest.raises(SystemExit) as exit_:
        programs.main()
    out, err = capsys.readouterr()
    assert exit_.value.code == (0 if name == "answer" else 2)
    assert bool(out) == (name == "answer") and ("data must name a file" in err) == (name == "calibrate")
    assert ("prompts must name a file" in err) == (name == "report")


def test_defaults_are_the_same_wherever_it_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Outside the repository calibrate ran with other generation settings, and the demo was looked for on the hub."""
    schemas: list[tuple[Any, list[str]]] = [(answer.AnswerConfig, []), (calibrate.CalibrateConfig, ["data=x"])]
    inside = [read_config(*given) for given in schemas]
    monkeypatch.chdir(tmp_path)
    assert [read_config(*given) for given in schemas] == inside
    assert inside[1].generation == {"max_new_tokens": 512, "do_sample": False}
    assert Path(inside[0].model_path) == ROOT / "demo" / "checkpoint"
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.yaml").write_text("model_path: ../models/mine\n")
    monkeypatch.chdir("/")
    config = read_config(answer.AnswerConfig, [f"config={tmp_path / 'configs' / 'mine.yaml'}"])
    assert Path(config.model_path) == tmp_path / "models" / "mine"


def test_without_the_demo_there_must_be_a_question(
    fails: Fails, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As in a wheel, whose default model is a folder that is not there."""
    monkeypatch.setattr(answer, "DEMO_IMAGE", tmp_path / "none.png")
    assert "exactly one of question and conversation must be given" in fails(answer.run)
    assert "model_path" in fails(answer.run, "question=What?", "model_path=../demo/nowhere")


def test_without_the_demo_a_model_must_be_given(fails: Fails, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a wheel: it asked for a question, or named a folder that nobody had typed."""
    (tmp_path / "configs").mkdir()
    default = tmp_path / "configs" / "default.yaml"
    default.write_text(options.DEFAULT.read_text())
    monkeypatch.setattr(options, "DEFAULT", default)
    monkeypatch.setattr(options.read_config, "__defaults__", (default,))
    for given in ((), ("image=x.png", "question=What?"), ("prompts=a", "output=b")):
        assert fails(answer.run, *given) == f"error: {options.NO_MODEL}\n"
    assert fails(calibrate.run, "data=x") == f"error: {options.NO_MODEL}\n"


def test_the_wheel(tmp_path: Path) -> None:
    """Installed into a fresh environment, it answers the demo's question from another folder."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run([*pip, *build], check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "fresh", with_pip=False)
    fresh = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "fresh")}))
    scripts = tmp_path / "fresh" / "bin"
    python = scripts / "python"
    install = ["--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([*pip, *install], check=True, cwd=tmp_path)
    (fresh / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")  # torch, transformers and so on
    native = ("chat_template.jinja", "custom_generate/generate.py", "custom_generate/requirements.txt", "model_card.md")
    files = (
        "configs/default.yaml",
        "configs/janus_pro_7b.yaml",
        "programs/report.html",
        "programs/web/token_view.html",
        "programs/web/web.css",
        "py.typed",
    )
    for file in (*files, *(f"native/{file}" for file in native)):
        assert (fresh / "janus_dola" / file).is_file()
    demo = [f"model_path={ROOT / 'demo' / 'checkpoint'}", f"image={ROOT / 'demo' / 'images' / 'scene.png'}"]
    question = json.loads((ROOT / "demo" / "images" / "questions.json").read_text())["scene.png"][2]
    done = subprocess.run(
        [scripts / "janus-dola", *demo, f"question={question['text']}", "device=cpu", "use_dola_lm=false"],
        capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": ""}, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == question["answer"]
    bare = {"env": os.environ | {"PYTHONPATH": ""}, "cwd": tmp_path}
    done = subprocess.run([scripts / "janus-dola"], capture_output=True, text=True, check=False, **bare)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {options.NO_MODEL}\n")


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoint with a NaN in its head."""
    from janus.models import MultiModalityCausalLM, VLChatProcessor

    model = MultiModalityCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    with torch.no_grad():
        model.language_model.lm_head.weight[77, 3] = torch.nan
    folder = tmp_path_factory.mktemp("broken")
    model.save_pretrained(folder)
    VLChatProcessor.from_pretrained(CHECKPOINT).save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("use_dola_lm", [True, False])
def test_logits_that_are_nan_are_an_error(fails: Fails, broken: Path, use_dola_lm: bool) -> None:
    """The answer was "!!!!!", with exit code 0."""
    err = fails(answer.run, *TEXT, f"model_path={broken}", f"use_dola_lm={use_dola_lm}")
    assert err == "error: logits are NaN at token 1; float16? try bfloat16\n"


def test_logits_that_are_nan_are_a_prompts_error(broken: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"question": "What?"}) + "\n")
    arguments = [f"prompts={tmp_path / 'prompts.jsonl'}", f"output={tmp_path / 'out.jsonl'}", "device=cpu"]
    assert answer.run([*arguments, f"model_path={broken}", "compare=true", "generation.max_new_tokens=3"]) == 1
    line = json.loads((tmp_path / "out.jsonl").read_text())
    assert line == {"id": "line 1", "error": "logits are NaN at token 1; float16? try bfloat16"}


def test_the_library_warns_of_logits_that_are_nan(model: Any, prompt: dict[str, Any]) -> None:
    """Once a call, and hides nothing: the row's scores are NaN."""

    def spoil(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[1, -1, 7] = torch.nan
        return output

    wrapper = DoLaJanusWrapper(model, DoLaConfig())
    handle = model.language_model.lm_head.register_forward_hook(spoil)
    try:
        with pytest.warns(RuntimeWarning, match=r"logits are NaN in rows \[1\]") as warned:
            output = wrapper.generate(**prompt, return_dict_in_generate=True, output_scores=True)
    finally:
        handle.remove()
    assert len([w for w in warned if w.category is RuntimeWarning]) == 1
    assert output.scores[0][1].isnan().all() and not output.scores[0][0].isnan().any()


def janus_dola(*arguments: str, first: str = "", **how: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", f"from janus_dola.programs import main\n{first}\nmain()", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | how
    return subprocess.Popen(command, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, **pipes)


@pytest.mark.parametrize(
    ("argument", "code", "out", "err"),
    [
        ("--version", 0, r"janus-dola \d+\.\d+\.\d+\n", ""),
        ("calibrat", 2, "", r"error: .* got 'calibrat'; did you mean 'calibrate'\?\n"),
        (
            "nonsense",
            2,
            "",
            r"error: .* got 'nonsense'; programs are answer, calibrate, draw, export, report, web; --help .*\n",
        ),
        ("help", 0, r"(?s)Asks a Janus model.*\nprograms: answer, calibrate, draw, export, report, web.*", ""),
    ],
)
def test_words_that_are_no_keys(
    monkeypatch: pytest.MonkeyPatch, capfd: Any, argument: str, code: int, out: str, err: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["janus-dola", argument])
    with pytest.raises(SystemExit) as exit_:
        sys.exit(programs.main())  # as the console script does
    said = capfd.readouterr()
    assert (exit_.value.code or 0) == code and re.fullmatch(out, said.out) and re.fullmatch(err, said.err), said


@pytest.mark.parametrize(
    "arguments", [["calibrat"], ["calibrate", "--help"], ["--help"], ["draw"], ["alhpa=0.1"]], ids=" ".join
)
def test_what_is_said_without_a_model_does_not_import_torch(arguments: list[str]) -> None:
    """It took five seconds."""
    code = f"import sys\nsys.argv = ['janus-dola', *{arguments}]\nfrom janus_dola import programs\n"
    code += "try:\n    programs.main()\nexcept SystemExit:\n    print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.endswith("False\n")


@pytest.mark.parametrize("seconds", [0.3, 1.5])
def test_second_thoughts_are_one_line(seconds: float) -> None:
    """While Python imported, an interrupt was a traceback."""
    # Whoever started the tests in the background has interrupts ignored, in every process below.
    first = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); print('started', flush=True)"
    with janus_dola(*TEXT, first=first) as process:
        assert process.stdout is not None and process.stdout.readline() == "started\n"
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, ("", "interrupted\n"))


def test_a_reader_that_has_enough_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    with janus_dola("help", stdout=write) as process:
        os.close(write)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (141, "")


def test_a_config_that_comes_along_is_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    named = read_config(answer.AnswerConfig, ["config=janus_1.3b"])
    assert (named.model_path, named.roles) == ("deepseek-ai/Janus-1.3B", ["User", "Assistant"])
    (tmp_path / "janus_1.3b").write_text("model_path: mine\n")  # a file of that name wins
    assert read_config(answer.AnswerConfig, ["config=janus_1.3b"]).model_path == "mine"
    with pytest.raises(ValueError, match="config must name a file that can be read, got 'janus_2b'"):
        read_config(answer.AnswerConfig, ["config=janus_2b"])


def test_a_config_from_a_pipe_is_read_once(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """As config=<(...) gives one: what was read is gone."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = subprocess.Popen(["sh", "-c", f"echo 'image: nowhere.png' > {pipe}"])
    monkeypatch.setattr(sys, "argv", ["janus-dola", f"config={pipe}", "question=What?"])
    with pytest.raises(SystemExit):
        programs.main()
    assert "nowhere.png" in capsys.readouterr().err and writer.wait() == 0
