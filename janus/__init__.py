"""Janus and Janus-Pro (deepseek-ai/Janus) on current transformers: published import paths, names and weight keys."""
