"""Wrong arguments, config files and conversations: one line on stderr, exit code 2, and nothing run."""

from pathlib import Path

import pytest
from conftest import CHECKPOINT, Fails

from janus_dola.programs import answer as answer_program

TAG = "<image_placeholder>"
TEXT = [f"model_path={CHECKPOINT}", "device=cpu", "generation.max_new_tokens=2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["question=" + "why " * 20_000], "too long: the prompt's 80046 tokens and 2 new ones"),
        (
            ["question=" + "why " * 2_000_000],
            "too long: 8000000 bytes of text are more than the model's 16384",
        ),
        (["max_new_tokens=5"], "unknown key 'max_new_tokens', did you mean 'generation.max_new_tokens'?"),
        (["--hlep"], "arguments must be written key=value, got '--hlep'; --help shows the keys"),
        (
            ["generation.max_new_tokens=many"],
            "generation.max_new_tokens must be an integer of at least 1, got 'many'",
        ),
        (["generation.max_new_tokens=0"], "generation.max_new_tokens must be an integer of at least 1, got 0"),
        (["generation.num_beams=0"], "generation.num_beams must be an integer of at least 1, got 0"),
        (
            ["generation.eos_token_id=a"],
            "generation.eos_token_id must be a token id or a list of them, below 512, the model's vocabulary, got 'a'",
        ),
        (
            ["generation.forced_eos_token_id=99999"],
            "generation.forced_eos_token_id must be a token id or a list of them, below 512, the model's vocabulary",
        ),
        (
            ["generation.pad_token_id=512"],
            "generation.pad_token_id must be a token id or a list of them, below 512, the model's vocabulary, got 512",
        ),
        (["generation.forced_bos_token_id=a"], "generation.forced_bos_token_id must be a token id or a list of them"),
        (["generation.return_dict_in_generate=true"], "generation.return_dict_in_generate must be left off"),
        (["generation.watermarking_config={a: 1}"], "generation: WatermarkingConfig.__init__() got an unexpected"),
        (
            ["generation.temperature=0", "generation.do_sample=true"],
            "`temperature` (=0.0) has to be a strictly positive",
        ),
        (["generation.num_beams=2", "stream=true"], "`streamer` cannot be used with beam search"),
        (["generation.dola_layers=high"], "dola_layers must be left off with DoLa, got 'high'"),
        (["generation=[1]"], "generation: Cannot merge incompatible container types"),
        (["seed=99999999999999999999"], "seed must be an integer of 64 bits, got 99999999999999999999"),
        (["candidate_layers=[1.5]"], "candidate_layers[0]: Value '1.5' of type 'float'"),
        (
            ["candidate_layers=[!!python/object/apply:os.mkdir [ran]]"],
            "are not YAML: could not determine a constructor",
        ),
        (["images=5"], "images must be a list of paths or data URLs, got 5"),
        (["images=[5]"], "images must be a list of paths or data URLs, got [5]"),
        (["alpha=nan"], "alpha must be in [0, 1], got nan"),
        (["device=meta"], "device must be auto, cpu, cuda or mps, and be there, got 'meta'"),
        (["model_path=../x"], "model_path '../x' cannot be loaded"),
        (["question=\ud800"], "prompt must be text that UTF-8 can encode"),
    ],
    ids=lambda value: value[0][:40] if isinstance(value, list) else "",
)
def test_arguments(fails: Fails, arguments: list[str], message: str) -> None:
    assert message in fails(answer_program.run, *TEXT, "question=What?", *arguments)


def test_a_trace_that_cannot_be_written(fails: Fails, tmp_path: Path) -> None:
    """It is refused before the model is asked."""
    (tmp_path / "file").touch()
    trace = f"trace={tmp_path / 'file' / 'below'}"
    assert "[Errno 20] Not a directory: " in fails(answer_program.run, *TEXT, "question=What?", trace)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"- 1", "must be a YAML mapping, got a list"),
        (b"a: [", "is not a YAML mapping: while parsing"),
        (b"\xff\xfe", "is not a YAML mapping: 'utf-8' codec"),
        (b"question: !!python/object/apply:os.mkdir [ran]", "could not determine a constructor for the tag"),
        (b"question: !!python/name:os.system", "could not determine a constructor for the tag"),
        (b'generation: {temperature: "${oc.env:HOME}"}', "generation.temperature must not use an interpolation"),
        (b"generation: []", "a list and a mapping stand for the same key"),
        (b"images: {a: b}", "a list and a mapping stand for the same key"),
        (b"alpha: 2024-01-01", "Value 'date' is not a supported primitive type"),
        (b"alpha: 0.1\n---\nalpha: 0.2", "expected a single document"),
        (b"roles: null", "roles: field 'roles' is not Optional"),
        (b"alpha: {b: 1}", "alpha: Value '{'b': 1}' of type 'DictConfig'"),
    ],
)
def test_config_files(fails: Fails, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: bytes, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_bytes(text)
    assert message in fails(answer_program.run, *TEXT, "question=What?", "config=bad.yaml")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ("5", "conversation must be a list of turns, got 5"),
        ("hello", "conversation must be a list of turns, got 'hello'"),
        ("{a: b}", "conversation must be a list of turns, got {'a': 'b'}"),
        ("[[]]", "turn 1 must have content, a string, got []"),
        (
            "[{content: x, role: System}]",
            "role of turn 1 must be one of ['<|User|>', '<|Assistant|>'], or user and assistant, got 'System'",
        ),
        ("[{content: x}, {content: '  '}, {content: '  '}]", "turn 3 must not be empty"),
        ("[{content: x, images: 5}]", "images of turn 1 must be a list of paths or data URLs, got 5"),
        ("[{content: x, 5: 1, foo: 2}]", "turn 1 has unknown keys ['5', 'foo']"),
        (f"[{{content: '{TAG} x'}}]", f"images must be as many as the {TAG} in the text, got 0 for 1"),
    ],
)
def test_conversations(fails: Fails, conversation: str, message: str) -> None:
    assert message in fails(answer_program.run, *TEXT, f"conversation={conversation}")
