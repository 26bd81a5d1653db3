"""Records to token ids: a prompt, and the completion that the loss is taken on.

The two are tokenised apart and joined as ids. In one piece, a tokenizer may merge the end of the
prompt with the start of the completion into a token that no prompt alone ever ends with; then the
model would be trained behind other ids than it has to generate behind. Apart, the prompt's ids are
the same in training and in generation, whatever the tokenizer does.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from string import Formatter
from typing import TYPE_CHECKING, Any, Literal, get_args

from rosa_train.data.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

OnTooLong = Literal["error", "truncate", "drop"]


@dataclass(frozen=True)
class Example:
    """Token ids of one record, the text that is expected after its prompt, and its place."""

    prompt_ids: list[int]
    completion_ids: list[int]
    completion: str
    where: str

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)

    @property
    def targets(self) -> int:
        """Tokens with a loss: the completion's, less a first one that nothing comes before."""
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
) -> list[Example]:
    """Fill the templates with each record and tokenise: ``prompt_ids + completion_ids``.

    A template holds fields in braces, ``"Utterance: {ref}\\nMeaning:"`` and ``" {mr}"``; ``{{`` is
    a brace. A string is put in as it is, any other value as JSON. The beginning-of-text token
    comes first if the tokenizer adds it, and once; the end-of-text token ends the completion,
    once.

    Args:
        max_length: tokens of prompt and completion together, at most what the model takes.
        chat: the prompt is a user's turn and the completion the assistant's, both as the
            tokenizer's chat template writes them; the loss is on the assistant's words and the end
            of its turn.
        on_too_long: "error"; or "drop" such records; or "truncate" them at max_length, which cuts
            the completion's end first, its end-of-text token included, and drops what has no
            completion left. The last two say how many through `logging`.

    Raises:
        ValueError: a malformed template, a field that a record lacks or has no value for, a record
            longer than max_length (all with the record's place), or nothing left to train on.
    """
    if on_too_long not in get_args(OnTooLong):
        raise ValueError(
            f"encode: expected on_too_long one of {', '.join(get_args(OnTooLong))}, "
            f"got {on_too_long!r}"
        )
    if max_length < 2:
        raise ValueError(f"encode: expected max_length >= 2, got {max_length}")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "encode: expected a tokenizer with an eos token, got none: without one at the end of "
            "the completions, generation would never learn to stop"
        )
    prompt_of = parse_template(prompt_template, "prompt_template")
    completion_of = parse_template(completion_template, "completion_template")
    prompts = [prompt_of(record) for record in records]
    completions = [completion_of(record) for record in records]
    heads, tails = prompts, completions
    if chat:
        pairs = list(map(_chat_writer(tokenizer), prompts, completions, records))
        heads, tails = [head for head, _ in pairs], [tail for _, tail in pairs]
    # What a chat template writes holds its special tokens already.
    bos = [] if chat else _bos(tokenizer)
    examples = [
        Example(
            head if head[:1] == bos else bos + head,
            _ended(tail, int(tokenizer.eos_token_id), turn=chat),
            completion,
            record.where,
        )
        for head, tail, completion, record in zip(
            _tokenise(tokenizer, heads),
            _tokenise(tokenizer, tails),
            completions,
            records,
            strict=True,
        )
    ]
    fitting = _fit(examples, max_length, on_too_long)
    if not fitting:
        raise ValueError(f"encode: expected records to train on, got none of {len(examples)}")
    return fitting


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What to fill rows with: the pad token, else the eos token, else 0.

    Any id will do: masks and labels are made from lengths, never by comparing ids. That the eos
    token often doubles as pad token therefore does not take it out of the loss.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def parse_template(template: str, name: str = "template") -> Callable[[Record], str]:
    """A function that fills ``template`` with a record's fields.

    Only whole fields: a template comes from a command line, and str.format would follow
    ``{a.__class__}`` or ``{a[0]}`` into the objects behind them.

    Raises:
        ValueError: unbalanced or empty braces, attributes, indices, conversions, format
            specifications; and, when called, a field that a record lacks.
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

    def fill(record: Record) -> str:
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
            filled.append(_as_text(record.fields[field], field, record.where))
        return "".join(filled)

    return fill


def _as_text(value: Any, field: str, where: str) -> str:
    if value is None:
        raise ValueError(f"encode: {where}: expected a value in field {field!r}, got null")
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell halves of surrogate pairs
        raise ValueError(
            f"encode: {where}: expected text in field {field!r}, "
            f"got the lone surrogate {text[error.start]!r}"
        ) from None
    return text


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
                f"encode: {record.where}: expected a chat template that writes the answer after "
                "the generation prompt, got another text before it; write the turns into "
                "prompt_template and completion_template instead"
            )
        return head, both[len(head) :]

    return write


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-text token as a list, empty if this tokenizer does not add one."""
    added: list[int] = tokenizer("").input_ids
    return added[:1] if added and added[0] == tokenizer.bos_token_id else []


def _tokenise(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    # verbose=False: it would warn about lengths, which are checked here and with better words.
    ids: list[list[int]] = (
        tokenizer(texts, add_special_tokens=False, verbose=False).input_ids if texts else []
    )
    return ids


def _ended(ids: list[int], eos: int, *, turn: bool) -> list[int]:
    """``ids`` with an eos at the end; of a turn, up to the eos in it.

    Chat templates write a line feed after the eos that ends a turn; generation stops before it.
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
