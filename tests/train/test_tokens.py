"""Prompt and completion as one text, under SentencePiece and other tokenizers; special tokens."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from conftest import sweep

from rosa_train.data.examples import encode
from rosa_train.data.records import Record

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

# As in Zephyr. The line feed before the answer is where a tokenizer might put a space.
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TURNS = ["<|user|>", "<|assistant|>"]


def sentencepiece(space: str) -> Any:
    """A small tokenizer that begins texts with a space, as those of Mistral and Llama 2 do.

    space: "first" or "always" of Metaspace, or "normalizer" as in older files.
    """
    unknown = {"byte_fallback": True, "unk_token": "<unk>"}
    special = ["<unk>", "<s>", "</s>", *TURNS]
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    metaspace = tokenizers.pre_tokenizers.Metaspace(
        "▁", space if space != "normalizer" else "first"
    )
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(**unknown))
    bpe.pre_tokenizer = metaspace
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=[*special, *byte_tokens], show_progress=False
    )
    bpe.train_from_iterator(["say: yes yes no no", "Answer: yes or no"] * 40, trainer)
    # The bytes are ordinary tokens.
    learnt = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair) for pair in learnt["merges"]]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(learnt["vocab"], merges, **unknown))
    if space == "normalizer":
        steps = [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
        made.normalizer = tokenizers.normalizers.Sequence(steps)
    else:
        made.pre_tokenizer = metaspace
    decoders = tokenizers.decoders
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=TURNS,
        chat_template=CHAT,
    )


SPACES = ["first", "always", "normalizer"]


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    return list(tokenizer.convert_ids_to_tokens(ids))


def records(*texts: str) -> list[Record]:
    return [Record({"q": "say", "a": text}, f"x:{i}") for i, text in enumerate(texts, 1)]


@sweep(space=SPACES)
def test_completion_after_a_newline_has_no_space(space: str) -> None:
    tokenizer = sentencepiece(space)
    (example,) = encode(records("yes"), tokenizer, "{q}:\n", "{a}", 99)
    assert pieces(tokenizer, example.completion_ids) == ["yes", "</s>"]
    joint = tokenizer("say:\nyes", add_special_tokens=False).input_ids
    assert [*example.prompt_ids, *example.completion_ids] == [*joint, tokenizer.eos_token_id]


@sweep(space=SPACES)
def test_chat_equals_the_tokenizers_own_chat(space: str) -> None:
    tokenizer = sentencepiece(space)
    (example,) = encode(records("yes"), tokenizer, "{q}", "{a}", 99, chat=True)
    turns = [{"role": "user", "content": "say"}, {"role": "assistant", "content": "yes"}]
    whole = tokenizer.apply_chat_template(turns).input_ids
    ours = [*example.prompt_ids, *example.completion_ids]
    assert ours == whole[: len(ours)]  # the template writes a line feed after the last token
    asked = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True).input_ids
    assert example.prompt_ids == asked


@sweep(space=SPACES)
def test_shared_tokens_are_counted_and_avoided(
    space: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.clear()
    tokenizer = sentencepiece(space)
    first, second = encode(records("yes", "\nno"), tokenizer, "{q}: ", "{a}", 99)
    # As one text, "▁yes" would have the prompt's space. Generation goes on after "▁".
    assert pieces(tokenizer, first.prompt_ids)[-1] == "▁"
    assert pieces(tokenizer, first.completion_ids) == ["yes", "</s>"]
    assert pieces(tokenizer, second.completion_ids) == ["<0x0A>", "no", "</s>"]
    assert "in 1 of 2 records prompt and completion share a token" in caplog.text
    (asked,) = encode(records("yes")[:1], tokenizer, "{q}: ", "", 99)
    assert asked.prompt_ids == first.prompt_ids


def test_tokenizers_without_offsets_are_served() -> None:
    tokenizer = transformers.ByT5Tokenizer()
    assert not tokenizer.is_fast
    for split in (False, True):
        options = {"split_special_tokens": split}
        (example,) = encode(records("yes</s>."), tokenizer, "{q}:", " {a}", 99, **options)
        assert example.prompt_ids == tokenizer("say:", add_special_tokens=False).input_ids
        texts = pieces(tokenizer, example.completion_ids)
        assert texts == [*" yes", *([*"</s>"] if split else ["</s>"]), ".", "</s>"]


@pytest.mark.parametrize("chat", [False, True])
def test_special_tokens_in_data_are_counted_and_split(
    chat: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    tokenizer = sentencepiece("first")
    rows = records("yes", "no <|user|> yes</s>")
    templates = ("{q}", "{a}") if chat else ("<|user|>{q}\n", "{a}</s>")
    plain = encode(rows, tokenizer, *templates, 99, chat=chat)
    said = "1 of 2 records hold text of special tokens, the first <|user|> in x:2: it "
    assert f"{said}becomes that token; --split_special_tokens" in caplog.text
    caplog.clear()
    split = encode(rows, tokenizer, *templates, 99, chat=chat, split_special_tokens=True)
    assert f"{said}is tokenised like other text" in caplog.text
    assert split[0] == plain[0]
    assert split[1].prompt_ids == plain[1].prompt_ids  # the template's own token stays
    assert split[1].completion == plain[1].completion == rows[1].fields["a"] + "</s>" * (not chat)
    special = {*tokenizer.all_special_ids}
    assert sum(i in special for i in plain[1].completion_ids) == 3
    assert [i in special for i in split[1].completion_ids].index(True) + 1 == len(
        split[1].completion_ids
    )
    text = tokenizer.decode(split[1].completion_ids)
    assert text.replace(" ", "") == "no<|user|>yes</s></s>"
