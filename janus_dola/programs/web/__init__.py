"""A page to ask a Janus model, with DoLa off and on side by side: janus-dola web [config=FILE] key=value ...

The demo:          janus-dola web open=true
A published model: janus-dola web config=configs/janus_pro_7b.yaml
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from janus_dola.config import option
from janus_dola.programs import checkpoint
from janus_dola.programs.generation import PAGE, refuse
from janus_dola.programs.options import ModelConfig, read_config
from janus_dola.wrapper import DoLaJanusWrapper

WAITING = 32  # questions that may wait for their turn


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
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported, which is an extra
    import gradio as gr

    from janus_dola.programs.web.page import Page

    font, mono = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]  # none from the network
    blocks = Page(config, model, processor, config.text_to_image).blocks
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
        css_paths=Path(__file__).with_name("web.css"),
    )
    return blocks
