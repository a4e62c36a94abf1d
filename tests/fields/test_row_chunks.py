import pytest
import torch

from co3d_ensemble.fields.row_chunks import CPU_CHUNK, CPU_ROWS, row_chunks


@pytest.mark.parametrize("n", [0, 1, CPU_ROWS, CPU_CHUNK, CPU_CHUNK + CPU_ROWS + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rows_come_back_in_order_and_reduced_precision_sees_few_numbers_of_rows(n, dtype):
    values, index = torch.arange(2.0 * n).view(n, 2), torch.arange(n)
    parts = row_chunks(values, index, dtype=dtype)
    assert all(len(a) == len(b) <= CPU_CHUNK for a, b in parts)
    assert torch.equal(torch.cat([a for a, _ in parts])[:n], values)
    assert torch.equal(torch.cat([b for _, b in parts])[:n], index)
    total = sum(len(a) for a, _ in parts)
    assert total == (n if dtype == torch.float32 else -(-n // CPU_ROWS) * CPU_ROWS)


def test_what_is_padded_takes_no_gradient_away():
    values = torch.ones(3, 2, requires_grad=True)
    torch.cat([part for (part,) in row_chunks(values, dtype=torch.bfloat16)]).sum().backward()
    assert (values.grad == 1).all()
