"""The programs as a user finds them: help, sub-commands, the wheel, and logits that are not numbers."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHECKPOINT, Fails

from janus_dola import DoLaConfig, DoLaJanusWrapper, programs
from janus_dola.programs import answer, calibrate, export, report
from janus_dola.programs.options import read_config

ROOT = Path(__file__).parents[1]
TEXT = [f"model_path={CHECKPOINT}", "device=cpu", "generation.max_new_tokens=4", "question=What?"]


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize(
    ("run", "says", "does_not_say"),
    [
        (
            answer.run,
            [
                "programs: answer, calibrate, export, report, web",
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


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """The golden checkpoint with a NaN in its head."""
    from janus.models import MultiModalityCausalLM, VLChatProcessor

    model = MultiModalityCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    with torch.no_grad():
        model.language_model.lm_head.weight[77, 3] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    VLChatProcessor.from_pretrained(CHECKPOINT).save_pretrained(str(tmp_path / "broken"))
    return tmp_path / "broken"


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
