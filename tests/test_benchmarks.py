"""The benchmarks run, and their reports say what was measured."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import allocator, common, latency, long_run, methods, profile_step, throughput
from demo.evaluate import Answers, numbered
from janus_dola import DoLaJanusWrapper
from janus_dola.programs.engine import Answer
from janus_dola.programs.options import read_config

TINY = ["shape=tiny", "batch=2", "layers=2", "prompt=9", "tokens=3", "device=cpu"]


def test_latency_writes_json_and_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    latency.run([*TINY, "layers=[1,2]", "rounds=2", "memory=false", f"out={tmp_path / 'report'}"])
    document = json.loads((tmp_path / "report.json").read_text())
    assert [(result["layers"], result["batch"]) for result in document["results"]] == [(1, 2), (2, 2)]
    for result in document["results"]:
        assert list(result["variants"]) == list(latency.VARIANTS)
        for variant, entry in result["variants"].items():
            assert len(entry["token_runs_s"]) == len(entry["prefill_runs_s"]) == 2
            assert entry["token_s"] > 0 and entry["prefill_s"] > 0
            first, median, third = entry["token_ratio"]
            assert first <= median <= third
            assert variant != "baseline" or first == third == 1
    text = (tmp_path / "report.md").read_text()
    assert capsys.readouterr().out == text
    rows = [line for line in text.splitlines() if line.startswith("| tiny")]
    assert len(rows) == 2 * len(latency.VARIANTS)
    assert {line.count("|") for line in text.splitlines() if line.startswith("|")} == {14}


def test_peak_memory_is_of_the_run() -> None:
    options = read_config(latency.LatencyOptions, TINY, None)
    peak = latency.peak_memory(options, common.Workload("tiny", 2, 2, 1), "dola")
    assert 50 * 2**20 < peak < 64 * 2**30


@pytest.mark.parametrize("variant", ["one call per exit", "hidden states"])
@pytest.mark.parametrize("beams", [1, 2])
def test_variants_decode_what_dola_decodes(variant: str, beams: int) -> None:
    """Otherwise their times would not be comparable."""
    with torch.inference_mode():
        model = DoLaJanusWrapper(common.build("tiny", torch.device("cpu"), torch.float32))
        prompt = common.prompt_for(model, common.Workload("tiny", 2, 2, beams), 9) | {"max_new_tokens": 6}
        prompt |= {"return_dict_in_generate": True, "output_scores": True}
        want, got = (latency.decode(model, name, 2, **prompt) for name in ("dola", variant))
        assert torch.equal(got.sequences, want.sequences)
        assert torch.allclose(torch.stack(got.scores), torch.stack(want.scores), atol=1e-5)


def test_quartiles_are_of_paired_ratios() -> None:
    times = {"baseline": [(1.0, 1.0), (2.0, 10.0), (4.0, 2.0)], "dola": [(1.0, 2.0), (2.0, 20.0), (6.0, 4.0)]}
    summary = latency.summarize(times, {"baseline": 100, "dola": 110})
    assert summary["dola"]["token_ratio"] == [2, 2, 2]  # although the machine's speed changed tenfold
    assert summary["dola"]["prefill_ratio"] == [1, 1, 1.25]
    assert summary["dola"]["peak_ratio"] == pytest.approx(1.1)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("shape=2b", "shape must be some of demo, 1b, 7b, tiny, got '2b'"),
        ("variants=[dola]", "variants must begin with baseline"),
        ("rounds=0", "rounds must be an integer of at least 1, got 0"),
        ("batch=[1,x]", "batch must be an integer of at least 1, got 'x'"),
        ("round=1", "unknown key 'round', did you mean 'rounds'"),
        ("layers=3", "layers must be at most 2 for 6 layers, got 3"),
        ("out=/nowhere/at/all", "out must be in a folder that exists"),
        ("fast", "arguments must be written key=value, got 'fast'"),
    ],
)
def test_latency_refuses(argument: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        latency.run([*TINY, argument])


def test_profile_names_the_parts_of_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    parts = profile_step.EXITS | profile_step.OF_FORMULAS
    before = [getattr(owner, name) for owner, name in parts.values()]
    profile_step.run(["shape=tiny", "layers=2", "prompt=9", "tokens=5", "device=cpu"])
    table = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    baseline, dola = ({row[0]: float(row[column]) for row in table[1:]} for column in (2, 4))  # operations
    assert list(dola) == ["decoder layers", "lm_head", *parts, profile_step.OTHER, "total"]
    assert baseline["decoder layers"] == dola["decoder layers"] > 50
    assert all(baseline[name] == 0 < dola[name] for name in parts)
    assert [getattr(owner, name) for owner, name in parts.values()] == before
    with pytest.raises(ValueError, match="tokens must be an integer of at least 3, got 2"):
        profile_step.run(["tokens=2"])
    with pytest.raises(ValueError, match="layers must be at most 2 for 6 layers, got 3"):
        profile_step.run(["shape=tiny", "layers=3"])


def test_a_kept_heap_has_no_page_faults(capsys: pytest.CaptureFixture[str]) -> None:
    allocator.run(["rounds=2", "processes=2", "threads=1", "layers=1"])
    table = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert table[0] == ["round", "as it is", "kept"] and [row[0] for row in table[1:]] == ["1", "2"]
    assert all(float(cell.split(" ms")[0]) > 0 for row in table[1:] for cell in row[1:])
    assert sys.platform != "linux" or table[2][2].endswith(", 0")
    with pytest.raises(ValueError, match="rounds must be an integer of at least 1, got 0"):
        allocator.run(["rounds=0"])


def test_long_run_reports_the_slope(capsys: pytest.CaptureFixture[str]) -> None:
    long_run.run(["generations=10", "warm_up=5", "tokens=2", "prompt=4", "threads=0"])
    out = capsys.readouterr().out
    assert "generations  10 after 5: off, on, trace, beams, stream by turns" in out
    assert " bytes per generation" in out
    assert long_run.slope([10, 14, 18, 22]) == pytest.approx(4)
    with pytest.raises(ValueError, match="generations must be an integer of at least 2, got 1"):
        long_run.run(["generations=1"])


@pytest.mark.parametrize("shape", ["demo", "tiny"])
def test_throughput_counts_the_answers(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = [f"shape={shape}", "questions=2", "batch=[1,2]", "tokens=3", "rounds=1", "device=cpu"]
    options = read_config(throughput.ThroughputOptions, given, None)
    model, processor = throughput.load_shape(options)
    prompts = throughput.questions(processor, 2)
    for name, asked in throughput.ASKED.items():
        assert len(asked) == int(name[0])
        start = time.perf_counter()
        answered, a_minute = throughput.answer(model, processor, prompts, options, 2, asked)
        assert a_minute >= 2 * len(asked) / (time.perf_counter() - start) * 60
        assert sorted(prompt.id for prompt, _ in answered) == [0, 1]
        assert [len(outcome.answers) for _, outcome in answered] == [len(asked)] * 2
    throughput.run(given)
    table = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert table[0] == ["batch", *throughput.ASKED] and [row[0] for row in table[1:]] == ["1", "2"]
    assert all(int(cell.split()[0]) > 0 for row in table[1:] for cell in row[1:])
    with pytest.raises(ValueError, match=r"questions must be a multiple of each batch, \[1, 2\], got 3"):
        throughput.run(["questions=3", "batch=[1,2]"])


def test_methods_are_shown_with_what_validation_chose() -> None:
    """Two buckets of one method on two descriptions, one of which each gets right, by a change at the second token."""
    pairs = [pair for _, pair in numbered("test", 2, ["describe"])]
    right = [pair.question.answer for pair in pairs]
    off = [right[0], ""]
    low, high = ["", right[1]], right

    def answered(texts: list[str], jsd: float) -> list[Answer]:
        changes = [[] if text == before else [1] for text, before in zip(texts, off, strict=True)]
        return [Answer(text, 2, [30, 2], None, [0.0, jsd], change) for text, change in zip(texts, changes, strict=True)]

    test = Answers(pairs, {"off": answered(off, 0.0), "low": answered(low, 0.1), "high": answered(high, 0.4)})
    validation = Answers(pairs, {"off": test.answers["off"], "low": test.answers["high"], "high": test.answers["off"]})
    lines = methods.table({"validation": validation, "test": test}, "describe", {"dola": ["high", "low"]})
    head, _, *rows = [line.split(" | ") for line in lines if line]
    assert [row[:2] for row in rows] == [["| off", ""], ["| high", "default"], ["| low", "chosen"]]
    column = {name.strip("| "): i for i, name in enumerate(head)}
    assert rows[0][column["exact, %"]] == "50.0" and rows[1][column["exact, %"]].startswith("+50.0 [")
    assert [row[column["changed, %"]] for row in rows[1:]] == ["25.0", "50.0"]
    assert [row[column["JSD there"]] for row in rows[1:]] == ["0.400", "0.100"]
    assert rows[1][-1] == "100.0 |"
    # Gained at 0.1 (low) and 0.4 (high), lost at 0.1 (low): a tie counts one half.
    assert methods.foretold(test, "describe", ["high", "low"])[0] == pytest.approx(0.75)
