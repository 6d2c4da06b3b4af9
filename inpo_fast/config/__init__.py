"""A run's configuration: YAML and command line to checked dataclasses."""

from inpo_fast.comparison.config import EvaluateConfig
from inpo_fast.config.parse import parse
from inpo_fast.config.run import (
    ObserveConfig,
    OnlineConfig,
    OptimConfig,
    PlanConfig,
    RunConfig,
    TrainConfig,
    flat,
    split_batch,
    to_dict,
    to_yaml,
    variant_of,
)

__all__ = [
    "EvaluateConfig",
    "ObserveConfig",
    "OnlineConfig",
    "OptimConfig",
    "PlanConfig",
    "RunConfig",
    "TrainConfig",
    "flat",
    "parse",
    "split_batch",
    "to_dict",
    "to_yaml",
    "variant_of",
]
