"""Data sources behind one registry; a data set is added as one class in one of these files."""

import modern_llm.data.sources.assistants
import modern_llm.data.sources.corpora
import modern_llm.data.sources.files
import modern_llm.data.sources.generated  # noqa: F401 - the four register their sources
from modern_llm.config import DataConfig, SourceConfig
from modern_llm.data.sources.base import KINDS, SOURCES, SPLITS, RowCounts, Source

__all__ = ["KINDS", "SOURCES", "SPLITS", "RowCounts", "Source", "open_source"]


def open_source(config: SourceConfig, data: DataConfig) -> Source:
    """The source that a config names; nothing is read yet.

    Raises:
        ConfigError: unknown source, or an option that it does not have or take.
    """
    source: Source = SOURCES.build(config, data)
    return source
