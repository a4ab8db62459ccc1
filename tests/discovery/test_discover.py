"""discover on modules of many kinds: what is found is verified, the rest has a reason."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from lightning_mi_prune.core.errors import PruningError, PruningWarning
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.discovery.discover import discover, discover_run
from lightning_mi_prune.graph.graph import PruningGraph
from lightning_mi_prune.surgery.units import apply_plan
from tests.support.models import batch, build, pictures


def kinds(graph: PruningGraph) -> dict[str, int]:
    found: dict[str, int] = {}
    for group in graph.groups:
        found[group.kind] = found.get(group.kind, 0) + 1
    return found


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))


class Images(nn.Module):
    """Convolutions with normalisation, a depthwise one, concatenation and a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.deep, self.b = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 4, 1)
        self.head = nn.Linear(10 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.norm(self.a(x)))
        b = torch.relu(self.b(self.deep(a)))
        return self.head(torch.cat([a, b], 1).flatten(1))


def tiny_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes, **heads)).eval()


def tiny_gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_embd=24, n_layer=2, n_head=4, n_positions=32)
    return GPT2LMHeadModel(config).eval()


# ------------------------------------------------------------------------------- what is found


def test_a_convolutional_network() -> None:
    graph = discover(Images(), torch.randn(2, 3, 4, 4))
    assert kinds(graph) == {"channels": 2}
    assert graph.refused == ()
    numbers = {(a.module, a.attribute) for group in graph.groups for a in group.attributes}
    assert {("deep", "groups"), ("norm", "num_features"), ("head", "in_features")} <= numbers


def test_a_decoder_with_grouped_heads() -> None:
    graph = discover(tiny_llama())
    found = {"hidden": 1, "heads": 2, "query_heads": 2, "head_dim": 1, "ffn": 2}
    assert kinds(graph) == found
    assert graph.refused == ()
    assert {group.size for group in graph.groups if group.kind == "heads"} == {2}
    assert [stack.size for stack in graph.stacks] == [2]
    assert all(group.may_be_empty for group in graph.groups if group.kind == "ffn")
    # Rotary positions turn pairs of dimensions in all layers, and one number counts values too.
    (dims,) = [group for group in graph.groups if group.kind == "head_dim"]
    pair = ((dims.name,), (dims.name,))
    (read,) = [s for s in dims.tensors if s.tensor == "model.layers.1.self_attn.o_proj.weight"]
    assert dims.size == 4
    assert read.layout[0][-1] == pair
    assert "model.rotary_emb.inv_freq" in {s.tensor for s in dims.tensors}


def test_generation_of_a_decoder_with_narrower_heads() -> None:
    net = tiny_llama()
    graph = discover(net)
    groups = [group for group in graph.groups if group.kind in ("heads", "head_dim", "ffn")]
    kept = {group.name: tuple(range(0, group.size, 2)) for group in groups}
    apply_plan(net, groups, PruningPlan({g.name: g.size for g in groups}, kept))
    ids = torch.randint(5, 40, (2, 4))
    asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "pad_token_id": 0}
    with_cache = net.generate(ids, do_sample=False, **asked)
    assert torch.equal(with_cache, net.generate(ids, do_sample=False, use_cache=False, **asked))


def test_layers_whose_numbers_differ_from_their_tensors() -> None:
    graph = discover(tiny_gpt2())
    assert kinds(graph) == {"hidden": 1, "heads": 2, "head_dim": 2, "ffn": 2}
    numbers = {a.attribute for group in graph.groups for a in group.attributes}
    assert {"split_size", "nf", "nx", "head_dim"} <= numbers
    # Queries, keys and values share their head size, since one number counts both.
    (dims,) = [g for g in graph.groups if g.kind == "head_dim" and ".0." in g.name]
    (fused,) = [s for s in dims.tensors if s.tensor.endswith("0.attn.c_attn.weight")]
    assert len(fused.layout) == 3


def test_attention_of_torch() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    net = nn.Sequential(nn.Linear(7, 16), encoder, nn.Linear(16, 3))
    graph = discover(net, torch.randn(2, 5, 7))
    assert {"heads", "ffn", "hidden"} <= set(kinds(graph))


def test_an_encoder_and_its_graph_as_json() -> None:
    graph = discover(build("bert"), **batch(4))
    assert kinds(graph)["heads"] == 2
    assert PruningGraph.from_json(graph.to_json()) == graph
    assert graph.reachable > 0.9 * graph.parameters
    table = str(graph)
    assert "bert.encoder.layer.{0,1}.ffn" in table
    assert f"are in {len(graph.groups)} groups" in table


def test_kinds_can_be_chosen() -> None:
    graph = discover_run(build("bert"), lambda net: net(**batch(2)), kinds=["heads"])
    assert set(kinds(graph)) == {"heads"}
    for group in graph.groups:
        assert group.partners == ()
        assert all(isinstance(s.layout[0][1], int) for s in group.tensors)


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_a_hugging_face_model_needs_no_arguments(family: str) -> None:
    net = build(family, "image" if family == "vit" else "sequence")
    given = pictures() if family == "vit" else batch(4)
    assert {g.name for g in discover(net).groups} == {g.name for g in discover(net, **given).groups}


def test_one_example_is_enough() -> None:
    assert len(discover(mlp(), torch.randn(1, 3)).groups) == 1
    assert kinds(discover(Images(), torch.randn(1, 3, 4, 4))) == {"channels": 2}


def test_a_large_batch_is_reduced() -> None:
    seen = []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            seen.append((x.shape[0], scale.shape))
            return self.inner(x) * scale

    assert discover(Net(), torch.randn(50, 3), scale=torch.tensor(2.0)).groups
    assert set(seen) == {(2, ())}


def test_a_step_that_returns_nothing_is_verified_on_the_network() -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def step(self, x: Tensor) -> None:
            self.net(x).sum()

    x = torch.randn(2, 3)
    graph = discover_run(Module(), lambda module: module.step(x))
    assert [group.size for group in graph.groups] == [8]


def test_shared_and_frozen_parameters_and_autocast() -> None:
    net = tiny_gpt2().requires_grad_(False)
    assert net.lm_head.weight is net.transformer.wte.weight
    with torch.autocast("cpu", dtype=torch.bfloat16):
        graph = discover(net)
    (hidden,) = [group for group in graph.groups if group.kind == "hidden"]
    assert {"lm_head", "transformer.wte"} <= {a.module for a in hidden.attributes}


def test_the_module_is_as_before() -> None:
    net = tiny_llama().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state, config = torch.get_rng_state(), net.config.to_dict()
    discover(net)
    assert net.training
    assert torch.equal(torch.get_rng_state(), state)
    assert net.config.to_dict() == config
    assert all(not part._forward_hooks for part in net.modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


# ----------------------------------------------------------------------------------- bad inputs


class Drawing(nn.Module):
    """Draws from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.source = mlp(), torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + torch.rand(2, generator=self.source)


class Recurrent(nn.Module):
    """A recurrent layer below a network."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = nn.LSTM(3, 6, batch_first=True)
        self.up, self.down = nn.Linear(6, 40), nn.Linear(40, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.rnn(x)[0])))


def fsdp() -> nn.Module:
    class FullyShardedDataParallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

    return FullyShardedDataParallel()


REFUSED = {
    "scripted": (lambda: torch.jit.script(mlp()), (torch.randn(2, 3),), "scripted"),
    "a scripted part": (
        lambda: nn.Sequential(mlp(), torch.jit.script(nn.Linear(2, 2))),
        (torch.randn(2, 3),),
        "'1' is a scripted module",
    ),
    "compiled": (lambda: torch.compile(mlp()), (torch.randn(2, 3),), "is compiled"),
    "sharded": (fsdp, (torch.randn(2, 3),), "sharded"),
    "without values": (lambda: mlp().to("meta"), (torch.randn(2, 3),), "'0.weight' has no values"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), (torch.randn(2, 3),), "lazy parameter"),
    "no parameters": (nn.ReLU, (torch.randn(2, 3),), "no parameters"),
    "no arguments": (mlp, (), "cannot be called without arguments"),
    "an empty batch": (mlp, (torch.randn(0, 3),), "without entries"),
    "wrong arguments": (mlp, (torch.randn(2, 4),), "fails in '0'"),
    "random numbers": (Drawing, (torch.randn(2, 3),), "Two equal calls of Drawing"),
    "one layer": (lambda: nn.Sequential(nn.Linear(3, 2)), (torch.randn(2, 3),), "Nothing of"),
    "complex numbers": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(torch.complex64),
        (torch.randn(2, 3, dtype=torch.complex64),),
        "complex",
    ),
    "sparse tensors": (mlp, (torch.randn(2, 3).to_sparse(),), "sparse"),
}


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_followed_is_refused_in_one_sentence(case: str) -> None:
    make, args, message = REFUSED[case]
    with pytest.raises(PruningError, match=message) as caught:
        discover(make(), *args)
    assert "\n" not in str(caught.value)


def test_data_parallel_names_the_module_inside() -> None:
    wrapped = torch.nn.parallel.DistributedDataParallel.__new__(
        torch.nn.parallel.DistributedDataParallel
    )
    nn.Module.__init__(wrapped)
    with pytest.raises(PruningError, match="give its attribute 'module'"):
        discover(wrapped, torch.randn(2, 3))


def test_recurrent_layers_are_left_out_and_the_rest_goes_on() -> None:
    graph = discover(Recurrent(), torch.randn(2, 5, 3))
    assert [group.size for group in graph.groups] == [40]
    assert any("rnn" in label for label in graph.unknown)


def test_little_coverage_is_a_warning() -> None:
    class Mostly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.net = nn.Embedding(100, 3), mlp()

        def forward(self, ids: Tensor) -> Tensor:
            return self.net(self.table(ids).flip(-1))

    with pytest.warns(PruningWarning, match=r"Only 14% of the parameters of Mostly"):
        discover(Mostly(), torch.arange(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        discover(mlp(), torch.randn(2, 3))


def test_a_limit_of_time_refuses_what_is_left() -> None:
    with pytest.raises(PruningError, match="not verified in the time"):
        discover_run(mlp(), lambda net: net(torch.ones(2, 3)), seconds=0.0)


class OwnNorm(nn.LayerNorm):
    """As timm has it."""


class Subclassed(nn.Module):
    """Attention whose heads times their size equal the width of the stream, under such a norm."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim = 3, 8
        self.norm, self.qkv, self.out = OwnNorm(24), nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).view(*x.shape[:2], 3, self.num_heads, -1).unbind(2)
        mixed = nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        return x + self.out(mixed.transpose(1, 2).flatten(2))


def test_the_shape_of_a_norm_counts_its_own_tensor_whatever_its_class() -> None:
    net = nn.Sequential(nn.Linear(5, 24), Subclassed(), Subclassed(), nn.Linear(24, 2)).eval()
    groups = discover(net, torch.randn(2, 4, 5)).groups
    numbers = {(a.module, a.attribute) for g in groups if g.kind == "heads" for a in g.attributes}
    assert not any("norm" in module for module, _ in numbers)
    assert any(g.kind == "hidden" for g in groups)
