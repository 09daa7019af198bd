"""What a kernel says of a gradient's rows reaches the update, or is forgotten where the gradient is another by then."""

from __future__ import annotations

import torch
from torch import Tensor

from train.sae.sparse.row_norms import RowNorms, leave_norms, take_norms

NORMS = RowNorms(torch.tensor([2.0]), None)


def gradient(*, added: bool) -> Tensor:
    """The gradient that autograd leaves at a weight, of a term that says its norms, with another term or without."""

    class Term(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, weight: Tensor) -> Tensor:
            return weight.sum()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            made = torch.ones(1, 2)
            leave_norms(made, NORMS)
            return made

    weight = torch.nn.Parameter(torch.zeros(1, 2))
    loss: Tensor = Term.apply(weight)  # type: ignore[no-untyped-call]
    (loss + weight.square().sum() if added else loss).backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    return weight.grad


def test_norms_go_with_the_gradient_through_autograd_and_are_taken_once() -> None:
    grad = gradient(added=False)
    assert take_norms(grad, unit=False) is NORMS
    assert take_norms(grad, unit=False) is None


def test_norms_of_a_gradient_that_more_was_added_to_are_forgotten() -> None:
    assert take_norms(gradient(added=True), unit=False) is None
    grad = gradient(added=False)
    grad.div_(2)
    assert take_norms(grad, unit=False) is None


def test_norms_of_free_rows_say_nothing_of_unit_ones() -> None:
    assert take_norms(gradient(added=False), unit=True) is None


def test_another_gradient_in_the_same_memory_has_no_norms() -> None:
    leave_norms(torch.ones(1000), NORMS)  # which is freed at once
    assert all(take_norms(torch.ones(1000), unit=False) is None for _ in range(3))
