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
    ],
)
def test_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DoLaConfig(**arguments)


def test_layers_that_the_model_lacks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"1\.\.\.30.*got 31"):
        DoLaConfig(candidate_layers=[31]).resolve_layers(30)


def test_structured_config() -> None:
    config = OmegaConf.structured(DoLaConfig)
    config = OmegaConf.merge(config, {"alpha": 0.3, "candidate_layers": [5]})
    assert OmegaConf.to_object(config) == DoLaConfig(alpha=0.3, candidate_layers=[5])
    with pytest.raises(ConfigKeyError):
        OmegaConf.merge(config, {"alhpa": 0.3})
