"""Tokenize ahead of training: the stores that the first stages will find ready."""

from pathlib import Path

from modern_llm.alignment.stages.pretrain import PretrainStage
from modern_llm.config import PipelineConfig
from modern_llm.runtime.logs import get_logger

log = get_logger(__name__)


def prepare_data(config: PipelineConfig) -> None:
    """Build tokenizer and token stores of the pretraining text, as training will ask for them.

    The stores of later stages depend on the tokenizer only too, and are small; they are built
    when their stage begins.

    Raises:
        DataError: a source cannot be had.
    """
    stage = PretrainStage(config, Path(config.paths.output) / config.name, None)
    log.info("tokenizer: %d ids, %s", stage.tokenizer.n_vocab, stage.tokenizer.sha256[:12])
    for store in (*stage.stores, stage.validation_store):
        for row in store.sources:
            log.info(
                "%s %s: %s rows, %s tokens", row["source"], row["split"], row["rows"], row["tokens"]
            )
