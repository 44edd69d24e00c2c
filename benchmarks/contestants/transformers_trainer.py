"""transformers: LlamaForCausalLM of the same sizes under its Trainer, bf16, compiled."""

import tempfile

import torch
from gate import Gate
from sizes import Sizes
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments


class Windows(Dataset):
    """Windows of the token file; the gate is passed at the first window of each batch."""

    def __init__(self, sizes: Sizes, gate: Gate) -> None:
        self.sizes, self.gate, self.count = sizes, gate, 0

    def __len__(self) -> int:
        return 10**7

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if self.count % self.sizes.batch_size == 0:
            self.gate.pass_batch()
        self.count += 1
        tokens = torch.from_numpy(self.sizes.window(index)[:-1])
        return {"input_ids": tokens, "labels": tokens}  # the model shifts


def main() -> None:
    sizes = Sizes.from_args()
    gate = Gate(sizes.steps)
    torch.set_num_threads(sizes.threads)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=sizes.vocab_size,
            hidden_size=sizes.d_model,
            intermediate_size=sizes.d_ff,
            num_hidden_layers=sizes.n_layers,
            num_attention_heads=sizes.n_heads,
            num_key_value_heads=sizes.n_heads,
            max_position_embeddings=sizes.seq_len,
            tie_word_embeddings=True,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
            attn_implementation=sizes.variant,
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=sizes.batch_size,
            max_steps=10**6,
            learning_rate=1e-3,
            weight_decay=0.1,
            max_grad_norm=1.0,
            bf16=True,
            torch_compile=True,
            use_cpu=True,
            dataloader_num_workers=0,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        Trainer(model, arguments, train_dataset=Windows(sizes, gate)).train()


if __name__ == "__main__":
    main()
