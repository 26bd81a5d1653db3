"""Makes tensors of examples.

Call a model as ``model(**batch, use_cache=False)``. transformers detects packed rows only if there
is no cache to fill, and by default there is one.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import torch
from torch import Tensor

from rosa_train.data.examples import Example

# torch's cross entropy, and so every loss of transformers, ignores labels of this value.
IGNORED = -100


def pad(examples: Sequence[Example], pad_id: int, pad_to: int | None = None) -> dict[str, Tensor]:
    """One row per example, padded on the right.

    Shapes: ``input_ids``, ``attention_mask`` (1 on tokens) and ``labels`` (-100 on positions
    without a loss), each int64 of (batch, longest), or of (batch, pad_to).

    Raises:
        ValueError: there are no examples, or one is longer than pad_to.
    """
    length = _row_length("pad", [len(example) for example in examples], pad_to)
    input_ids = torch.full((len(examples), length), pad_id)
    attention_mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, IGNORED)
    for row, example in enumerate(examples):
        input_ids[row, : len(example)] = torch.tensor(example.prompt_ids + example.completion_ids)
        attention_mask[row, : len(example)] = 1
        labels[row, : len(example)] = torch.tensor(_labels(example))
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def pad_prompts(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """Only the prompts, padded on the left, so that ``generate`` appends right after them.

    Shapes: ``input_ids`` and ``attention_mask``, int64 of (batch, longest). The generated tokens
    are ``output[:, input_ids.shape[1]:]``.

    Raises:
        ValueError: there are no examples, or a prompt is empty.
    """
    lengths = [len(example.prompt_ids) for example in examples]
    length = _row_length("pad_prompts", lengths, None)
    input_ids = torch.full((len(examples), length), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, example in enumerate(examples):
        if not example.prompt_ids:
            raise ValueError(f"pad_prompts: {example.where}: expected a prompt, got none")
        input_ids[row, length - lengths[row] :] = torch.tensor(example.prompt_ids)
        attention_mask[row, length - lengths[row] :] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def pack(examples: Sequence[Example], max_length: int) -> list[list[Example]]:
    """Packs whole examples into rows of at most ``max_length`` tokens, by best fit.

    In the given order, each example goes into the fullest row with room for it, or into a new row.
    So only lengths and order decide which examples share a row. Rows of ViGGO (256 tokens) and of
    GSM8K (1,024) are 97 % tokens. Padded batches of 8 examples are 72 % and 63 %.

    Raises:
        ValueError: there are no examples, or one is longer than max_length.
    """
    _row_length("pack", [len(example) for example in examples], max_length)
    rows: list[list[Example]] = []
    # Sorted by (room left, -row), so that of equal rooms the latest row comes first.
    free: list[tuple[int, int]] = []
    for example in examples:
        at = bisect_left(free, (len(example), -len(rows)))
        if at == len(free):
            rows.append([])
            room, row = max_length, len(rows) - 1
        else:
            room, row = free[at][0], -free[at][1]
            del free[at]
        rows[row].append(example)
        if room > len(example):
            insort(free, (room - len(example), -row))
    return rows


def collate_packed(
    rows: Sequence[Sequence[Example]], pad_id: int, pad_to: int | None = None
) -> dict[str, Tensor]:
    """Packed rows, padded on the right. Examples do not attend to each other.

    ``position_ids`` restart at 0 with every example, and there is no attention_mask. By this,
    transformers recognises a packed row and keeps attention block-diagonal. The padding counts as
    one more example, without labels. Loss and logits equal those of the examples by themselves.

    Shapes: ``input_ids``, ``position_ids`` and ``labels``, each int64 of (rows, longest), or of
    (rows, pad_to). Labels are -100 on positions without a loss, and on each example's first token:
    the last token of the example before must not predict it.

    Raises:
        ValueError: there are no rows, or one is longer than pad_to.
    """
    length = _row_length("collate_packed", [sum(map(len, row)) for row in rows], pad_to)
    input_ids = torch.full((len(rows), length), pad_id)
    position_ids, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, IGNORED)
    for index, row in enumerate(rows):
        start = 0
        for example in row:
            stop = start + len(example)
            input_ids[index, start:stop] = torch.tensor(example.prompt_ids + example.completion_ids)
            position_ids[index, start:stop] = torch.arange(len(example))
            labels[index, start:stop] = torch.tensor(_labels(example))
            start = stop
        position_ids[index, start:] = torch.arange(length - start)
    return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}


def _labels(example: Example) -> list[int]:
    labels = [IGNORED] * len(example.prompt_ids) + example.completion_ids
    labels[0] = IGNORED  # no token comes before it, from which to predict it
    return labels


def _row_length(function: str, lengths: Sequence[int], limit: int | None) -> int:
    if not lengths:
        raise ValueError(f"{function}: expected at least one example, got none")
    longest = max(lengths)
    if limit is None:
        return longest
    if longest > limit:
        raise ValueError(f"{function}: expected at most {limit} tokens a row, got {longest}")
    return limit
