"""Which document a token is of, and standard errors that draw documents, not contexts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from evaluate.documents import Documents
from evaluate.metrics import GroupedSums, SetSums, pooled, without_empty
from evaluate.report.columns import few_documents
from harvest.packing import PackedTokens


def test_numbers_worked_by_hand() -> None:
    """Contexts of a BOS and three tokens of the stream 0 0 | 1 1 1 1 1 | 2 ...; a BOS is of the token after it."""
    packed = PackedTokens(np.zeros((3, 4), np.int32), np.ones((3, 4), np.bool_), np.array([0, 2, 7]), "abc", stride=3)
    documents = Documents.of(packed)
    assert documents.count == 3
    assert documents.numbers(range(3)).tolist() == [[0, 0, 0, 1], [1, 1, 1, 1], [1, 1, 2, 2]]
    assert documents.numbers(range(2, 3)).tolist() == [[1, 1, 2, 2]]
    for sequence in range(3):
        for position in range(4):
            name = packed.document(sequence, position)
            assert name == "abc"[documents.numbers(range(sequence, sequence + 1))[0, position]]


def test_without_known_documents_each_context_is_one() -> None:
    packed = PackedTokens(np.zeros((3, 2), np.int32), np.ones((3, 2), np.bool_))
    assert Documents.of(packed).numbers(range(1, 3)).tolist() == [[1, 1], [2, 2]]
    assert Documents.one_a_context(5, 2).count == 5


def test_sums_by_context_and_by_document_have_one_total() -> None:
    sums = GroupedSums(("l0",), 3, 4)
    value, context, document = torch.arange(6.0), torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 1, 1, 1, 1, 3])
    sums.add("l0", value, context, document)
    assert sums.table("context")["l0"].tolist() == [1, 5, 9]
    assert sums.table("document")["l0"].tolist() == [0, 10, 0, 5]
    assert sums.merged(sums).table("document")["l0"].tolist() == [0, 20, 0, 10]


def a_set(rng: np.random.Generator, n_documents: int, contexts_each: int) -> SetSums:
    """Contexts of ten tokens, `contexts_each` to a document, whose losses share the document's own part."""
    of_document = rng.normal(2.0, 0.3, n_documents)
    ce: NDArray[np.float64] = np.repeat(of_document, contexts_each) + rng.normal(0, 0.2, n_documents * contexts_each)
    names = ("error", "deviation", "error_token", "deviation_token", "error_btk", "l0", "cosine", "norm", "dot")
    more = ("norm_c", "dot_c", "clean", "zero", "mean", "kl", "tokens", "predicted")
    contexts = {name: np.full(len(ce), 10.0) for name in (*names, *more)} | {"spliced": ce * 10}
    documents = {name: column.reshape(n_documents, contexts_each).sum(1) for name, column in contexts.items()}
    return SetSums(contexts, documents)


def test_intervals_cover_with_several_contexts_a_document() -> None:
    """In 300 simulated sets of 80 documents with 6 contexts each, 95% intervals by documents hold the true mean about
    95 times in 100; by contexts, as if each were drawn alone, far less often."""
    rng = np.random.default_rng(0)
    covered: dict[str, list[bool]] = {"documents": [], "contexts": []}
    for _ in range(300):
        sums = a_set(rng, 80, 6)
        for by, used in (("documents", sums), ("contexts", SetSums(sums.contexts, sums.contexts))):
            got: dict[str, Any] = pooled(used, samples=100, seed=1)["ce_spliced"]
            covered[by].append(abs(got["value"] - 2.0) < 1.96 * got["se"])
    assert 0.91 < np.mean(covered["documents"]) < 0.98
    assert np.mean(covered["contexts"]) < 0.75


def test_documents_of_which_nothing_is_scored_are_not_drawn() -> None:
    sums = a_set(np.random.default_rng(1), 30, 2)
    padded = {name: np.concatenate([column, np.zeros(50)]) for name, column in sums.documents.items()}
    assert pooled(SetSums(sums.contexts, padded), samples=50, seed=0) == pooled(sums, samples=50, seed=0)
    assert len(without_empty(padded)["tokens"]) == 30


@pytest.mark.parametrize(("documents", "says"), [(49, True), (50, False), (1, True), (None, False)])
def test_few_documents_are_said(documents: int | None, says: bool) -> None:
    sentence = few_documents({"documents": documents})
    assert (sentence is not None) == says
    assert sentence is None or f"only {documents} document" in sentence
