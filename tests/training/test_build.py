import pytest
import torch

from shards import open_index
from t5vae.common.errors import UserError
from t5vae.training import build


@pytest.fixture
def index(dataset):
    return open_index(dataset)


def model_config(config, index):
    return build.model_config(config.model, config.objective, index)


def test_vocabulary_special_ids_and_length_come_from_the_shards(make_config, index):
    made = model_config(make_config(), index)
    assert made.sequence_length == index.max_length == 24
    assert made.t5["vocab_size"] == index.vocab_size == 300
    assert made.t5["pad_token_id"] == index.pad_id
    assert made.t5["eos_token_id"] == index.eos_id
    assert made.latent_size == 8


def test_a_larger_vocabulary_and_length_than_the_shards_are_allowed(make_config, index):
    made = model_config(make_config(model={"vocab_size": 512, "sequence_length": 40}), index)
    assert made.t5["vocab_size"] == 512
    assert made.sequence_length == 40


@pytest.mark.parametrize(
    ("key", "given", "needed"), [("vocab_size", 299, 300), ("sequence_length", 23, 24)]
)
def test_a_model_too_small_for_the_shards_is_refused_with_both_values(
    make_config, index, key, given, needed
):
    with pytest.raises(UserError) as caught:
        model_config(make_config(model={key: given}), index)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for word in (f"model.{key}", str(given), str(needed), str(index.path)):
        assert word in message


def test_equal_seeds_give_equal_weights(make_config, index):
    config = make_config()

    def weights(seed):
        settings, device = model_config(config, index), torch.device("cpu")
        model = build.build_model(settings, config.model, seed=seed, half=True, device=device)
        return {name: value.tolist() for name, value in model.state_dict().items()}

    assert weights(1) == weights(1)
    assert weights(1) != weights(2)


@pytest.mark.parametrize(
    ("half", "device", "allowed"),
    [(False, "cuda", True), (True, "cuda", False), (False, "cpu", False)],
)
def test_an_fp32_model_is_multiplied_in_tf32_on_cuda_alone(
    make_config, index, half, device, allowed
):
    matmul, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = matmul.fp32_precision, cpu.fp32_precision
    matmul.allow_tf32 = False
    config = make_config()
    settings = model_config(config, index)
    try:
        build.build_model(settings, config.model, seed=0, half=half, device=torch.device(device))
        assert matmul.allow_tf32 == allowed
        assert matmul.fp32_precision == ("tf32" if allowed else "ieee")
        assert cpu.fp32_precision == before[1]
    finally:
        matmul.allow_tf32 = False
        matmul.fp32_precision = before[0]
