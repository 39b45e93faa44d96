"""DoLa decoding with dynamic early exit for Janus (arXiv 2309.03883): see `DoLaJanusWrapper`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from janus_dola.config import DoLaConfig
    from janus_dola.trace import DoLaTrace
    from janus_dola.wrapper import DoLaJanusWrapper

__all__ = ["DoLaConfig", "DoLaJanusWrapper", "DoLaTrace"]
_PLACES = {"DoLaConfig": "config", "DoLaJanusWrapper": "wrapper", "DoLaTrace": "trace"}


def __getattr__(name: str) -> Any:  # PEP 562: torch is imported when it is needed, not before a program's first line
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"janus_dola.{_PLACES[name]}"), name)
