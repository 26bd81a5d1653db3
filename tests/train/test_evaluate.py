"""Loss and exact match: equal to transformers, and independent of batches and padding."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rosa_train.config import DataArguments
from rosa_train.data.collate import IGNORED, pad
from rosa_train.data.dataset import Dataset, read_dataset
from rosa_train.data.examples import Example
from rosa_train.run.evaluate import (
    eval_mode,
    evaluate_loss,
    generate_exact_match,
    target_count,
    target_loss,
)

from .train_runs import write_all

transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def model(source: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(source).eval()


@pytest.fixture
def tokenizer(source: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(source)


@pytest.fixture
def rows(source: Path, tokenizer: Any) -> Dataset:
    data = DataArguments(train_file=str(source / "train.jsonl"), max_length=40)
    return read_dataset(data, tokenizer, training=True)


def test_loss_equals_that_of_transformers(model: Any, rows: Dataset) -> None:
    batch = rows.collate(range(6))
    expected = model(**batch, use_cache=False).loss * target_count(batch)
    torch.testing.assert_close(target_loss(model, batch, CPU), expected)
    # The gradients are equal, too. target_loss uses no attention mask and computes fewer logits.
    weight = model.get_input_embeddings().weight
    ours = torch.autograd.grad(target_loss(model, batch, CPU), weight)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, weight))


def test_target_count_matches_the_labels(rows: Dataset) -> None:
    batch = rows.collate(range(6))
    assert target_count(batch) == sum(rows.targets[i] for i in range(6))
    assert target_count(batch) == int((batch["labels"] != IGNORED).sum())


def test_loss_of_a_model_without_logits_to_keep(model: Any, rows: Dataset) -> None:
    class Plain(torch.nn.Module):
        def forward(self, input_ids: Any, use_cache: bool) -> Any:
            return model(input_ids=input_ids, use_cache=use_cache)

    batch = rows.collate(range(6))
    torch.testing.assert_close(
        target_loss(Plain(), batch, CPU), target_loss(model, batch, CPU), rtol=1e-5, atol=1e-5
    )


def test_loss_is_independent_of_batches_and_packing(
    source: Path, model: Any, rows: Dataset, tokenizer: Any
) -> None:
    total, count = evaluate_loss(model, [rows.collate([i]) for i in range(len(rows))], CPU)
    assert count == sum(rows.targets)
    for size in (4, 41):
        shares = rows.share(range(len(rows)), size, 0, 1)
        again = evaluate_loss(model, map(rows.collate, shares), CPU)
        assert again == (pytest.approx(total, rel=1e-5), count)
    data = DataArguments(train_file=str(source / "train.jsonl"), max_length=40, packing=True)
    packed = read_dataset(data, tokenizer, training=True)
    assert len(packed) < len(rows) / 2
    again = evaluate_loss(model, [packed.collate(range(len(packed)))], CPU)
    assert again == (pytest.approx(total, rel=1e-5), count)


def test_batch_without_targets_adds_no_loss(model: Any, rows: Dataset) -> None:
    batch = rows.collate([0])
    nothing = batch | {"labels": torch.full_like(batch["labels"], IGNORED)}
    assert evaluate_loss(model, [nothing, batch], CPU) == evaluate_loss(model, [batch], CPU)
    assert evaluate_loss(model, [], CPU) == (0.0, 0)


def test_eval_mode_is_undone_after_an_error(model: Any) -> None:
    model.train()

    def fail() -> None:
        with eval_mode(model):
            assert not model.training
            assert not torch.is_grad_enabled()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert model.training
    assert torch.is_grad_enabled()


def with_completions(examples: list[Example], texts: Iterator[str]) -> list[Example]:
    return [dataclasses.replace(e, completion=t) for e, t in zip(examples, texts, strict=True)]


def test_exact_match_compares_stripped_completions(
    model: Any, tokenizer: Any, rows: Dataset
) -> None:
    def complete(examples: list[Example], size: int) -> tuple[float, list[dict[str, Any]]]:
        return generate_exact_match(
            model, tokenizer, examples, max_new_tokens=7, batch_size=size, device=CPU
        )

    examples = rows.examples[:9]
    share, alone = complete(examples, 1)
    assert share == 0.0  # an untrained model
    assert [p["where"] for p in alone] == [e.where for e in examples]
    assert [p["expected"] for p in alone] == [e.completion for e in examples]
    assert all(p["prompt"].endswith("=") for p in alone)
    # Padding on the left changes no prediction, and the order of the examples is kept.
    assert complete(examples, 4)[1] == alone
    # White space at both ends is ignored. Any other difference counts.
    said = with_completions(examples, (f" {p['predicted']}\n" for p in alone))
    assert complete(said, 4)[0] == 1.0
    wrong = with_completions(said[:3], (said[0].completion, "x" + said[1].completion, "A"))
    assert complete(wrong, 2)[0] == pytest.approx(1 / 3)
    assert complete([], 2) == (0.0, [])


def test_generation_stops_at_the_end_of_text(model: Any, tokenizer: Any, rows: Dataset) -> None:
    # All logits are equal. Generation takes the first token, 0, which is the end of text.
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    (_, predictions) = generate_exact_match(
        model, tokenizer, rows.examples[:2], max_new_tokens=5, batch_size=2, device=CPU
    )
    assert [p["predicted"] for p in predictions] == ["", ""]


def test_loss_ignores_the_choice_of_pad_token(model: Any, rows: Dataset) -> None:
    examples = rows.examples[:5]
    losses = [target_loss(model, pad(examples, pad_id), CPU).item() for pad_id in (0, 5)]
    assert losses[0] == losses[1]
