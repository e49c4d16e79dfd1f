"""Adapters as Megatron-Bridge and mcore-bridge train and save them, written anew from their published rules.

On every rank a linear's adapter is added by a hook, with matrices that only this rank holds; nothing here knows how rows of fused
linears are ordered over the ranks, nor how Hugging Face orders them. What is saved are those matrices, by Megatron's own sharded
tensors and its own factory for SwiGLU, through torch's distributed checkpoint.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.strategies.checkpointable import (
    CheckpointableShardedTensor,
    LocalShardsContainer,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from parallel.stages import named_modules
from tests.tiny import GROUPS, LAYERS

RANK, ALPHA, TENSOR = 4, 6, 2
COLUMN, ROW = ("linear_qkv", "linear_fc1"), ("linear_proj", "linear_fc2")


@dataclass(frozen=True)
class Case:
    """A checkpoint to write.

    Attributes:
        name: of its directory.
        layout: "megatron-bridge" or "mcore-bridge".
        canonical: Megatron-Bridge's CanonicalLoRA.
        by_layer: each layer is a tensor of its own.
        targets: last parts of the linears; of CanonicalLoRA, of their adapters (``q``) or linears.
        whole: modules that train whole.
        settings: what ``run_config.yaml`` or ``args.json`` says more.
        scaling: of the product.
    """

    name: str
    layout: str = "megatron-bridge"
    canonical: bool = False
    by_layer: bool = False
    targets: tuple[str, ...] = (*COLUMN, *ROW)
    whole: tuple[str, ...] = ()
    settings: tuple[tuple[str, Any], ...] = ()
    scaling: float = ALPHA / RANK


CASES = {
    case.name: case
    for case in (
        Case("bridge"),
        Case("bridge-by-layer", by_layer=True, targets=("linear_qkv", "linear_fc2")),
        Case("canonical", canonical=True, targets=("q", "k", "v", "gate", "up", *ROW)),
        Case("canonical-some", canonical=True, targets=("q", "v", "up"), by_layer=True),
        Case("swift", layout="mcore-bridge"),
        Case(
            "swift-rslora",
            layout="mcore-bridge",
            by_layer=True,
            targets=("linear_fc1", "linear_proj"),
            settings=(("use_rslora", True),),
            scaling=ALPHA / RANK**0.5,
        ),
        Case("bridge-output", targets=("linear_fc2", "output_layer")),
        Case(
            "swift-ends",
            layout="mcore-bridge",
            targets=("linear_proj", "output_layer"),
            whole=("embedding.word_embeddings", "decoder.final_layernorm"),
        ),
        Case("swift-whole", layout="mcore-bridge", targets=("linear_fc2",), whole=("output_layer",)),
    )
}


def _draw(name: str, *shape: int) -> torch.Tensor:
    """The same numbers for the same name on every rank."""
    seed = int.from_bytes(name.encode(), "little") % (2**61 - 1)
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class Writer:
    """Hooks on this rank's chunks, and the pieces that they hold."""

    case: Case
    pieces: dict[str, list[ShardedTensor]]

    @classmethod
    def attach(cls, case: Case, chunks: list[torch.nn.Module]) -> tuple["Writer", list[Any]]:
        """The writer, and handles by which the hooks are removed."""
        writer, handles = cls(case, {}), []
        for chunk in chunks:
            for name, module in named_modules(chunk):
                leaf = name.rpartition(".")[2]
                if name in case.whole:
                    handles.append(writer._swap(name, module))
                if leaf in (*COLUMN, *ROW, "output_layer") and (hook := writer._hook(name, leaf, module)):
                    handles.append(module.register_forward_hook(hook))
        return writer, handles

    def _hook(self, name: str, leaf: str, module: Any) -> Callable[..., Any] | None:
        rows, columns = module.weight.shape
        if leaf in ROW:
            return self._row(name, rows, columns * TENSOR) if leaf in self.case.targets else None
        if not self.case.canonical or leaf == "output_layer":
            return self._column(name, "", rows, columns) if leaf in self.case.targets else None
        parts = ("q", "k", "v") if leaf == "linear_qkv" else ("gate", "up")
        width = module.config.kv_channels * GROUPS // TENSOR
        counts = {"q": rows - 2 * width, "k": width, "v": width, "gate": rows // 2, "up": rows // 2}
        held = {
            part: self._column(name, f"adapter_{part}.", counts[part], columns)
            for part in parts
            if part in self.case.targets
        }
        return _canonical(leaf, held, counts) if held else None

    def _column(self, name: str, part: str, rows: int, columns: int) -> Callable[..., Any]:
        """y_l += s (x Aᵀ) B_lᵀ; Megatron-Bridge divides A's rows over the ranks and gathers x Aᵀ."""
        rank = parallel_state.get_tensor_model_parallel_rank()
        A, B = _draw(f"{name}{part}A", RANK, columns), _draw(f"{name}{part}B{rank}", rows, RANK)
        if self.case.layout == "megatron-bridge":
            share = RANK // TENSOR
            self._keep(name, f"adapter.{part}linear_in.weight", A[rank * share : (rank + 1) * share], 0)
            self._keep(name, f"adapter.{part}linear_out.weight", B, 0, swiglu="linear_fc1" in name)
        else:
            self._keep(name, "lora_A.default.weight", A, None)
            self._keep(name, "lora_B.default.weight", B, 0)

        def hook(module: Any, inputs: Any, output: Any) -> Any:
            y, bias = output
            return y + self.case.scaling * (inputs[0] @ A.to(y).T) @ B.to(y).T, bias

        return hook

    def _row(self, name: str, rows: int, columns: int) -> Callable[..., Any]:
        """y += s (Σ x_l A_lᵀ) Bᵀ; Megatron-Bridge divides B's rows over the ranks and gathers the result."""
        rank, share = parallel_state.get_tensor_model_parallel_rank(), columns // TENSOR
        A, B = _draw(f"{name}A", RANK, columns), _draw(f"{name}B", rows, RANK)
        A_l = A[:, rank * share : (rank + 1) * share]
        if self.case.layout == "megatron-bridge":
            piece = B[rank * (rows // TENSOR) : (rank + 1) * (rows // TENSOR)]
            self._keep(name, "adapter.linear_in.weight", A_l, 1)
            self._keep(name, "adapter.linear_out.weight", piece, 0)
        else:
            self._keep(name, "lora_A.default.weight", A_l, 1)
            self._keep(name, "lora_B.default.weight", B, None)

        def hook(module: Any, inputs: Any, output: Any) -> Any:
            y, bias = output
            middle = inputs[0] @ A_l.to(y).T
            dist.all_reduce(middle, group=parallel_state.get_tensor_model_parallel_group())
            return y + self.case.scaling * middle @ B.to(y).T, bias

        return hook

    def _swap(self, name: str, module: Any) -> "_Swapped":
        """Give a module another weight, and hold it."""
        rank, cut = parallel_state.get_tensor_model_parallel_rank(), module.weight.dim() == 2
        changed = module.weight + _draw(f"{name}{rank if cut else ''}", *module.weight.shape).to(module.weight)
        # What the files hold is float32.
        swapped = _Swapped(module, changed.detach().float())
        self._keep(name, "modules_to_save.default.weight", swapped.data, 0 if cut else None)
        return swapped

    def _keep(self, name: str, end: str, data: torch.Tensor, dim: int | None, swiglu: bool = False) -> None:
        """Hold a piece as Megatron would save it: with the layers stacked in front, or under a key for each layer."""
        rank, number = parallel_state.get_tensor_model_parallel_rank(), re.search(r"\.layers\.(\d+)\.", name)
        stacked = number is not None and not self.case.by_layer
        offsets: tuple[tuple[int, int, int], ...] = ((0, int(number[1]), LAYERS),) if number and stacked else ()
        key = f"{re.sub(r'(?<=layers)[.][0-9]+', '', name) if stacked else name}.{end}"
        cut = () if dim is None else ((dim + len(offsets), rank, TENSOR),)
        piece = ShardedTensor.from_rank_offsets(
            key,
            data.contiguous(),
            *offsets,
            *cut,
            replica_id=(0, rank if dim is None else 0, parallel_state.get_data_parallel_rank()),
            prepend_axis_num=len(offsets),
        )
        made = [piece]
        if swiglu:
            factory = apply_swiglu_sharded_factory(piece, offsets)
            made = factory.build()
        self.pieces.setdefault(key, []).extend(made)

    def save(self, folder: Path) -> None:
        """Write the checkpoint; every rank calls it."""
        state = {
            key: LocalShardsContainer([_with_layer(piece) for piece in held])
            for key, pieces in self.pieces.items()
            if (held := [piece for piece in pieces if is_main_replica(piece.replica_id)])
        }
        if dist.get_rank() == 0:
            folder.mkdir(parents=True)
        dist.barrier()
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        save(state, storage_writer=FileSystemWriter(folder), planner=planner)
        if dist.get_rank() == 0:
            write_sides(folder, self.case)


class _Swapped:
    """A module with another weight, until :meth:`remove`, as of a hook."""

    def __init__(self, module: Any, data: torch.Tensor) -> None:
        self.module, self.data, self.before = module, data, module.weight.data
        module.weight.data = data.to(self.before)

    def remove(self) -> None:
        self.module.weight.data = self.before


def _with_layer(piece: ShardedTensor) -> CheckpointableShardedTensor:
    """A piece with the leading dimension of its layer, as it lies in the files."""
    piece.data = piece.data.view((1,) * (len(piece.global_shape) - piece.data.dim()) + tuple(piece.data.shape))
    piece.local_shape = tuple(piece.data.shape)
    return CheckpointableShardedTensor.from_sh_ten(piece)


def _canonical(leaf: str, held: dict[str, Callable[..., Any]], counts: dict[str, int]) -> Callable[..., Any]:
    """CanonicalLoRA: the adapters' outputs, zero where there is none, put together as the linear's output is on one rank."""

    def hook(module: Any, inputs: Any, output: Any) -> Any:
        y, bias = output
        zeros = {part: y.new_zeros(*y.shape[:-1], rows) for part, rows in counts.items()}
        found = {part: run(module, inputs, (zeros[part], None))[0] for part, run in held.items()}
        parts = [found.get(part, zeros[part]) for part in (("q", "k", "v") if leaf == "linear_qkv" else ("gate", "up"))]
        if leaf == "linear_qkv":
            parts = [part.unflatten(-1, (GROUPS // TENSOR, -1)) for part in parts]
        return y + torch.cat(parts, dim=-1).reshape(y.shape), bias

    return hook


def write_sides(folder: Path, case: Case) -> None:
    """What lies beside the tensors."""
    import yaml

    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    if case.layout == "megatron-bridge":
        target = "canonical_lora.CanonicalLoRA" if case.canonical else "lora.LoRA"
        peft = {"_target_": f"megatron.bridge.peft.{target}", "dim": RANK, "alpha": ALPHA, "dropout": 0.0}
        config = {"model": {"tensor_model_parallel_size": TENSOR}, "peft": peft | dict(case.settings)}
        (folder / "run_config.yaml").write_text(yaml.safe_dump(config))
    else:
        args = {"lora_rank": RANK, "lora_alpha": ALPHA, "lora_bias": "none", "tensor_model_parallel_size": TENSOR}
        (folder.parent / "args.json").write_text(json.dumps(args | dict(case.settings)))
