"""What the page shows, and what it does when it is asked."""

import json
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, nullcontext
from dataclasses import fields, replace
from html import escape
from pathlib import Path
from threading import Event
from typing import Any

import gradio as gr
import torch
from matplotlib import rc_context
from PIL import Image
from torch import Tensor

from janus.image_generation import build_prompt, generate_images
from janus.utils.io import load_image
from janus_dola.buckets import candidates_in_bucket
from janus_dola.call import check_length
from janus_dola.config import METHODS, DoLaConfig
from janus_dola.exits import generating_model
from janus_dola.programs.answer import DEMO_IMAGE, DEMO_QUESTION
from janus_dola.programs.differences import Parts, differences
from janus_dola.programs.errors import first_line
from janus_dola.programs.keys import AnswerConfig
from janus_dola.programs.options import ModelConfig, read_config
from janus_dola.programs.prompts import IMAGE_TAG, build_conversation, prompt_length
from janus_dola.programs.web.side_by_side import Turns, answer_both
from janus_dola.programs.web.token_view import token_view
from janus_dola.trace import DoLaTrace
from janus_dola.wrapper import DoLaJanusWrapper

ABOUT = (
    "[DoLa](https://arxiv.org/abs/2309.03883) contrasts the final layer with an earlier one, M, at each token. "
    "α, bucket, layers and method are its controls; the others say how a token is drawn."
)
# The page may be light or dark: no ground, and an ink to read on either.
HEAT: Any = dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none") | dict.fromkeys(
    ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), "#777777"
)
EMPTY: dict[str, Any] = {"text": "", "files": []}
PICTURES = 5  # of text to image, as on the published page
ERRORS = (ValueError, RuntimeError, MemoryError, OSError)  # what a user, or the size of the machine, may cause
SAMPLING = ("temperature", "top_p", "repetition_penalty")  # arguments of `generate` that have a control each
# The demo's examples; in the last one DoLa with the lower layers changes the answer.
EXAMPLES = {DEMO_IMAGE.name: DEMO_QUESTION, "two.png": "What do you see?", "habit.png": "Describe the picture."}


class Drawing:
    """The model, for `generate_images`: counts the tokens drawn, and raises once nobody waits for the pictures."""

    def __init__(self, model: Any, gone: Event) -> None:
        self.model, self.gone, self.tokens = model, gone, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def gen_head(self, hidden: Tensor) -> Tensor:
        if self.gone.is_set():
            raise InterruptedError("nobody waits for the pictures")
        self.tokens += 1
        return self.model.gen_head(hidden)


def as_command(config: ModelConfig, conversations: Sequence[Turns]) -> str:
    """The command that prints both answers; one for each where they answer different conversations."""
    default = read_config(AnswerConfig, [f"model_path={config.model_path}"])  # with the checkpoint's own configuration
    keys = {key.name for key in fields(ModelConfig)} - {"use_dola_lm", "generation", "model_path"}
    given = {key: getattr(config, key) for key in sorted(keys) if getattr(config, key) != getattr(default, key)}
    path = str(Path(config.model_path).resolve()) if Path(config.model_path).is_dir() else config.model_path
    if path != str(DEMO_IMAGE.parents[1].resolve() / "checkpoint"):  # the default
        given["model_path"] = path
    given |= {f"generation.{k}": v for k, v in config.generation.items() if v != default.generation.get(k)}

    def line(turns: Turns, **more: Any) -> str:
        question, *later = turns[:-1]
        images = question["images"]
        if later:
            more["conversation"] = turns[:-1]
        else:
            more |= {"image": images[0]} if len(images) == 1 else {"images": images} if images else {}
            more["question"] = question["content"].removeprefix(f"{IMAGE_TAG}\n" * len(images))
        words = [f"{k}={v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)}" for k, v in more.items()]
        return shlex.join(["python", "inference_dola.py", *words])

    off, on = conversations
    if off == on:
        return line(off, **given, compare=True)
    return f"{line(off, **given, use_dola_lm=False)}\n{line(on, **given, use_dola_lm=True)}"


def as_messages(turns: Turns, said: Sequence[Parts]) -> list[dict[str, Any]]:
    """A conversation as `gradio.Chatbot` has it; what its turns say in parts, of which those that differ are marked."""
    messages: list[dict[str, Any]] = []
    for index, (turn, parts) in enumerate(zip(turns, said, strict=True)):
        role = "assistant" if index % 2 else "user"
        messages += [{"role": role, "content": {"path": path}} for path in turn["images"]]
        escaped = [(escape(text, quote=False), differs) for text, differs in parts]  # the page takes it for HTML
        html = "".join(f"<mark>{text}</mark>" if differs else text for text, differs in escaped)
        messages.append({"role": role, "content": html})
    return messages


def check_picture(path: str) -> None:
    try:
        load_image(path)
    except ValueError as error:  # which names the place of the upload
        raise ValueError(
            f"{Path(path).name} must be a picture that Pillow can read, of at most {Image.MAX_IMAGE_PIXELS} pixels"
        ) from error


def draw_heat(trace: DoLaTrace, tokenizer: Any) -> Image.Image | None:
    """The trace's heat map; None where no layer is traced."""
    if not trace.traced_layers:
        return None
    with tempfile.TemporaryDirectory() as folder, rc_context(HEAT):
        trace.heatmap(f"{folder}/heat.png", tokenizer)
        with Image.open(f"{folder}/heat.png") as image:
            return image.copy()


def sentence(error: BaseException) -> gr.Error:
    return gr.Error(first_line(error), title="No answer", print_exception=False)


class Page:
    """The page. Its API has /ask, which keeps a conversation for each session, and /draw.

    Args:
        config: What its controls begin with.
        model: The wrapped model.
        processor: The checkpoint's.
        text_to_image: Whether it has a tab that draws.

    Attributes:
        blocks: It, as `gradio.Blocks`.
    """

    def __init__(self, config: ModelConfig, model: DoLaJanusWrapper, processor: Any, text_to_image: bool) -> None:
        self.config, self.model, self.processor = config, model, processor
        inner = generating_model(model.model)
        self.positions = inner.config.get_text_config().max_position_embeddings
        own = inner.generation_config
        self.usual = {key: config.generation.get(key) or getattr(own, key, None) or 1.0 for key in SAMPLING}
        # Only one call at a time runs the model.
        self.events: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
        with gr.Blocks(title="Janus + DoLa", analytics_enabled=False) as self.blocks:
            name = "/".join(Path(config.model_path).parts[-2:])
            gr.Markdown(f"### Janus + DoLa · {name}, {model.num_layers} layers\n{ABOUT}", elem_id="about")
            with gr.Tab("Ask") if text_to_image else nullcontext():
                self.ask_tab()
            if text_to_image:
                with gr.Tab("Draw"):
                    self.draw_tab()

    def ask_tab(self) -> None:
        """The conversations, the question, what DoLa did and the controls, and what happens on a click."""
        with gr.Row():
            with gr.Column(scale=4, min_width=320):
                with gr.Row(elem_classes="answers"):
                    self.off, self.on = (
                        gr.Chatbot(
                            label=f"DoLa {way}", elem_id=way, elem_classes="column", height=340, min_width=280,
                            render_markdown=False, placeholder=f"The answer with DoLa {way}",
                            buttons=[],  # "copy" copies the tags of a mark
                        )
                        for way in ("off", "on")
                    )  # fmt: skip
                self.box = gr.MultimodalTextbox(
                    label="Question", placeholder="Ask; add or paste pictures", file_types=["image"],
                    file_count="multiple", sources=["upload"], autofocus=True, elem_id="question",
                )  # fmt: skip
                with gr.Row():
                    stop, new = (gr.Button(does, size="sm", min_width=120) for does in ("Stop", "New conversation"))
                with gr.Column(elem_classes="found"):
                    self.tokens = gr.HTML(label="Tokens", elem_id="tokens")
                    self.heat = gr.Image(
                        label="Heat map", format="png", show_label=False, buttons=["download", "fullscreen"],
                        interactive=False, elem_id="heat",
                    )  # fmt: skip
                    self.command = gr.Code(
                        label="Command", language="shell", interactive=False, lines=1, wrap_lines=True,
                        elem_id="command",
                    )  # fmt: skip
                if DEMO_IMAGE.is_file():  # a wheel has no demo
                    paths = {str(DEMO_IMAGE.with_name(name)): text for name, text in EXAMPLES.items()}
                    gr.Examples([[{"text": text, "files": [path]}] for path, text in paths.items()], self.box)
            with gr.Column(scale=1, min_width=260):
                controls = self.controls()
        self.state = gr.State([[], []])
        outputs = [self.off, self.on, self.tokens, self.heat, self.command, self.box, self.state]
        asking = self.box.submit(self.ask, [self.box, *controls, self.state], outputs, api_name="ask", **self.events)
        stop.click(None, cancels=asking, api_visibility="private")
        nothing: list[Any] = [None, None, "", None, "", EMPTY, [[], []]]
        new.click(lambda: nothing, None, outputs, cancels=asking, api_visibility="private")

    def controls(self) -> list[Any]:
        """The controls of /ask, in the order of its parameters."""
        config, N = self.config, self.model.num_layers
        thirds = [
            (f"{third}: {', '.join(map(str, candidates_in_bucket(N, i)))}", i)
            for i, third in enumerate(("lower", "middle", "upper"))
        ]
        # No candidates are the last layer alone: nothing to subtract.
        chosen = [N] if config.candidate_layers == [] else config.candidate_layers or []
        warm = self.usual["temperature"] if config.generation.get("do_sample") else 0
        longest = config.generation.get("max_new_tokens") or 512
        penalty = self.usual["repetition_penalty"]
        bucket_info = "layers to choose M from; DeCo and SLED have all that lie there"
        return [
            gr.Slider(0, 1, config.alpha, step=0.01, label="α", info="tokens below α · max q_N are out"),
            gr.Radio(thirds, value=config.bucket_id, label="Bucket", info=bucket_info),
            gr.Dropdown(
                list(range(1, N + 1)), value=chosen, multiselect=True, label="Layers", info="in place of a bucket"
            ),
            gr.Slider(0, 2, warm, step=0.05, label="Temperature", info="0: the likeliest token"),
            gr.Slider(0, 1, self.usual["top_p"], step=0.01, label="Top-p"),
            gr.Slider(1, longest, longest, step=1, precision=0, label="Length", info="new tokens at most"),
            gr.Slider(0.5, 2, penalty, step=0.01, label="Repetition penalty", info="1: none"),
            gr.Number(config.seed, precision=0, label="Seed"),
            gr.Radio(list(METHODS), value=config.method, label="Method", info="α is DoLa's"),
        ]

    def draw_tab(self) -> None:
        prompt = gr.Textbox(label="Prompt", placeholder="What to draw", elem_id="prompt")
        with gr.Row():
            controls = [
                gr.Slider(1, 10, 5, step=0.5, label="CFG weight"),
                gr.Slider(0, 1, 1, step=0.05, label="Temperature"),
                gr.Number(self.config.seed, precision=0, label="Seed"),
            ]
        button = gr.Button("Draw", variant="primary")
        pictures = gr.Gallery(label="Pictures", columns=PICTURES, format="png", elem_id="pictures")
        asked = [prompt, *controls]
        gr.on([button.click, prompt.submit], self.draw, asked, pictures, api_name="draw", **self.events)

    def asked(
        self, dola: dict[str, Any], temperature: float, top_p: float, length: int, penalty: float, seed: int | None
    ) -> ModelConfig:
        """The configuration that the controls stand for; keys of other methods keep their defaults."""
        draws = {"temperature": temperature, "top_p": top_p} if temperature else {}
        own = {k: v for k, v in self.config.generation.items() if k not in SAMPLING}
        own |= {"max_new_tokens": length, "do_sample": bool(draws), **draws}
        own |= {"repetition_penalty": penalty} if penalty != self.usual["repetition_penalty"] else {}
        others = {key for method in METHODS if method != dola["method"] for key in METHODS[method]}
        dola |= {key: getattr(DoLaConfig, key) for key in others}
        return replace(self.config, **dola, seed=seed or 0, generation=own)

    def ask(
        self,
        message: dict[str, Any],
        alpha: float,
        bucket_id: int,
        layers: list[int],
        temperature: float,
        top_p: float,
        length: int,
        penalty: float,
        seed: int | None,
        method: str,
        past: list[Turns],
    ) -> Iterator[dict[Any, Any]]:
        """Asks with DoLa off and on; each answer goes on with its own conversation."""
        dola = {"alpha": alpha, "bucket_id": bucket_id, "candidate_layers": layers or None, "method": method}
        try:
            asked = self.asked(dola, temperature, top_p, length, penalty, seed)
            new = build_conversation(asked.roles, message["text"], message["files"])
            conversations = [[*turns, *new] for turns in past]
            for path in message["files"]:
                check_picture(path)
            for turns in conversations:
                check_length(prompt_length(turns, self.processor), length, self.positions, "new ones")
            yield {self.box: EMPTY} | self.shown(conversations, coming=True)
            with closing(answer_both(self.model, self.processor, asked, conversations)) as answers:
                for texts, trace in answers:  # noqa: B007
                    after = [[*c[:-1], c[-1] | {"content": text}] for c, text in zip(conversations, texts, strict=True)]
                    yield self.shown(after, coming=True)
            yield self.shown(after) | {
                self.tokens: token_view(trace, self.processor.tokenizer),
                self.heat: draw_heat(trace, self.processor.tokenizer),
                self.command: as_command(asked, conversations),
                self.state: after,
            }
        except ERRORS as error:
            yield {self.box: message} | self.shown(past)
            raise sentence(error) from error

    def shown(self, conversations: Sequence[Turns], coming: bool = False) -> dict[Any, Any]:
        """The conversations with DoLa off and on, in their places; `coming` if the last answers are not whole yet."""
        said = [[turn["content"].replace(IMAGE_TAG, "").strip() for turn in turns] for turns in conversations]
        parts = [differences(off, on) for off, on in zip(*said, strict=True)]
        if coming:
            parts[-1] = ([(said[0][-1], False)], [(said[1][-1], False)])
        off, on = (as_messages(turns, [turn[i] for turn in parts]) for i, turns in enumerate(conversations))
        return {self.off: off, self.on: on}

    def draw(
        self,
        prompt: str,
        cfg_weight: float,
        temperature: float,
        seed: int | None,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Iterator[Any]:
        """Draws pictures, as the published page does."""
        processor = self.processor
        size, gone = processor.image_processor.image_size, Event()
        number, drawing = (size // 16) ** 2, Drawing(self.model, gone)
        try:
            if not prompt.strip():
                raise ValueError(f"prompt must not be empty, got {prompt!r}")
            text = build_prompt(processor, prompt)
            check_length(len(processor.tokenizer.encode(text)), number, self.positions, "of an image")
            generator = torch.Generator(self.model.device).manual_seed(seed or 0)
            arguments = (temperature, PICTURES, cfg_weight, number, size)
            with ThreadPoolExecutor(1) as pool, ExitStack() as on_exit:
                on_exit.callback(gone.set)
                call = pool.submit(generate_images, drawing, processor, text, *arguments, generator=generator)
                while wait([call], timeout=1).not_done:
                    progress((drawing.tokens, number), unit="tokens")
                    yield gr.skip()
                yield list(call.result()[1])
        except ERRORS as error:
            raise sentence(error) from error
