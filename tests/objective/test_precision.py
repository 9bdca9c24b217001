import pytest
import torch

from t5vae.objective.precision import true_fp32

MATMUL = torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def restored():
    before = MATMUL.fp32_precision
    yield
    MATMUL.allow_tf32 = False
    MATMUL.fp32_precision = before


@pytest.mark.parametrize("before", ["tf32", "ieee", "none"])
def test_products_are_in_fp32_within_and_as_before_afterwards(before):
    MATMUL.fp32_precision = before
    with true_fp32():
        assert MATMUL.fp32_precision == "ieee"
    assert MATMUL.fp32_precision == before


def test_products_are_as_before_after_an_error():
    MATMUL.fp32_precision = "tf32"
    with pytest.raises(KeyError), true_fp32():
        raise KeyError
    assert MATMUL.fp32_precision == "tf32"


def test_a_function_can_have_its_products_in_fp32():
    MATMUL.fp32_precision = "tf32"

    @true_fp32()
    def precision():
        return MATMUL.fp32_precision

    assert [precision(), precision()] == ["ieee", "ieee"]
    assert MATMUL.fp32_precision == "tf32"


def test_tf32_that_the_older_setting_allows_comes_back():
    MATMUL.allow_tf32 = True
    with true_fp32():
        assert MATMUL.fp32_precision == "ieee"
    assert MATMUL.allow_tf32
    assert torch.get_float32_matmul_precision() == "high"
