"""Layer 4: architecture studies, each a set of trainings that are compared with statistics."""

from modern_llm.experiments.compare import compare_experiments
from modern_llm.experiments.config import ExperimentConfig
from modern_llm.experiments.experiment import ArchitectureExperiment
from modern_llm.experiments.results import ExperimentResult, SeedResult, load_results

__all__ = [
    "ArchitectureExperiment",
    "ExperimentConfig",
    "ExperimentResult",
    "SeedResult",
    "compare_experiments",
    "load_results",
]
