"""GPT-2 from its configuration on the bytes of Python's help topics, under Hugging Face's Trainer, by Alrao-Adam.

python examples/gpt2_trainer.py
"""

import argparse
import math
from pydoc_data.topics import topics

import torch
import transformers
from torch import Tensor
from torch.utils.data import Dataset

import alrao_fast as alrao
from alrao_fast.integrations.transformers import AlraoCallback


class Windows(Dataset):
    """Pieces of a text, as bytes; the labels are the inputs, which the model shifts."""

    def __init__(self, text: bytes, length: int) -> None:
        self.tokens = torch.tensor(list(text))
        self.length = length

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitem__(self, k: int) -> dict[str, Tensor]:
        piece = self.tokens[k * self.length : (k + 1) * self.length]
        return {"input_ids": piece, "labels": piece}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--clones", type=int, default=6)
    parser.add_argument("--out", default="results/gpt2", help="folder of checkpoints and model")
    args = parser.parse_args()

    text = "\n".join(topics.values()).encode()
    cut = int(0.9 * len(text))
    config = transformers.GPT2Config(
        vocab_size=256,
        n_positions=args.context,
        n_embd=args.width,
        n_layer=args.layers,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    model = alrao.wrap(transformers.GPT2LMHeadModel(config), num_clones=args.clones)
    arguments = transformers.TrainingArguments(
        args.out,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        # It moves the multiplier of all rates, which is 1; Trainer's learning_rate goes nowhere.
        lr_scheduler_type="cosine",
        warmup_steps=args.steps // 20,
        # One norm over all parameters would count every clone's gradient.
        max_grad_norm=0,
        logging_steps=max(args.steps // 10, 1),
        save_strategy="no",
        report_to=[],
    )
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=Windows(text[:cut], args.context),
        eval_dataset=Windows(text[cut : cut + 64 * args.context], args.context),
        optimizer_cls_and_kwargs=(
            alrao.AlraoAdam,
            {"generator": torch.Generator().manual_seed(0)},
        ),
    )
    AlraoCallback().add_to(trainer)
    trainer.train()

    bits = trainer.evaluate()["eval_loss"] / math.log(2)
    print(f"validation: {bits:.3f} bits per byte; best learning rate {model.suggested_lr():.1e}")
    plain = model.collapse("best")
    plain.save_pretrained(f"{args.out}/model")
    start = torch.tensor([list(b"The ")], device=plain.device)
    written = plain.generate(start, max_new_tokens=args.context - 4, do_sample=True, pad_token_id=0)
    print(bytes(written[0].tolist()).decode(errors="replace"))


if __name__ == "__main__":
    main()
