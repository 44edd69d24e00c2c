"""What a checkpoint hands over beside its weights: the shape of its decoder, and its tokenizer."""

from modern_llm.config import ModelConfig
from modern_llm.data.templates import TEMPLATE_HASH
from modern_llm.data.tokenizer import Tokenizer
from modern_llm.errors import CheckpointError, DataError
from modern_llm.runtime.logs import get_logger
from modern_llm.training.checkpoint import Checkpoint

log = get_logger(__name__)


def model_config(checkpoint: Checkpoint) -> ModelConfig:
    """Sizes and components of the decoder in a checkpoint.

    Raises:
        CheckpointError: its description names none, or none that this version knows.
    """
    try:
        return ModelConfig.model_validate(checkpoint.meta["model"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint.folder}: config.json has no valid model: {error}"
        ) from None


def read_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer that a checkpoint was trained with; another chat template is warned of.

    Raises:
        CheckpointError: it cannot be read, is not the one of training, or has more ids than the
            model.
    """
    folder, meta = checkpoint.folder, checkpoint.meta
    try:
        tokenizer = Tokenizer.load(checkpoint.tokenizer_path)
    except DataError as error:
        raise CheckpointError(str(error)) from None
    if meta.get("tokenizer_sha256") not in (None, tokenizer.sha256):
        raise CheckpointError(f"{folder}: tokenizer.json is not the one that it was trained with")
    ids = model_config(checkpoint).vocab_size
    if tokenizer.n_vocab > ids:
        raise CheckpointError(
            f"{folder}: its tokenizer has {tokenizer.n_vocab} ids, its model {ids}; the two are "
            "not of one training"
        )
    if meta.get("template_sha256") not in (None, TEMPLATE_HASH):
        log.warning("%s was trained with another chat template; answers may suffer", folder)
    return tokenizer
