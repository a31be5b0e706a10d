"""Settings: frozen, strict groups; flat `key=value`, YAML and keyword arguments in, one hash out."""

from parallelmind.config.explain import did_you_mean
from parallelmind.config.frozen import FrozenConfig, GroupedConfig
from parallelmind.config.groups import (
    Alignment,
    BoolOrAuto,
    BranchAngle,
    CheckpointConfig,
    DataConfig,
    Dtype,
    DtypeOrAuto,
    HubConfig,
    LoraConfig,
    MetricsConfig,
    ModelConfig,
    OptimizerConfig,
    Pairs,
    Positions,
    Quantize,
    RopeConfig,
    RunConfig,
    ServicesConfig,
    SiblingPenalty,
    Visibility,
    WorkersConfig,
)
from parallelmind.config.paths import AdapterPath, HomePath, HubRepo, OutputPath, TrackingUri
from parallelmind.config.resolve import resolve
from parallelmind.config.train import TrainConfig

__all__ = [
    "AdapterPath",
    "Alignment",
    "BoolOrAuto",
    "BranchAngle",
    "CheckpointConfig",
    "DataConfig",
    "Dtype",
    "DtypeOrAuto",
    "FrozenConfig",
    "GroupedConfig",
    "HomePath",
    "HubConfig",
    "HubRepo",
    "LoraConfig",
    "MetricsConfig",
    "ModelConfig",
    "OptimizerConfig",
    "OutputPath",
    "Pairs",
    "Positions",
    "Quantize",
    "RopeConfig",
    "RunConfig",
    "ServicesConfig",
    "SiblingPenalty",
    "TrackingUri",
    "TrainConfig",
    "Visibility",
    "WorkersConfig",
    "did_you_mean",
    "resolve",
]
