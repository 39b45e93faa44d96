"""Arguments of transformers' `generate`: what each program refuses of them, and why."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from janus_dola.config import UNSUPPORTED
from janus_dola.programs.errors import first_line, unknown_key

# A table for each kind of program: argument -> the values that leave it off, and why it must be left off.
Refused = Mapping[str, tuple[tuple[Any, ...], str]]
ALWAYS: Refused = {"return_dict_in_generate": ((None, False), "the answers alone are printed")}
BATCH: Refused = UNSUPPORTED | {
    "num_return_sequences": ((None, 1), "each prompt has one answer"),
    "max_length": ((None,), "it counts the padding, max_new_tokens does not"),
    "min_length": ((None, 0), "it counts the padding, min_new_tokens does not"),
    "exponential_decay_length_penalty": ((None,), "it counts the padding"),
    "max_time": ((None,), "it ends all answers of a batch at once"),
}
PAGE: Refused = dict.fromkeys(("num_beams", "num_return_sequences"), ((None, 1), "it shows one answer as it comes"))
# What transformers would find out too late: in the last step, when the first row ends, or by dividing by it.
POSITIVE = ("max_new_tokens", "num_beams", "num_return_sequences")
FLOATS = ("temperature", "repetition_penalty", "encoder_repetition_penalty")  # refused as integers
TOKEN_IDS = ("eos_token_id", "pad_token_id", "bos_token_id", "forced_eos_token_id", "forced_bos_token_id")


def generation_config(**arguments: Any) -> Any:
    from transformers import GenerationConfig  # not at the top: it takes a second, which --help does not need

    return GenerationConfig(**arguments)


@cache
def names() -> tuple[str, ...]:
    """The arguments of `generate`."""
    return tuple(name for name in vars(generation_config()) if not name.startswith("_"))


def refuse(generation: Mapping[str, Any], table: Refused, must: str) -> None:
    """Refuses what a table names.

    Args:
        generation: The arguments.
        table: Such as `BATCH`.
        must: What such an argument must be, for the error.

    Raises:
        ValueError: One of them is not left off.
    """
    for name, (off, why) in table.items():
        if (value := generation.get(name)) not in off:
            raise ValueError(f"generation.{name} must be {must}, got {value!r}: {why}")


def check_generation(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Refuses what `generate` does not take.

    Returns:
        The arguments, with a float in place of an integer where `generate` takes floats alone.

    Raises:
        ValueError: A key is unknown, or its value is of another type or out of range.
    """
    if unknown := [key for key in generation if key not in names()]:
        raise ValueError(unknown_key(unknown[0], names(), "generation."))
    refuse(generation, ALWAYS, "left off")
    for key in POSITIVE:
        value = generation.get(key, 1)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"generation.{key} must be an integer of at least 1, got {value!r}")
    try:
        generation_config(**generation)
    except TypeError as error:
        raise ValueError(f"generation: {first_line(error)}, got {dict(generation)}") from error
    floats = {key: float(value) for key in FLOATS if type(value := generation.get(key)) is int}
    return {**generation, **floats}


def check_token_ids(generation: Mapping[str, Any], vocab_size: int) -> None:
    """Refuses tokens that a model does not have.

    Raises:
        ValueError: There is such a token.
    """
    for key in TOKEN_IDS:
        value = generation.get(key)
        for token in value if isinstance(value, (list, tuple)) else [value]:
            if token is not None and (not isinstance(token, int) or not 0 <= token < vocab_size):
                raise ValueError(
                    f"generation.{key} must be a token id or a list of them, below {vocab_size}, the model's "
                    f"vocabulary, got {value!r}"
                )
