"""Time and memory of converting an adapter between PEFT and a native checkpoint, against a plain copy of its files with fsync.

The adapter is synthetic, of Llama-3-70B's widths, on every linear; its native checkpoint is written by as many processes as the
parallel layout has ranks. Each step runs in a process of its own, so that its peak memory is its own; it is also given beyond that
of the same step on a tiny adapter. One table goes to stdout.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from mlora.conversion import open_adapter
from mlora.conversion.importing import plan_import
from mlora.conversion.native_writer import write_import
from mlora.conversion.peft_writer import write_peft
from mlora.conversion.profiles import peft_adapter
from mlora.description import CONFIG_FILE, INFO_FILE, PREFIX
from mlora.pretrained import Pretrained
from mlora_tools.bench_merge import Shape, make_adapter, measure
from parallel.reader import Reader
from parallel.storage import read, write

WIDTHS = Shape(hidden=8192, ffn=28672, keys=1024, layers=80)  # Llama-3-70B's
TINY = Shape(
    hidden=256, ffn=96, keys=128, layers=2
)  # what a conversion takes whatever the adapter: imports, touched code
HEAD = 128  # features of an attention head
ROW_PARALLEL = ("linear_proj", "linear_fc2")


@dataclass(frozen=True)
class Layout:
    """Tensor- and pipeline-parallel sizes."""

    tensor: int
    pipeline: int


def write_config(folder: Path, shape: Shape) -> None:
    """Write the ``config.json`` of a base model."""
    folder.mkdir()
    values = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": shape.hidden, "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.hidden // HEAD, "num_key_value_heads": shape.keys // HEAD,
        "head_dim": HEAD, "vocab_size": 128_256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0,
        "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")


def shard(source: Path, target: Path, layout: Layout) -> None:
    """Write a native checkpoint as the ranks of a layout would save it, each its pieces."""
    target.mkdir()
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        size = layout.tensor * layout.pipeline
        ranks = [
            context.Process(target=_save, args=(rank, size, os.path.join(folder, "store"), source, target, layout))
            for rank in range(size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise SystemExit("a rank could not save its pieces")
    info = json.loads((source / INFO_FILE).read_text(encoding="utf-8"))
    info["parallel"] |= {"tensor": layout.tensor, "pipeline": layout.pipeline}
    (target / INFO_FILE).write_text(json.dumps(info), encoding="utf-8")
    shutil.copyfile(source / CONFIG_FILE, target / CONFIG_FILE)


def _save(rank: int, size: int, store: str, source: Path, target: Path, layout: Layout) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)  # type: ignore[attr-defined]
    shapes = Reader(source).tensors(PREFIX)
    stage, tensor_rank = divmod(rank, layout.tensor)
    per_stage = -(-(1 + max(map(_layer, shapes))) // layout.pipeline)
    held = {key: what for key, what in shapes.items() if _layer(key) // per_stage == stage}
    pieces = {key: _piece(key, *what, tensor_rank, layout.tensor) for key, what in held.items()}
    for key, value in read({"adapter": dict(pieces)}, source).get("adapter", {}).items():
        pieces[key].data = value
    write({"adapter": pieces}, target)
    dist.destroy_process_group()


def _layer(key: str) -> int:
    return int(next(part for part in key.split(".") if part.isdigit()))


def _piece(key: str, shape: tuple[int, ...], dtype: torch.dtype, rank: int, tensor: int) -> ShardedTensor:
    """A rank's piece: B is cut where the base's rows are, A where its columns are."""
    is_A, by_columns = key.endswith("lora_A"), any(name in key for name in ROW_PARALLEL)
    dim = (1 if is_A else None) if by_columns else (None if is_A else 0)
    local, offset = list(shape), [0, 0]
    if dim is not None:
        local[dim] = shape[dim] // tensor
        offset[dim] = rank * local[dim]
    return ShardedTensor(
        key=key,
        data=None,
        dtype=dtype,
        local_shape=tuple(local),
        global_shape=shape,
        global_offset=tuple(offset),
        axis_fragmentations=None,
        replica_id=(0, 0 if dim is not None else rank, 0),
    )


def make(folder: Path, shape: Shape, rank: int, layout: Layout) -> None:
    """Make ``folder`` with a base model's configuration and an adapter, as a PEFT directory and as a native checkpoint."""
    folder.mkdir()
    write_config(folder / "base", shape)
    make_adapter(folder / "peft", shape, rank)
    _import(folder)
    shard(folder / "output", folder / "native", layout)
    shutil.rmtree(folder / "output")


def _copy(folder: Path) -> None:
    output = folder / "output"
    output.mkdir()
    for path in (folder / "peft").iterdir():
        shutil.copyfile(path, output / path.name)
        with (output / path.name).open("rb+") as file:
            os.fsync(file.fileno())


def _import(folder: Path) -> None:
    write_import(plan_import(open_adapter(folder / "peft"), Pretrained.open(folder / "base")), folder / "output")


def _export(folder: Path) -> None:
    write_peft(peft_adapter(open_adapter(folder / "native")), folder / "output")


STEPS: dict[str, Callable[[Path], None]] = {"copy + fsync": _copy, "PEFT to native": _import, "native to PEFT": _export}


def largest_group(shape: Shape, rank: int) -> int:
    """Bytes of the matrices of one Megatron linear: gate and up."""
    return 2 * 4 * rank * (shape.ffn + shape.hidden)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=WIDTHS.layers, help="of the base, default: %(default)s")
    parser.add_argument("--rank", type=int, default=64, help="of the adapter, default: %(default)s")
    parser.add_argument(
        "--tensor", type=int, default=8, help="tensor-parallel size of the checkpoint, default: %(default)s"
    )
    parser.add_argument("--pipeline", type=int, default=4, help="pipeline-parallel size of it, default: %(default)s")
    parser.add_argument(
        "--rounds", type=int, default=2, help="times that each is measured; the best counts, default: %(default)s"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="on the disk to measure; needs room for four times the adapter; default: the system's",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    arguments = _arguments(argv)
    shape = Shape(WIDTHS.hidden, WIDTHS.ffn, WIDTHS.keys, arguments.layers)
    layout = Layout(arguments.tensor, arguments.pipeline)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as work:
        tiny, whole = Path(work) / "tiny", Path(work) / "whole"
        make(tiny, TINY, 4, Layout(1, 1))
        idle = {name: _measure(tiny, name)[1] for name in STEPS}
        make(whole, shape, arguments.rank, layout)
        size = sum(path.stat().st_size for path in (whole / "peft").iterdir())
        print(
            f"adapter {size / 1e9:.2f} GB: {shape.layers} layers of {shape.hidden}, rank {arguments.rank}, float32; native at TP "
            f"{layout.tensor} x PP {layout.pipeline}",
            flush=True,
        )
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in STEPS}
        for _ in range(arguments.rounds):
            for name in STEPS:
                found[name].append(_measure(whole, name))
    _print(found, size, idle, largest_group(shape, arguments.rank))
    return 0


def _measure(folder: Path, name: str) -> tuple[float, float]:
    """(seconds, peak GB) of a step."""
    result = measure(STEPS[name], folder)
    shutil.rmtree(folder / "output")
    return result


def _print(found: dict[str, list[tuple[float, float]]], size: int, idle: dict[str, float], group: int) -> None:
    copied = min(found["copy + fsync"])[0]
    print(f"{'':16}{'seconds':>9}{'MB/s':>8}{'of a copy':>11}{'peak MB':>9}{'beyond tiny':>16}{'of a group':>12}")
    for name, measured in found.items():
        seconds, memory = min(measured)[0], max(peak for _, peak in measured)
        beyond = max(memory - idle[name], 0.0) * 1e9
        print(
            f"{name:16}{seconds:9.1f}{size / seconds / 1e6:8.0f}{seconds / copied:10.2f}x{memory * 1e3:9.0f}{beyond / 1e6:13.1f} MB"
            f"{beyond / group:11.2f}x"
        )
    print(f"a group is the matrices of gate and up: {group / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
