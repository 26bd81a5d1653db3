"""Attaching, switching, disabling and deleting adapters, and which parameters train."""

from __future__ import annotations

import copy
import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from rosa_kernels import RosaLinear
from rosa_kernels.masks.targets import find_targets, target_shapes
from rosa_train.adapters.attach import attach, set_masks
from rosa_train.adapters.merge import unload
from rosa_train.adapters.switch import (
    active_adapter,
    adapter_names,
    adapter_spec,
    adapter_targets,
    delete_adapter,
    disable_adapter,
    print_trainable_parameters,
    rosa_modules,
    set_adapter,
    trainable_parameters,
)
from rosa_train.methods.budget import Allocation, allocate

from .train_models import (
    IDS,
    Q0,
    assert_same,
    give,
    groups_of,
    ignore_pefts_warning,
    logits,
    make_gpt2,
    make_llama,
    make_masks,
    snapshot,
)

# -- attach --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "lora+", "spa", "rosa"])
def test_attach_changes_only_which_parameters_train(model, method):
    before, state, keys = logits(model), torch.get_rng_state(), set(model.state_dict())
    parameters = dict(model.named_parameters())
    targets = give(model, method, train=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits(model), before)
    assert set(model.state_dict()) > keys
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".adapters.default." in name), name
        assert name not in parameters or parameter is parameters[name]
    allocation = sum(p.numel() for p in model.parameters() if p.requires_grad)
    spec = adapter_spec(model)
    shapes = target_shapes(targets)
    assert allocation == sum(
        spec.ranks[n] * sum(shapes[n]) + spec.nnz[n] for n in adapter_targets(model)
    )
    assert (adapter_names(model), active_adapter(model)) == (["default"], "default")
    assert list(rosa_modules(model)) == list(adapter_targets(model)) == list(targets)
    assert (spec.method.name, spec.dropout) == (method, 0.05)


def test_only_the_adapter_gets_gradients(model):
    give(model)
    model.train()
    model(IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".adapters." in name), name


def test_attach_keeps_the_training_mode():
    model = make_llama()
    model.train()
    model.model.layers[0].eval()
    give(model)
    assert not model.model.layers[0].mlp.up_proj.training
    assert model.model.layers[1].mlp.up_proj.adapters["default"].training


def test_hooks_survive_attach_and_unload():
    model = make_llama()
    called = []
    handle = model.get_submodule(Q0).register_forward_hook(lambda m, *_: called.append(type(m)))
    give(model)
    logits(model)
    unload(model)
    logits(model)
    handle.remove()
    logits(model)
    assert called == [RosaLinear, nn.Linear]


def test_module_with_two_names_is_replaced_everywhere():
    model = make_llama()
    first, second = (layer.mlp for layer in model.model.layers)
    second.up_proj = first.up_proj
    base = logits(model)
    give(model)
    assert isinstance(first.up_proj, RosaLinear)
    assert second.up_proj is first.up_proj
    unload(model)
    assert type(first.up_proj) is nn.Linear
    assert second.up_proj is first.up_proj
    assert torch.equal(logits(model), base)


def lora_a(model: nn.Module, name: str, adapter: str = "default") -> Tensor:
    return model.get_submodule(name).adapters[adapter].lora_a.detach().clone()


def test_initial_lora_a_depends_on_name_and_seed():
    one, other = make_llama(), make_llama()
    name = "model.layers.1.self_attn.q_proj"
    give(one, "lora", train=False)
    torch.manual_seed(5)
    give(other, "lora", train=False, target_modules=["q_proj"])
    assert torch.equal(lora_a(one, name), lora_a(other, name))
    assert not torch.equal(lora_a(one, name), lora_a(one, name.replace("1", "0")))
    give(other, "lora", "second", train=False, seed=7)
    assert torch.equal(lora_a(other, name), lora_a(other, name, "second"))
    third = make_llama()
    targets = find_targets(third)
    attach(third, "lora", allocate("lora", target_shapes(targets), rank=3), targets, seed=43)
    assert not torch.equal(lora_a(one, name), lora_a(third, name))


def test_lora_a_starts_kaiming_uniform():
    model = nn.Sequential(nn.Linear(1000, 10))
    targets = find_targets(model)
    attach(model, "lora", allocate("lora", target_shapes(targets), rank=10), targets)
    a = lora_a(model, "0")
    bound = 1 / math.sqrt(1000)
    assert bound * 0.99 < a.abs().max() <= bound
    # Moments of a uniform distribution, within four standard errors.
    assert abs(a.std() - bound / math.sqrt(3)) < 0.02 * bound
    assert abs(a.mean()) < 0.024 * bound
    assert not model[0].adapters["default"].lora_b.any()


def test_alpha_pattern_sets_the_scaling():
    model = make_llama()
    targets = find_targets(model)
    allocation = allocate("lora", target_shapes(targets), rank=4, rank_pattern={"v_proj": 2})
    attach(model, "lora", allocation, targets, alpha=8, alpha_pattern={"layers.1.*v_proj": 32})
    scaling = {name: m.adapters["default"].scaling for name, m in rosa_modules(model).items()}
    assert scaling["model.layers.0.self_attn.q_proj"] == 2
    assert scaling["model.layers.0.self_attn.v_proj"] == 4
    assert scaling["model.layers.1.self_attn.v_proj"] == 16
    other = {"alpha_pattern": {"q_proj": 1, "typo": 2}, "adapter_name": "other"}
    with pytest.raises(ValueError, match=r"alpha_pattern: expected keys .* got \['typo'\] on lay"):
        attach(model, "lora", allocation, targets, **other)


def test_full_trains_every_parameter():
    model = make_gpt2()
    model.requires_grad_(False)
    targets = find_targets(model)
    attach(model, "full", allocate("full", target_shapes(targets)), targets)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not rosa_modules(model)
    assert adapter_names(model) == []
    give(model)
    with pytest.raises(ValueError, match=r"without adapters for full, got \['default'\]"):
        attach(model, "full", allocate("full", target_shapes(targets)), {})


def bad_attachments():
    """Yields a name, a faulty call of attach, and the expected message."""

    def attach_with(**changes):
        def run(model: nn.Module) -> None:
            targets = find_targets(model, ["q_proj"])
            allocation = allocate("lora", target_shapes(targets), rank=2)
            arguments = {"targets": targets, "allocation": allocation} | changes
            attach(model, "lora", adapter_name=arguments.pop("adapter_name", "new"), **arguments)

        return run

    one = {"model.layers.0.self_attn.q_proj": 2}
    yield "name taken", attach_with(adapter_name="default"), "'default', which is attached already"
    yield "dots", attach_with(adapter_name="a.b"), "an adapter name without dots, got 'a.b'"
    yield "no name", attach_with(adapter_name=""), "an adapter name without dots, got ''"
    yield (
        "ranks of others",
        attach_with(allocation=Allocation(one, one, 2)),
        "expected ranks of exactly the 2 targets, got 1, differing in model.layers.1",
    )
    yield "no targets", attach_with(targets={}), "expected target layers, got none"
    yield (
        "another model's",
        attach_with(targets=find_targets(make_llama(), ["q_proj"])),
        "expected layers of this model, got Linear as 'model.layers.0.self_attn.q_proj'",
    )

    def attach_to_hooked(model: nn.Module) -> None:
        targets = find_targets(model, ["down_proj"])
        targets["model.layers.1.mlp.down_proj"].forward = lambda x: x
        allocation = allocate("lora", target_shapes(targets), rank=2)
        attach(model, "lora", allocation, targets, adapter_name="new")

    yield (
        "own forward",
        attach_to_hooked,
        r"class Linear or Conv1D, got model\.layers\.1\.mlp\.down_proj whose forward was replaced",
    )
    yield "dropout", attach_with(dropout=1.0), r"dropout to be a number in \[0, 1\), got 1.0"
    yield "alpha", attach_with(alpha=0), "alpha of model.layers.0.* to be a number > 0, got 0"
    yield (
        "unknown saved",
        attach_with(modules_to_save=["classifier"]),
        "got 'classifier'; candidates: .*lm_head",
    )
    yield (
        "saved and adapted",
        attach_with(modules_to_save=["self_attn"]),
        "modules without adapters, got model.layers.0.self_attn and an adapter in model.layers.0",
    )


@pytest.mark.parametrize(
    ("run", "message"),
    [pytest.param(run, message, id=name) for name, run, message in bad_attachments()],
)
def test_a_bad_attachment_changes_nothing(run, message):
    model = make_llama()
    give(model, target_modules=["q_proj", "up_proj"])
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        run(model)
    assert_same(before, snapshot(model))
    assert adapter_names(model) == ["default"]


def test_targets_that_share_memory_are_refused():
    model = make_llama()
    targets = find_targets(model, ["down_proj"])
    first, second = targets.values()
    first.weight.data = second.weight.data
    allocation = allocate("lora", target_shapes(targets), rank=2)
    with pytest.raises(ValueError, match=r"got .*0\.mlp\.down_proj, which is tied to .*1\.mlp"):
        attach(model, "lora", allocation, targets)
    assert not rosa_modules(model)


def test_failed_attach_changes_nothing(monkeypatch):
    model = make_llama()
    give(model, target_modules=["q_proj"])
    before = snapshot(model)
    calls = []

    def fail_late(self, *args, real=RosaLinear.add_adapter, **kwargs):
        calls.append(self)
        if len(calls) == 10:
            raise MemoryError("full")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(RosaLinear, "add_adapter", fail_late)
    with pytest.raises(MemoryError):
        give(model, name="second")
    assert_same(before, snapshot(model))
    assert adapter_names(model) == ["default"]
    assert len(rosa_modules(model)) == 2


# -- masks ---------------------------------------------------------------------------------------


def test_masks_can_be_set_after_warm_up():
    model = make_llama()
    targets = find_targets(model)
    attach(model, "rosa", allocate("rosa", target_shapes(targets), rank=3, density=0.05), targets)
    assert {g["name"] for g in groups_of(model)} == {"lora_a", "lora_b"}
    before = logits(model)
    masks = make_masks(targets)
    set_masks(model, masks)
    assert torch.equal(logits(model), before)
    assert {g["name"] for g in groups_of(model)} == {"lora_a", "lora_b", "sparse"}
    assert adapter_spec(model).nnz == {name: mask.nnz for name, mask in masks.items()}


def test_bad_masks_change_nothing():
    model = make_llama()
    masks = make_masks(give(model))
    before = snapshot(model)
    last = list(masks)[-1]
    missing = {name: mask for name, mask in masks.items() if name != last}
    wrong = masks | {last: masks[last].T}
    with pytest.raises(ValueError, match=f"masks of the 14 layers of .* differing in {last}"):
        set_masks(model, missing)
    with pytest.raises(ValueError, match=rf"of shape \(32, 48\) for {last}, got \(48, 32\)"):
        set_masks(model, wrong)
    give(model, "lora", "other")
    with pytest.raises(ValueError, match="expected a method with a sparse branch, got lora"):
        set_masks(model, masks)
    set_adapter(model, "default")
    delete_adapter(model, "other")
    assert_same(before, snapshot(model))


# -- several adapters ------------------------------------------------------------------------------


def test_switch_disable_and_delete_adapters(model):
    base = logits(model)
    give(model, "rosa", "one")
    one = logits(model)
    give(model, "lora", "two", seed=2, target_modules=r".*(up_proj|c_fc)")
    two = logits(model)
    assert not torch.equal(one, two)
    for name, expected in [("one", one), ("two", two), ("one", one)]:
        set_adapter(model, name)
        assert torch.equal(logits(model), expected)
        for key, parameter in model.named_parameters():
            assert parameter.requires_grad == (f".adapters.{name}." in key), key
    with disable_adapter(model):
        assert active_adapter(model) is None
        assert torch.equal(logits(model), base)
        assert trainable_parameters(model)[0] == 0
    assert torch.equal(logits(model), one)
    delete_adapter(model, "two")
    assert torch.equal(logits(model), one)
    delete_adapter(model, "one")
    assert torch.equal(logits(model), base)
    assert (adapter_names(model), active_adapter(model)) == ([], None)
    assert not any(".adapters." in name for name, _ in model.named_parameters())


def test_disable_adapter_is_undone_after_an_exception():
    model = make_llama()
    give(model, modules_to_save=["lm_head"])
    model.lm_head.weight.requires_grad_(False)  # the user's choice must be kept
    before, out = snapshot(model), logits(model)
    with pytest.raises(KeyboardInterrupt), disable_adapter(model):
        raise KeyboardInterrupt
    assert_same(before, snapshot(model))
    assert torch.equal(logits(model), out)


def test_each_adapter_keeps_its_own_saved_modules():
    model = make_llama()
    base = logits(model)
    head = model.lm_head.weight
    original = head.detach().clone()
    give(model, "rosa", "one", modules_to_save=["lm_head", "model.norm"])
    optimizer = torch.optim.SGD(groups_of(model, full_lr=0.1))
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    one, head_one = logits(model), head.detach().clone()
    assert not torch.equal(head_one, original)
    give(model, "lora", "two", seed=2, modules_to_save=["lm_head"])
    two = logits(model)
    give(model, "lora", "three", seed=3)
    assert torch.equal(head, original)
    three = logits(model)
    for _ in range(2):
        for name, expected in {"one": one, "two": two, "three": three}.items():
            set_adapter(model, name)
            assert torch.equal(logits(model), expected)
            assert head.requires_grad == (name != "three")
            assert model.model.norm.weight.requires_grad == (name == "one")
            with disable_adapter(model):
                assert torch.equal(logits(model), base)
                assert not head.requires_grad
    assert model.lm_head.weight is head
    delete_adapter(model, "two")
    set_adapter(model, "one")
    assert torch.equal(logits(model), one)
    assert torch.equal(head, head_one)
    delete_adapter(model, "one")
    assert torch.equal(logits(model), base)
    assert not head.requires_grad


def test_saved_module_with_tied_weights():
    model = make_llama(tie_word_embeddings=True)
    base, embedding = logits(model), model.model.embed_tokens.weight
    before = embedding.detach().clone()
    give(model, "lora", "one", modules_to_save=["lm_head"])
    one = logits(model)
    assert torch.equal(embedding, before)
    assert not torch.equal(model.lm_head.weight, before)
    give(model, "lora", "two", seed=2, modules_to_save=["embed_tokens"])
    two = logits(model)
    set_adapter(model, "one")
    assert torch.equal(logits(model), one)
    set_adapter(model, "two")
    assert torch.equal(logits(model), two)
    with disable_adapter(model):
        assert torch.equal(logits(model), base)
    delete_adapter(model, "one")
    assert torch.equal(logits(model), two)
    unload(model)
    assert torch.equal(logits(model), base)
    assert model.lm_head.weight is model.model.embed_tokens.weight is embedding


def test_adapter_attached_as_not_trainable_does_not_train():
    model = make_llama()
    give(model, train=False, trainable=False, modules_to_save=["lm_head"])
    assert trainable_parameters(model)[0] == 0
    with pytest.raises(ValueError, match="expected parameters that train, got none"):
        groups_of(model)


@pytest.mark.parametrize("run", [set_adapter, delete_adapter, adapter_spec, adapter_targets])
def test_unknown_adapter_name_is_refused(run):
    model = make_llama()
    give(model)
    with pytest.raises(ValueError, match=r"expected one of \['default'\], got 'other'"):
        run(model, "other")
    with disable_adapter(model), pytest.raises(ValueError, match="an active adapter, got none of"):
        adapter_spec(model)


def test_copied_model_has_independent_adapters():
    model = make_llama()
    give(model, "rosa", "one", modules_to_save=["lm_head"])
    one = logits(model)
    twin = copy.deepcopy(model)
    delete_adapter(twin, "one")
    assert adapter_names(model) == ["one"]
    assert torch.equal(logits(model), one)
    assert torch.equal(logits(twin), logits(make_llama()))


# -- parameters -----------------------------------------------------------------------------------


def test_param_groups_of_each_branch():
    model = make_gpt2()
    give(model, "rosa", modules_to_save=["ln_f"])
    with pytest.raises(ValueError, match="expected a full_lr for weights that train in full"):
        groups_of(model)
    groups = groups_of(model, "lora+", full_lr=1e-5, weight_decay=0.1)
    assert [(g["name"], g["lr"], g["weight_decay"], len(g["params"])) for g in groups] == [
        ("lora_a", 7e-4, 0.1, 8),
        ("lora_b", 16 * 7e-4, 0.1, 8),
        ("sparse", 2e-4, 0.1, 8),
        ("full_no_decay", 1e-5, 0.0, 2),
    ]
    assert all(group["peak_lr"] == group["lr"] for group in groups)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    torch.optim.AdamW(groups)


def test_param_groups_of_full():
    model = make_llama()
    attach(model, "full", allocate("full", {"x": (1, 1)}), {})
    groups = groups_of(model, "full", full_lr=1e-5, weight_decay=0.1)
    assert [(g["name"], g["weight_decay"], len(g["params"])) for g in groups] == [
        ("full", 0.1, 16),
        ("full_no_decay", 0.0, 5),
    ]


@ignore_pefts_warning
def test_trainable_parameters_print_like_peft(capsys):
    peft = pytest.importorskip("peft")
    ours = make_llama()
    give(ours, "lora")
    print_trainable_parameters(ours)
    printed = capsys.readouterr().out
    config = peft.LoraConfig(r=3, target_modules="all-linear")
    peft.get_peft_model(make_llama(), config).print_trainable_parameters()
    assert printed == capsys.readouterr().out
    assert printed.startswith("trainable params: 2,784 || all params: 22,400 || trainable%: 12.42")


def test_imports_do_not_load_transformers_or_peft():
    modules = ["files", "methods.budget", "adapters.merge", "adapters.save"]
    names = ["rosa_kernels.masks", *(f"rosa_train.{name}" for name in modules)]
    code = (
        f"import sys, {', '.join(names)}\n"
        "sys.exit(any(m in sys.modules for m in ('transformers', 'accelerate', 'peft')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
