"""Right or wrong, and how sure one may be of it: answers judged, compared with the baseline, with intervals."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from janus_dola.programs.keys import BASELINE
from janus_dola.programs.prompts import Prompt

RESAMPLES = 2000


def is_right(prompt: Prompt, text: str) -> bool:
    """Whether a text gives the prompt's answer."""
    if prompt.form == "pope":
        return yes_or_no(text) == prompt.answer
    return normalize(text) == normalize(prompt.choices[prompt.answer] if prompt.choices else prompt.answer)


def normalize(text: str) -> str:
    """Lower case, without punctuation, articles and extra spaces, as SQuAD compares answers."""
    text = re.sub(r"[^\w\s]", " ", text.lower())
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def yes_or_no(text: str) -> str:
    """What an answer to a POPE question says, as the benchmark reads it: "no" if it says no or not, else "yes"."""
    words = re.sub(r"[.,]", " ", text.lower()).split()
    return "no" if {"no", "not"} & set(words) else "yes"


def interval(values: np.ndarray) -> list[float]:
    """Bootstrap 95 % interval of the mean of `values` [n]."""
    draws = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    return [float(x) for x in np.quantile(values[draws].mean(1), [0.025, 0.975])]


def simultaneous_intervals(differences: np.ndarray) -> list[list[float]]:
    """Bootstrap 95 % intervals of the means of paired differences [configurations, n], for all of them at once.

    The best of many is not held to an interval for one: each is mean ± c standard errors, with c the 95 % quantile of
    the largest standardized deviation over the configurations on the same draws (Westfall and Young, 1993).
    """
    n = differences.shape[1]
    mean, error = differences.mean(1), differences.std(1) / np.sqrt(n)  # [configurations]
    draws = np.random.default_rng(0).integers(0, n, (RESAMPLES, n))
    counts = np.stack([np.bincount(draw, minlength=n) for draw in draws])  # [draws, n]
    deviation = np.abs(counts @ differences.T / n - mean)  # [draws, configurations]
    standardized = np.divide(deviation, error, out=np.zeros_like(deviation), where=error > 0)
    half = np.quantile(standardized.max(1), 0.95) * error
    return np.stack([mean - half, mean + half], 1).tolist()


def pope_measures(said: Sequence[str], truth: Sequence[str]) -> dict[str, float]:
    """Accuracy, precision, recall and F1 of "yes", and the share of "yes", as POPE reports them (arXiv 2305.10355)."""
    yes, true = np.array(said) == "yes", np.array(truth) == "yes"
    hits = (yes & true).sum()
    return {
        "accuracy": float((yes == true).mean()),
        "precision": float(hits / max(yes.sum(), 1)),
        "recall": float(hits / max(true.sum(), 1)),
        "f1": float(2 * hits / max(yes.sum() + true.sum(), 1)),
        "yes_ratio": float(yes.mean()),
    }


def _pope(pairs: Sequence[tuple[Prompt, dict[str, Any]]], name: str) -> dict[str, float]:
    """`pope_measures` of a configuration's answers."""
    return pope_measures([result[name]["said"] for _, result in pairs], [prompt.answer for prompt, _ in pairs])


def summarize(prompts: Sequence[Prompt], results: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The table: for each configuration its accuracy, the difference from the baseline, and what changed.

    Args:
        prompts: The questions.
        results: Of each, name of the configuration -> {"correct"}, and "said" or "logprob" where the form has them.
    """
    baseline = np.array([result[BASELINE]["correct"] for result in results], dtype=float)
    pope = [pair for pair in zip(prompts, results, strict=True) if pair[0].form == "pope"]
    names = sorted({prompt.category for prompt, _ in pope if prompt.category})
    splits = {split: [pair for pair in pope if pair[0].category == split] for split in names}
    table: dict[str, dict[str, Any]] = {}
    for name in results[0]:
        correct = np.array([result[name]["correct"] for result in results], dtype=float)
        logprobs = [result[name]["logprob"] for result in results if "logprob" in result[name]]
        table[name] = {
            "questions": len(correct),
            "accuracy": float(correct.mean()),
            "interval": interval(correct),
            "difference": float((correct - baseline).mean()),
            "difference_interval": interval(correct - baseline),
            "gained": int(((correct == 1) & (baseline == 0)).sum()),
            "lost": int(((correct == 0) & (baseline == 1)).sum()),
            "logprob": float(np.mean(logprobs)) if logprobs else None,
        }
        if pope:
            table[name]["pope"] = _pope(pope, name)
            table[name]["pope_splits"] = {split: _pope(part, name) for split, part in splits.items()}
    correct = np.array([[result[name]["correct"] for result in results] for name in table], dtype=float)
    for row, both in zip(table.values(), simultaneous_intervals(correct - baseline), strict=True):
        row["simultaneous_interval"] = both
    return table
