from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from train_runs import write_all

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


def test_the_loss_is_that_of_transformers(model: Any, rows: Dataset) -> None:
    batch = rows.collate(range(6))
    expected = model(**batch, use_cache=False).loss * target_count(batch)
    torch.testing.assert_close(target_loss(model, batch, CPU), expected)
    # So are the gradients: neither the mask nor the logits that are left out here matter.
    weight = model.get_input_embeddings().weight
    ours = torch.autograd.grad(target_loss(model, batch, CPU), weight)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, weight))


def test_targets_are_counted_once(rows: Dataset) -> None:
    batch = rows.collate(range(6))
    assert target_count(batch) == sum(rows.targets[i] for i in range(6))
    assert target_count(batch) == int((batch["labels"] != IGNORED).sum())


def test_a_model_that_cannot_leave_logits_out(model: Any, rows: Dataset) -> None:
    class Plain(torch.nn.Module):
        def forward(self, input_ids: Any, use_cache: bool) -> Any:
            return model(input_ids=input_ids, use_cache=use_cache)

    batch = rows.collate(range(6))
    torch.testing.assert_close(
        target_loss(Plain(), batch, CPU), target_loss(model, batch, CPU), rtol=1e-5, atol=1e-5
    )


def test_the_loss_does_not_depend_on_batches_or_packing(
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


def test_a_batch_without_targets_counts_for_nothing(model: Any, rows: Dataset) -> None:
    batch = rows.collate([0])
    nothing = batch | {"labels": torch.full_like(batch["labels"], IGNORED)}
    assert evaluate_loss(model, [nothing, batch], CPU) == evaluate_loss(model, [batch], CPU)
    assert evaluate_loss(model, [], CPU) == (0.0, 0)


def test_the_mode_is_as_before_after_an_error(model: Any) -> None:
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


def test_exact_match(model: Any, tokenizer: Any, rows: Dataset) -> None:
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
    # Padding on the left changes nothing, and the order is kept.
    assert complete(examples, 4)[1] == alone
    # White space at the ends does not count, anything else does.
    said = with_completions(examples, (f" {p['predicted']}\n" for p in alone))
    assert complete(said, 4)[0] == 1.0
    wrong = with_completions(said[:3], (said[0].completion, "x" + said[1].completion, "A"))
    assert complete(wrong, 2)[0] == pytest.approx(1 / 3)
    assert complete([], 2) == (0.0, [])


def test_generation_stops_at_the_end_of_text(model: Any, tokenizer: Any, rows: Dataset) -> None:
    # Of equal logits the first wins, and the end of text is token 0.
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    (_, predictions) = generate_exact_match(
        model, tokenizer, rows.examples[:2], max_new_tokens=5, batch_size=2, device=CPU
    )
    assert [p["predicted"] for p in predictions] == ["", ""]


def test_padding_is_ignored_whatever_its_token(model: Any, rows: Dataset) -> None:
    examples = rows.examples[:5]
    losses = [target_loss(model, pad(examples, pad_id), CPU).item() for pad_id in (0, 5)]
    assert losses[0] == losses[1]
