"""`find_targets` follows the rules of PEFT, and is checked against PEFT."""

from __future__ import annotations

import pytest
import torch
from conftest import sweep
from mask_models import tiny
from torch import Tensor, nn

from rosa_kernels import RosaLinear
from rosa_kernels.masks.targets import as_rule, find_targets, saved_modules, target_shapes

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
    model = nn.ModuleDict({"embed": nn.Embedding(8, 4), "inner": nn.Linear(4, 4)})
    model["out"] = nn.Linear(4, 8, bias=False)
    for how in ("parameter", "memory"):
        if how == "parameter":
            model["out"].weight = model["embed"].weight
        else:
            model["out"].weight = nn.Parameter(model["embed"].weight.data)
        assert list(find_targets(model)) == ["inner"]
        with pytest.raises(ValueError, match=r"got out, which is tied: .* with embed.weight"):
            find_targets(model, ["out"])


@pytest.mark.filterwarnings("ignore:`is_gradient_check:FutureWarning")
def test_models_with_adapters_of_peft_are_refused():
    peft = pytest.importorskip("peft")
    inner = tiny("llama")
    outer = peft.get_peft_model(inner, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for model in (inner, outer):
        with pytest.raises(ValueError, match=r"without adapters of PEFT, got .*unload\(\) first"):
            find_targets(model)
    assert len(find_targets(outer.unload())) == 14


def test_a_layer_compiled_alone_is_refused():
    model = tiny("llama")
    mlp = model.model.layers[0].mlp
    mlp.up_proj = torch.compile(mlp.up_proj, backend="eager")
    assert len(find_targets(model)) == 13
    with pytest.raises(ValueError, match=r"layers.0.mlp.up_proj that torch.compile wraps alone"):
        find_targets(model, ["up_proj"])
    model = torch.compile(tiny("llama"), backend="eager")
    assert len(find_targets(model, r"model\.layers\..*_proj")) == 14


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


def test_each_name_without_a_match_is_named():
    model = tiny("llama")
    with pytest.raises(
        ValueError, match=r"target_modules: .* got \['typo', 'x.*'\]; candidates: q"
    ):
        find_targets(model, ["q_proj", "typo", "x.*"])
    for typo in (["typo"], "typo", r".*typo.*"):
        with pytest.raises(
            ValueError, match=r"exclude_modules: expected to match a module, got .*typ"
        ):
            find_targets(model, "all-linear", typo)
    with pytest.raises(
        ValueError, match=r"exclude_modules: expected a regular expression, got '\('"
    ):
        find_targets(model, "all-linear", "(")
    # A name may be excluded that is no target anyway.
    assert find_targets(model, "all-linear", ["lm_head"]).keys() == find_targets(model).keys()
    # An adapter of PEFT may name modules of other models.
    assert len(find_targets(model, ["q_proj", "c_attn"], ["h"], strict=False)) == 2


def test_a_single_name_may_be_a_string():
    model = tiny("llama")
    for name in ("q_proj", "self_attn.q_proj", "model.layers.0.self_attn.q_proj"):
        assert find_targets(model, name).keys() == find_targets(model, [name]).keys()
    assert len(find_targets(model, exclude_modules="k_proj")) == 12
    assert len(find_targets(model, modules_to_save="mlp")) == 8
    assert [*saved_modules(model, "lm_head")] == ["lm_head"]
    assert as_rule("q_proj") == ["q_proj"]  # PEFT would take it as a regular expression
    assert [as_rule(rule) for rule in ("all-linear", ".*q_proj")] == ["all-linear", ".*q_proj"]


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


def test_layers_of_bitsandbytes_are_named_as_quantised() -> None:
    quantised = type("Linear4bit", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    model = nn.Sequential(quantised(4, 4))
    with pytest.raises(ValueError, match="left out: 0 of class Linear4bit: bitsandbytes has quan"):
        find_targets(model)
    with pytest.raises(ValueError, match="got 0 of class Linear4bit: bitsandbytes has quantised"):
        find_targets(model, ["0"])
