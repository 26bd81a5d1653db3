"""The rows of a data set: one example each, or several packed examples."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rosa_train.config import DataArguments, expect
from rosa_train.data.collate import collate_packed, pack, pad
from rosa_train.data.examples import Example, encode, pad_token_id
from rosa_train.data.records import read_records


class Dataset:
    """Rows of one example each or, if packed, of several.

    Attributes:
        examples: the examples of all rows.
        lengths: the number of tokens of each row.
        targets: the number of tokens with a loss of each row.
    """

    def __init__(
        self, examples: Sequence[Example], pad_id: int, pack_to: int | None = None
    ) -> None:
        self.examples = list(examples)
        self._pad_id = pad_id
        self._packed = pack_to is not None
        self._rows = pack(self.examples, pack_to) if pack_to else [[e] for e in self.examples]
        self.lengths = [sum(map(len, row)) for row in self._rows]
        self.targets = [sum(example.targets for example in row) for row in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def collate(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The tensors of some rows, as `pad` or `collate_packed` makes them."""
        rows = [self._rows[i] for i in indices]
        if self._packed:
            return collate_packed(rows, self._pad_id)
        return pad([row[0] for row in rows], self._pad_id)

    def share(self, indices: Sequence[int], size: int, rank: int, world: int) -> list[list[int]]:
        """This process's micro-batches of an optimizer step, of at most `size` rows each.

        Rows are sorted by length, which saves padding, and dealt to the processes in turn. So no
        process gets all the long rows, for which the others would wait. The order does not change
        the step's gradient. A process may get no micro-batch of a short last batch.
        """
        ordered = sorted(indices, key=lambda i: (self.lengths[i], i))[rank::world]
        shares = [ordered[i : i + size] for i in range(0, len(ordered), size)]
        return [share for share in shares if any(self.targets[i] for i in share)]

    def where(self, indices: Sequence[int]) -> str:
        """The places of the records in some rows, as file and line."""
        return ", ".join(example.where for i in indices for example in self._rows[i])

    def largest_id(self) -> int:
        """The largest token id of all examples."""
        return max(max(e.prompt_ids + e.completion_ids) for e in self.examples)

    def digest(self) -> str:
        """A hash of all tokens, by which a resumed run recognises its data."""
        state = hashlib.sha256()
        for example in self.examples:
            state.update(repr((example.prompt_ids, example.completion_ids)).encode())
        return state.hexdigest()[:16]


def read_dataset(args: DataArguments, tokenizer: Any, *, training: bool) -> Dataset:
    """Reads and encodes the training or the evaluation data of a run.

    Only training rows are packed. The evaluation loss does not depend on the layout of rows.
    """
    source = args.train_file if training else args.eval_file
    split = None
    if source is None:
        name = args.dataset_name if training else args.eval_dataset_name
        source, split = split_of(str(name))
    records = read_records(
        source,
        split=split,
        limit=args.max_train_examples if training else args.max_eval_examples,
    )
    examples = encode(
        records,
        tokenizer,
        args.prompt_template,
        args.completion_template,
        args.max_length,
        chat=args.chat,
        on_too_long=args.on_too_long,  # type: ignore[arg-type]
        split_special_tokens=args.split_special_tokens,
    )
    name = "train_file" if training else "eval_file"
    expect(bool(examples), name, "at least one example that fits", f"none in {source}")
    packed = args.max_length if training and args.packing else None
    # Any token can fill a row. The pad token is avoided: attention masks are left out (see
    # target_loss), and some models of transformers warn of pad tokens without a mask.
    special = (pad_token_id(tokenizer), tokenizer.eos_token_id)
    return Dataset(examples, next(i for i in range(3) if i not in special), packed)


def split_of(name: str) -> tuple[str, str | None]:
    """NAME and SPLIT of `NAME[SPLIT]`. NAME may have a colon and a configuration."""
    if name.endswith("]") and "[" in name:
        name, _, split = name[:-1].partition("[")
        return name, split
    return name, None
