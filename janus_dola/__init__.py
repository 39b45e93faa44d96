"""DoLa decoding with dynamic early exit for Janus (arXiv 2309.03883): see `DoLaJanusWrapper`."""

from janus_dola.config import DoLaConfig
from janus_dola.trace import DoLaTrace
from janus_dola.wrapper import DoLaJanusWrapper

__all__ = ["DoLaConfig", "DoLaJanusWrapper", "DoLaTrace"]
