"""relufy: ReLU where the matcher finds an activation, with a configuration that says so."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import d2dcompile as d2d
from d2dcompile import testing
from d2dcompile.errors import D2DWarning, SparsifyError


def activations(model: nn.Module, *args: Any, **kwargs: Any) -> set[str]:
    return {
        site.activation for site in d2d.explain(model, *args, **kwargs).sites if site.convertible
    }


def x() -> Tensor:
    return torch.randn(6, 16, generator=torch.Generator().manual_seed(1))


FIELDS = {
    "bert": ("hidden_act", {"relu(up)"}),
    "gpt2": ("activation_function", {"relu(up)"}),  # tanh-GELU, written out
    "gemma": ("hidden_act", {"relu(gate) * up"}),
    "phi3": ("hidden_act", {"up * relu(gate)"}),
}


@pytest.mark.parametrize("family", FIELDS)
def test_families_and_their_checkpoints(family: str, tmp_path: Path) -> None:
    case = testing.tiny(family)
    field, wanted = FIELDS[family]
    before = activations(case.model, **case.inputs)
    old = getattr(case.model.config, field)
    handle = d2d.relufy(case.model, case.inputs)
    assert activations(case.model, **case.inputs) == wanted
    assert handle.fields == (field,) and handle.amount == 1.0 and not handle.also
    case.model.save_pretrained(tmp_path)
    loaded = type(case.model).from_pretrained(tmp_path).eval()
    assert getattr(loaded.config, field) == "relu"
    with torch.no_grad():
        mine, theirs = (testing.output(m(**case.inputs)) for m in (case.model, loaded))
    assert torch.equal(mine, theirs)
    handle.remove()
    assert activations(case.model, **case.inputs) == before != wanted
    assert getattr(case.model.config, field) == old


def test_what_is_sparse_stays() -> None:
    case = testing.tiny("opt")
    handle = d2d.relufy(case.model, case.inputs, anneal_steps=5)
    assert handle.places == () and handle.amount == 1.0
    assert activations(case.model, **case.inputs) == {"relu(up)"}


def test_gated_t5_and_nested_configurations(tmp_path: Path) -> None:
    import transformers as t

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    config = t.T5Config(vocab_size=99, feed_forward_proj="gated-gelu", **sizes)
    model = t.T5ForConditionalGeneration(config).eval()
    inputs = {"input_ids": torch.ones(1, 5).long(), "decoder_input_ids": torch.ones(1, 3).long()}
    d2d.relufy(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert activations(loaded, **inputs) == {"relu(gate) * up"}
    tiny = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    clip = t.CLIPModel(
        t.CLIPConfig(
            text_config={**tiny, "vocab_size": 99},
            vision_config={**tiny, "image_size": 32, "patch_size": 8},
        )
    ).eval()
    inputs = {"input_ids": torch.ones(1, 5).long(), "pixel_values": torch.randn(1, 3, 32, 32)}
    handle = d2d.relufy(clip, inputs)
    assert set(handle.fields) == {"text_config.hidden_act", "vision_config.hidden_act"}
    assert clip.config.vision_config.hidden_act == "relu"


def test_activations_that_the_same_field_governs(tmp_path: Path) -> None:
    import transformers as t

    model = t.BertForMaskedLM(t.BertConfig(**testing._SIZES)).eval()
    inputs = {"input_ids": torch.ones(1, 5).long()}
    handle = d2d.relufy(model, inputs)
    assert handle.also == ("cls.predictions.transform.transform_act_fn",)
    assert "governed by the same field" in str(handle)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, loaded(**inputs).logits)
    handle.remove()
    assert type(model.cls.predictions.transform.transform_act_fn).__name__ == "GELUActivation"


def test_no_field_is_a_warning() -> None:
    case = testing.tiny("bert")
    for layer in case.model.encoder.layer:
        layer.intermediate.intermediate_act_fn = nn.SiLU()  # not what the configuration says
    case.model.config.hidden_act = "relu"
    with pytest.warns(D2DWarning, match=r"No field of BertConfig says what encoder\.layer\.0"):
        handle = d2d.relufy(case.model, case.inputs)
    assert handle.fields == ()


def test_functions_sequentials_and_fused_layers() -> None:
    model = testing.Stack()
    d2d.relufy(model, x())
    assert model.blocks[0].act is nn.functional.relu
    ffn = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    d2d.relufy(nn.Sequential(ffn, nn.LayerNorm(16)), x())
    assert [type(m) for m in ffn] == [nn.Linear, nn.ReLU, nn.Linear]
    layer = nn.TransformerEncoderLayer(16, 2, 32, activation="gelu", batch_first=True).eval()
    handle = d2d.relufy(layer, x()[None])
    assert layer.activation is nn.functional.relu and layer.activation_relu_or_gelu == 1
    with torch.no_grad():
        fused = layer(x()[None])
    torch.testing.assert_close(fused, layer(x()[None]).detach())
    handle.remove()
    assert layer.activation_relu_or_gelu == 2


def test_annealing() -> None:
    model = testing.Stack().train()
    acts = [block.act for block in model.blocks]
    keys = set(model.state_dict())
    plain = model(x())
    weak = weakref.ref(d2d.relufy(model, x(), anneal_steps=4))
    gc.collect()
    assert weak() is not None  # goes on although nobody keeps it
    torch.testing.assert_close(model(x()), plain)
    assert set(model.state_dict()) == keys
    others = [d2d.relufy(testing.Stack(), x(), anneal_steps=9) for _ in range(2)]  # count as well
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    fast = torch.compile(model, backend="eager", fullgraph=True)
    fast(x())
    for step in range(1, 5):
        optimizer.step()
        h = model.blocks[0].up(x())
        mix = (1 - step / 4) * acts[0](h) + step / 4 * torch.relu(h)
        torch.testing.assert_close(model.blocks[0](x()), x() + model.blocks[0].down(mix))
        if step < 4:
            with torch._dynamo.config.patch(error_on_recompile=True):
                torch.testing.assert_close(fast(x()), model(x()))
    assert model.blocks[1].act is nn.functional.relu
    assert activations(model, x()) == {"relu(up)"}
    gc.collect()
    assert weak() is None and [other.steps for other in others] == [0, 0]


def test_annealing_by_hand_resumed_and_removed() -> None:
    case = testing.tiny("llama")
    handle = d2d.relufy(case.model, case.inputs, anneal_steps=10)
    assert case.model.config.hidden_act == "silu" and handle.amount == 0.0
    handle.steps = 8
    handle.step()
    assert "90% ReLU at step 9" in str(handle)
    handle.remove()
    assert activations(case.model, **case.inputs) == {"silu(gate) * up"}
    handle = d2d.relufy(case.model, case.inputs, anneal_steps=10)
    handle.steps = 10
    assert activations(case.model, **case.inputs) == {"relu(gate) * up"}
    assert case.model.config.hidden_act == "relu"


def test_a_penalty_of_what_is_annealing() -> None:
    case = testing.in_dtype(testing.tiny("llama"), torch.float64)
    model = case.model.train()
    handle = d2d.relufy(model, case.inputs, anneal_steps=4)
    handle.steps = 1
    d2d.sparsify(model, case.inputs, penalty="l1", weight=5.0)
    gates: list[Tensor] = []
    mlps = [layer.mlp for layer in model.model.layers]
    for step in (2, 4):  # halfway, and at its end
        handle.steps = step
        testing.output(model(**case.inputs)).square().mean().backward()
        found = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        model.eval()  # no penalty but the one written out
        hooks = [
            m.act_fn.register_forward_hook(lambda _, args, out: gates.append(out)) for m in mlps
        ]
        loss = testing.output(model(**case.inputs)).square().mean()
        (loss + 5.0 * sum(a.abs().mean() for a in gates) / 2).backward()
        for got, parameter in zip(found, model.parameters(), strict=True):
            torch.testing.assert_close(got, parameter.grad)
        for hook in hooks:
            hook.remove()
        model.train().zero_grad()
        gates.clear()


class WrittenOut(testing.FFN):
    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        return x + self.down(h * torch.sigmoid(1.702 * h))


class Unused(testing.FFN):
    """Has an attribute that computes its activation, and calls something else."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


class Twice(testing.FFN):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.GELU()


class Learnable(testing.FFN):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.sigmoid(self.slope * self.up(x)))


@pytest.mark.parametrize(
    ("block", "why"),
    [
        (WrittenOut, "no attribute computes the same"),
        (Unused, "the attribute that computes the same is not what it calls"),
        (Twice, "other and act of 1 compute the same"),
        (Learnable, "it has a scalar of its own"),
    ],
)
def test_refusals_leave_the_model_as_it_was(block: type[nn.Module], why: str) -> None:
    model = nn.Sequential(testing.FFN(), block())
    before = model(x())
    with pytest.raises(SparsifyError, match=rf"Site 1, \w+\.py:\d+: cannot replace .*: {why}"):
        d2d.relufy(model, x())
    assert torch.equal(model(x()), before)
    assert model[0].act is nn.functional.gelu


def test_impossible_arguments() -> None:
    with pytest.raises(SparsifyError, match="anneal_steps is 0; expected optimizer steps"):
        d2d.relufy(testing.Stack(), x(), anneal_steps=0)
    model = testing.Stack()
    handle = d2d.sparsify(model, x(), weight=1.0)
    with pytest.raises(SparsifyError, match=r"expected relufy\(\) before sparsify\(\)"):
        d2d.relufy(model, x())
    handle.remove()
    d2d.relufy(model, x())
