"""Order of batches, padding and packing. Packed examples must not see each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import sweep
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rosa_train.data.collate import collate_packed, pack, pad, pad_prompts
from rosa_train.data.examples import Example
from rosa_train.data.order import BatchOrder
from rosa_train.run.packing import why_not_packed

from .train_models import MODELS, transformers

small = st.integers(1, 6)


def example(prompt: int, completion: int, start: int = 3) -> Example:
    ids = [start + i % 50 for i in range(prompt + completion)]
    return Example(ids[:prompt], ids[prompt:], "", f"x:{start}")


lengths = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5)), min_size=1, max_size=20)


@given(count=st.integers(1, 40), batch_size=small, world=small, seed=st.integers(0, 9))
def test_an_epoch_covers_every_example(count: int, batch_size: int, world: int, seed: int) -> None:
    ranks = [BatchOrder(count, batch_size, seed, world, rank) for rank in range(world)]
    steps = ranks[0].steps_per_epoch
    for epoch in range(2):
        seen: list[int] = []
        for step in range(epoch * steps, (epoch + 1) * steps):
            batches = [order.batch(step) for order in ranks]
            assert len({len(batch) for batch in batches}) == 1
            assert 1 <= len(batches[0]) <= batch_size
            assert {order.epoch(step) for order in ranks} == {epoch}
            seen += [index for batch in batches for index in batch]
        assert {*seen} == {*range(count)}
        # Repeated examples fill the last step: fewer than `world`, none if `world` divides count.
        assert len(seen) - count == -count % world


def test_a_batch_depends_only_on_seed_and_step() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    order = BatchOrder(100, 8, seed=1)
    forwards = [order.batch(step) for step in range(40)]
    assert torch.equal(torch.get_rng_state(), before)
    assert [BatchOrder(100, 8, seed=1).batch(step) for step in reversed(range(40))] == forwards[
        ::-1
    ]
    assert forwards[0] != forwards[13] != BatchOrder(100, 8, seed=2).batch(13)
    # A fixed order: a run that is resumed with a later release must get the same batches.
    assert BatchOrder(10, 4, seed=42).batch(0) == [9, 5, 2, 7]
    assert order.batch(12) == forwards[12]
    assert len(forwards[12]) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1), "count >= 1, got 0"),
        ((1, 0), "batch_size >= 1, got 0"),
        ((1, 1, 0, 0), "world >= 1, got 0"),
        ((1, 1, 0, 2, 2), r"rank in \[0, 2\), got 2"),
    ],
)
def test_invalid_batch_orders_are_refused(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchOrder(*arguments)
    with pytest.raises(ValueError, match="step >= 0, got -1"):
        BatchOrder(1, 1).batch(-1)


def test_padding_is_masked_even_if_pad_is_eos() -> None:
    eos = 2  # also the pad token, as in many tokenizers; the real eos must keep its label
    batch = pad([Example([5, 6], [7, eos], "", "x"), Example([], [8, eos, 9], "", "x")], eos, 5)
    assert batch["input_ids"].tolist() == [[5, 6, 7, eos, eos], [8, eos, 9, eos, eos]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, eos, -100], [-100, eos, 9, -100, -100]]
    assert pad([example(2, 1)], 0)["input_ids"].shape == (1, 3)


def test_prompts_are_padded_on_the_left() -> None:
    batch = pad_prompts([Example([5, 6, 7], [9], "", "x"), Example([8], [9], "", "x")], 2)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [2, 2, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    with pytest.raises(ValueError, match=r"pad_prompts: x:3: expected a prompt, got none"):
        pad_prompts([example(0, 1)], 2)


def test_empty_and_too_long_rows_are_refused() -> None:
    for function in (pad, collate_packed, pad_prompts):
        with pytest.raises(ValueError, match="expected at least one example, got none"):
            function([], 0)  # type: ignore[operator]
    with pytest.raises(ValueError, match="pad: expected at most 4 tokens a row, got 5"):
        pad([example(2, 3)], 0, 4)
    with pytest.raises(ValueError, match="pack: expected at most 4 tokens a row, got 5"):
        pack([example(2, 3)], 4)
    with pytest.raises(ValueError, match="collate_packed: expected at most 4 tokens a row, got 5"):
        collate_packed([[example(2, 3)]], 0, 4)


@given(lengths=lengths, max_length=st.integers(10, 40))
def test_packing_keeps_every_example_whole(lengths: list[tuple[int, int]], max_length: int) -> None:
    examples = [example(*pair, start=3 + i) for i, pair in enumerate(lengths)]
    rows = pack(examples, max_length)
    assert sorted(e.where for row in rows for e in row) == sorted(e.where for e in examples)
    sizes = [sum(map(len, row)) for row in rows]
    assert max(sizes) <= max_length
    # The first example of a row fits into no earlier row, at that row's final size.
    for later, row in enumerate(rows):
        assert all(size + len(row[0]) > max_length for size in sizes[:later])
    batch = collate_packed(rows, 0)
    assert int((batch["labels"] != -100).sum()) == sum(e.targets for e in examples)


def test_packing_takes_the_fullest_row_with_room() -> None:
    a, b, c, d = example(3, 3), example(3, 5), example(1, 1), example(2, 2)
    assert pack([a, b, c, d], 10) == [[a, d], [b, c]]


def test_packed_rows_have_the_expected_tensors() -> None:
    rows = [[Example([5, 6], [7], "", "x"), Example([], [8, 9], "", "x")], [example(1, 1)]]
    batch = collate_packed(rows, 1, 6)
    assert {*batch} == {"input_ids", "position_ids", "labels"}
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 1], [3, 4, 1, 1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 2, 3]]
    assert batch["labels"].tolist() == [[-100, -100, 7, -100, 9, -100], [-100, 4] + [-100] * 4]


def tiny_model(kind: str, attention: str) -> Any:
    """A tiny model with ten times its initial weights, so that attention has a visible effect."""
    model = MODELS[kind](attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(10)
    return model


def gradients(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    model.zero_grad()
    out = model(**batch, use_cache=False)
    out.loss.backward()
    return out.loss.detach(), out.logits.detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_packed_examples_do_not_see_each_other(kind: str, attention: str) -> None:
    model = tiny_model(kind, attention)
    sizes = [(4, 3), (0, 5), (6, 1), (1, 1), (3, 8), (2, 2)]
    examples = [example(*size, start=3 + 7 * i) for i, size in enumerate(sizes)]
    rows = pack(examples, 17)
    assert 1 < len(rows) < len(examples)
    assert len({sum(map(len, row)) for row in rows}) > 1  # so that one row is padded
    apart, packed = pad(examples, 0), collate_packed(rows, 0)
    loss, logits, grads = gradients(model, apart)
    packed_loss, packed_logits, packed_grads = gradients(model, packed)
    assert abs(float(loss - packed_loss)) <= 1e-5 * float(loss)
    for index, row in enumerate(rows):
        start = 0
        for one in row:
            alone = logits[examples.index(one), : len(one)]
            got = packed_logits[index, start : start + len(one)]
            torch.testing.assert_close(got, alone, rtol=1e-5, atol=1e-5)
            start += len(one)
    for got, alone in zip(packed_grads, grads, strict=True):
        torch.testing.assert_close(got, alone, rtol=1e-4, atol=1e-5)
    # Without the position ids of each example, the loss differs: the checks above can fail.
    counting = torch.arange(packed["input_ids"].shape[1]).expand(len(rows), -1)
    leaking = gradients(model, packed | {"position_ids": counting})
    assert abs(float(leaking[0] - loss)) > 1e-2


def of_config(kind: str, **options: Any) -> Callable[[], Any]:
    """A function that makes a tiny model of another kind, with its usual initial weights."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4} | options
    make = transformers.AutoModelForCausalLM.from_config
    return lambda: make(getattr(transformers, f"{kind}Config")(**sizes))


SIZES = {"intermediate_size": 48, "num_hidden_layers": 2, "num_key_value_heads": 2}
APART = {
    "llama": MODELS["llama"],
    "gpt2": MODELS["gpt2"],
    "experts": of_config("Mixtral", num_local_experts=4, **SIZES),
}
LEAKING = {
    "learned positions": of_config("OPT", ffn_dim=48, num_hidden_layers=2, word_embed_proj_dim=32),
    "alibi": of_config("Bloom", n_layer=2, n_head=4),
    "state": of_config("Mamba", num_hidden_layers=2, state_size=4),
    "convolution": of_config("Lfm2", layer_types=["conv", "full_attention"], **SIZES),
}


@sweep(model=APART | LEAKING, dtype=[torch.float32, torch.bfloat16])
def test_models_that_mix_packed_examples_are_found(model: Any, dtype: torch.dtype) -> None:
    reason = why_not_packed(model.to(dtype).train(), torch.device("cpu"))
    assert (reason is not None) == (type(model).__name__[:3] in ("OPT", "Blo", "Mam", "Lfm"))
    # The model is as it was.
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks


def test_batched_generation_equals_generation_of_single_prompts() -> None:
    model = tiny_model("llama", "sdpa")
    examples = [example(2, 1), example(7, 1, start=20)]
    together = pad_prompts(examples, 0)
    arguments = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    width = together["input_ids"].shape[1]
    new = model.generate(**together, **arguments)[:, width:]
    for row, one in enumerate(examples):
        prompt = pad_prompts([one], 0)
        alone = model.generate(**prompt, **arguments)[:, prompt["input_ids"].shape[1] :]
        assert new[row].tolist() == alone[0].tolist()
