"""The model that config.json describes against the stored weights: one that no file holds is refused, not built."""

import json
import os
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.modeling_utils import load_state_dict
from transformers.utils import cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from janus.models.siglip_vit import tower_sizes

Shapes = Mapping[str, tuple[int, ...]]
# In the order in which transformers looks for them.
FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
POINTER = b"version https://git-lfs.github.com/spec/v1"


def refuse_pointer(path: str, file: str | Path) -> None:
    """Refuses a file of a checkpoint that git cloned without git-lfs: a few lines stand where the file should be.

    Raises:
        ValueError: It is such a pointer.
    """
    with open(file, "rb") as opened:
        if opened.read(len(POINTER)) == POINTER:
            raise ValueError(
                f"{path!r} has a git-lfs pointer in place of {Path(file).name}: `git lfs pull` there gets the file"
            )


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Errors of reading weights, as a ValueError that names the checkpoint."""
    try:
        yield
    except (SafetensorError, EOFError) as error:
        raise ValueError(f"{path!r} has a broken file of weights: {error}") from error
    except pickle.UnpicklingError as error:  # PyTorch's message suggests to run it
        raise ValueError(
            f"{path!r} has a pickle that is broken or holds more than tensors, which might run code: it is not read"
        ) from error


def weight_files(path: str, **hub: Any) -> list[str] | None:
    """The files with a checkpoint's weights, in this machine's cache if it is on the hub; None where there are none.

    Args:
        path: A folder, or a name on the hub.
        hub: `cached_file`'s arguments: where on the hub, and where in the cache.

    Raises:
        ValueError: A git-lfs pointer stands in place of one, or the index names files that are not in the folder.
    """
    found = (cached_file(path, name, _raise_exceptions_for_missing_entries=False, **hub) for name in FILES)
    file = next((file for file in found if file is not None), None)
    if file is None:
        return None
    refuse_pointer(path, file)
    if not file.endswith(".index.json"):
        return [file]
    with open(file, encoding="utf-8") as index:
        shards = json.load(index)["weight_map"].values()  # a KeyError that says more than that of the next line
    for shard in shards:
        if not isinstance(shard, str) or PurePath(shard).is_absolute() or ".." in PurePath(shard).parts:
            raise ValueError(f"{path!r}: its {Path(file).name} must name files of the folder, got {shard!r}")
    files, _ = get_checkpoint_shard_files(path, file, **hub)
    for file in filter(os.path.isfile, files):
        refuse_pointer(path, file)
    return files


def stored_shapes(path: str, quantized: bool = False, **hub: Any) -> Shapes | None:
    """The shape of each weight of a checkpoint, by name, from the files' headers; None where there are no weights.

    Args:
        path, hub: Those of `weight_files`.
        quantized: Whether weights of one byte an element are left out: they may be packed, and of other shapes.
    """
    if (files := weight_files(path, **hub)) is None:
        return None
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        # A pickle for the CPU is mapped; for meta, it would be read.
        with reading(path):
            state = load_state_dict(file, map_location="meta" if file.endswith(".safetensors") else "cpu")
        kept = {name: weight for name, weight in dict(state).items() if not (quantized and weight.itemsize == 1)}
        shapes |= {name: tuple(weight.shape) for name, weight in kept.items()}
    return shapes


def depths(config: Any) -> Iterator[tuple[str, Any, int, str]]:
    """What `check_depths` takes of a `MultiModalityConfig`."""
    layers = config.language_config.num_hidden_layers
    yield "language_config.num_hidden_layers", layers, layers, "language_model.model.layers"
    params = config.vision_config.params
    depth = tower_sizes(**params)["layers"]
    yield "vision_config.params.layers", params.get("layers", depth), depth, "vision_model.vision_tower.blocks"
    for part in ("aligner", "gen_aligner"):
        params = getattr(config, f"{part}_config").params
        if params["projector_type"] == "mlp_gelu":
            yield f"{part}_config.params.depth", params["depth"], params["depth"], f"{part}.layers"


def refuse(path: str, missing: Iterable[str], mismatched: Iterable[tuple[str, Any, Any]]) -> None:
    """Refuses a checkpoint whose weights are not those that its config.json describes.

    Args:
        path: Where it is from, for the error.
        missing: The names of weights that are not stored.
        mismatched: Name, stored shape and described shape of weights that have another shape.

    Raises:
        ValueError: There is one of either; the message names the first.
    """
    if mismatched := sorted(mismatched):
        name, found, wanted = mismatched[0]
        raise ValueError(
            f"{path!r} has {name} in the shape {list(found)}, but its config.json describes {list(wanted)}"
        )
    if missing := sorted(missing):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"{path!r} lacks the weights {', '.join(missing[:3])}{more}; "
            "a Janus checkpoint has all the weights that its config.json describes"
        )


def check_shapes(build: Callable[[], nn.Module], stored: Shapes, path: str, renamed: bool = False) -> Set[str]:
    """Compares the stored weights with those of the model, which is built on the meta device: its size costs nothing.

    Args:
        build: Builds the model.
        stored: The shapes of the stored weights, by name.
        path: Where they are from, for the error.
        renamed: Whether weights may be stored under other names, which transformers knows, or packed; then none is
            missing.

    Returns:
        The names of the model's weights.

    Raises:
        ValueError: A weight is missing or of another shape, or the model cannot be built.
    """
    try:
        with torch.device("meta"):
            model = build()
    except (RuntimeError, ZeroDivisionError) as error:  # more bytes than 64 bits count; 0 heads
        raise ValueError(f"{path!r}: its config.json describes no model that can be built: {error}") from error
    wanted = model.state_dict(keep_vars=True)
    known = {id(wanted[name]) for name in stored if name in wanted}  # a tied weight is stored under one of its names
    missing = [name for name, weight in wanted.items() if name not in stored and id(weight) not in known]
    both = wanted.keys() & stored.keys()
    mismatched = [
        (name, stored[name], tuple(wanted[name].shape)) for name in both if stored[name] != wanted[name].shape
    ]
    refuse(path, () if renamed else missing, mismatched)
    return wanted.keys()


def check_depths(depths: Iterable[tuple[str, Any, int, str]], stored: Shapes) -> None:
    """Refuses more layers than are stored, before anything is built: on the meta device, too, each takes its time.

    Args:
        depths: For each key of config.json that makes layers its name and value, how many, the prefix of their names.
        stored: The shapes of the stored weights, by name.

    Raises:
        ValueError: A part is deeper than its weights.
    """
    for key, value, depth, prefix in depths:
        # Counted, as an index alone may be anything.
        found = len({match[1] for name in stored if (match := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name))})
        if isinstance(depth, int) and depth > found:
            raise ValueError(f"config.json: {key} must be at most {found}, the {prefix} in the weights, got {value!r}")
