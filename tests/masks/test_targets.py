"""`find_targets` follows the rules of PEFT, and is checked against PEFT."""

from __future__ import annotations

import pytest
from conftest import sweep
from mask_models import tiny
from torch import Tensor, nn

from rosa_kernels import RosaLinear
from rosa_kernels.masks.targets import find_targets, target_shapes

LLAMA_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def test_all_linear_excludes_the_output_head():
    names = list(find_targets(tiny("llama")))
    assert [name.split(".")[-1] for name in names] == LLAMA_LAYERS * 2
    assert target_shapes(find_targets(tiny("llama")))["model.layers.0.mlp.up_proj"] == (56, 32)
    targets = find_targets(tiny("gpt2"), "ALL-linear")
    assert {name.split(".", 3)[-1] for name in targets} == {
        "attn.c_attn",
        "attn.c_proj",
        "mlp.c_fc",
        "mlp.c_proj",
    }
    # The stored weight of a Conv1D has shape (n, m).
    assert target_shapes(targets)["transformer.h.1.attn.c_attn"] == (96, 32)


def test_all_linear_excludes_tied_layers():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(8, 4)
            self.inner = nn.Linear(4, 4)
            self.out = nn.Linear(4, 8, bias=False)
            self.out.weight = self.embed.weight

    assert list(find_targets(Tied())) == ["inner"]
    with pytest.raises(ValueError, match="weight with no other, got out, which shares it with e"):
        find_targets(Tied(), ["out"])


RULES = [
    {"target_modules": "all-linear"},
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": ["self_attn.q_proj", "model.layers.1.mlp.up_proj"]},
    {"target_modules": r".*\.layers\.1\..*_proj"},
    {"target_modules": "all-linear", "exclude_modules": ["k_proj", "layers.0.mlp.down_proj"]},
    {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*layers\.0.*"},
    {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    {"target_modules": "all-linear", "modules_to_save": ["mlp"]},
]


# PEFT 0.21 uses a deprecated name of transformers 5.23.
@pytest.mark.filterwarnings("ignore:`is_gradient_check:FutureWarning")
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_targets_match_those_of_peft(rule):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(tiny("llama"), peft.LoraConfig(r=2, **rule)).base_model.model
    expected = [
        name for name, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)
    ]
    assert list(find_targets(tiny("llama"), **rule)) == expected
    assert expected


def test_targets_of_a_model_with_adapters():
    model = tiny("llama")
    targets = find_targets(model)
    before = list(targets)
    for name, layer in targets.items():
        model.set_submodule(name, RosaLinear.from_linear(layer, rank=3))
    assert list(find_targets(model)) == before
    # The regular expression also matches modules inside a layer, but only the layer is a target.
    assert list(find_targets(model, r".*q_proj.*")) == [n for n in before if "q_proj" in n]


def test_no_match_lists_the_candidates():
    with pytest.raises(ValueError, match=r"got \['c_attn'\]; candidates: q_proj \(2\), k_proj"):
        find_targets(tiny("llama"), ["c_attn"])
    with pytest.raises(ValueError, match=r"c_attn \(2\), c_proj \(4\), c_fc \(2\)"):
        find_targets(tiny("gpt2"), r".*q_proj")
    with pytest.raises(ValueError, match=r"without \['q_proj'\]; candidates"):
        find_targets(tiny("llama"), ["q_proj"], ["q_proj"])


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (["embed_tokens"], "got model.embed_tokens of class Embedding; candidates: q_proj"),
        (["mlp"], "got model.layers.0.mlp of class LlamaMLP"),
        ("(", r"expected a regular expression, got '\('"),
        ([], r"expected 'all-linear', a regular expression or a list of names, got \[\]"),
        ("", "expected 'all-linear'"),
        ([""], "expected 'all-linear'"),
        (["q_proj", 3], "expected 'all-linear'"),
    ],
)
def test_bad_target_rules_are_refused(rule, message):
    with pytest.raises(ValueError, match=message):
        find_targets(tiny("llama"), rule)


class Quantised(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x


class MambaMixer(nn.Module):
    """As in transformers: it multiplies with dt_proj's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.dt_proj = nn.Linear(4, 4), nn.Linear(4, 4)


LEFT_OUT = {
    "0 of class Quantised, which has a forward of its own": (Quantised(4, 4), []),
    "0.out_proj of class NonDynamicallyQuantizableLinear: nn.MultiheadAttention reads": (
        nn.MultiheadAttention(4, 2),
        [],
    ),
    "0.self_attn.out_proj of class NonDynamic": (
        nn.TransformerEncoderLayer(4, 2, 8),
        ["0.linear1", "0.linear2"],
    ),
    "0.dt_proj in MambaMixer, which reads its weight": (MambaMixer(), ["0.in_proj"]),
    "0 with bias, parametrizations in place of": (
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        [],
    ),
}


@sweep(reason=[*LEFT_OUT])
def test_layers_an_adapter_would_miss_are_excluded(reason):
    module, others = LEFT_OUT[reason]
    assert list(find_targets(nn.Sequential(module, nn.Linear(4, 4)))) == [*others, "1"]
    with pytest.raises(ValueError, match=f"of class Linear or Conv1D, got {reason}"):
        find_targets(nn.Sequential(module), [reason.split()[0]])
    if not others:
        with pytest.raises(
            ValueError, match=f"got 'all-linear'; candidates: -; left out: {reason}"
        ):
            find_targets(nn.Sequential(module))
