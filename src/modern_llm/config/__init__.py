"""Layer 1: schemas, loading with ``extends`` and overrides, presets. Needs no torch."""

from modern_llm.config.data import DataConfig, TokenizerConfig
from modern_llm.config.loading import (
    get_pipeline_preset,
    json_schema,
    list_presets,
    load_config,
)
from modern_llm.config.model import ModelConfig, MoEConfig
from modern_llm.config.pipeline import (
    PARTS,
    STAGES,
    TRAINED_STAGES,
    DPOConfig,
    EvalConfig,
    EvalTask,
    PerplexityTask,
    PipelineConfig,
    PreferenceTask,
    PretrainConfig,
    ReasoningTask,
    SFTConfig,
    StageConfig,
    TextMetricTask,
    VerifierConfig,
    check_run_name,
    config_sha256,
)
from modern_llm.config.schema import Component, Schema, SourceConfig
from modern_llm.config.study import Hold, StudyConfig, as_overrides, list_studies, load_study
from modern_llm.config.training import TrainingConfig

__all__ = [
    "PARTS",
    "STAGES",
    "TRAINED_STAGES",
    "Component",
    "DPOConfig",
    "DataConfig",
    "EvalConfig",
    "EvalTask",
    "Hold",
    "MoEConfig",
    "ModelConfig",
    "PerplexityTask",
    "PipelineConfig",
    "PreferenceTask",
    "PretrainConfig",
    "ReasoningTask",
    "SFTConfig",
    "Schema",
    "SourceConfig",
    "StageConfig",
    "StudyConfig",
    "TextMetricTask",
    "TokenizerConfig",
    "TrainingConfig",
    "VerifierConfig",
    "as_overrides",
    "check_run_name",
    "config_sha256",
    "get_pipeline_preset",
    "json_schema",
    "list_presets",
    "list_studies",
    "load_config",
    "load_study",
]
