"""The arguments of a program: `key=value` over files of defaults, `--help`, and one-line errors."""

import inspect
import json
import math
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from janus_dola.config import METHODS, DoLaConfig, option
from janus_dola.programs.errors import first_line, read_bytes, unknown_key
from janus_dola.programs.generation import BATCH, check_generation, refuse
from janus_dola.programs.generation import names as generation_names

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
NO_MODEL = "model_path must be given: model_path=deepseek-ai/Janus-Pro-1B, another name on the hub, or a folder"
PROGRAMS = ("answer", "calibrate", "draw", "export", "report", "web")
DTYPES = ("auto", "float32", "bfloat16", "float16")
ENGINES = ("transformers", "vllm")
ROLES = ["<|User|>", "<|Assistant|>"]
# In a wheel the package has the configs; in a checkout they lie beside it.
CONFIGS = next(folder / "configs" for folder in Path(__file__).parents[1:3] if (folder / "configs").is_dir())
DEFAULT = CONFIGS / "default.yaml"
GROUPS = {"DoLaConfig": "DoLa", "ModelConfig": "Model", "ManyConfig": "Many prompts"}
COLUMN = 34  # of --help's comments, and of default.yaml's


@dataclass
class ModelConfig(DoLaConfig):
    """Which model to run, where, and how: the keys that all command lines have."""

    model_path: str = option(
        "",
        "a folder, or a name on the hub, such as deepseek-ai/Janus-Pro-7B; in the published layout or "
        "transformers' own (model_type: janus)",
    )
    roles: list[str] = option(ROLES, "how the checkpoint's prompts name user and assistant")
    device: str = option("auto", "auto: cuda, else mps, else cpu; or a PyTorch device, such as cuda:1")
    dtype: str = option(
        "auto",
        "or float32, bfloat16, float16; auto: bfloat16 on cuda, and for a checkpoint of bfloat16 on mps and "
        "on CPUs that multiply it natively (AVX-512, AMX, Arm BF16); else float32",
    )
    seed: int = option(0, "seed for sampling")
    generation: dict[str, Any] = option({}, "any argument of transformers' generate")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if len(self.roles) != 2:
            raise ValueError(f"roles must be two names, user and assistant, got {self.roles}")
        if not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed must be an integer of 64 bits, got {self.seed}")
        self.generation = check_generation(self.generation)

    def dola(self) -> DoLaConfig:
        return DoLaConfig(**{key.name: getattr(self, key.name) for key in fields(DoLaConfig)})


@dataclass
class ManyConfig(ModelConfig):
    """The keys of programs that answer many prompts."""

    image_root: str = option(".", "folder of the images of lines in POPE's form")
    engine: str = option(
        "transformers",
        "or vllm, whose continuous batching takes the place of batch_size; model_path is then a folder of "
        "janus-dola export (pip install 'janus-dola[vllm]')",
    )
    batch_size: int = option(8, "prompts answered together; halved when memory runs out; changes no answer")
    workers: int = option(
        0,
        "processes that answer, each with a model, on this machine or the Ray cluster of RAY_ADDRESS (pip "
        "install 'janus-dola[ray]'); 0: this process alone",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {self.engine!r}")
        if self.engine == "vllm" and self.workers:
            raise ValueError(f"workers must be 0 with engine=vllm, which is one process's, got {self.workers}")
        if self.workers < 0:
            raise ValueError(f"workers must be at least 0, got {self.workers}")
        if self.workers and not (find_spec("ray") and find_spec("pyarrow")):
            raise ValueError("workers needs ray: pip install 'janus-dola[ray]'")

    def check_batch(self) -> None:
        """Refuses what cannot be in a batch run; nothing needs to be loaded for it.

        Raises:
            ValueError: `batch_size` or an argument of `generate` is out of its range.
        """
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        refuse(self.generation, BATCH, "left off in a batch run")


def read_config(schema: type[T], argv: Sequence[str], default: Path | None = DEFAULT) -> T:
    """`key=value` arguments, checked against `schema`.

    They are over the files that `config=FILE` names, those over the checkpoint's own DoLa keys, those over the default.

    Args:
        schema: A dataclass; keys and types must be its own.
        argv: The arguments. A key whose type is `str` takes its value as it stands, others are YAML. `--help` prints
            what there is to know and exits.
        default: A file with defaults. Keys of default.yaml that the schema does not have are those of other programs.

    Raises:
        ValueError: A file is missing or broken, a key is unknown, a value is wrong, or there is no model.
    """
    asks_for_help = {"--help", "-h"} & set(argv)
    # Text is kept away from OmegaConf: "Is it red: yes?" is YAML for a dict, and "${x}" an interpolation.
    text_keys = {key.name for key in fields(schema) if key.type in (str, str | None)}
    files, texts, overrides = [default] if default is not None else [], {}, []
    for argument in argv:
        name, equals, value = argument.partition("=")
        if argument in ("--help", "-h"):
            continue
        if not equals or not name:
            raise ValueError(f"arguments must be written key=value, got {argument!r}; --help shows the keys")
        if name == "config":
            files.append(config_file(value))
        elif name in text_keys:
            texts[name] = value
        else:
            overrides.append(argument)
    names = {item.name for item in fields(schema)}
    if asks_for_help:  # whatever else is wrong
        overrides = [argument for argument in overrides if re.split(r"[.\[=]", argument)[0] in names]
    foreign = read_yaml(DEFAULT).keys() - names  # of other programs
    layers = [{name: v for name, v in read_yaml(file).items() if name not in foreign} for file in files]
    values = merge(schema, layers, overrides) | texts
    typed = dict.fromkeys([*(re.split(r"[.\[=]", argument)[0] for argument in overrides), *texts], "command line")
    path = values["model_path"] if issubclass(schema, DoLaConfig) else ""
    if path and (own := own_keys(path, bool(asks_for_help))) is not None:
        file, keys = own
        start = default is not None
        given = typed.keys() | {name for layer in layers[start:] for name in layer}
        if "bucket_id" in given:  # which candidate_layers would win over
            keys.pop("candidate_layers", None)
        if "method" in given and values["method"] != (method := keys.get("method", "dola")):
            keys = {name: value for name, value in keys.items() if name not in METHODS[method]}
        files.insert(start, file)
        layers.insert(start, keys)
        values = merge(schema, layers, overrides) | texts
    if asks_for_help:
        origins = {
            name: str(file) for file, layer in zip(files, layers, strict=True) if file != default for name in layer
        }
        print(usage(schema, values, origins | typed))
        sys.exit()
    if default is not None and not values.get("model_path", "none"):
        raise ValueError(NO_MODEL)
    return schema(**values)


def own_keys(model_path: str, cached: bool) -> tuple[Path, dict[str, Any]] | None:
    """A checkpoint's generation_config.json, where an exported folder has its configuration, and DoLa's keys in it.

    Args:
        model_path: A folder, or a name on the hub.
        cached: Whether to look only at what was downloaded before.

    Returns:
        None if there is no such file, or no such checkpoint, of which those say more who load it.

    Raises:
        ValueError: The file is not JSON, or a key's value is wrong.
    """
    name = "generation_config.json"
    try:
        file = Path(model_path, name)
        if not Path(model_path).is_dir():
            file = Path(hf_hub_download(model_path, name, local_files_only=cached))
        given = json.loads(file.read_bytes())
        keys = {key.name: given[key.name] for key in fields(DoLaConfig) if key.name in given}
        DoLaConfig(**merge(DoLaConfig, [keys]))
    except (OSError, HFValidationError):
        return None
    except (ValueError, TypeError) as error:  # a TypeError of what is not a mapping
        raise ValueError(f"model_path {model_path!r}: generation_config.json: {first_line(error)}") from error
    return file, keys


def config_file(name: str) -> Path:
    """The file that config=NAME names: a path, or one of the configs that come along, such as janus_pro_7b."""
    installed = CONFIGS / f"{name}.yaml"
    return installed if not Path(name).exists() and installed.is_file() else Path(name)


def config_files(argv: Sequence[str]) -> list[str]:
    """The files that `config=FILE` arguments name."""
    return [str(config_file(argument.removeprefix("config="))) for argument in argv if argument.startswith("config=")]


def merge(schema: Any, layers: Iterable[Mapping[str, Any]], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Mappings over a dataclass, each over those before it.

    Args:
        schema: The dataclass, or an instance with its defaults.
        layers: The mappings.
        overrides: `key=value`, over them all.

    Raises:
        ValueError: A key is not one of the dataclass, its value of another type, or an interpolation.
    """
    try:
        given = OmegaConf.from_dotlist(list(overrides))
        for layer in (*layers, OmegaConf.to_container(given)):
            refuse_missing(layer)
        values: Any = OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(schema), *layers, given))
    except yaml.YAMLError as error:
        raise ValueError(f"arguments {overrides} are not YAML: {first_line(error)}") from error
    except OmegaConfBaseException as error:
        key, names = str(error.full_key or error.key or ""), [item.name for item in fields(schema)]
        if key not in names and "generation" in names and key in generation_names():
            raise ValueError(f"unknown key {key!r}, did you mean 'generation.{key}'?") from error
        if key and re.split(r"[.\[]", key)[0] not in names:
            raise ValueError(unknown_key(key, names)) from error
        raise ValueError(f"{key or 'config'}: {first_line(error)}") from error
    except RecursionError as error:
        raise ValueError("config: a value is nested too deeply") from error
    except OverflowError as error:  # of an integer that no float holds
        raise ValueError(f"config: a number is too large: {first_line(error)}") from error
    except TypeError as error:  # a list for a mapping, or a mapping for a list, of which OmegaConf does not say where
        raise ValueError(f"config: a list and a mapping stand for the same key: {first_line(error)}") from error
    refuse_interpolations(values)
    return values


def refuse_missing(values: Any, key: str = "config") -> None:
    """Refuses OmegaConf's mark of a missing value, which a merge would take for the default."""
    if isinstance(values, (Mapping, list)):
        for name, value in values.items() if isinstance(values, Mapping) else enumerate(values):
            refuse_missing(value, str(name))
    elif values == "???":
        raise ValueError(f"{key} must have a value, got '???'")


def refuse_interpolations(values: Mapping[Any, Any], prefix: str = "") -> None:
    """A configuration is data: `${oc.env:SECRET}` must not read the environment."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            refuse_interpolations(value, f"{prefix}{key}.")
        elif "${" in str(value):
            raise ValueError(f"{prefix}{key} must not use an interpolation, got {value!r}")


def read_yaml(path: Path) -> dict[str, Any]:
    """A file of keys. A `model_path` that is a folder is relative to the file, not to where the program runs.

    Raises:
        ValueError: It cannot be read, or is something else.
    """
    text = read_bytes(path, "config")
    try:
        loaded = OmegaConf.to_container(OmegaConf.create(yaml.safe_load(text.decode()) or {}))
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ValueError(f"config {str(path)!r} is not a YAML mapping: {first_line(error)}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"config {str(path)!r} must be a YAML mapping, got a list")
    keys = {str(key): value for key, value in loaded.items()}
    if isinstance(keys.get("model_path"), str) and (path.parent / keys["model_path"]).is_dir():
        keys["model_path"] = str((path.parent / keys["model_path"]).resolve())
    elif path == DEFAULT:  # a wheel has no demo
        keys["model_path"] = ""
    return keys


def usage(schema: Any, values: Mapping[str, Any], origins: Mapping[str, str]) -> str:
    """What --help prints: what the program does, with examples, the programs, then its keys by group.

    Args:
        schema: The program's dataclass.
        values: The value of each key as it would run.
        origins: Key -> the file, or "command line", that a value is from, where it is not the default.
    """
    lines = [
        inspect.getdoc(schema) or "",
        "",
        f"programs: {', '.join(PROGRAMS)}; the first is the default",
    ]
    for cls in reversed(schema.__mro__):
        own = [item for item in fields(schema) if item.name in vars(cls).get("__annotations__", {})]
        if own:
            lines += ["", f"# {GROUPS.get(cls.__name__, 'This program')}"]
        for item in own:
            text = yaml.safe_dump(values[item.name], default_flow_style=True, allow_unicode=True, width=math.inf)
            shown = f"{item.name}: {text.removesuffix('...' + chr(10)).strip()}"
            origin = f"[{origins[item.name]}] " if item.name in origins else ""
            about = textwrap.wrap(origin + item.metadata["help"], 118 - COLUMN, break_on_hyphens=False)
            beside = [] if len(shown) < COLUMN else [shown]
            lines += beside
            for i, part in enumerate(about):
                lines.append(f"{shown if i == 0 and not beside else '':<{COLUMN}}# {part}")
    return "\n".join(lines)


def run_program(run: Callable[[Sequence[str]], int | None]) -> None:
    """Runs a program: an error of the user's is one line on stderr and exit code 2."""
    try:
        code = run(sys.argv[1:]) or 0
        sys.stdout.flush()
        sys.exit(code)
    except BrokenPipeError:  # whoever read, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ValueError, OSError, ImportError) as error:  # a file that cannot be written, an extra not installed
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
