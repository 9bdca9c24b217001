import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from t5vae.objective import mmd, sliced_epps_pulley
from t5vae.objective.precision import true_fp32

MATMUL = torch.backends.cuda.matmul


class Products(TorchDispatchMode):
    """Notes the precision of products of matrices in fp32."""

    def __init__(self):
        super().__init__()
        self.precisions = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name().startswith(("aten::mm", "aten::addmm", "aten::bmm")):
            self.precisions.add(MATMUL.fp32_precision)
        return function(*args, **(kwargs or {}))


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


@pytest.mark.parametrize("statistic", [mmd, sliced_epps_pulley])
def test_a_statistic_multiplies_codes_in_fp32_in_a_run_whose_model_is_in_tf32(statistic):
    MATMUL.fp32_precision = "tf32"
    with Products() as products:
        statistic(torch.randn(6, 4))
    assert products.precisions == {"ieee"}
    assert MATMUL.fp32_precision == "tf32"
