"""python -m pytest tests/train/sae/test_decoder.py"""

from __future__ import annotations

import torch
from torch import nn

from train.sae.parts.unit_rows import project_gradient_, renormalise_


def test_projection_by_hand() -> None:
    rows = nn.Parameter(torch.tensor([[1.0, 0.0], [0.6, 0.8]]))
    rows.grad = torch.tensor([[3.0, 2.0], [1.0, 0.0]])
    project_gradient_(rows)
    torch.testing.assert_close(rows.grad, torch.tensor([[0.0, 2.0], [0.64, -0.48]]))


def test_the_projected_gradient_is_that_of_the_loss_on_the_sphere() -> None:
    raw = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = nn.Parameter(raw / raw.norm(dim=1, keepdim=True))
    target = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (rows**3 * target).sum().backward()
    project_gradient_(rows)
    free = rows.detach().clone().requires_grad_()
    ((free / free.norm(dim=1, keepdim=True)) ** 3 * target).sum().backward()
    torch.testing.assert_close(rows.grad, free.grad)


def test_renormalise_by_hand() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-9, 0.0], [1e-30, 0.0]])
    renormalise_(rows)
    # A row too short to have a direction in float32 is neither divided by zero nor blown up.
    torch.testing.assert_close(rows, torch.tensor([[0.6, 0.8], [0.0, 0.0], [1.0, 0.0], [1e-18, 0.0]]))
