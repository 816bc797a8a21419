"""The best columns of each row, beside a stable sort of all of them."""

import math

import pytest
import torch

from fwpkm_kernels import ranking, testing

SIZES = [(1, 1), (32, 5), (33, 33), (100, 8), (128, 8), (512, 1), (512, 8), (768, 8), (4096, 8), (512, 32), (1024, 32)]


@pytest.mark.parametrize(("columns", "k"), SIZES)
@pytest.mark.parametrize("values", [3, 1000, 2**20])
def test_the_lower_of_equals_comes_first(columns, k, values):
    scores = torch.randint(values, (2, 40, columns), generator=torch.Generator().manual_seed(columns)).float()
    scores[0, 3, columns // 2 :] = math.nan
    scores[0, 4, : columns // 3] = math.inf
    scores[1, 5] = -math.inf
    ordered, order = torch.sort(scores, dim=-1, descending=True, stable=True)
    best, found, others = ranking.best_columns(scores.clone(), k)
    testing.assert_bitwise_equal(found, order[..., :k], "columns")
    testing.assert_bitwise_equal(best, ordered[..., :k], "the best")
    testing.assert_bitwise_equal(others, ordered[..., k : k + 1], "the best of the others")


def test_scores_that_follow_other_ones_are_put_in_order():
    scores = torch.tensor([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0], [2.0, 2.0, 5.0], [2.0, 2.0, 2.0]])
    columns = torch.tensor([[9, 8, 7], [4, 5, 6], [8, 1, 0], [3, 1, 2]])
    ranking.order_equals_(scores, columns)
    assert scores.tolist() == [[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [5.0, 2.0, 2.0], [2.0, 2.0, 2.0]]
    assert columns.tolist() == [[9, 8, 7], [5, 6, 4], [0, 1, 8], [1, 2, 3]]


@pytest.mark.parametrize("width", [0, 1, 7])
def test_equal_rows_are_seen_in_one_table_only(width):
    rows = torch.randn(2, 50, width, generator=torch.Generator().manual_seed(0))
    norms = rows.square().sum(-1)
    assert ranking.may_have_equals(rows, norms) == (width == 0)
    for other, expected in ((rows[1, 3], width == 0), (rows[0, 3], True)):
        rows[0, 40] = other
        assert ranking.may_have_equals(rows, rows.square().sum(-1)) == expected
