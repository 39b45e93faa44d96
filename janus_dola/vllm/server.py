"""The configuration of a server, and those of requests over it, both checked before anything is decoded."""

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from transformers import PretrainedConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from janus_dola.config import METHODS, DoLaConfig, Rows, by_row
from janus_dola.vllm import ARCHITECTURES

KEYS = [key.name for key in fields(DoLaConfig)]
NEUTRAL = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
# vLLM puts these into extra_args by itself.
OF_VLLM = ("kv_transfer_params", "ec_transfer_params", "kv_cache_report_mode")


def over(base: DoLaConfig, keys: Mapping[str, Any]) -> DoLaConfig:
    """A configuration with some of its keys replaced.

    Args:
        base: Gives the other keys; but `bucket_id` alone replaces its `candidate_layers`, and `method` the keys of its
            method.
        keys: Keys of `DoLaConfig`. HTTP has no truth values in `vllm_xargs`: `use_dola_lm` may be 0 or 1.

    Raises:
        ValueError: A key is unknown, or its value is wrong.
    """
    for key in keys:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            raise ValueError(
                f"unknown key {key!r}, " + (f"did you mean {near[0]!r}?" if near else f"allowed are {KEYS}")
            )
    if (on := keys.get("use_dola_lm", True)) not in (0, 1):
        raise ValueError(f"use_dola_lm must be true or false, got {on!r}")
    values = asdict(base)
    if keys.get("method", base.method) != base.method:
        values = {key: value for key, value in values.items() if key not in METHODS[base.method]}
    if "bucket_id" in keys:
        values["candidate_layers"] = None
    return DoLaConfig(**values | dict(keys))


@dataclass(frozen=True)
class Server:
    """What a server was started with.

    Attributes:
        config: The configuration of requests that have no keys of their own.
        num_layers: N.
        layers: The exits that are read; a request's candidates are among them.
        penalties_first: Whether penalties come before DoLa, as they must: not in vLLM's older model runner.
    """

    config: DoLaConfig
    num_layers: int
    layers: tuple[int, ...]
    penalties_first: bool

    @classmethod
    def of(cls, vllm_config: Any) -> "Server | None":
        """That of an engine, after `StartUp`; None if its model is not one of ours."""
        if vllm_config.model_config.architecture not in ARCHITECTURES:
            return None
        config = DoLaConfig(**vllm_config.additional_config["dola"])
        num_layers = vllm_config.model_config.hf_text_config.num_hidden_layers
        layers = by_row([config if config.use_dola_lm else over(config, {"use_dola_lm": True})], num_layers).layers
        return cls(config, num_layers, layers, vllm_config.use_v2_model_runner)

    def rows(self, params: Any) -> Rows:
        """A request's configuration as `config.by_row` makes it, over the exits that are read.

        Args:
            params: Its `SamplingParams`, with keys of `DoLaConfig` in `extra_args`.

        Raises:
            ValueError: A key is unknown, a value wrong, a layer not read, or penalties would come after DoLa.
        """
        given = params.extra_args or {}
        config = over(self.config, {key: value for key, value in given.items() if key not in OF_VLLM})
        if left := sorted(set(by_row([config], self.num_layers).layers) - set(self.layers)):
            raise ValueError(
                f"the candidate layers must be among {list(self.layers)}, which this server reads, got {left}: start it"
                ' with others by --additional-config \'{"dola": {"candidate_layers": [...]}}\''
            )
        rows = by_row([config], self.num_layers, self.layers)
        if not self.penalties_first and not rows.changes_nothing:
            for name, off in NEUTRAL.items():
                if (value := getattr(params, name)) != off:
                    raise ValueError(
                        f"{name} must be {off} with DoLa, got {value}: this model runner of vLLM's applies it after"
                        " DoLa; use_dola_lm=0 leaves DoLa off"
                    )
        return rows


class StartUp(VerifyAndUpdateConfig):
    """vLLM's hook for an architecture's configuration: it runs in the processes that admit requests."""

    server: ClassVar[Server | None] = None  # of the engine that was made last in this process

    @classmethod
    def verify_and_update_config(cls, vllm_config: Any) -> None:
        """Checks the server's configuration, and leaves it where the workers and vLLM's cache of graphs look.

        It is that of the folder's generation_config.json, under `--additional-config '{"dola": {...}}'`.

        Raises:
            ValueError: A key or a value is wrong, or vLLM was started with what DoLa cannot work with.
        """
        drafts = vllm_config.speculative_config
        if drafts is not None and not (
            vllm_config.use_v2_model_runner and drafts.use_ngram() and not drafts.enable_adaptive_verification
        ):
            raise ValueError(
                "speculative_config must be None, or n-gram on vLLM's model runner V2, with DoLa, got"
                f" {drafts.method}: the older runner drops DoLa, and EAGLE-3 takes the exits for itself"
            )
        if vllm_config.parallel_config.enable_batch_sharded_sampling:
            raise ValueError("enable_batch_sharded_sampling must be off with DoLa: it leaves the exits unread")
        folder = vllm_config.model_config.try_get_generation_config()
        if folder.get("do_sample") is False:  # vLLM reads the temperature alone
            vllm_config.model_config.override_generation_config.setdefault("temperature", 0.0)
        config = over(DoLaConfig(), {key: folder[key] for key in KEYS if key in folder})
        given = vllm_config.additional_config.get("dola", {})
        if not isinstance(given, Mapping):
            raise ValueError(f"additional_config: dola must be a mapping of DoLaConfig's keys, got {given!r}")
        config = over(config, given)
        vllm_config.additional_config = {**vllm_config.additional_config, "dola": asdict(config)}
        cls.server = Server.of(vllm_config)


class PublishedConfig(PretrainedConfig):
    """The published layout, which is refused: vLLM would load its tokenizer as transformers 5 does, without spaces."""

    model_type = "multi_modality"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        raise ValueError(
            "model must be in the layout of transformers' own Janus, got the published one:"
            " janus-dola export out=FOLDER model_path=... writes the folder to serve"
        )
