"""The program `web`, a page to ask on. What it does is told by `keys.WebConfig`."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from janus_dola.programs import checkpoint
from janus_dola.programs.keys import WebConfig
from janus_dola.programs.options import read_config
from janus_dola.wrapper import DoLaJanusWrapper

WAITING = 32  # questions that may wait for their turn


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
