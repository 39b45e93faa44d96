import math
from typing import Any

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError

from janus_dola import DoLaConfig


def test_defaults() -> None:
    config = DoLaConfig()
    assert (config.use_dola_lm, config.alpha, config.candidate_layers, config.bucket_id) == (True, 0.1, None, 2)
    assert config.resolve_layers(30) == (22, 24, 26, 28)
    assert config.resolve_layers(24) == (18, 20, 22)


def test_candidate_layers_win_over_bucket_id() -> None:
    assert DoLaConfig(candidate_layers=[9, 3, 9], bucket_id=0).resolve_layers(30) == (3, 9)
    assert DoLaConfig(candidate_layers=[]).resolve_layers(30) == ()
    assert DoLaConfig(candidate_layers=[30]).resolve_layers(30) == (30,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": -0.1}, r"alpha must be in \[0, 1\], got -0.1"),
        ({"alpha": 1.5}, "got 1.5"),
        ({"alpha": math.nan}, "got nan"),
        ({"bucket_id": 3}, "bucket_id must be 0, 1 or 2, got 3"),
        ({"candidate_layers": [0]}, r"candidate_layers .* got \[0\]"),
        ({"candidate_layers": [2.5]}, r"candidate_layers .* got \[2.5\]"),
        ({"candidate_layers": 5}, "candidate_layers .* got 5"),
        ({"candidate_layers": "12"}, "candidate_layers .* got '12'"),
        ({"alpha": "x"}, "alpha .* got 'x'"),
        ({"alpha": None}, "alpha .* got None"),
        ({"bucket_id": 1.0}, "bucket_id .* got 1.0"),
        ({"method": "deko"}, "method must be dola, deco, sled or confident, got 'deko', did you mean 'deco'?"),
        ({"method": "opera"}, "method must be dola, deco, sled or confident, got 'opera'$"),
        ({"method": None}, "method must be dola, deco, sled or confident, got None"),
        ({"method": "deco", "alpha": 0.3}, "alpha is of method dola, got alpha=0.3 with method 'deco'"),
        ({"deco_alpha": 1.0}, "deco_alpha is of method deco, got deco_alpha=1.0 with method 'dola'"),
        ({"method": "deco", "sled_top_k": 5}, "sled_top_k is of method sled, got sled_top_k=5 with method 'deco'"),
        ({"method": "deco", "deco_alpha": -0.1}, "deco_alpha must be a number of at least 0, got -0.1"),
        ({"method": "sled", "sled_rate": math.inf}, "sled_rate must be a number of at least 0, got inf"),
        ({"method": "sled", "sled_top_k": 0}, "sled_top_k must be an integer of at least 1, got 0"),
        ({"method": "sled", "sled_top_k": 2.5}, "sled_top_k must be an integer of at least 1, got 2.5"),
    ],
)
def test_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DoLaConfig(**arguments)


@pytest.mark.parametrize(
    ("method", "num_layers", "bucket_id", "want"),
    [
        ("deco", 32, 2, range(20, 29)),  # as its paper has it
        ("deco", 30, 2, range(18, 27)),
        ("deco", 4, 2, range(2, 4)),
        ("deco", 30, 1, range(11, 21)),
        ("sled", 30, 2, range(21, 30)),
        ("sled", 24, 0, range(1, 9)),
        ("confident", 30, 0, range(21, 30)),  # the last ten with N, whatever the bucket
        ("confident", 6, 2, range(1, 6)),
    ],
)
def test_layers_of_other_methods(method: str, num_layers: int, bucket_id: int, want: range) -> None:
    config = DoLaConfig(method=method, bucket_id=bucket_id)
    assert config.resolve_layers(num_layers) == tuple(want)
    assert DoLaConfig(method=method, candidate_layers=[3, 1]).resolve_layers(num_layers) == (1, 3)


def test_layers_that_the_model_lacks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"1\.\.\.30.*got 31"):
        DoLaConfig(candidate_layers=[31]).resolve_layers(30)


def test_structured_config() -> None:
    config = OmegaConf.structured(DoLaConfig)
    config = OmegaConf.merge(config, {"alpha": 0.3, "candidate_layers": [5]})
    assert OmegaConf.to_object(config) == DoLaConfig(alpha=0.3, candidate_layers=[5])
    with pytest.raises(ConfigKeyError):
        OmegaConf.merge(config, {"alhpa": 0.3})
