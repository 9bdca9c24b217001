"""torch.compile of a model's layers: the same results, from few graphs."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

from tests.model.conftest import ARCHITECTURES
from tests.model.test_execution import LONGEST, PADDED, make_model, score, sequences, worst


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def traced(fresh_compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile without code generation, which takes most of the time: PyTorch runs graphs.

    What has to be run by Python is an error.
    """
    compiling = partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", compiling)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.slow
def test_compiled_layers_give_the_loss_and_gradients_of_the_others(fresh_compiler):
    plain, compiled = make_model(), make_model()
    compiled.compile_layers()
    for lengths in ([8, 3, 5], [16, 16, 2]):
        loss, gradients = score(compiled, sequences(lengths))
        right_loss, right = score(plain, sequences(lengths))
        assert loss == pytest.approx(right_loss, rel=1e-6)
        assert worst(gradients, right) <= 1e-5
    assert graphs() == 2  # of the encoder's layer and the decoder's, whatever the length


@pytest.mark.slow
def test_layers_share_graphs_over_all_lengths(traced):
    plain, compiled = make_model(layers=4), make_model(layers=4)
    compiled.compile_layers()
    for longest in (8, 16, 24, 32):
        ids_BT = sequences([longest, 2, 5, 3, 6])
        loss, gradients = score(compiled, ids_BT)
        right_loss, right = score(plain, ids_BT)
        assert loss == pytest.approx(right_loss, rel=1e-6)
        assert worst(gradients, right) <= 1e-5
    assert graphs() == 4  # the first layer of a stack computes the position bias of the others


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_layer_is_one_graph_for_all_lengths_and_batch_sizes(traced, architecture, dtype):
    # Lengths and numbers of rows that equal another size of the model may have graphs of their own.
    model = make_model(layers=2, d_model=32, **ARCHITECTURES[architecture]).to(dtype)
    model.compile_layers()
    kinds = 2 if architecture == "umt5" else 4  # in others the first layer makes the position bias
    batches = [[8, 3], [12, 2, 5, 3, 6], [24, 4, 4, 4, 4, 4]]
    for lengths in batches:
        model(sequences(lengths), mode="score").loss.backward()
    assert graphs() == kinds
    model.eval()
    with torch.no_grad():
        for lengths in batches:
            model(sequences(lengths), mode="score")
    assert graphs() == 2 * kinds


@pytest.mark.slow
def test_compiled_layers_hold_no_weights_until_the_backward_pass(fresh_compiler, monkeypatch):
    # ZeRO-3 takes them away in between, and gives others with the same values.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    plain, compiled = make_model(), make_model()
    compiled.compile_layers()
    ids_BT = sequences([8, 3, 5])
    loss = compiled(ids_BT, mode="score").loss
    for stack in (compiled.t5.encoder, compiled.t5.decoder):
        for weight in stack.block.parameters():
            gone, weight.data = weight.data, weight.data.clone()
            gone.fill_(torch.nan)
    loss.backward()
    gradients = {name: weight.grad for name, weight in compiled.named_parameters()}
    assert worst(gradients, score(plain, ids_BT)[1]) <= 1e-5


@pytest.mark.slow
def test_no_layer_runs_uncompiled_for_want_of_graphs(traced):
    compiled = make_model(layers=4)
    compiled.compile_layers()
    for lengths in ([LONGEST] * 6, [LONGEST, 5, 5, 5, 5, 5], [24] * 6, [6] * 6, [6, 2, 2, 3, 4, 5]):
        score(compiled, sequences(lengths))
        with torch.no_grad():
            compiled(sequences(lengths), mode="score")
    assert graphs() > 8  # torch's own limit


@pytest.mark.slow
def test_a_compiled_model_encodes_and_generates_as_before(traced):
    plain, compiled = make_model(tied=False).eval(), make_model(tied=False).eval()
    compiled.compile_layers()
    ids_BT = sequences(PADDED)
    with torch.no_grad():
        z_BD = plain(ids_BT, mode="encode")
        torch.testing.assert_close(compiled(ids_BT, mode="encode"), z_BD)
    right_BT = plain.generate(latent=z_BD, do_sample=False)
    assert torch.equal(compiled.generate(latent=z_BD, do_sample=False), right_BT)
    assert right_BT.shape[1] > 3  # the cache was used


def test_compiling_changes_no_name_in_the_state_dict(traced):
    model = make_model()
    names = list(model.state_dict())
    model.compile_layers()
    assert list(model.state_dict()) == names


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_compiled_layers_can_be_checkpointed(traced):
    plain, compiled = make_model(layers=2), make_model(layers=2)
    compiled.gradient_checkpointing_enable()
    compiled.compile_layers()
    for longest in (8, 16):
        ids_BT = sequences([longest, 2, 5])
        loss, gradients = score(compiled, ids_BT)
        right_loss, right = score(plain, ids_BT)
        assert loss == pytest.approx(right_loss, rel=1e-6)
        assert worst(gradients, right) <= 1e-5
    assert graphs()
