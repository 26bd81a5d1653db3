"""Token ids of a prompt and of the completion after it.

The two are tokenised as one text. A SentencePiece tokenizer begins every text with a space, so a
completion by itself would begin with a space token that the model never sees there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Stands for a special token in data, until the templates are filled: (number). Private characters.
_MARK = re.compile("\ue000(\\d+)\ue001")
# No tokenizer joins a line feed with the text after it.
_BEFORE = "\n"


class Tokens:
    """Tokenises pairs of texts, and knows which special tokens are from data.

    Data may hold the text of a special token, such as ``<|im_end|>``. `mark` marks it in a value,
    before templates are filled. Then a token of the data differs from the same one of a template.

    Attributes:
        splits: whether special tokens of data are tokenised like other text.
        apart: the number of pairs that could not be tokenised as one text (see `pairs`).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, split_special_tokens: bool) -> None:
        self._tokenizer, self.splits = tokenizer, split_special_tokens
        special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        added = tokenizer.added_tokens_decoder.items()
        special |= {token.content: number for number, token in added if token.special}
        # The unknown token stands for text of any kind, so its place is not that of its own text.
        special.pop(str(tokenizer.unk_token), None)
        self._texts, self._special = [*special], set(special.values())
        longest_first = sorted(map(re.escape, special), key=len, reverse=True)
        self._pattern = re.compile("|".join(longest_first) or "(?!)")
        self.apart = 0

    def mark(self, text: str) -> str:
        """The text with its special tokens marked. `found` of the result has the first of them."""
        return self._pattern.sub(lambda s: f"\ue000{self._texts.index(s[0])}\ue001", text)

    def found(self, marked: str) -> str | None:
        """The first special token of data in a marked text."""
        mark = _MARK.search(marked)
        return None if mark is None else self._texts[int(mark[1])]

    def plain(self, marked: str) -> str:
        """A marked text as it was."""
        return _MARK.sub(lambda mark: self._texts[int(mark[1])], marked)

    def pairs(
        self, heads: Sequence[str], tails: Sequence[str]
    ) -> list[tuple[list[int], list[int]]]:
        """The ids of marked prompts, as they are before generation, and of their completions.

        The ids of both as one text begin with the prompt's, and the completion has the rest.
        Sometimes they do not: a token has characters of both, or the completion changes how the
        prompt's end is tokenised. Then the completion is tokenised by itself, after a line feed.
        The model so trains after the ids after which it generates. Ids are compared, and not
        offsets: tokenizers in Python have no offsets.
        """
        alone = self._ids(heads)
        joint = self._ids([head + tail for head, tail in zip(heads, tails, strict=True)])
        pairs = []
        for prompt, both, tail in zip(alone, joint, tails, strict=True):
            if both[: len(prompt)] == prompt:
                pairs.append((prompt, both[len(prompt) :]))
            else:
                self.apart += 1
                pairs.append((prompt, self._after_a_line_feed(tail)))
        return pairs

    def _after_a_line_feed(self, text: str) -> list[int]:
        before, both = self._ids([_BEFORE, _BEFORE + text])
        return both[len(before) :] if both[: len(before)] == before else self._ids([text])[0]

    def _ids(self, marked: Sequence[str]) -> list[list[int]]:
        if not marked:
            return []
        rows = self._call([self.plain(text) for text in marked])
        if self.splits:
            rows = [self._with_split(*one) for one in zip(marked, rows, strict=True)]
        return rows

    def _with_split(self, marked: str, ids: list[int]) -> list[int]:
        """The ids, with the special tokens of data tokenised like other text.

        White space that the tokenizer strips beside a special token is lost, as in Phi-3's.
        """
        if not _MARK.search(marked):
            return ids
        # In the text's order: the marks, and the special tokens of templates.
        either = re.compile(f"{_MARK.pattern}|{self._pattern.pattern}")
        order = iter([place[0] for place in either.finditer(marked)])
        split: list[int] = []
        for one in ids:
            mark = _MARK.fullmatch(next(order, "")) if one in self._special else None
            if mark is None:
                split.append(one)
            else:
                before = self._call([_BEFORE], split_special_tokens=True)[0]
                text = _BEFORE + self._texts[int(mark[1])]
                split += self._call([text], split_special_tokens=True)[0][len(before) :]
        return split

    def _call(self, texts: list[str], **options: bool) -> list[list[int]]:
        # verbose=False: the tokenizer would warn about lengths, which `encode` checks.
        ids: list[list[int]] = self._tokenizer(
            texts, add_special_tokens=False, verbose=False, **options
        ).input_ids
        return ids
