"""Two answers at the same time, with DoLa off and on, each token for token that of `inference_dola.py`."""

from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from queue import Empty, SimpleQueue
from threading import Event
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import StoppingCriteria, TextStreamer

from janus_dola.processor import NaNWatch
from janus_dola.programs.engine import generate_arguments
from janus_dola.programs.options import ModelConfig
from janus_dola.programs.prompts import open_images
from janus_dola.trace import DoLaTrace
from janus_dola.wrapper import DoLaJanusWrapper

Turns = list[dict[str, Any]]


class Column(TextStreamer):
    """Puts each new piece of its column's text on a queue."""

    def __init__(self, tokenizer: Any, index: int, told: SimpleQueue[tuple[int, str | None]]) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self.index, self.told = index, told

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.told.put((self.index, text))


class Gone(StoppingCriteria):
    """Ends all rows once nobody waits for the answer."""

    def __init__(self, gone: Event) -> None:
        self.gone = gone

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.gone.is_set(), device=input_ids.device)


class OwnDraws(TorchFunctionMode):
    """In this thread sampling draws what it draws after `torch.manual_seed(seed)`, whatever other threads draw."""

    def __init__(self, seed: int, device: torch.device) -> None:
        super().__init__()
        self.generator = torch.Generator(device).manual_seed(seed)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = {"generator": self.generator} if func is torch.multinomial else {}
        return func(*args, **(kwargs or {}), **own)


def answer_both(
    model: DoLaJanusWrapper, processor: Any, config: ModelConfig, conversations: Sequence[Turns]
) -> Generator[tuple[list[str], DoLaTrace]]:
    """Answers two conversations, the first with DoLa off, the second with DoLa on. Closing the iterator stops both.

    Args:
        model: The wrapped model, left as it is.
        processor: The checkpoint's.
        config: Its DoLa keys, `generation` and `seed`; each answer draws as if it were alone.
        conversations: Two, as `build_conversation` makes them; if they are equal, images are encoded once.

    Yields:
        The texts so far, at least once a second, and in the end the answers; and the second one's trace, which is empty
        until then.

    Raises:
        ValueError: An image, or an argument of `generate`, is wrong, or logits were NaN.
    """
    tokenizer, gone, trace = processor.tokenizer, Event(), DoLaTrace()
    told: SimpleQueue[tuple[int, str | None]] = SimpleQueue()

    def embed(turns: Turns) -> dict[str, Tensor]:
        inputs = processor(conversations=turns, images=open_images(turns, processor)).to(model.device, model.dtype)
        with torch.inference_mode():
            embeds = model.prepare_inputs_embeds(**inputs)  # [1, T, d]
        return {"inputs_embeds": embeds, "attention_mask": inputs.attention_mask}

    def generate(index: int, prompt: Future[dict[str, Tensor]]) -> str:
        try:
            watch = NaNWatch()
            with OwnDraws(config.seed, model.device) if config.generation.get("do_sample") else nullcontext():
                sequences = model.generate_with_dola(
                    **generate_arguments(tokenizer, config.generation),
                    **prompt.result(),
                    configs=[replace(config.dola(), use_dola_lm=bool(index))],
                    trace=trace if index else None,
                    streamer=Column(tokenizer, index, told),
                    logits_processor=[watch],
                    stopping_criteria=[Gone(gone)],
                )
            if error := watch.errors(1)[0]:
                raise ValueError(error)
            return tokenizer.decode(sequences[0], skip_special_tokens=True).strip()
        finally:
            told.put((index, None))

    with ThreadPoolExecutor(2) as pool, ExitStack() as on_exit:
        on_exit.callback(gone.set)
        same = conversations[0] == conversations[1]
        first = pool.submit(embed, conversations[0])
        prompts = [first, first if same else pool.submit(embed, conversations[1])]
        calls = [pool.submit(generate, index, prompts[index]) for index in (0, 1)]
        texts, ended = ["", ""], 0
        while ended < 2:
            try:  # all that came meanwhile: the reader may be slower than the model
                index, text = told.get(timeout=1)
                while True:
                    if text is None:
                        texts[index], ended = calls[index].result(), ended + 1
                    else:
                        texts[index] += text
                    index, text = told.get_nowait()
            except Empty:
                pass
            yield [text.strip() for text in texts], trace
