"""Templates and tokenisation: the token ids of prompts and completions."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rosa_train.data.examples import Example, encode, pad_token_id, parse_template
from rosa_train.data.records import Record

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}:{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


def tiny_tokenizer(adds: str = "", **special: str | None) -> Any:
    """A BPE tokenizer of bytes that also merges across ' ', ':' and letters.

    adds: the template by which the tokenizer adds special tokens, such as "<s> $A </s>".
    special: changes to the names of the special tokens.
    """
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = None
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.normalizer = tokenizers.normalizers.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["say: yes", "say: no", "say: yes, yes"] * 50, trainer)
    if adds:
        bpe.post_processor = tokenizers.processors.TemplateProcessing(
            single=adds, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | special
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **names)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def records(*rows: dict[str, Any]) -> list[Record]:
    return [Record(row, f"x.jsonl:{line}") for line, row in enumerate(rows, 1)]


ONE = records({"q": "say", "a": "yes"})


def test_prompt_and_completion_are_tokenised_separately(tokenizer: Any) -> None:
    (example,) = encode(ONE, tokenizer, "{q}:", " {a}", 99)
    assert tokenizer.decode(example.prompt_ids) == "say:"
    assert tokenizer.decode(example.completion_ids) == " yes</s>"
    assert example.completion == " yes"
    assert example.where == "x.jsonl:1"
    assert len(example) == len(example.prompt_ids) + len(example.completion_ids)
    assert example.targets == len(example.completion_ids)
    # For the joined text, this tokenizer merges across the boundary. A prompt without its
    # completion never has these ids.
    together = tokenizer("say: yes", add_special_tokens=False).input_ids
    assert together[: len(example.prompt_ids)] != example.prompt_ids
    assert tokenizer("say:", add_special_tokens=False).input_ids == example.prompt_ids


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@given(q=text, a=text)
def test_encoding_keeps_all_text_of_prompt_and_completion(q: str, a: str) -> None:
    tokenizer = _SHARED
    (example,) = encode(records({"q": q, "a": a}), tokenizer, "Q{q}", "{a}", 1000)
    assert example.prompt_ids == tokenizer("Q" + q, add_special_tokens=False).input_ids
    assert tokenizer.decode(example.prompt_ids) == "Q" + q
    assert tokenizer.decode(example.completion_ids[:-1]) == a
    assert example.completion_ids[-1] == tokenizer.eos_token_id


_SHARED = tiny_tokenizer()


@pytest.mark.parametrize(
    ("adds", "prompt", "start"),
    [
        ("", "{q}", "say"),
        ("<s> $A", "{q}", "<s>say"),
        ("<s> $A", "<s>{q}", "<s>say"),  # the template already has it
        ("<s> $A </s>", "{q}", "<s>say"),  # an eos after the prompt would end the text there
        ("$A </s>", "{q}", "say"),
    ],
)
def test_special_tokens_are_added_once(adds: str, prompt: str, start: str) -> None:
    tokenizer = tiny_tokenizer(adds)
    for completion in ("{a}", "{a}</s>"):
        (example,) = encode(ONE, tokenizer, prompt, completion, 99)
        assert tokenizer.decode(example.prompt_ids) == start
        assert tokenizer.decode(example.completion_ids) == "yes</s>"


def test_chat_trains_on_answer_and_end_of_turn() -> None:
    for adds in ("", "<s> $A </s>"):
        tokenizer = tiny_tokenizer(adds)
        tokenizer.chat_template = CHAT
        (example,) = encode(ONE, tokenizer, "{q}", "{a}", 99, chat=True)
        assert tokenizer.decode(example.prompt_ids) == "<s>user:say</s>\n<s>assistant:"
        assert tokenizer.decode(example.completion_ids) == "yes</s>"
        assert example.completion == "yes"


def test_chat_template_must_continue_its_prompt() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="expected a tokenizer with a chat template"):
        encode(ONE, tokenizer, "{q}", "{a}", 99, chat=True)
    tokenizer.chat_template = CHAT.replace("<s>assistant:{%", "<s>assistant:<think>{%")
    with pytest.raises(ValueError, match=r"x\.jsonl:1: expected a chat template that writes"):
        encode(ONE, tokenizer, "{q}", "{a}", 99, chat=True)
    # This template ends a turn with `|`. The eos is added after it, so that generation ends.
    tokenizer.chat_template = CHAT.replace("</s>\n", "|")
    (example,) = encode(ONE, tokenizer, "{q}", "{a}", 99, chat=True)
    assert tokenizer.decode(example.completion_ids) == "yes|</s>"


def test_non_string_values_are_written_as_json() -> None:
    row = {"n": 1.5, "b": True, "l": ["ä", {"x": None}], "odd name": "é"}
    fill = parse_template("{n} {b} {l} {{{odd name}}}")
    assert fill(Record(row, "x")) == '1.5 true ["ä", {"x": null}] {é}'


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{", r"expected fields in braces in prompt_template, got '\{'"),
        ("{q", "expected fields in braces"),
        ("q}", r"expected fields in braces.*write \{\{ or \}\} for a brace"),
        ("{}", r"expected plain fields such as \{text\} in prompt_template, got \{\} in"),
        ("{q.__class__}", r"plain fields .*got \{q\.__class__\}"),
        ("{q[0]}", r"plain fields .*got \{q\[0\]\}"),
        ("{q!r}", r"plain fields .*got \{q!r\}"),
        ("{q:>9}", r"plain fields .*got \{q:>9\}"),
        ("{q:{a}}", r"plain fields .*got \{q:\{a\}\}"),
        ("{Q}", r"x\.jsonl:1: expected field 'Q' of prompt_template, got q, a"),
    ],
)
def test_bad_templates_are_refused(tokenizer: Any, template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode(ONE, tokenizer, template, "{a}", 99)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, r"x\.jsonl:2: expected a value in field 'a', got null"),
        (float("nan"), r"x\.jsonl:2: expected a value in field 'a', got nan, which JSON does not"),
        ([1e999], r"x\.jsonl:2: expected a value in field 'a', got \[inf\], which JSON does not"),
        ("\ud800", r"x\.jsonl:2: expected text in field 'a', got the lone surrogate '\\ud800'"),
    ],
)
def test_null_and_surrogate_values_are_refused(tokenizer: Any, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode([*ONE, *records({}, {"q": "q", "a": value})[1:]], tokenizer, "{q}", "{a}", 99)


LONG = records(
    {"q": "q" * 4, "a": "a" * 2}, {"q": "q" * 6, "a": "a" * 5}, {"q": "q" * 20, "a": "a"}
)  # 7, 12 and 22 tokens with the eos


def test_too_long_record_is_named(tokenizer: Any) -> None:
    with pytest.raises(
        ValueError,
        match=r"x\.jsonl:2: expected at most max_length=8 tokens, got 12 \(6 of the prompt, 6 of "
        r"the completion\); 2 of 3 records are too long, the longest has 22 tokens \(x\.jsonl:3\)",
    ):
        encode(LONG, tokenizer, "{q}", "{a}", 8)
    assert [len(example) for example in encode(LONG, tokenizer, "{q}", "{a}", 22)] == [7, 12, 22]


def test_too_long_records_can_be_dropped_or_truncated(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "rosa_train.data.examples")
    (kept,) = encode(LONG, tokenizer, "{q}", "{a}", 8, on_too_long="drop")
    assert len(kept) == 7
    assert "2 of 3 records are longer than max_length=8: 0 truncated, 2 dropped" in caplog.text
    caplog.clear()
    whole, cut = encode(LONG, tokenizer, "{q}", "{a}", 8, on_too_long="truncate")
    assert whole == kept
    assert tokenizer.decode(cut.prompt_ids + cut.completion_ids) == "qqqqqqaa"
    assert len(cut.prompt_ids) == 6
    assert "2 of 3 records are longer than max_length=8: 1 truncated, 1 dropped" in caplog.text
    with pytest.raises(ValueError, match="expected records to train on, got none of 3"):
        encode(LONG, tokenizer, "{q}", "{a}", 4, on_too_long="drop")
    with pytest.raises(ValueError, match="got none of 2"):
        encode(LONG[1:], tokenizer, "{q}", "{a}", 6, on_too_long="truncate")


def test_empty_prompt_trains_on_the_completion_only(tokenizer: Any) -> None:
    (example,) = encode(ONE, tokenizer, "", "{a}", 99)
    assert (example.prompt_ids, example.targets) == ([], len(example.completion_ids) - 1)
    (with_bos,) = encode(ONE, tiny_tokenizer("<s> $A"), "", "{a}", 99)
    assert (with_bos.prompt_ids, with_bos.targets) == ([0], len(example.completion_ids))
    with pytest.raises(ValueError, match=r"x\.jsonl:1: expected a token to predict"):
        encode(records({"a": ""}), tokenizer, "", "{a}", 99)


def test_bad_encode_arguments_are_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="max_length >= 2, got 1"):
        encode(ONE, tokenizer, "{q}", "{a}", 1)
    with pytest.raises(ValueError, match="expected a tokenizer with an eos token"):
        encode(ONE, tiny_tokenizer(eos_token=None), "{q}", "{a}", 99)
    with pytest.raises(ValueError, match="expected records to train on, got none of 0"):
        encode([], tokenizer, "{q}", "{a}", 99)


def test_pad_token_falls_back_to_other_tokens(tokenizer: Any) -> None:
    assert pad_token_id(tokenizer) == 2
    assert pad_token_id(tiny_tokenizer(pad_token=None)) == 1
    assert pad_token_id(tiny_tokenizer(pad_token=None, eos_token=None)) == 0


def test_an_empty_example_has_no_targets() -> None:
    assert Example([], [], "", "x").targets == 0
