"""The command line on the golden checkpoint: what it prints, what it refuses, and before what."""

import base64
import json
import re
import runpy
import shutil
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CASES, CHECKPOINT, GOLDEN, Fails
from omegaconf import OmegaConf

from janus_dola import DoLaConfig, DoLaJanusWrapper, DoLaTrace
from janus_dola.programs import answer as answer_program
from janus_dola.programs import checkpoint
from janus_dola.programs.options import DEFAULT, ModelConfig, read_config
from janus_dola.programs.web import WebConfig

pytestmark = pytest.mark.usefixtures("loaded_once")

ROOT = Path(__file__).parents[1]

IMAGES = GOLDEN / "expected" / "images"
WIDE = ["model_path=" + str(CHECKPOINT), f"image={IMAGES / 'wide.png'}", "question=What is in the image?"]
SHORT = "generation.max_new_tokens=24"
GREEDY = CASES["single_wide"]["greedy_text"][0]


def answer(capsys: Any, *arguments: str) -> str:
    answer_program.run([*WIDE, "device=cpu", SHORT, *arguments])
    return capsys.readouterr().out.removesuffix("\n")


def test_without_dola_it_prints_the_golden_answer(capsys: Any) -> None:
    assert answer(capsys, "use_dola_lm=false") == GREEDY
    assert answer(capsys, "use_dola_lm=true", "candidate_layers=[]", "alpha=0") == GREEDY


def test_dola_keys_reach_the_wrapper(capsys: Any, model: Any, expected: dict[str, torch.Tensor]) -> None:
    from janus.models import VLChatProcessor

    tokenizer = VLChatProcessor.from_pretrained(CHECKPOINT).tokenizer
    prompt = {name: expected[f"single_wide/{name}"] for name in ("inputs_embeds", "attention_mask")}
    for overrides, config in (
        ([], DoLaConfig()),
        (["alpha=0.3", "bucket_id=0"], DoLaConfig(alpha=0.3, bucket_id=0)),
        (["candidate_layers=[5,17]"], DoLaConfig(candidate_layers=[5, 17])),
    ):
        ids = DoLaJanusWrapper(model, config).generate(
            **prompt, max_new_tokens=12, do_sample=False, eos_token_id=481, pad_token_id=481
        )
        few = "generation.max_new_tokens=12"
        assert answer(capsys, few, *overrides) == tokenizer.decode(ids[0], skip_special_tokens=True).strip()


def test_image_as_list_as_data_url_and_in_a_conversation(capsys: Any) -> None:
    url = "data:image/png;base64," + base64.b64encode((IMAGES / "wide.png").read_bytes()).decode()
    base = [WIDE[0], "device=cpu", SHORT, "use_dola_lm=false"]
    turns = [{"role": "<|User|>", "content": "<image_placeholder>\nWhat is in the image?", "images": [url]}]
    for given in (
        [f"images=[{IMAGES / 'wide.png'}]", WIDE[2]],
        [f"images={IMAGES / 'wide.png'}", WIDE[2]],
        [f"image={url}", WIDE[2]],
        [f"image={url}", "question=<image_placeholder>\nWhat is in the image?"],
        ["conversation=" + json.dumps(turns)],
    ):
        answer_program.run([*base, *given])
        assert capsys.readouterr().out == GREEDY + "\n"


def test_multi_turn_and_text_only(capsys: Any) -> None:
    for case in ("multi_turn", "text_only"):
        turns = CASES[case]["conversations"][0][:-1]
        turns = [dict(turn, images=[str(GOLDEN / "expected" / i) for i in turn.get("images", [])]) for turn in turns]
        answer_program.run([WIDE[0], "device=cpu", SHORT, "use_dola_lm=false", "conversation=" + json.dumps(turns)])
        assert capsys.readouterr().out == CASES[case]["greedy_text"][0].strip() + "\n"


def test_question_is_taken_as_it_stands() -> None:
    for question in ("Is it red: yes?", "[1, 2]", "null", "50 % # of them", "What is ${HOME}?", "a=b", "{x"):
        config = read_config(answer_program.AnswerConfig, ["question=" + question])
        assert config.question == question


def test_config_file_is_over_the_default_and_under_the_overrides(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("alpha: 0.4\nbucket_id: 1\ngeneration:\n  max_new_tokens: 7\n")
    config = read_config(answer_program.AnswerConfig, [f"config={file}", "bucket_id=0", "generation.top_k=3"], DEFAULT)
    assert (config.alpha, config.bucket_id) == (0.4, 0)
    assert config.generation == {"max_new_tokens": 7, "do_sample": False, "top_k": 3}


def test_generation_keys_seed_and_returned_sequences(capsys: Any) -> None:
    draw = ["generation.do_sample=true", "generation.temperature=1.5", "alpha=0", "generation.max_new_tokens=8"]
    first = answer(capsys, *draw, "seed=1")
    assert first == answer(capsys, *draw, "seed=1")
    assert first != answer(capsys, *draw, "seed=2")
    beams = answer(capsys, "generation.num_beams=3", "generation.num_return_sequences=2", "generation.max_new_tokens=4")
    assert len(beams.split("\n")) == 2
    assert answer(capsys, "use_dola_lm=false", "generation.repetition_penalty=1.3") != GREEDY


def test_dead_beams_are_not_answers(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five were asked for, V_head left two, and three repeats of them were printed."""
    monkeypatch.chdir(ROOT)
    asked = ["image=demo/images/habit.png", "question=Describe the image.", "device=cpu", "compare=true"]
    answer_program.run([*asked, "generation.num_beams=5", "generation.num_return_sequences=5"])
    out, err = capsys.readouterr()
    on, off = (re.findall(rf"^DoLa {label} +(.*)$", out, re.M) for label in ("on", "off"))
    assert (len(set(on)), len(on), len(set(off)), len(off)) == (2, 2, 5, 5)
    assert err == "2 of 5 beams: V_head leaves no more (alpha=0.1)\n"


def test_defaults_answer_the_demo_question(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    answer_program.run(["use_dola_lm=false"])
    asked = json.loads((ROOT / "demo" / "images" / "questions.json").read_text(encoding="utf-8"))
    answers = [q["answer"] for q in asked["scene.png"] if q["text"] == answer_program.DEMO_QUESTION]
    assert capsys.readouterr().out == answers[0] + "\n"


def test_stream(capsys: Any) -> None:
    """What is printed without it; it began with a space, and came twice with compare."""
    few = "generation.max_new_tokens=12"
    assert answer(capsys, few, "stream=true") == answer(capsys, few)
    both = [re.sub(r"0\.\d+ sec", "", answer(capsys, few, "compare=true", *more)) for more in ([], ["stream=true"])]
    assert both[0] == both[1]


def test_integers_where_generate_takes_floats(capsys: Any) -> None:
    """A temperature of 2 was refused."""
    draw = ["generation.do_sample=true", "generation.max_new_tokens=12"]
    for key in ("temperature", "repetition_penalty"):
        assert answer(capsys, *draw, f"generation.{key}=2") == answer(capsys, *draw, f"generation.{key}=2.0")


def test_compare_and_trace(capsys: Any, tmp_path: Path) -> None:
    out = answer(capsys, "compare=true", f"trace={tmp_path / 'out'}")
    assert f"DoLa off  {GREEDY}" in out
    assert f"DoLa on   {answer(capsys)}" in out
    assert len(re.findall(r"\(\d+ tokens, \d+\.\d+ seconds per token\)", out)) == 2
    trace = DoLaTrace.load(tmp_path / "out" / "trace.jsonl")
    assert "layers    " + " ".join(map(str, trace.layers[0, : trace.lengths[0]].tolist())) in out
    assert set(trace.layers[0].tolist()) <= {22, 24, 26, 28}
    assert (tmp_path / "out" / "trace.png").read_bytes().startswith(b"\x89PNG")


def test_a_trace_without_matplotlib_is_refused_before_the_answer(
    fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was an error after the answer."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as it is where it is not installed
    monkeypatch.setattr(checkpoint, "load_model", lambda *args: pytest.fail("loaded the weights"))
    error = fails(answer_program.run, *WIDE, f"trace={tmp_path / 'out'}")
    assert error == "error: trace needs matplotlib: pip install 'janus-dola[viz]'\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["image=nowhere.png"], "there is no file 'nowhere.png'"),
        ([f"image={CHECKPOINT / 'config.json'}"], "config.json' is not an image"),
        (["question=<image_placeholder> <image_placeholder> Which?"], "got 1 for 2"),
        (["alhpa=0.2"], "unknown key 'alhpa', did you mean 'alpha'"),
        (["generation.max_new_tokns=2"], "did you mean 'generation.max_new_tokens'"),
        (["alpha=1.5"], "alpha must be in [0, 1], got 1.5"),
        (["alpha=high"], "alpha: Value 'high'"),
        (["bucket_id=3"], "bucket_id must be 0, 1 or 2, got 3"),
        (["candidate_layers=[0]"], "candidate_layers must be integers from 1"),
        (["candidate_layers=[31]"], "must be in 1...30, the model's layers, got 31"),
        (["question="], "question must not be empty"),
        (["question=  "], "question must not be empty"),
        (["model_path=" + str(GOLDEN)], "not a checkpoint: it has no config.json"),
        (["model_path=/nowhere/at/all"], "model_path must be a folder or a name on the hub"),
        (["device=tpu9"], "device must be auto, cpu, cuda or mps"),
        (["device=cuda:77"], "device must be auto, cpu, cuda or mps"),
        (["dtype=float8"], "dtype must be one of auto, float32, bfloat16, float16, got 'float8'"),
        (["config=nowhere.yaml"], "config must name a file that can be read, got 'nowhere.yaml'"),
        (["alpha"], "arguments must be written key=value, got 'alpha'"),
        (["roles=[one]"], "roles must be two names"),
        (["conversation=[{content: 5}]"], "turn 1 must have content"),
        (["seed=${oc.env:HOME}"], "seed must not use an interpolation"),
    ],
    ids=lambda value: value[0][:30] if isinstance(value, list) else "",
)
def test_errors_are_one_line_before_the_weights_are_loaded(
    fails: Fails, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr(checkpoint, "load_model", lambda *args: pytest.fail("loaded the weights"))
    given = WIDE[:1] if any(a.startswith("conversation") for a in arguments) else WIDE
    assert message in fails(answer_program.run, *given, *arguments)


def test_exit_code_and_stderr_of_the_script(capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(GOLDEN)
    monkeypatch.setattr(sys, "argv", ["inference_dola.py", *WIDE, "alhpa=0.2"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(ROOT / "inference_dola.py"), run_name="__main__")
    assert exit_.value.code == 2
    assert capfd.readouterr() == ("", "error: unknown key 'alhpa', did you mean 'alpha'?\n")


def test_default_yaml_says_of_every_key_what_the_dataclasses_say() -> None:
    """The sentences stand in the dataclasses; --help prints them, and the file repeats them."""
    text = re.sub(r"\n +# ", " ", DEFAULT.read_text(encoding="utf-8"))  # a comment that goes on
    said = dict(re.findall(r"^(\w+):.*? +# (.*)$", text, re.M))
    keys = {item.name: item for schema in (WebConfig, answer_program.AnswerConfig) for item in fields(schema)}
    assert {name: item.metadata["help"] for name, item in keys.items() if name != "image"} == said
    given = OmegaConf.to_container(OmegaConf.load(DEFAULT))
    defaults = {
        name: item.default if item.default_factory is MISSING else item.default_factory() for name, item in keys.items()
    }
    # The file's own: what to run, and how long an answer may be.
    own = {"model_path": "../demo/checkpoint", "generation": {"max_new_tokens": 512, "do_sample": False}}
    assert given == {name: own.get(name, default) for name, default in defaults.items() if name != "image"}


def test_help_tells_where_a_value_is_from(capsys: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("alpha: 0.3\nbucket_id: 1\n")
    with pytest.raises(SystemExit):
        read_config(answer_program.AnswerConfig, [f"config={file}", "alpha=0.4", "question=Is it: red?", "--help"])
    out = re.sub(r"\n +# ", " ", capsys.readouterr().out)
    assert re.search(r"^alpha: 0.4 +# \[command line\] tokens less likely", out, re.M)
    assert re.search(rf"^bucket_id: 1 +# \[{re.escape(str(file))}\] 0, 1, 2: candidates", out, re.M)
    assert re.search(r"^question: 'Is it: red\?' +# \[command line\]", out, re.M)
    assert re.search(r"^method: dola +# or deco, sled, confident", out, re.M)


@pytest.mark.parametrize(
    ("own", "arguments", "want"),
    [
        ({"bucket_id": 0, "temperature": 0.5}, [], DoLaConfig(bucket_id=0)),
        ({"alpha": 1, "bucket_id": 0}, ["bucket_id=1"], DoLaConfig(alpha=1, bucket_id=1)),
        ({"alpha": 0.3, "bucket_id": 0}, ["config=FILE"], DoLaConfig(alpha=0.3, bucket_id=1)),
        ({"candidate_layers": [3, 5]}, ["alpha=0.2"], DoLaConfig(alpha=0.2, candidate_layers=[3, 5])),
        ({"candidate_layers": [3, 5]}, ["config=FILE"], DoLaConfig(bucket_id=1)),
        ({"method": "sled", "sled_top_k": 5, "bucket_id": 0}, ["method=deco"], DoLaConfig(method="deco", bucket_id=0)),
        ({"method": "sled", "sled_top_k": 5}, ["sled_rate=3"], DoLaConfig(method="sled", sled_top_k=5, sled_rate=3.0)),
        ({"alpha": 0.3, "bucket_id": 0}, ["method=sled"], DoLaConfig(method="sled", bucket_id=0)),
    ],
)
def test_a_checkpoints_own_configuration_is_over_the_defaults_and_under_what_is_given(
    tmp_path: Path, own: dict[str, Any], arguments: list[str], want: DoLaConfig
) -> None:
    """What is given wins also over what would otherwise win over it, or not go with it."""
    (tmp_path / "generation_config.json").write_text(json.dumps(own))
    (tmp_path / "mine.yaml").write_text("bucket_id: 1\n")
    given = [argument.replace("FILE", str(tmp_path / "mine.yaml")) for argument in arguments]
    config = read_config(answer_program.AnswerConfig, [f"model_path={tmp_path}", *given])
    assert config.dola() == want and config.generation == {"max_new_tokens": 512, "do_sample": False}


def test_help_tells_what_is_the_checkpoints(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        read_config(answer_program.AnswerConfig, ["alpha=0.4", "--help"])
    out = re.sub(r"\n +# ", " ", capsys.readouterr().out)
    file = ROOT / "demo" / "checkpoint" / "generation_config.json"
    assert re.search(rf"^bucket_id: 0 +# \[{re.escape(str(file))}\] 0, 1, 2: candidates", out, re.M)
    assert re.search(r"^alpha: 0.4 +# \[command line\]", out, re.M)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"alpha": 7}', "alpha must be in [0, 1], got 7"),
        ('{"alpha": null}', "alpha: Incompatible value 'None'"),
        ('{"bucket_id": "low"}', "bucket_id: Value 'low'"),
        ("{", "Expecting property name"),
        ("5", "argument of type 'int' is not"),
    ],
)
def test_a_checkpoints_own_configuration_is_checked(tmp_path: Path, fails: Fails, text: str, message: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    error = fails(answer_program.run, *WIDE[1:], f"model_path={tmp_path}")
    assert f"model_path {str(tmp_path)!r}: generation_config.json: {message}" in error


@pytest.mark.parametrize(
    ("name", "model_path", "roles", "layers"),
    [
        ("janus_1.3b", "deepseek-ai/Janus-1.3B", ["User", "Assistant"], 24),
        ("janus_pro_1b", "deepseek-ai/Janus-Pro-1B", ["<|User|>", "<|Assistant|>"], 24),
        ("janus_pro_7b", "deepseek-ai/Janus-Pro-7B", ["<|User|>", "<|Assistant|>"], 30),
    ],
)
def test_configs_of_the_published_models(name: str, model_path: str, roles: list[str], layers: int) -> None:
    file = ROOT / "configs" / f"{name}.yaml"
    config = read_config(answer_program.AnswerConfig, [f"config={file}"])
    assert (config.model_path, config.roles) == (model_path, roles)
    assert config.resolve_layers(layers) == {24: (18, 20, 22), 30: (22, 24, 26, 28)}[layers]
    assert OmegaConf.load(file).keys() == {"model_path", "roles", "text_to_image"}


@pytest.mark.parametrize(
    ("device", "capabilities", "stored", "want"),
    [
        ("cpu", {"avx512_bf16": True}, torch.bfloat16, torch.bfloat16),
        ("cpu", {"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16, torch.bfloat16),
        ("cpu", {"neon": True, "bf16": True}, torch.bfloat16, torch.bfloat16),
        ("cpu", {"avx512_f": True, "avx512_bf16": False}, torch.bfloat16, torch.float32),
        ("cpu", {"avx512_bf16": True}, torch.float32, torch.float32),
        ("cpu", {"avx512_bf16": True}, None, torch.float32),
        ("mps", {}, torch.bfloat16, torch.bfloat16),
        ("mps", {}, torch.float32, torch.float32),
        ("cuda", {}, torch.float32, torch.bfloat16),
    ],
)
def test_auto_dtype(monkeypatch: Any, device: str, capabilities: Any, stored: Any, want: torch.dtype) -> None:
    """bfloat16 where it is the checkpoint's and the device multiplies it natively."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert checkpoint.pick_dtype(torch.device(device), stored) == want


def test_the_dtype_of_the_checkpoint_counts(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    shutil.copytree(CHECKPOINT, tmp_path / "half")
    file = tmp_path / "half" / "config.json"
    file.write_text(file.read_text().replace('"torch_dtype": "float32"', '"torch_dtype": "bfloat16"'))
    for path, want in ((CHECKPOINT, torch.float32), (tmp_path / "half", torch.bfloat16)):
        config = ModelConfig(model_path=str(path), device="cpu")
        assert checkpoint.load(config)[0].dtype == want
    assert checkpoint.load_config("demo/checkpoint").dtype == torch.float32  # what its card's figures were measured in
    assert checkpoint.pick_device("cpu", "bfloat16", torch.float32) == (torch.device("cpu"), torch.bfloat16)
