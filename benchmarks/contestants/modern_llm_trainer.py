"""This project: the pretrain stage of a config, as the pipeline runs it."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gate import Gate
from sizes import Sizes

from modern_llm.alignment.stages.pretrain import PretrainStage
from modern_llm.config import load_config
from modern_llm.training.trainer import Loader


class GatedLoader:
    """The stage's own loader behind the gate."""

    def __init__(self, loader: Loader, gate: Gate) -> None:
        self.loader, self.gate = loader, gate
        self.fingerprint, self.steps_per_epoch = loader.fingerprint, loader.steps_per_epoch

    def batches(self, step: int) -> Sequence[Any]:
        self.gate.pass_batch()
        return self.loader.batches(step)


def main() -> None:
    sizes = Sizes.from_args()
    gate = Gate(sizes.steps)

    class GatedStage(PretrainStage):
        def loader(self) -> GatedLoader:
            return GatedLoader(super().loader(), gate)

    overrides = [f"training.threads={sizes.threads}", *sizes.variant.split()]
    config = load_config(sizes.config, overrides)
    with tempfile.TemporaryDirectory() as run:
        GatedStage(config, Path(run), None).execute()


if __name__ == "__main__":
    main()
