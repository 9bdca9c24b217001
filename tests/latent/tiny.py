"""Small things with a latent space."""

from pathlib import Path

import torch
import yaml

import shards
from shards.format.tokenizers import load_tokenizer
from t5vae.model import T5VAE, T5VAEConfig

T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
LINES = [
    f"value_{i} = f{i % 7}({', '.join('abcdef'[: i % 6])})" if i % 4 else f"value_{i} = {i}"
    for i in range(120)
]


def random_model(vocab_size: int, seed: int = 0, **options) -> T5VAE:
    """Untrained; codes of 6 numbers, by default."""
    torch.manual_seed(seed)
    t5 = {**T5, **options.pop("t5", {}), "vocab_size": vocab_size, "decoder_start_token_id": 0}
    how = {"latent_size": 6, "sequence_length": 40, "memory_length": 3, **options}
    return T5VAE(T5VAEConfig(t5=t5, **how)).eval()


def run_folder(folder: Path) -> Path:
    """A run on lines of Python whose export is a random model of bytes."""
    (folder / "lines.txt").write_text("\n".join(LINES) + "\n")
    shards.build(folder / "lines.txt", folder / "data", tokenizer="byte", max_length=40)
    run = folder / "run"
    run.mkdir()
    config = {"data": {"shards": str(folder / "data")}, "run": {"output_dir": str(run)}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    export(run / "export")
    return run


def export(folder: Path, seed: int = 0) -> None:
    """Write a random model of bytes."""
    tokenizer = load_tokenizer("byte")
    random_model(len(tokenizer), seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Digits:
    """A space without loss: texts of D digits, whose codes are the digits."""

    def __init__(self, latent_size: int):
        self.latent_size = latent_size

    def encode(self, texts):
        return torch.tensor([[float(digit) for digit in text] for text in texts])

    def decode_ids(self, z_ND):
        return z_ND.round().clamp(0, 9).int().tolist()

    def detokenize(self, ids):
        return ["".join(map(str, row)) for row in ids]
