"""A page to ask a Janus model, with DoLa off and on side by side: janus-dola web [config=FILE] key=value ...

The demo:          janus-dola web open=true
A published model: janus-dola web config=configs/janus_pro_7b.yaml
"""

import json
import os
import shlex
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, fields, replace
from html import escape
from importlib.util import find_spec
from pathlib import Path
from threading import Event
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from janus.image_generation import build_prompt, generate_images
from janus.utils.io import load_image
from janus_dola.config import DoLaConfig, option
from janus_dola.dola_runtime import candidates_in_bucket
from janus_dola.exits import generating_model
from janus_dola.methods import METHODS
from janus_dola.programs import checkpoint
from janus_dola.programs.answer import DEMO_IMAGE, DEMO_QUESTION, AnswerConfig
from janus_dola.programs.errors import first_line
from janus_dola.programs.generation import PAGE, refuse
from janus_dola.programs.options import ModelConfig, read_config
from janus_dola.programs.prompts import IMAGE_TAG, build_conversation, prompt_length
from janus_dola.programs.side_by_side import Turns, answer_both
from janus_dola.programs.token_view import token_view
from janus_dola.trace import DoLaTrace
from janus_dola.wrapper import DoLaJanusWrapper

EMPTY: dict[str, Any] = {"text": "", "files": []}
WAITING = 32  # questions that may wait for their turn
PICTURES = 5  # of text to image, as on the published page
ERRORS = (ValueError, RuntimeError, MemoryError, OSError)  # what a user, or the size of the machine, may cause
# The demo's examples; in the last one DoLa with the lower layers changes the answer.
EXAMPLES = {DEMO_IMAGE.name: DEMO_QUESTION, "two.png": "What do you see?", "habit.png": "Describe the picture."}


@dataclass
class WebConfig(ModelConfig):
    """The keys of the page, where `use_dola_lm` is not looked at.

    generation.max_new_tokens is also the most that one may ask for on the page.
    """

    host: str = option("127.0.0.1", "0.0.0.0: whoever reaches this machine may ask")
    port: int | None = option(None, "null: the first free one from 7860")
    open: bool = option(False, "open the page in this machine's browser")
    text_to_image: bool = option(
        False,
        "a tab that draws, where the checkpoint's image part is trained (the demo's is not)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(self.generation, PAGE, "1 on a page")
        if not find_spec("gradio"):
            raise ValueError("web needs gradio: pip install 'janus-dola[web]'")


def run(argv: Sequence[str]) -> None:
    config = read_config(WebConfig, argv)
    model, processor = checkpoint.load(config)
    if config.text_to_image and not hasattr(model, "gen_head"):
        raise ValueError("text_to_image must be false for a checkpoint in transformers' own layout, got true")
    blocks = serve(config, model, processor)
    print(blocks.local_url, flush=True)
    blocks.block_thread()


def serve(config: WebConfig, model: DoLaJanusWrapper, processor: Any) -> Any:
    """Starts to serve the page, a `gradio.Blocks`, in the background."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import
    import gradio as gr

    blocks = page(config, model, processor)
    font, mono = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]  # none from the network
    blocks.queue(max_size=WAITING).launch(
        server_name=config.host,
        server_port=config.port,
        inbrowser=config.open,
        share=False,
        ssr_mode=False,
        quiet=True,
        prevent_thread_lock=True,
        max_file_size=3 * (Image.MAX_IMAGE_PIXELS or 2**30),  # as much as a data URL
        footer_links=["api", "settings"],
        theme=gr.themes.Default(primary_hue="blue", font=font, font_mono=mono),
        css_paths=Path(__file__).with_suffix(".css"),
    )
    return blocks


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
    default = read_config(AnswerConfig, [])
    keys = {key.name for key in fields(ModelConfig)} - {"use_dola_lm", "generation"}
    given = {key: getattr(config, key) for key in sorted(keys) if getattr(config, key) != getattr(default, key)}
    if "model_path" in given and Path(config.model_path).is_dir():
        given["model_path"] = str(Path(config.model_path).resolve())
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


def as_messages(turns: Turns) -> list[dict[str, Any]]:
    """A conversation as `gradio.Chatbot` has it."""
    messages: list[dict[str, Any]] = []
    for index, turn in enumerate(turns):
        role = "assistant" if index % 2 else "user"
        messages += [{"role": role, "content": {"path": path}} for path in turn["images"]]
        text = turn["content"].replace(IMAGE_TAG, "").strip()
        messages.append({"role": role, "content": escape(text, quote=False)})  # the page takes it for HTML
    return messages


def page(config: WebConfig, model: DoLaJanusWrapper, processor: Any) -> Any:
    """The page, a `gradio.Blocks`: its API has /ask, which keeps a conversation for each session, and /draw."""
    import gradio as gr

    N, generation, tokenizer = model.num_layers, config.generation, processor.tokenizer
    inner = generating_model(model.model)
    positions = inner.config.get_text_config().max_position_embeddings
    played = ("temperature", "top_p", "repetition_penalty")
    usual = {key: generation.get(key) or getattr(inner.generation_config, key, None) or 1.0 for key in played}
    longest = generation.get("max_new_tokens") or 512

    def sentence(error: BaseException) -> gr.Error:
        return gr.Error(first_line(error), title="No answer", print_exception=False)

    def check_length(prompt: int, new: int) -> None:
        if prompt + new > positions:
            raise ValueError(
                f"too long: {prompt} tokens and {new} new ones are more than the model's {positions} positions"
            )

    def check_picture(path: str) -> None:
        try:
            load_image(path)
        except ValueError as error:  # which names the place of the upload
            raise ValueError(
                f"{Path(path).name} must be a picture that Pillow can read, of at most {Image.MAX_IMAGE_PIXELS} pixels"
            ) from error

    def ask(message, alpha, bucket_id, layers, temperature, top_p, length, penalty, seed, method, past):
        """Asks with DoLa off and on; each answer goes on with its own conversation."""
        draws = {"temperature": temperature, "top_p": top_p} if temperature else {}
        own = {k: v for k, v in generation.items() if k not in played}
        own |= {"max_new_tokens": length, "do_sample": bool(draws), **draws}
        own |= {"repetition_penalty": penalty} if penalty != usual["repetition_penalty"] else {}
        dola = {"alpha": alpha, "bucket_id": bucket_id, "candidate_layers": layers or None, "method": method}
        dola |= {key: getattr(DoLaConfig, key) for m in METHODS if m != method for key in METHODS[m]}  # have no part
        try:
            asked = replace(config, **dola, seed=seed or 0, generation=own)
            new = build_conversation(config.roles, message["text"], message["files"])
            conversations = [[*turns, *new] for turns in past]
            for path in message["files"]:
                check_picture(path)
            for turns in conversations:
                check_length(prompt_length(turns, processor), length)
            yield {box: EMPTY, off: as_messages(conversations[0]), on: as_messages(conversations[1])}
            with closing(answer_both(model, processor, asked, conversations)) as answers:
                for texts, trace in answers:  # noqa: B007
                    after = [[*c[:-1], c[-1] | {"content": text}] for c, text in zip(conversations, texts, strict=True)]
                    shown = {off: as_messages(after[0]), on: as_messages(after[1])}
                    yield shown
            yield shown | {
                tokens: token_view(trace, tokenizer),
                heat: draw_heat(trace),
                command: as_command(asked, conversations),
                state: after,
            }
        except ERRORS as error:
            yield {box: message, off: as_messages(past[0]), on: as_messages(past[1])}
            raise sentence(error) from error

    def draw_heat(trace: DoLaTrace) -> Image.Image | None:
        if not trace.traced_layers:
            return None
        with tempfile.TemporaryDirectory() as folder:
            trace.heatmap(f"{folder}/heat.png", tokenizer)
            with Image.open(f"{folder}/heat.png") as image:
                return image.copy()

    def draw(prompt, cfg_weight, temperature, seed, progress=gr.Progress()):  # noqa: B008
        """Draws pictures, as the published page does."""
        size, gone = processor.image_processor.image_size, Event()
        number, drawing = (size // 16) ** 2, Drawing(model, gone)
        try:
            if not prompt.strip():
                raise ValueError(f"prompt must not be empty, got {prompt!r}")
            text = build_prompt(processor, prompt)
            check_length(len(tokenizer.encode(text)), number)
            generator = torch.Generator(model.device).manual_seed(seed or 0)
            how = (temperature, PICTURES, cfg_weight, number, size)
            with ThreadPoolExecutor(1) as pool, ExitStack() as on_exit:
                on_exit.callback(gone.set)
                call = pool.submit(generate_images, drawing, processor, text, *how, generator=generator)
                while wait([call], timeout=1).not_done:
                    progress((drawing.tokens, number), unit="tokens")
                    yield gr.skip()
                yield list(call.result()[1])
        except ERRORS as error:
            raise sentence(error) from error

    thirds = [
        (f"{third}: {', '.join(map(str, candidates_in_bucket(N, i)))}", i)
        for i, third in enumerate(("lower", "middle", "upper"))
    ]
    # No candidates are the last layer alone: nothing to subtract.
    chosen = [N] if config.candidate_layers == [] else config.candidate_layers or []
    warm = usual["temperature"] if generation.get("do_sample") else 0
    with gr.Blocks(title="Janus + DoLa", analytics_enabled=False) as blocks:
        gr.Markdown(f"### Janus + DoLa · {'/'.join(Path(config.model_path).parts[-2:])}, {N} layers")
        with gr.Tab("Ask") if config.text_to_image else nullcontext(), gr.Row():
            with gr.Column(scale=4, min_width=320):
                with gr.Row(elem_classes="answers"):
                    off, on = (
                        gr.Chatbot(
                            label=f"DoLa {way}", elem_id=way, elem_classes="column", height=340, min_width=280,
                            render_markdown=False, buttons=["copy"], placeholder=f"The answer with DoLa {way}",
                        )
                        for way in ("off", "on")
                    )  # fmt: skip
                box = gr.MultimodalTextbox(
                    label="Question", placeholder="Ask; add or paste pictures", file_types=["image"],
                    file_count="multiple", sources=["upload"], autofocus=True, elem_id="question",
                )  # fmt: skip
                with gr.Row():
                    stop, new = (gr.Button(does, size="sm", min_width=120) for does in ("Stop", "New conversation"))
                with gr.Column(elem_classes="found"):
                    tokens = gr.HTML(label="Tokens", elem_id="tokens")
                    heat = gr.Image(
                        label="Heat map", format="png", show_label=False, buttons=["download", "fullscreen"],
                        interactive=False, elem_id="heat",
                    )  # fmt: skip
                    command = gr.Code(
                        label="Command",
                        language="shell",
                        interactive=False,
                        lines=1,
                        wrap_lines=True,
                        elem_id="command",
                    )
                if DEMO_IMAGE.is_file():  # a wheel has no demo
                    paths = {str(DEMO_IMAGE.with_name(name)): text for name, text in EXAMPLES.items()}
                    gr.Examples([[{"text": text, "files": [path]}] for path, text in paths.items()], box)
            with gr.Column(scale=1, min_width=260):
                controls = [
                    gr.Slider(0, 1, config.alpha, step=0.01, label="α", info="tokens below α · max q_N are out"),
                    gr.Radio(
                        thirds,
                        value=config.bucket_id,
                        label="Bucket",
                        info="layers to choose M from; DeCo and SLED have all that lie there",
                    ),
                    gr.Dropdown(
                        list(range(1, N + 1)),
                        value=chosen,
                        multiselect=True,
                        label="Layers",
                        info="in place of a bucket",
                    ),
                    gr.Slider(0, 2, warm, step=0.05, label="Temperature", info="0: the likeliest token"),
                    gr.Slider(0, 1, usual["top_p"], step=0.01, label="Top-p"),
                    gr.Slider(1, longest, longest, step=1, precision=0, label="Length", info="new tokens at most"),
                    gr.Slider(
                        0.5, 2, usual["repetition_penalty"], step=0.01, label="Repetition penalty", info="1: none"
                    ),
                    gr.Number(config.seed, precision=0, label="Seed"),
                    gr.Radio(list(METHODS), value=config.method, label="Method", info="α is DoLa's"),
                ]
        state = gr.State([[], []])
        outputs = [off, on, tokens, heat, command, box, state]
        one_at_a_time: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
        asking = box.submit(ask, [box, *controls, state], outputs, api_name="ask", **one_at_a_time)
        stop.click(None, cancels=asking, api_visibility="private")
        nothing: list[Any] = [None, None, "", None, "", EMPTY, [[], []]]
        new.click(lambda: nothing, None, outputs, cancels=asking, api_visibility="private")
        if config.text_to_image:
            with gr.Tab("Draw"):
                prompt = gr.Textbox(label="Prompt", placeholder="What to draw", elem_id="prompt")
                with gr.Row():
                    settings = [
                        gr.Slider(1, 10, 5, step=0.5, label="CFG weight"),
                        gr.Slider(0, 1, 1, step=0.05, label="Temperature"),
                        gr.Number(config.seed, precision=0, label="Seed"),
                    ]
                button = gr.Button("Draw", variant="primary")
                pictures = gr.Gallery(label="Pictures", columns=PICTURES, format="png", elem_id="pictures")
            asked = [prompt, *settings]
            gr.on([button.click, prompt.submit], draw, asked, pictures, api_name="draw", **one_at_a_time)
    return blocks
