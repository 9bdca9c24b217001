"""What `model.py` times: training steps, their parts, and ways to decode.

Shapes: B sequences, T tokens, D latent size, C model width, V vocabulary, N real tokens.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

sys.path.insert(0, str(Path(__file__).parents[1]))  # `shards` is the package, not the script
from shards import Batch
from t5vae.config import Config
from t5vae.model import T5VAE, T5VAEConfig, row_keys
from t5vae.model.noise import keyed_normal
from t5vae.objective import start_gather
from t5vae.training.losses import Step, micro_step, real_tokens

LENGTH, LATENT = 20, 128
PAD, END = 0, 1
SHORTEST = 5
"""Real lengths are uniform on SHORTEST to LENGTH tokens."""

RUN = Config.model_validate({"data": {"shards": ""}, "objective": {"latent_noise": 0.5}})


class Size(NamedTuple):
    """What is built, and how much of it is timed."""

    name: str
    t5: dict[str, int]
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
BASE = Size("T5-base", shape(768, 3072, 12, 12, 32128), rows=1024, latents=512, few=32, turns=10)


class Place(NamedTuple):
    device: torch.device
    dtype: torch.dtype

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def seconds(self, run: Callable[[], object]) -> float:
        self.wait()
        begin = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - begin

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


def start_process_group() -> None:
    """Of this process alone: the objective sums over ranks."""
    dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)


# Models


def configuration(size: Size, bottleneck: str) -> T5VAEConfig:
    return T5VAEConfig(
        t5=size.t5, latent_size=LATENT, sequence_length=LENGTH, bottleneck=bottleneck
    )


def t5vae(size: Size, bottleneck: str, place: Place) -> T5VAE:
    torch.manual_seed(0)
    return T5VAE(configuration(size, bottleneck)).to(place.device, place.dtype)


def bare_t5(size: Size, place: Place) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(configuration(size, "flatten").t5_config)
    return model.to(place.device, place.dtype)


def batch(size: Size, full: bool) -> Batch:
    draw = torch.Generator().manual_seed(0)
    shortest = LENGTH if full else SHORTEST
    lengths_B = torch.randint(shortest, LENGTH + 1, (size.rows,), generator=draw)
    ids_BT = torch.randint(3, size.t5["vocab_size"], (size.rows, LENGTH), generator=draw)
    ids_BT[torch.arange(LENGTH) >= lengths_B[:, None]] = PAD
    ids_BT[torch.arange(size.rows), lengths_B - 1] = END
    sequence_B = torch.arange(size.rows)
    weights_B = torch.ones(size.rows)
    return Batch(ids_BT, lengths_B, weights_B, sequence_B, torch.zeros_like(sequence_B), 0)


# Training steps

TrainingStep = Callable[[Batch], None]


def t5_step(model: T5ForConditionalGeneration, place: Place) -> TrainingStep:
    """As one trains a T5: labels of pads are -100, and no cache is built."""
    update = updates(model)

    def step(batch: Batch) -> None:
        ids_BT = batch.ids.to(place.device)
        mask_BT = ids_BT != PAD
        labels_BT = ids_BT.masked_fill(~mask_BT, -100)
        model(ids_BT, mask_BT.long(), labels=labels_BT, use_cache=False).loss.backward()
        update()

    return step


def t5vae_step(model: T5VAE, place: Place) -> TrainingStep:
    """As the training loop has it, DeepSpeed apart."""
    engine, update = Engine(model), updates(model)

    def step(batch: Batch) -> None:
        shared = Step(1, 0, real_tokens(batch), RUN.objective.mmd.weight, 1)
        micro_step(engine, batch, 0, shared, RUN, place.device)
        update()

    return step


class Engine:
    """DeepSpeed's, as far as a micro step knows it."""

    def __init__(self, model: T5VAE):
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()


def updates(model: nn.Module) -> Callable[[], None]:
    """AdamW's step; on fp32 copies of weights in half precision, as DeepSpeed does it."""
    weights = list(model.parameters())
    masters = weights
    if weights[0].dtype != torch.float32:
        masters = [weight.detach().float().requires_grad_() for weight in weights]
    adamw = torch.optim.AdamW(masters, lr=1e-4)

    def update() -> None:
        for master, weight in zip(masters, weights, strict=True):
            if master is not weight:
                master.grad = weight.grad.float()
                weight.grad = None
        adamw.step()
        adamw.zero_grad()
        if masters is not weights:
            with torch.no_grad():
                torch._foreach_copy_(weights, masters)

    return update


def compile_layers(model: PreTrainedModel) -> None:
    """What `T5VAE.compile_layers` does, to a T5."""
    for block in (*model.encoder.block, *model.decoder.block):
        block.compile()


def t5_operations(size: Size) -> int:
    """Of a T5's step on rows without pads, as torch counts them on tensors without storage."""
    place = Place(torch.device("meta"), torch.float32)
    model = bare_t5(size, place)
    model.set_attn_implementation("eager")
    ids_BT = torch.ones(size.rows, LENGTH, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(ids_BT, labels=ids_BT, use_cache=False).loss.backward()
    return counter.get_total_flops()


def product_rate(size: Size, place: Place, repeats: int = 3) -> float:
    """Operations a second of the faster of the model's two largest products, into buffers."""
    tokens, width = size.rows * LENGTH, size.t5["d_model"]
    states_NC = torch.randn(tokens, width, device=place.device, dtype=place.dtype)
    rates = []
    for wide in (size.t5["d_ff"], size.t5["vocab_size"]):
        weight_CV = torch.randn(width, wide, device=place.device, dtype=place.dtype)
        out_NV = states_NC @ weight_CV
        taken = [
            place.seconds(lambda w=weight_CV, out=out_NV: torch.mm(states_NC, w, out=out))
            for _ in range(repeats)
        ]
        rates.append(2 * tokens * width * wide / min(taken))
    return max(rates)


# Parts of a step

Part = Callable[[], object] | None


def parts(
    t5: T5ForConditionalGeneration, model: T5VAE, batch: Batch, place: Place
) -> dict[str, tuple[Part, Part]]:
    """What T5 and T5VAE do differently, forward and backward, each part alone: T5's, T5VAE's."""
    rows, width = len(batch.ids), t5.config.d_model
    ids_BT = batch.ids.to(place.device)
    real_BT = ids_BT != PAD
    labels_BT = ids_BT.masked_fill(~real_BT, -100)
    weights_B = batch.weights.to(place.device)
    like = {"device": place.device, "dtype": place.dtype}
    states_BTC = torch.randn(rows, LENGTH, width, **like).requires_grad_()
    z_BD = torch.randn(rows, LATENT, **like).requires_grad_()
    slope_BMC = torch.randn_like(model.bottleneck.expand(z_BD.detach()))
    objective = RUN.objective.mmd

    def t5_scores() -> None:
        logits_NV = t5.lm_head(states_BTC * width**-0.5).flatten(0, 1)
        nn.functional.cross_entropy(logits_NV, labels_BT.flatten()).backward()

    def t5vae_scores() -> None:
        model._score(states_BTC * width**-0.5, ids_BT, None).loss.backward()

    def bottleneck() -> None:
        code_BD = model.bottleneck.compress(states_BTC, real_BT.long())
        model.bottleneck.expand(code_BD).backward(slope_BMC)

    def mmd() -> None:
        gathering = start_gather(z_BD, weights_B=weights_B, equal_rows=True)
        gathering.finish(kernel=objective.kernel, prior=objective.prior).backward()

    def noise() -> None:
        keys_B = row_keys(0, 0, batch.sequence.to(place.device))
        (z_BD.detach() + 0.5 * keyed_normal(keys_B, LATENT, 0).to(z_BD.dtype)).sum()

    return {
        "output layer and cross-entropy": (t5_scores, t5vae_scores),
        "bottleneck": (None, bottleneck),
        "MMD": (None, mmd),
        "noise": (None, noise),
        "AdamW": (adamw(t5), adamw(model)),
    }


def adamw(model: nn.Module) -> Callable[[], object]:
    """The optimizer's step alone, on tensors like the model's weights."""
    weights = [torch.zeros_like(weight, dtype=torch.float32) for weight in model.parameters()]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    return torch.optim.AdamW(weights).step


def part_seconds(run: Part, place: Place, repeats: int = 3) -> float:
    """The median, after a first time."""
    if run is None:
        return 0.0
    return median([place.seconds(run) for _ in range(repeats + 1)][1:])


# Decoding


def decode_batch(model: T5VAE, z_BD: Tensor) -> Tensor:
    """The ids [B, <= T]."""
    return model.generate(latent=z_BD, do_sample=False)[:, 1:]


def decode_original(model: T5VAE, z_1D: Tensor) -> Tensor:
    """The ids [1, <= T] of one latent as the original T5-VAE decodes: all tokens again each time.

    Greenlee, 2020: the decoder and the output layer run over all tokens so far without a cache,
    and the likeliest last token is appended, until that is the end token.
    """
    memory = BaseModelOutput(last_hidden_state=model(latent=z_1D, mode="expand"))
    ids_1T = torch.full((1, 1), PAD, device=z_1D.device)
    for _ in range(LENGTH):
        output = model(encoder_outputs=memory, decoder_input_ids=ids_1T, use_cache=False)
        next_1 = output.logits[:, -1].argmax(-1)
        ids_1T = torch.cat([ids_1T, next_1[:, None]], 1)
        if next_1.item() == END:
            break
    return ids_1T[:, 1:]


def decode_operations(decode: Callable[[T5VAE, Tensor], Tensor], model: T5VAE, z_BD: Tensor) -> int:
    """Operations a latent, by torch's count of the matrix products."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        decode(model, z_BD)
    return counter.get_total_flops() // len(z_BD)
