"""Turns records into token ids: a prompt, and the completion that has a loss.

The prompt's ids are the same in training and in generation.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from string import Formatter
from typing import TYPE_CHECKING, Any, Literal

from rosa_train.data.records import Record
from rosa_train.data.tokens import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

OnTooLong = Literal["error", "truncate", "drop"]


@dataclass(frozen=True)
class Example:
    """The token ids of one record, the text of its completion, and its place."""

    prompt_ids: list[int]
    completion_ids: list[int]
    completion: str
    where: str

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)

    @property
    def targets(self) -> int:
        """The number of tokens with a loss: those of the completion that have a token before."""
        return len(self.completion_ids) - (not self.prompt_ids and bool(self.completion_ids))


def encode(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    prompt_template: str,
    completion_template: str,
    max_length: int,
    *,
    chat: bool = False,
    on_too_long: OnTooLong = "error",
    split_special_tokens: bool = False,
) -> list[Example]:
    """Fill the templates with each record and tokenise: ``prompt_ids + completion_ids``.

    A template holds fields in braces, such as ``"Utterance: {ref}\\nMeaning:"`` and ``" {mr}"``.
    ``{{`` stands for a brace. A string is inserted unchanged, any other value as JSON. The
    beginning-of-text token comes first, once, if the tokenizer adds it. The end-of-text token ends
    the completion, once.

    Args:
        max_length: the most tokens of prompt and completion together. The model must take as many.
        chat: the tokenizer's chat template writes the prompt as a user's turn, and the completion
            as the assistant's. The loss is on the assistant's words and the end of its turn.
        on_too_long: what to do with a record that is longer than max_length. "error" raises an
            error, and "drop" leaves the record out. "truncate" cuts the end of the completion, its
            end-of-text token included, and drops the record if no completion is left. The last
            two log how many records are concerned.
        split_special_tokens: text of special tokens in a record, such as ``<|im_end|>``, is
            tokenised like other text. Otherwise it becomes that token. Templates keep theirs. The
            number of such records is logged in both cases.

    Raises:
        ValueError: a template is malformed, or no examples are left. A record lacks a field or its
            value, or is longer than max_length. The message then names the record's place.
    """
    if max_length < 2:
        raise ValueError(f"encode: expected max_length >= 2, got {max_length}")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "encode: expected a tokenizer with an eos token, got none; a completion must end with "
            "it, or the model does not learn to stop"
        )
    prompt_of = parse_template(prompt_template, "prompt_template")
    completion_of = parse_template(completion_template, "completion_template")
    tokens = Tokens(tokenizer, split_special_tokens)
    prompts = [prompt_of(record, tokens.mark) for record in records]
    completions = [completion_of(record, tokens.mark) for record in records]
    heads, tails = prompts, completions
    if chat:
        pairs = list(map(_chat_writer(tokenizer), prompts, completions, records))
        heads, tails = [head for head, _ in pairs], [tail for _, tail in pairs]
    # A chat template writes the special tokens itself.
    bos = [] if chat else _bos(tokenizer)
    examples = [
        Example(
            head if head[:1] == bos else bos + head,
            _ended(tail, int(tokenizer.eos_token_id), turn=chat),
            tokens.plain(completion),
            record.where,
        )
        for (head, tail), completion, record in zip(
            tokens.pairs(heads, tails), completions, records, strict=True
        )
    ]
    _say(tokens, [*zip(prompts, completions, records, strict=True)])
    fitting = _fit(examples, max_length, on_too_long)
    if not fitting:
        raise ValueError(f"encode: expected records to train on, got none of {len(examples)}")
    return fitting


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills rows: the pad token, else the eos token, else 0.

    Any id would do, because masks and labels are made from lengths and not from ids. So the eos
    token stays in the loss even if it is the pad token too.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def parse_template(template: str, name: str = "template") -> Callable[..., str]:
    """A function that fills ``template`` with a record's fields.

    It takes a record and, if wanted, a function that changes each inserted text.

    Only whole fields are allowed. A template comes from a command line, and str.format would
    evaluate ``{a.__class__}`` or ``{a[0]}``.

    Raises:
        ValueError: braces are unbalanced or empty, or hold an attribute, an index, a conversion or
            a format specification. The function raises it for a field that a record lacks.
    """
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            f"encode: expected fields in braces in {name}, got {template!r}: {error} "
            "(write {{ or }} for a brace)"
        ) from None
    for _, field, spec, conversion in parts:
        if field is not None and (not field or {*field} & {*".[]{"} or spec or conversion):
            tail = f"!{conversion}" if conversion else f":{spec}" if spec else ""
            raise ValueError(
                f"encode: expected plain fields such as {{text}} in {name}, "
                f"got {{{field}{tail}}} in {template!r}"
            )

    def fill(record: Record, change: Callable[[str], str] = str) -> str:
        filled = []
        for text, field, _, _ in parts:
            filled.append(text)
            if field is None:
                continue
            if field not in record.fields:
                raise ValueError(
                    f"encode: {record.where}: expected field {field!r} of {name}, "
                    f"got {', '.join(map(str, record.fields)) or 'no fields'}"
                )
            filled.append(change(_as_text(record.fields[field], field, record.where)))
        return "".join(filled)

    return fill


def _as_text(value: Any, field: str, where: str) -> str:
    if value is None:
        raise ValueError(f"encode: {where}: expected a value in field {field!r}, got null")
    try:
        text = value if isinstance(value, str) else _as_json(value)
    except ValueError:
        raise ValueError(
            f"encode: {where}: expected a value in field {field!r}, got {value!r}, which JSON "
            "does not have"
        ) from None
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can hold half of a surrogate pair
        raise ValueError(
            f"encode: {where}: expected text in field {field!r}, "
            f"got the lone surrogate {text[error.start]!r}"
        ) from None
    return text


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, default=str)


def _chat_writer(
    tokenizer: PreTrainedTokenizerBase,
) -> Callable[[str, str, Record], tuple[str, str]]:
    if not tokenizer.chat_template:
        raise ValueError("encode: expected a tokenizer with a chat template for chat, got none")

    def write(prompt: str, completion: str, record: Record) -> tuple[str, str]:
        turns = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": completion},
        ]
        head = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        both = tokenizer.apply_chat_template(turns, tokenize=False)
        assert isinstance(head, str)
        assert isinstance(both, str)
        if not both.startswith(head):
            raise ValueError(
                f"encode: {record.where}: expected a chat template that writes the answer right "
                "after the generation prompt, got text between them; write the turns into "
                "prompt_template and completion_template instead"
            )
        return head, both[len(head) :]

    return write


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-text token in a list. It is empty if the tokenizer does not add one."""
    added: list[int] = tokenizer("").input_ids
    return added[:1] if added and added[0] == tokenizer.bos_token_id else []


def _say(tokens: Tokens, rows: Sequence[tuple[str, str, Record]]) -> None:
    """Logs how many records hold special tokens, or could not be tokenised as one text."""
    special = [
        (found, record.where)
        for prompt, completion, record in rows
        if (found := tokens.found(prompt + completion))
    ]
    if special:
        _log.warning(
            "%d of %d records hold text of special tokens, the first %s in %s: %s",
            len(special),
            len(rows),
            *special[0],
            "it is tokenised like other text"
            if tokens.splits
            else "it becomes that token; --split_special_tokens keeps it as text",
        )
    if tokens.apart:
        _log.warning(
            "in %d of %d records prompt and completion share a token, or change each other's "
            "tokens: the prompt has the tokens as in generation, and the completion is tokenised "
            "by itself (a prompt_template that ends before a space may avoid it)",
            tokens.apart,
            len(rows),
        )


def _ended(ids: list[int], eos: int, *, turn: bool) -> list[int]:
    """``ids`` with an eos at the end. A turn is cut after its last eos.

    Chat templates write a line feed after that eos, but generation stops at the eos.
    """
    if turn and eos in ids:
        return ids[: len(ids) - ids[::-1].index(eos)]
    return ids if ids[-1:] == [eos] else [*ids, eos]


def _fit(examples: list[Example], max_length: int, on_too_long: OnTooLong) -> list[Example]:
    for example in examples:
        if not example.targets:
            raise ValueError(
                f"encode: {example.where}: expected a token to predict, got an empty text"
            )
    too_long = [example for example in examples if len(example) > max_length]
    if not too_long:
        return examples
    if on_too_long == "error":
        first, longest = too_long[0], max(too_long, key=len)
        raise ValueError(
            f"encode: {first.where}: expected at most max_length={max_length} tokens, "
            f"got {len(first)} ({len(first.prompt_ids)} of the prompt, "
            f"{len(first.completion_ids)} of the completion); {len(too_long)} of {len(examples)} "
            f"records are too long, the longest has {len(longest)} tokens ({longest.where}): "
            "raise max_length, or choose to drop or to truncate them"
        )
    fitting = [example for example in examples if len(example) <= max_length]
    if on_too_long == "truncate":
        cut = [
            replace(
                example,
                prompt_ids=example.prompt_ids[:max_length],
                completion_ids=example.completion_ids[: max_length - len(example.prompt_ids)],
            )
            for example in examples
            if len(example.prompt_ids) < max_length
        ]
        fitting = [example for example in cut if example.targets]
    dropped = len(examples) - len(fitting)
    _log.warning(
        "%d of %d records are longer than max_length=%d: %d truncated, %d dropped",
        len(too_long),
        len(examples),
        max_length,
        len(too_long) - dropped,
        dropped,
    )
    return fitting
