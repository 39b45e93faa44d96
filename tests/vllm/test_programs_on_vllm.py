"""engine=vllm: the results of the programs' own engine, by continuous batching."""

import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm
from conftest import Fails
from engines import janus, new_folder
from helpers import LINES, TALL, TEXT, WIDE, calibrate_arguments, golden_lines, read, write
from safetensors.torch import load_file, save_file
from vllm import SamplingParams

from janus_dola import DoLaConfig
from janus_dola.programs import answer, calibrate, checkpoint, vllm_engine
from janus_dola.programs.engine import Task
from janus_dola.programs.options import ManyConfig
from janus_dola.programs.prompts import read_prompts

KEYS: list[dict[str, Any]] = [
    {"use_dola_lm": False}, {"alpha": 0.5}, {"candidate_layers": [5]}, {"bucket_id": 0}, {"method": "deco"},
    {"method": "sled", "bucket_id": 1},
]  # fmt: skip
# In a process of its own, two requests at a time, so that the answers do not all come at once.
SLOWLY = """
import functools, vllm
vllm.LLM = functools.partial(vllm.LLM, enforce_eager=True, max_num_seqs=2)
from janus_dola.programs import main
main()
"""


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "LLM", partial(vllm.LLM, enforce_eager=True))


def arguments(folder: Path, engine: str, *more: str) -> list[str]:
    return [
        f"model_path={janus()[1]}", "device=cpu", "dtype=float32", f"engine={engine}", "generation.max_new_tokens=16",
        f"prompts={folder / 'prompts.jsonl'}", f"output={folder / engine}.jsonl", *more,
    ]  # fmt: skip


def test_a_file_of_prompts_killed_and_resumed_has_the_own_engines_lines(tmp_path: Path) -> None:
    """Pictures, several and none; rows with configurations of their own; one without its picture."""
    own = [case | keys | {"id": f"{i} {j}"} for i, keys in enumerate(KEYS) for j, case in enumerate((WIDE, TEXT))]
    bad = ['{"question": "Wh', {"id": "gone", "question": "Q", "images": ["nowhere.png"]}]
    write(tmp_path / "prompts.jsonl", [*golden_lines(), *bad, *own, TALL | {"answer": "No."}])
    assert answer.run(arguments(tmp_path, "transformers", "compare=true")) == 1
    want = read(tmp_path / "transformers.jsonl")

    output = tmp_path / "vllm.jsonl"
    command = [sys.executable, "-c", SLOWLY, *arguments(tmp_path, "vllm", "compare=true")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        while not output.exists() or output.read_bytes().count(b"\n") < 8:
            assert run.poll() is None, run.communicate()
            time.sleep(0.01)
        run.kill()
    before = output.read_bytes().count(b"\n")
    assert before < len(want)
    page = tmp_path / "page.html"
    assert answer.run(arguments(tmp_path, "vllm", "compare=true", f"report={page}")) == 1
    got = read(output)
    assert got.keys() == want.keys()
    for name, line in want.items():
        assert got[name].pop("layers", None) is None  # which vLLM does not tell
        line.pop("layers", None)
        assert got[name] == line
    assert "there is no file 'nowhere.png'" in got["gone"]["error"]
    assert len({line["text"] for line in got.values() if "text" in line}) > 10
    assert "DoLa changed" in page.read_text()


def test_calibrate_judges_as_with_the_own_engine(tmp_path: Path, fails: Fails) -> None:
    """But for the scores, which vLLM does not give: a file with choices is refused, and changes nothing."""
    given = partial(calibrate_arguments, tmp_path)
    keys = [f"model_path={janus()[1]}", "dtype=float32"]
    write(tmp_path / "val.jsonl", LINES)
    assert fails(calibrate.run, *given(*keys, "engine=vllm")) == (
        "error: engine must be transformers where choices are scored, since vLLM gives no log p̂ of given tokens, got"
        " 'vllm'\n"
    )
    write(tmp_path / "val.jsonl", [line for line in LINES if "choices" not in line])
    calibrate.run(given(*keys, "engine=vllm"))
    got = read(tmp_path / "mine.results.jsonl")
    calibrate.run(given(*keys, f"output={tmp_path / 'own.yaml'}"))
    for name, line in read(tmp_path / "own.results.jsonl").items():
        for result in line["results"].values():
            result.pop("logprob", None)
        assert got[name] == line
    assert len(got) == 3 and json.loads((tmp_path / "mine.json").read_text())["table"]["off"]["logprob"] is None


@pytest.fixture(scope="module")
def broken() -> Path:
    """With a NaN in its head."""
    folder = new_folder()
    for file in janus()[1].iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][77, 3] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_what_is_wrong_with_a_prompt_is_its_error(tmp_path: Path, broken: Path) -> None:
    write(tmp_path / "prompts.jsonl", [TEXT | {"id": "off", "use_dola_lm": False}, TEXT | {"id": "on"}])
    more = [f"model_path={broken}", "generation.repetition_penalty=1.2"]
    assert answer.run(arguments(tmp_path, "vllm", *more)) == 1
    lines = read(tmp_path / "vllm.jsonl")
    assert lines["off"] == {"id": "off", "error": "logits are NaN at token 1; float16? try bfloat16"}
    assert "repetition_penalty must be 1.0 with DoLa, got 1.2" in lines["on"]["error"]


def test_a_seed_repeats_what_is_sampled(tmp_path: Path) -> None:
    """One engine, as lmms-eval keeps it, answers again and again; an answer does not depend on the others."""
    config = ManyConfig(model_path=str(janus()[1]), device="cpu", dtype="float32")
    model_config = checkpoint.load_config(config.model_path)
    processor = checkpoint.load_processor(config, model_config)
    path = write(tmp_path / "prompts.jsonl", [each | {"alpha": 0.0} for each in (WIDE, TALL, TEXT, WIDE)])
    prompts, _ = read_prompts(config, path, processor, model_config)
    llm = vllm_engine.start(config, model_config, torch.float32, [DoLaConfig()])
    drawn = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 8}
    params = vllm_engine.sampling_params(drawn, config.model_path, processor.tokenizer)

    def answers(seed: int, count: int = 4) -> dict[Any, str]:
        answered = vllm_engine.answer_many(llm, processor, prompts[:count], Task(), params, seed)
        return {prompt.id: outcome.answers[0].text for prompt, outcome in answered}

    first = answers(0)
    assert answers(0) == first and answers(0, 2) == dict(sorted(first.items())[:2])
    assert len({*first.values(), *answers(1).values()}) == 8


@pytest.mark.parametrize(
    ("given", "params"),
    [
        ({"max_new_tokens": 3}, {"temperature": 0.0, "max_tokens": 3, "stop_token_ids": [481]}),
        ({"max_new_tokens": 3, "top_k": 2, "temperature": 0.5, "num_beams": 1}, {"temperature": 0.0, "top_k": 0}),
        ({"max_new_tokens": 3, "do_sample": True}, {"temperature": 1.0, "top_k": 50, "top_p": 1.0}),
        (
            {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "top_k": 0, "min_p": 0.1, "min_new_tokens": 2},
            {"temperature": 0.5, "top_p": 0.9, "top_k": 0, "min_p": 0.1, "min_tokens": 2, "max_tokens": 512},
        ),
        ({"eos_token_id": [3, 4], "stop_strings": "x"}, {"stop_token_ids": [3, 4], "stop": ["x"], "ignore_eos": True}),
        ({"eos_token_id": None, "repetition_penalty": 1.2}, {"stop_token_ids": [], "repetition_penalty": 1.2}),
    ],
)
def test_arguments_of_generate_are_vllms(given: dict[str, Any], params: dict[str, Any]) -> None:
    """The folder's own, which has max_new_tokens, are below them."""
    config = ManyConfig(model_path=str(janus()[1]))
    tokenizer = checkpoint.load_processor(config, checkpoint.load_config(config.model_path)).tokenizer
    made = SamplingParams(**vllm_engine.sampling_params(given, config.model_path, tokenizer))
    assert {name: getattr(made, name) for name in params} == params


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["generation.num_beams=4"], "generation.num_beams must be left off with engine=vllm, got 4: vLLM has"),
        (["generation.no_repeat_ngram_size=3"], "generation.no_repeat_ngram_size must be left off with engine=vllm"),
        (["generation.max_new_tokens=null"], "generation.max_new_tokens must be an integer of at least 1"),
        (["workers=2"], "workers must be 0 with engine=vllm, which is one process's, got 2"),
        (["engine=vlm"], "engine must be one of transformers, vllm, got 'vlm'"),
        (["device=mps"], "device must be"),
        ([f"model_path={janus()[0]}"], "janus-dola export out=FOLDER model_path="),
    ],
)
def test_refused_in_one_sentence(tmp_path: Path, fails: Fails, more: list[str], message: str) -> None:
    write(tmp_path / "prompts.jsonl", [TEXT])
    assert message in fails(answer.run, *arguments(tmp_path, "vllm", *more))


def test_one_question_is_not_for_it(fails: Fails) -> None:
    assert "engine must be transformers for one question, got 'vllm'" in fails(answer.run, "question=Q", "engine=vllm")
