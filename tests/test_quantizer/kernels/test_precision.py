"""Promises of quantizer.kernels.precision."""

import torch

from quantizer.kernels.precision import fastest_matmul_dtype


def test_precision_is_one_that_products_can_be_computed_in() -> None:
    assert fastest_matmul_dtype("cuda") == torch.bfloat16
    assert fastest_matmul_dtype("cpu") in (torch.bfloat16, torch.float32)
