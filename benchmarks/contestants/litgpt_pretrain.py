"""litgpt: its pretrain on the same sizes in a Llama shape; litgpt compiles the model itself."""

import tempfile
from pathlib import Path

import torch
from gate import Gate
from litgpt.args import EvalArgs, LogArgs, TrainArgs
from litgpt.config import Config
from litgpt.data import DataModule
from litgpt.pretrain import setup
from sizes import Sizes
from torch.utils.data import DataLoader, Dataset


class Windows(Dataset):
    """Windows of the token file; with a gate, it is passed at the first window of each batch."""

    def __init__(self, sizes: Sizes, gate: Gate | None) -> None:
        self.sizes, self.gate, self.count = sizes, gate, 0

    def __len__(self) -> int:
        return 10**7

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.gate is not None and self.count % self.sizes.batch_size == 0:
            self.gate.pass_batch()
        self.count += 1
        return torch.from_numpy(self.sizes.window(index))


class Data(DataModule):
    """The windows in litgpt's form."""

    def __init__(self, sizes: Sizes, gate: Gate) -> None:
        super().__init__()
        self.sizes, self.gate = sizes, gate

    def connect(self, tokenizer=None, batch_size: int = 1, max_seq_length: int | None = None):
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Windows(self.sizes, self.gate), batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Windows(self.sizes, None), batch_size=self.batch_size)


def main() -> None:
    sizes = Sizes.from_args()
    gate = Gate(sizes.steps)
    torch.set_num_threads(sizes.threads)
    config = Config(
        name="llama-10m",
        block_size=sizes.seq_len,
        vocab_size=sizes.vocab_size,
        padded_vocab_size=sizes.vocab_size,
        n_layer=sizes.n_layers,
        n_head=sizes.n_heads,
        n_embd=sizes.d_model,
        intermediate_size=sizes.d_ff,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )
    with tempfile.TemporaryDirectory() as folder:
        setup(
            "llama-10m",
            model_config=config,
            out_dir=Path(folder),
            precision=sizes.variant,
            data=Data(sizes, gate),
            train=TrainArgs(
                save_interval=None,
                log_interval=10,
                global_batch_size=sizes.batch_size,
                micro_batch_size=sizes.batch_size,
                max_tokens=10**12,
                max_seq_length=sizes.seq_len,
                max_norm=1.0,
                lr_warmup_steps=10,
                min_lr=1e-4,
                tie_embeddings=True,
            ),
            eval=EvalArgs(interval=10**9, max_iters=1, initial_validation=False),
            log=LogArgs(),
            optimizer="AdamW",
            devices=1,
            logger_name="csv",
        )


if __name__ == "__main__":
    main()
