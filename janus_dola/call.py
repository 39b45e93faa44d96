"""One call of `generate`: what was asked for is gathered, checked and run once."""

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)

from janus_dola.config import UNSUPPORTED

# generate's leading positional parameters, the same in transformers 4.48 and 5.
POSITIONAL = ("inputs", "generation_config", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn")


def check_length(prompt: int, new: int, positions: int, what: str = "new ones (max_new_tokens)") -> None:
    """Refuses more tokens than the model has positions for: past them answers are noise.

    Raises:
        ValueError: The prompt's and the new tokens together are more.
    """
    if prompt + new > positions:
        raise ValueError(
            f"too long: the prompt's {prompt} tokens and {new} {what} are more than the model's {positions} positions"
        )


class Call:
    """The arguments of one `generate` call, by name, with the defaults of the model's generation config.

    Args:
        model: The generating model.
        args, kwargs: Those of its `generate`.

    Attributes:
        rows: How many prompts there are; None where the arguments do not say.

    Raises:
        ValueError: There are too many arguments, or `inputs_embeds` or its `attention_mask` has the wrong shape.
    """

    def __init__(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        own = model.config.model_type == "janus"  # transformers' Janus, which has a generate of its own
        names = ("inputs", "attention_mask", "logits_processor") if own else POSITIONAL
        if len(args) > len(names):
            raise ValueError(f"generate takes at most {len(names)} positional arguments, got {len(args)}")
        self._model = model
        self._kwargs = dict(zip(names, args, strict=False)) | kwargs
        if own:
            self._kwargs.pop("generation_mode", None)  # text: DoLaJanusWrapper.generate leaves images to the model
            self.set("guidance_scale", 1)  # of images, too: its generate leaves it off for text
        embeds, mask = self.get("inputs_embeds"), self.get("attention_mask")
        ids = [given for name in ("input_ids", "inputs") if (given := self.get(name)) is not None]
        self.rows = next((len(given) for given in (embeds, *ids) if isinstance(given, Tensor)), None)
        if embeds is not None:
            shape, d = list(getattr(embeds, "shape", ())), model.config.get_text_config().hidden_size
            if not isinstance(embeds, Tensor) or len(shape) != 3 or 0 in shape or shape[2] != d:
                raise ValueError(f"inputs_embeds must be a tensor [rows, T, {d}], rows and T at least 1, got {shape}")
            # ids beside the embeddings are more to mask
            if not ids and mask is not None and mask.ndim == 2 and list(mask.shape) != shape[:2]:
                raise ValueError(f"attention_mask must be of shape {shape[:2]}, got {list(mask.shape)}")

    def get(self, name: str) -> Any:
        """What `generate` will use: keyword, else the call's generation config, else the model's."""
        if name in self._kwargs:
            return self._kwargs[name]
        given: GenerationConfig | None = self._kwargs.get("generation_config")
        value = getattr(given, name, None)
        return value if value is not None else getattr(self._model.generation_config, name, None)

    def set(self, name: str, value: Any) -> None:
        """Sets an argument without changing what the caller passed in."""
        given = self._kwargs.get("generation_config")
        if given is not None and hasattr(given, name):  # transformers warns when both are given
            self._kwargs["generation_config"] = copy.deepcopy(given)
            setattr(self._kwargs["generation_config"], name, value)
            self._kwargs.pop(name, None)
        else:
            self._kwargs[name] = value

    def check_dola(self) -> None:
        """Refuses the kinds of decoding that DoLa cannot work with.

        Raises:
            ValueError: One is asked for.
        """
        for name, (off, reason) in UNSUPPORTED.items():
            if (value := self.get(name)) not in off:
                raise ValueError(f"{name} must be left off with DoLa, got {value!r}: {reason}")

    def check_positions(self) -> None:
        """Refuses what `check_length` does of a Janus; other models may stretch their positions.

        Raises:
            ValueError: The prompt is too long.
        """
        prompts = [self.get(name) for name in ("inputs", "input_ids", "inputs_embeds")]
        if self._model.config.model_type == "janus":
            length = max((prompt.shape[1] for prompt in prompts if isinstance(prompt, Tensor)), default=0)
            positions = self._model.config.get_text_config().max_position_embeddings
            check_length(length, self.get("max_new_tokens") or 1, positions)

    def run(
        self, own: Sequence[LogitsProcessor] = (), criterion: StoppingCriteria | None = None, view: Any = None
    ) -> Any:
        """What `generate` returns, of the model or a view of it, with our processors and criterion after the caller's.

        It is always transformers' own loop: Janus' `generate` of transformers drops the caller's processors.
        """
        processors = [*(self._kwargs.pop("logits_processor", None) or ()), *own]
        penalty = self.get("repetition_penalty")
        if penalty not in (None, 1.0) and self.get("inputs_embeds") is not None and self.get("inputs") is None:
            # transformers 5 counts a row's padding off its new tokens and skips the penalty for as many of them.
            self.set("repetition_penalty", 1.0)
            processors.insert(0, RepetitionPenaltyLogitsProcessor(float(penalty)))
        if processors:
            self._kwargs["logits_processor"] = LogitsProcessorList(processors)
        if criterion is not None:
            given = self._kwargs.get("stopping_criteria")
            self._kwargs["stopping_criteria"] = StoppingCriteriaList([*(given or ()), criterion])
        return GenerationMixin.generate(self._model if view is None else view, **self._kwargs)
