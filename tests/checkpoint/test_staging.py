"""Host memory that asynchronous saves copy the state into."""

import errno
import os
from contextlib import closing

import pytest
import torch

from t5vae.checkpoint import saving, staging
from t5vae.checkpoint.manifest import consolidated_weights
from t5vae.checkpoint.staging import Staging

FILE = "rank-00000.safetensors"


def state(device="cpu"):
    """Of several dtypes and lengths, in no order of either."""
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.uint8, torch.float64]
    return {
        f"{number}": torch.arange(number, number + 3 * number + 1, dtype=dtype, device=device)
        for number, dtype in enumerate(dtypes * 3)
    }


def buffers(copies):
    """Bytes of each, by its address."""
    storages = [copy.untyped_storage() for copy in copies.values()]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def assert_same(copies, tensors):
    assert set(copies) == set(tensors)
    for name, tensor in tensors.items():
        assert copies[name].dtype == tensor.dtype
        assert copies[name].equal(tensor.cpu()), name


def test_copies_stay_as_the_state_was():
    tensors, wanted = state(), state()
    copies = Staging().copy(tensors)
    for tensor in tensors.values():
        tensor.zero_()
    assert_same(copies, wanted)


def test_they_take_the_bytes_of_the_state_in_a_buffer_a_dtype():
    tensors = state()
    sizes = buffers(Staging().copy(tensors))
    assert len(sizes) == len({tensor.dtype for tensor in tensors.values()})
    assert sum(sizes.values()) == sum(tensor.nbytes for tensor in tensors.values())


def test_the_next_state_is_copied_to_the_same_memory():
    stage, tensors = Staging(), state()
    first = buffers(stage.copy(tensors))
    for tensor in tensors.values():
        tensor.add_(1)
    copies = stage.copy(tensors)
    assert buffers(copies) == first
    assert_same(copies, tensors)


def test_a_state_of_another_layout_gets_memory_of_its_own():
    stage, tensors = Staging(), state()
    stage.copy(tensors)
    tensors["moment"] = torch.ones(5, dtype=torch.bfloat16)  # made by the first step that is taken
    tensors["0"] = tensors["0"].half()
    copies = stage.copy(tensors)
    assert_same(copies, tensors)
    assert sum(buffers(copies).values()) == sum(tensor.nbytes for tensor in tensors.values())


def test_no_buffer_is_larger_than_the_limit_but_for_a_tensor_that_is(monkeypatch):
    monkeypatch.setattr(staging, "BUFFER", 64)
    tensors = state()
    copies = Staging().copy(tensors)
    assert_same(copies, tensors)
    largest = max(tensor.nbytes for tensor in tensors.values())
    sizes = buffers(copies).values()
    assert max(sizes) == largest > 64
    assert all(size <= 64 or size in [t.nbytes for t in tensors.values()] for size in sizes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_devices_state_is_copied_to_page_locked_memory():
    tensors = state("cuda") | {"large": torch.arange(1e8, device="cuda"), "host": torch.ones(3)}
    copies = Staging().copy(tensors)
    assert_same(copies, tensors)
    assert {name for name, copy in copies.items() if copy.is_pinned()} == set(tensors) - {"host"}


def test_an_asynchronous_save_is_the_same_file(tmp_path, together, make_engine):
    together(1)
    written = []
    for asynchronous in (False, True):
        with closing(
            saving.Saver(tmp_path / str(asynchronous), asynchronous=asynchronous)
        ) as saver:
            saver.start(make_engine("muon"), 10, {})
            written.append((saver.finish().path / FILE).read_bytes())
    assert written[0] == written[1]


def test_each_of_several_saves_has_its_own_state_one_that_failed_or_not(
    tmp_path, together, make_engine, held, monkeypatch
):
    def no_space(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    together(1)
    engine, held_write = make_engine(), saving.write
    with closing(saving.Saver(tmp_path, asynchronous=True)) as saver:
        for step in (10, 20, 30):
            held.clear()
            wanted = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
            monkeypatch.setattr(saving, "write", no_space if step == 20 else held_write)
            saver.start(engine, step, {})
            with torch.no_grad():  # training goes on
                for parameter in engine.module.parameters():
                    parameter.add_(1)
            held.set()
            if step == 20:
                with pytest.raises(OSError, match="No space"):
                    saver.finish()
                continue
            for name, weight in consolidated_weights(saver.finish().path).items():
                assert weight.equal(wanted[name].flatten()), (step, name)
