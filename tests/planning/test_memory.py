"""What a rank needs, by part; held against real forward passes and, in test_plan.py, real runs."""

import pytest
import torch

from t5vae.config import BatchSplit
from t5vae.model import T5VAE
from t5vae.planning.activations import Activations, Affine, activations
from t5vae.planning.memory import Sizes, memory, regime_of, sizes_of, state_bytes
from t5vae.training.build import model_config
from tests.refused import refusal

ROWS, LENGTH, VOCABULARY = 6, 24, 300
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 3}
T5 |= {"num_heads": 2}


@pytest.fixture
def settings(make_config):
    """A model's configuration, for changes to the run's."""

    def make(**changes):
        sized = {"vocab_size": VOCABULARY, "sequence_length": LENGTH, "latent_size": 8}
        config = make_config(model={"t5": T5, "token_size": 4, **sized, **changes})
        return model_config(config.model, config.objective, config.data.open())

    return make


def kept_by_a_real_pass(settings, dtype, rows) -> int:
    """Bytes that a real forward pass saves, each storage once, weights apart."""
    model = T5VAE(settings).to(dtype).train()
    model.set_attn_implementation("eager")
    seen = {weight.untyped_storage()._cdata for weight in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            kept[storage._cdata] = storage
        return tensor

    ids_BT = torch.randint(3, VOCABULARY, (rows, LENGTH))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(ids_BT, mode="score")
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"normalize": True},
        {"bottleneck": "attention"},
        {"mask_padding": False},
        {"t5": {**T5, "dropout_rate": 0.1}},
        {"t5": {**T5, "feed_forward_proj": "gated-gelu"}},
    ],
)
def test_what_is_kept_is_what_a_real_pass_keeps(settings, dtype, changes):
    own = settings(**changes)
    planned = activations(own, LENGTH, dtype).saved.at(ROWS)
    log_softmax = 4 * ROWS * LENGTH * VOCABULARY
    real = kept_by_a_real_pass(own, dtype, ROWS)
    # Beside that the cross-entropy keeps which tokens are real, and their labels.
    assert planned + log_softmax == pytest.approx(real, rel=0.03)


def test_checkpointed_layers_keep_their_inputs_alone(settings):
    whole = activations(settings(), LENGTH, torch.float32)
    few = activations(settings(), LENGTH, torch.float32, checkpointing=True)
    assert whole.recomputed.at(ROWS) == 0
    assert few.saved.at(ROWS) < whole.saved.at(ROWS) / 2
    inputs = 5 * ROWS * LENGTH * 16 * 4
    assert few.saved.at(ROWS) > inputs
    layers = 5 * few.recomputed.at(ROWS) + few.saved.at(ROWS) - inputs
    assert layers == pytest.approx(whole.saved.at(ROWS), rel=1e-5)


def test_a_fused_cross_entropy_has_no_logits(settings):
    plain = activations(settings(), LENGTH, torch.bfloat16)
    fused = activations(settings(), LENGTH, torch.bfloat16, fused_cross_entropy=True)
    assert plain.at(ROWS) - fused.at(ROWS) == 12 * ROWS * LENGTH * VOCABULARY


def test_lines_go_through_their_points():
    line = Affine.through((2, 110.0), (4, 210.0))
    assert (line.constant, line.per_row, line.at(10)) == (10, 50, 510)


N = Sizes(total=1000, own=0, largest_group=800)
OWN = {"adamw": 0, "muon": 600, "lion": 1000}


@pytest.mark.parametrize(
    ("optimizer", "precision", "stage", "ranks", "per_parameter"),
    [
        ("adamw", "fp32", 0, 4, 4 + 4 + 8),
        ("adamw", "bf16", 0, 4, 2 + 2 + 4 + 8),
        ("adamw", "fp32", 1, 4, 4 + 4 + (4 + 8) / 4),
        ("adamw", "bf16", 1, 4, 2 + 2 + (4 + 8) / 4),
        ("adamw", "bf16", 2, 4, 2 + (2 + 4 + 8) / 4),
        ("adamw", "bf16", 3, 4, (2 + 2 + 4 + 8) / 4),
        ("adamw", "fp32", 3, 8, (4 + 4 + 4 + 8) / 8),
        ("muon", "fp32", 0, 1, 4 + 4 + 0.6 * 4 + 0.4 * 8),
        ("muon", "bf16", 1, 2, 2 + 2 + (4 + 0.6 * 2 + 0.4 * 8) / 2),
        ("muon", "bf16", 3, 2, (2 + 2 + 4 + 0.6 * 2 + 0.4 * 8) / 2),
        ("muon", "bf16", 3, 4, (2 + 2 + 4 + 0.6 * 4 + 0.4 * 8) / 4),
        ("lion", "bf16", 2, 4, 2 + (2 + 4 + 4) / 4),
    ],
)
def test_states_are_zeros_arithmetic(
    make_config, optimizer, precision, stage, ranks, per_parameter
):
    config = make_config(
        optim={"name": optimizer},
        train={"precision": precision},
        deepspeed={"zero_stage": stage},
    )
    regime = regime_of(config, config.data.split(ranks))
    sizes = Sizes(total=1000, own=OWN[optimizer], largest_group=0)
    assert state_bytes(regime, sizes) == pytest.approx(1000 * per_parameter)


def needed(config, *, rows=16, accumulation=1, ranks=4, accelerated=True, saved=1000.0, n=N):
    kept = Activations(Affine(0, saved), Affine(0, 0), Affine(0, 0))
    split = BatchSplit(rows * ranks * accumulation, ranks, rows, accumulation)
    return memory(regime_of(config, split), n, kept, accelerated=accelerated)


def test_more_rows_more_stages_and_more_ranks_count(make_config):
    sizes = Sizes(total=8 * 10**9, own=0, largest_group=8 * 10**9)
    peaks = [
        needed(make_config(deepspeed={"zero_stage": stage}, optim={"name": "adamw"}), n=sizes).peak
        for stage in (1, 2, 3)
    ]
    assert peaks[0] >= peaks[1] > peaks[2]
    config = make_config(optim={"name": "adamw"})
    assert needed(config, n=sizes, ranks=8).peak < needed(config, n=sizes).peak
    assert needed(config, rows=64, saved=1e9).peak > needed(config, rows=32, saved=1e9).peak


def test_gradients_take_the_place_of_activations_unless_they_must_wait(make_config):
    config = make_config(optim={"name": "adamw"}, train={"precision": "fp32"})
    sizes = Sizes(10**7, 0, 10**7)
    small = {"n": sizes, "saved": 1e6, "ranks": 1, "accelerated": False}
    at_once = needed(config, **small).backward
    assert at_once["gradients"] == 4 * 10**7
    assert at_once["activations"] == 0
    waiting = needed(config, **small, accumulation=2).backward
    assert waiting["activations"] == 16 * 10**6


@pytest.mark.parametrize(
    ("stage", "accumulation", "backward", "step"),
    [
        (0, 1, 2 * 1000, 2 * 1000),
        (0, 2, 2 * 1000, 2 * 1000),
        (1, 1, 2 * 1000 / 4, 2 * 1000 / 4),
        (1, 2, 4 * 1000, 4 * 1000 / 4),
        (2, 1, 2 * 1000 / 4, 2 * 1000 / 4),
        (2, 2, 4 * 1000 / 4, 4 * 1000 / 4),
        (3, 2, 4 * 1000 / 4, 4 * 1000 / 4),
    ],
)
def test_sums_over_micro_steps_are_in_fp32(make_config, stage, accumulation, backward, step):
    config = make_config(optim={"name": "adamw"}, deepspeed={"zero_stage": stage})
    found = needed(config, accumulation=accumulation)
    assert found.backward["gradients"] == backward
    assert found.step["gradients"] == step
    in_place = stage in (1, 2) and accumulation > 1
    assert found.step["fp32 gradients"] == (0 if in_place else 4 * 1000 / (4 if stage else 1))


def test_a_sum_in_the_precision_of_the_weights_is_beside_a_micro_steps(make_config):
    config = make_config(
        optim={"name": "adamw"}, deepspeed={"zero_stage": 2}, train={"precision": "fp32"}
    )
    assert needed(config, accumulation=1).backward["gradients"] == 4 * 1000 / 4
    assert needed(config, accumulation=2).backward["gradients"] == 2 * 4 * 1000 / 4


def test_an_accelerators_buffers_take_what_was_asked_for(make_config):
    def buffers(**zero):
        config = make_config(optim={"name": "adamw"}, deepspeed={"config": zero})
        return [
            needed(config, accelerated=accelerated).backward["communication buffers"]
            for accelerated in (True, False)
        ]

    assert buffers() == [2 * 2 * 1000, 2 * 1000]
    zero = {"reduce_bucket_size": 10_000}
    assert buffers(zero_optimization=zero) == [2 * 2 * 10_000, 2 * 1000]
    assert buffers(zero_optimization=zero | {"overlap_comm": False}) == [2 * 10_000, 2 * 1000]


@pytest.mark.parametrize(
    ("stage", "accumulation", "buffers", "copies"),
    [
        # bytes an element; copies are flattened gradients, then fp32 ones
        (0, 1, 0, 2 + 4),
        (1, 1, 2 * 2, 2 + 4),
        (1, 2, 2 * 4, 4),
        (2, 1, 2 * 2, 2 + 4),
        (2, 2, 2 * 2, 2 + 4),
        (3, 1, 4, 4),
    ],
)
def test_gradients_are_reduced_in_fp32(make_config, stage, accumulation, buffers, copies):
    config = make_config(optim={"name": "adamw"}, deepspeed={"zero_stage": stage})
    own = 4 * 1000 // 4 if (stage, accumulation) == (1, 2) else 0  # a place for the sum
    gathered = 2 * 1000 if stage == 3 else 0
    found = needed(config, accumulation=accumulation, saved=0).backward
    assert found["communication buffers"] == buffers * 1000 + gathered
    assert found["activations"] == copies * 1000 + own


def test_a_small_bucket_is_reduced_beside_activations(make_config):
    zero = {"reduce_bucket_size": 100}
    own = {"zero_stage": 2, "config": {"zero_optimization": zero}}
    config = make_config(optim={"name": "adamw"}, deepspeed=own)
    found = needed(config, rows=1, saved=10_500).backward
    kept = 10_500 - found["gradients"]
    assert found["activations"] == max(kept, kept * 9 // 10 + 6 * 100)
    assert needed(config, rows=1, saved=1500).backward["activations"] == 900 + 600


def test_deepspeeds_own_settings_count(make_config):
    zero = {"stage3_max_live_parameters": 100, "reduce_bucket_size": 10_000}
    more = {"zero_optimization": zero, "communication_data_type": "bf16"}
    config = make_config(optim={"name": "adamw"}, deepspeed={"zero_stage": 3, "config": more})
    assert needed(config).backward["communication buffers"] == 2 * (10_000 + 100)


def test_without_zero_deepspeeds_bucket_is_its_own(make_config):
    zero = {"zero_optimization": {"reduce_bucket_size": 10}}
    own = {"zero_stage": 0, "config": zero}
    found = needed(make_config(optim={"name": "adamw"}, deepspeed=own), saved=0)
    assert found.backward["activations"] == (2 + 4) * 1000


def test_an_optimiser_that_gathers_holds_gradients_and_momentum_whole(make_config):
    config = make_config(optim={"name": "muon"}, deepspeed={"zero_stage": 3})
    own = Sizes(total=1000, own=600, largest_group=400)
    buffers = needed(config, n=own).step["communication buffers"]
    assert buffers == 4 * 1000 + 4 * 600 * (3 + 2 / 4)


@pytest.mark.parametrize("stage", [0, 2])
def test_the_copy_of_an_asynchronous_save_is_in_the_hosts_memory(make_config, stage):
    config = make_config(
        optim={"name": "muon"},
        checkpoint={"asynchronous": True},
        deepspeed={"zero_stage": stage},
    )
    sizes = Sizes(total=1000, own=600, largest_group=400)
    copy = (4 * 1000 + (2 if stage else 4) * 600 + 8 * 400) // 4
    there = needed(config, n=sizes)
    assert there.host["copy of the state"] == copy
    assert "copy of the state" not in there.backward | there.step
    on_cpu = needed(config, n=sizes, accelerated=False)
    assert on_cpu.backward["copy of the state"] == on_cpu.step["copy of the state"] == copy
    assert on_cpu.host == {}


def test_what_is_offloaded_is_in_the_hosts_memory(make_config):
    config = make_config(
        optim={"name": "adamw"}, deepspeed={"zero_stage": 2, "offload_optimizer": True}
    )
    there, plain = needed(config), needed(make_config(optim={"name": "adamw"}))
    assert not {"moments", "fp32 weights"} & (set(there.backward) | set(there.step))
    assert there.host["moments"] == plain.step["moments"] == 8 * 1000 / 4
    assert plain.host == {}


def test_parameters_are_counted_as_the_optimiser_groups_them(settings):
    with torch.device("meta"):
        model = T5VAE(settings())
    lion, muon, adamw = (sizes_of(model, name) for name in ("lion", "muon", "adamw"))
    assert muon.total == adamw.total == sum(p.numel() for p in model.parameters())
    assert adamw.own == 0
    assert lion == Sizes(total=muon.total, own=muon.total, largest_group=0)
    embeddings = {
        id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding)
    }
    matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert adamw.largest_group == matrices
    assert muon.largest_group == sum(embeddings.values()) == matrices - muon.own


@pytest.mark.parametrize(
    ("optimizer", "precision", "stage", "extra"),
    [
        ("muon", "bf16", 0, None),
        ("muon", "fp32", 1, 600 * 4 / 4),
        ("muon", "bf16", 2, 600 * 2 / 4),
        ("muon", "bf16", 3, None),
        ("lion", "bf16", 2, None),
    ],
)
def test_new_momentum_is_kept_apart_until_a_step_is_known_to_be_one(
    make_config, optimizer, precision, stage, extra
):
    config = make_config(
        optim={"name": optimizer},
        train={"precision": precision},
        deepspeed={"zero_stage": stage},
    )
    found = needed(config, n=Sizes(1000, own=600, largest_group=400))
    assert found.backward.get("staged momentum") == found.step.get("staged momentum") == extra


@pytest.mark.parametrize("given", ["many", [], None, float("inf")])
@pytest.mark.parametrize("name", ["reduce_bucket_size", "stage3_max_live_parameters"])
def test_a_number_of_the_users_own_that_is_none_is_refused(make_config, name, given):
    own = {"zero_optimization": {name: given}}
    config = make_config(deepspeed={"zero_stage": 3, "config": own})
    told = refusal(regime_of, config, config.data.split(1))
    assert told == f"deepspeed.config sets {name} to {given!r}: give a number"


def test_a_number_may_be_written_as_text(make_config):
    own = {"zero_optimization": {"reduce_bucket_size": "5e8"}}
    config = make_config(deepspeed={"zero_stage": 2, "config": own})
    assert regime_of(config, config.data.split(1)).bucket == 500_000_000
