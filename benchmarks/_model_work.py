"""What `model.py` times: training steps, their parts, and ways to decode.

Shapes: B sequences, T tokens, M memory, D latent size, C model width, N tokens, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import _objective
import _step
import torch
import torch.distributed as dist
from _timing import CPU, seconds
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from shards import Batch
from t5vae.config import Config
from t5vae.model import T5VAE, T5VAEConfig

LENGTH, LATENT = 20, 128
SHORTEST = 5
"""Real lengths are uniform on SHORTEST to LENGTH tokens."""
PAD, END = 0, 1

RUN = Config.model_validate({"data": {"shards": ""}, "objective": {"latent_noise": 0.5}})


class Size(NamedTuple):
    """What is built, and how much of it is timed."""

    name: str
    t5: dict[str, float]
    rows: int
    latents: int
    few: int
    """Latents that are decoded one by one."""
    turns: int


def shape(width: int, feed_forward: int, layers: int, heads: int, vocabulary: int) -> dict:
    return {
        "d_model": width,
        "d_kv": width // heads,
        "d_ff": feed_forward,
        "num_layers": layers,
        "num_heads": heads,
        "vocab_size": vocabulary,
        "dropout_rate": 0.0,
        "pad_token_id": PAD,
        "eos_token_id": END,
        "decoder_start_token_id": PAD,
    }


TINY = Size("tiny", shape(32, 64, 2, 4, 512), rows=16, latents=16, few=4, turns=2)
SMALL = Size("T5-small", shape(512, 2048, 6, 8, 32128), rows=256, latents=512, few=32, turns=3)
# Models


def configuration(size: Size, bottleneck: str, **settings: Any) -> T5VAEConfig:
    return T5VAEConfig(
        t5=size.t5, latent_size=LATENT, sequence_length=LENGTH, bottleneck=bottleneck, **settings
    )


def t5vae(config: T5VAEConfig) -> T5VAE:
    torch.manual_seed(0)
    return T5VAE(config)


def bare_t5(size: Size) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(configuration(size, "flatten").t5_config)


def batch(size: Size, full: bool) -> Batch:
    draw = torch.Generator().manual_seed(0)
    lengths_B = torch.randint(LENGTH if full else SHORTEST, LENGTH + 1, [size.rows], generator=draw)
    ids_BT = torch.randint(3, int(size.t5["vocab_size"]), (size.rows, LENGTH), generator=draw)
    ids_BT[torch.arange(LENGTH) >= lengths_B[:, None]] = PAD
    ids_BT[torch.arange(size.rows), lengths_B - 1] = END
    sequence_B = torch.arange(size.rows)
    weights_B = torch.ones(size.rows)
    return Batch.of(ids_BT, lengths_B, weights_B, sequence_B, torch.zeros_like(sequence_B))


# Training steps

TrainingStep = Callable[[Batch], None]


def start_process_group() -> None:
    """Of this process alone: a loss sums over ranks."""
    dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)


def t5_step(model: T5ForConditionalGeneration) -> TrainingStep:
    """As one trains a T5: labels of pads are -100; no cache is built."""
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(batch: Batch) -> None:
        mask_BT = batch.ids != PAD
        labels_BT = batch.ids.masked_fill(~mask_BT, -100)
        model(batch.ids, mask_BT.long(), labels=labels_BT, use_cache=False).loss.backward()
        adamw.step()
        adamw.zero_grad()

    return step


def t5vae_step(model: T5VAE) -> TrainingStep:
    """As the training loop has it, DeepSpeed apart."""
    loss = _step.loss_of(RUN, 1, CPU)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(batch: Batch) -> None:
        _step.whole_loss(loss, model, batch, float(batch.lengths.sum())).backward()
        adamw.step()
        adamw.zero_grad()

    return step


def t5_operations(size: Size) -> int:
    """Of a T5's training step, as torch counts them on tensors without storage."""
    with torch.device("meta"):
        t5 = bare_t5(size)
    t5.set_attn_implementation("eager")
    ids_BT = torch.ones(size.rows, LENGTH, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        t5(ids_BT, labels=ids_BT, use_cache=False).loss.backward()
    return counter.get_total_flops()


def product_rate(t5: dict[str, float], tokens: int, repeats: int = 3) -> float:
    """Operations a second of the faster of a T5's two largest products, into buffers."""
    width = int(t5["d_model"])
    states_NC = torch.randn(tokens, width)
    rates = []
    for wide in (int(t5["d_ff"]), int(t5["vocab_size"])):
        weight_CV = torch.randn(wide, width).T
        out_NV = states_NC @ weight_CV
        product = torch.no_grad()(lambda w, out: torch.mm(states_NC, w, out=out))
        least = min(seconds(product, weight_CV, out_NV) for _ in range(repeats))
        rates.append(2 * tokens * width * wide / least)
    return max(rates)


# Parts of a step

Part = Callable[[], object] | None


def parts(
    t5: T5ForConditionalGeneration, model: T5VAE, batch: Batch
) -> dict[str, tuple[Part, Part]]:
    """What a T5 and a T5VAE do differently, forward and backward: the T5's, and the T5VAE's."""
    rows, width, ids_BT = len(batch.ids), t5.config.d_model, batch.ids
    real_BT = ids_BT != PAD
    mask_BT, labels_BT = real_BT.long(), ids_BT.masked_fill(~real_BT, -100)
    states_BTC = torch.randn(rows, LENGTH, width, requires_grad=True)
    states_NC = states_BTC.detach()[real_BT].requires_grad_()
    z_BD = torch.randn(rows, LATENT, requires_grad=True)
    pull_BMC = torch.randn_like(model.bottleneck.expand(z_BD.detach()))

    def t5_scores() -> None:
        logits_NV = t5.lm_head(states_BTC * width**-0.5).flatten(0, 1)
        cross_entropy(logits_NV, labels_BT.flatten()).backward()

    def t5vae_scores() -> None:
        model._score(states_NC * width**-0.5, ids_BT, real_BT).loss.backward()

    def bottleneck() -> None:
        code_BD = model.bottleneck.compress(states_BTC, mask_BT)
        model.bottleneck.expand(code_BD).backward(pull_BMC)

    return {
        "output layer and cross-entropy": (t5_scores, t5vae_scores),
        "bottleneck": (None, bottleneck),
        "MMD": (None, lambda: _objective.statistic(_objective.gather(z_BD), RUN).backward()),
        "latent noise": (None, lambda: _step.with_noise(z_BD, batch, RUN).sum().backward()),
        "AdamW": (adamw(t5), adamw(model)),
    }


def adamw(model: nn.Module) -> Callable[[], object]:
    """The optimizer's step alone, on tensors like the model's weights."""
    weights = [torch.zeros_like(weight) for weight in model.parameters()]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    return torch.optim.AdamW(weights).step


# Decoding


def decode_batch(model: T5VAE, z_BD: Tensor) -> Tensor:
    """The ids [B, <= T]."""
    return model.generate(latent=z_BD, do_sample=False)[:, 1:]


def decode_original(model: T5VAE, z_1D: Tensor) -> Tensor:
    """The ids [1, <= T] of one latent, as the original T5-VAE (Greenlee, 2020) decodes.

    Decoder and output layer run over all tokens so far, without a cache, and the likeliest last
    token is appended, until that is the end token.
    """
    memory = BaseModelOutput(last_hidden_state=model(latent=z_1D, mode="expand"))
    ids_1T = torch.full((1, 1), model.start, device=z_1D.device)
    for _ in range(model.config.sequence_length):
        output = model(encoder_outputs=memory, decoder_input_ids=ids_1T, use_cache=False)
        next_1 = output.logits[:, -1].argmax(-1)
        ids_1T = torch.cat([ids_1T, next_1[:, None]], 1)
        if next_1.item() == model.end:
            break
    return ids_1T[:, 1:]


def operations(decode: Callable[[T5VAE, Tensor], Tensor], model: T5VAE, z_BD: Tensor) -> int:
    """Operations a latent, as torch counts those of matrix products."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        decode(model, z_BD)
    return counter.get_total_flops() // len(z_BD)
