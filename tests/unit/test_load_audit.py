"""What each rank should hold of a file, on modules named and shaped as vLLM's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quantgate.formats.stored import StoredTensors
from quantgate.measuring.load_sources import Rank
from quantgate.measuring.loaded import compared

ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
HEADS, KV_HEADS, WIDTH, HIDDEN = 8, 2, 4, 32


class Linear(torch.nn.Module):
    """A linear of vLLM's on one rank, with its parameters."""

    def __init__(self, sizes: list[int], **parameters: torch.Tensor) -> None:
        super().__init__()
        self.output_partition_sizes = sizes
        for name, value in parameters.items():
            parameter: Any = torch.nn.Parameter(value.clone(), requires_grad=False)
            if value.ndim > 1:
                parameter.output_dim, parameter.input_dim = 0, 1
            self.register_parameter(name, parameter)


@pytest.fixture
def stored(tmp_path: Path) -> StoredTensors:
    generator = torch.Generator().manual_seed(0)

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(-128, 128, shape, generator=generator).to(torch.int8)

    rows = {"q_proj": HEADS * WIDTH, "k_proj": KV_HEADS * WIDTH, "v_proj": KV_HEADS * WIDTH}
    tensors = {f"{ATTENTION}.{name}.weight": codes(size, HIDDEN) for name, size in rows.items()}
    tensors |= {
        f"{ATTENTION}.{name}.weight_scale": torch.rand((), generator=generator) for name in rows
    }
    tensors[f"{ATTENTION}.o_proj.weight"] = codes(HIDDEN, HEADS * WIDTH)
    for expert in range(4):
        for name, shape in (("gate", (16, 32)), ("up", (16, 32)), ("down", (32, 16))):
            tensors[f"{MLP}.experts.{expert}.{name}_proj.weight"] = codes(*shape)
    save_file(tensors, tmp_path / "model.safetensors")
    return StoredTensors(tmp_path)


def share(whole: torch.Tensor, rank: int, of: int, dim: int = 0) -> torch.Tensor:
    return whole.chunk(of, dim)[rank].contiguous()


def model_of(stored: StoredTensors, rank: int, ranks: int) -> torch.nn.Module:
    """What vLLM makes of the file on a rank: ranks beyond the KV heads' number share them."""
    kv_ranks = min(ranks, KV_HEADS)
    kv_rank = rank * kv_ranks // ranks
    q, k, v = (stored.read(f"{ATTENTION}.{name}_proj.weight") for name in "qkv")
    scales = [stored.read(f"{ATTENTION}.{name}_proj.weight_scale") for name in "qkv"]
    parts = [share(q, rank, ranks), share(k, kv_rank, kv_ranks), share(v, kv_rank, kv_ranks)]
    experts = [
        {
            name: stored.read(f"{MLP}.experts.{expert}.{name}_proj.weight")
            for name in ("gate", "up", "down")
        }
        for expert in range(4)
    ]
    gate_up = [torch.cat([share(e[name], rank, ranks) for name in ("gate", "up")]) for e in experts]
    down = [share(e["down"], rank, ranks, dim=1) for e in experts]
    tree: Any = torch.nn.Module()
    tree.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    tree.model = torch.nn.Module()
    tree.model.layers = torch.nn.ModuleList([torch.nn.Module()])
    (layer,) = tree.model.layers
    layer.self_attn, layer.mlp = torch.nn.Module(), torch.nn.Module()
    layer.self_attn.qkv_proj = Linear(
        [len(part) for part in parts], weight=torch.cat(parts), weight_scale=torch.stack(scales)
    )
    o_proj = stored.read(f"{ATTENTION}.o_proj.weight")
    layer.self_attn.o_proj = Linear([HIDDEN], weight=share(o_proj, rank, ranks, dim=1))
    layer.mlp.experts = torch.nn.Module()
    layer.mlp.experts.routed_experts = Linear(
        [], w13_weight=torch.stack(gate_up), w2_weight=torch.stack(down)
    )
    found: torch.nn.Module = tree
    return found


RANKS = [(0, 1), (0, 2), (1, 2), (0, 4), (1, 4), (2, 4), (3, 4)]


@pytest.mark.parametrize(("rank", "ranks"), RANKS)
def test_every_rank_holds_its_part(stored: StoredTensors, rank: int, ranks: int) -> None:
    found = compared(model_of(stored, rank, ranks), stored, Rank(rank, ranks))
    assert found.problems == []
    assert found.not_compared == set()
    assert found.claimed == set(stored.names)


@pytest.mark.parametrize(
    ("module", "named"),
    [
        ("self_attn.qkv_proj", {f"{ATTENTION}.{n}_proj.weight" for n in "qkv"}),
        ("self_attn.o_proj", {f"{ATTENTION}.o_proj.weight"}),
    ],
)
def test_another_ranks_part_is_named(stored: StoredTensors, module: str, named: set[str]) -> None:
    model, other = (model_of(stored, rank, 2) for rank in (0, 1))
    name = f"model.layers.0.{module}.weight"
    model.get_parameter(name).data = other.get_parameter(name).data
    problems = compared(model, stored, Rank(0, 2)).problems
    assert {problem.name for problem in problems} == named


def test_keys_that_were_cut_as_queries_are_named(stored: StoredTensors) -> None:
    """A quarter of the rows for each of four ranks, where two of them should share a head."""
    model = model_of(stored, 1, 4)
    rows = stored.read(f"{ATTENTION}.k_proj.weight")
    weight = model.get_parameter(f"{ATTENTION}.qkv_proj.weight").data
    weight[8:12] = rows.roll(-2, dims=0)[:4]
    (problem,) = compared(model, stored, Rank(1, 4)).problems
    assert problem.name == f"{ATTENTION}.k_proj.weight"


def test_an_experts_shard_that_is_anothers_is_named(stored: StoredTensors) -> None:
    model = model_of(stored, 1, 2)
    down = model.get_parameter(f"{MLP}.experts.routed_experts.w2_weight").data
    down[2] = down[1]
    (problem,) = compared(model, stored, Rank(1, 2)).problems
    assert problem.name == f"{MLP}.experts.2.down_proj.weight"


def test_experts_of_other_ranks_are_theirs_to_compare(stored: StoredTensors) -> None:
    """Expert parallelism: this rank has experts 3 and 1, in this order."""
    model = model_of(stored, 0, 1)
    routed: Any = model.get_submodule(f"{MLP}.experts.routed_experts")
    routed.expert_map = torch.tensor([-1, 1, -1, 0])
    for parameter in routed.parameters():
        parameter.data = parameter.data[[3, 1]]
    found = compared(model, stored, Rank(0, 1))
    assert found.problems == []
    assert f"{MLP}.experts.3.up_proj.weight" in found.claimed
    assert f"{MLP}.experts.0.up_proj.weight" not in found.claimed


def test_a_scale_of_a_fused_linear_that_is_anothers_is_named(stored: StoredTensors) -> None:
    model = model_of(stored, 0, 1)
    scales = model.get_parameter(f"{ATTENTION}.qkv_proj.weight_scale").data
    scales[2] = scales[0]
    (problem,) = compared(model, stored, Rank(0, 1)).problems
    assert problem.name == f"{ATTENTION}.v_proj.weight_scale"
    assert f"holds {ATTENTION}.q_proj.weight_scale" in problem.value


def test_what_is_named_otherwise_is_not_compared(stored: StoredTensors) -> None:
    """Unlike what the file lacks: it has a tensor of that shape that is in no parameter."""
    model = model_of(stored, 0, 1)
    attention: Any = model.get_submodule(ATTENTION)
    attention.out = attention.o_proj
    del attention.o_proj
    found = compared(model, stored, Rank(0, 1))
    assert found.problems == []
    assert found.not_compared == {"model.layers.*.self_attn.out.weight"}
    attention.extra = Linear([3], weight=torch.zeros(3, 7))
    (problem,) = compared(model, stored, Rank(0, 1)).problems
    assert (problem.name, problem.in_file) == (f"{ATTENTION}.extra.weight", False)
