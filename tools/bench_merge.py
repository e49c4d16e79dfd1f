"""Time and memory of merging an adapter, against a plain copy of the base with fsync.

The base is synthetic: Llama's tensors, bfloat16, in shards of 5 GB; the adapter targets every linear. Each step runs in a process
of its own, so that its peak memory is its own. One table goes to stdout.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from mlora.conversion import open_adapter
from mlora.conversion.merge import merge
from mlora.tensor_file import write_tensors

SHARD_BYTES = 5_000_000_000
VOCABULARY = 128_256
START_METHOD: Literal["spawn"] = "spawn"  # of processes: a forked one would begin with this one's memory
Named = list[tuple[str, tuple[int, int]]]


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama."""

    hidden: int
    ffn: int
    keys: int  # features of the key projection: key-value heads times head size
    layers: int

    def linears(self) -> Named:
        """(path, [out, in]) of every linear of the layers."""
        h, f, k = self.hidden, self.ffn, self.keys
        shapes = {
            "self_attn.q_proj": (h, h),
            "self_attn.k_proj": (k, h),
            "self_attn.v_proj": (k, h),
            "self_attn.o_proj": (h, h),
            "mlp.gate_proj": (f, h),
            "mlp.up_proj": (f, h),
            "mlp.down_proj": (h, f),
        }
        return [(f"model.layers.{i}.{name}", shape) for i in range(self.layers) for name, shape in shapes.items()]

    def parameters(self) -> Named:
        """(name, shape) of every weight matrix."""
        vocabulary = (VOCABULARY, self.hidden)
        linears = [(f"{name}.weight", shape) for name, shape in self.linears()]
        return [("model.embed_tokens.weight", vocabulary), *linears, ("lm_head.weight", vocabulary)]


def shape_of(gigabytes: float) -> Shape:
    """Llama-3-8B's widths, with as many layers as it takes to fill ``gigabytes`` of bfloat16; small sizes are narrower."""
    wide = Shape(4096, 14336, 1024, 1) if gigabytes > 3 else Shape(1024, 3584, 256, 1)
    elements = [shape[0] * shape[1] for _, shape in wide.parameters()]
    fixed, layer = elements[0] + elements[-1], sum(elements[1:-1])
    return Shape(wide.hidden, wide.ffn, wide.keys, max(1, round((gigabytes * 5e8 - fixed) / layer)))


def _values(shapes: Iterator[tuple[int, int]], dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Random matrices, cut from one pool: making numbers is not what is measured."""
    pool = (torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    for rows, columns in shapes:
        count = rows * columns
        yield pool.repeat(count // len(pool) + 1)[:count].view(rows, columns)


def make_base(folder: Path, shape: Shape) -> int:
    """Write the base; its bytes."""
    folder.mkdir()
    shards: list[Named] = [[]]
    size = total = 0
    for name, (rows, columns) in shape.parameters():
        if size and size + rows * columns * 2 > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((name, (rows, columns)))
        size += rows * columns * 2
        total += rows * columns * 2
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        entries = [(name, dims, torch.bfloat16) for name, dims in sorted(shard)]
        write_tensors(folder / file, entries, _values((dims for _, dims in sorted(shard)), torch.bfloat16))
        weight_map |= {name: file for name, _ in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "tie_word_embeddings": False}), encoding="utf-8"
    )
    return total


def make_adapter(folder: Path, shape: Shape, rank: int) -> None:
    """Write a PEFT adapter on every linear, float32."""
    folder.mkdir()
    entries = []
    for name, (rows, columns) in shape.linears():
        entries += [(f"base_model.model.{name}.lora_A.weight", (rank, columns), torch.float32)]
        entries += [(f"base_model.model.{name}.lora_B.weight", (rows, rank), torch.float32)]
    entries.sort()
    write_tensors(
        folder / "adapter_model.safetensors", entries, _values((dims for _, dims, _ in entries), torch.float32)
    )
    leaves = sorted({name.rpartition(".")[2] for name, _ in shape.linears()})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": leaves}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def _copy(base: Path, output: Path) -> None:
    output.mkdir()
    for path in base.iterdir():
        shutil.copyfile(path, output / path.name)
        with (output / path.name).open("rb+") as file:
            os.fsync(file.fileno())


def _merge(base: Path, adapter: Path, output: Path, device: str) -> None:
    merge(base, [(open_adapter(adapter), 1.0)], output, device=device)


def measure(work: Callable[..., None], *arguments: object) -> tuple[float, float]:
    """(seconds, peak resident GB) of ``work`` in a new process; the imports are not counted in the seconds."""
    context = multiprocessing.get_context(START_METHOD)
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(send, work, arguments))
    process.start()
    send.close()
    try:
        result: tuple[float, float] = receive.recv()
    except EOFError:
        raise SystemExit(f"{work.__name__} failed") from None
    finally:
        process.join()
    return result


def _measured(
    send: "multiprocessing.connection.Connection", work: Callable[..., None], arguments: Sequence[object]
) -> None:
    began = time.monotonic()
    work(*arguments)
    seconds = time.monotonic() - began
    send.send((seconds, _peak_bytes() / 1e9))


def _peak_bytes() -> int:
    """Peak resident memory of this process. getrusage would start from that of the process that started it."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the base, default: %(default)s")
    parser.add_argument("--rank", type=int, default=64, help="of the adapter, default: %(default)s")
    parser.add_argument("--device", default="cpu", help="of the arithmetic, default: %(default)s")
    parser.add_argument(
        "--rounds", type=int, default=2, help="times that each is measured; the best counts, default: %(default)s"
    )
    parser.add_argument(
        "--folder", type=Path, help="on the disk to measure; needs room for twice the base; default: the system's"
    )
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as work:
        base, adapter, output = (Path(work) / name for name in ("base", "adapter", "output"))
        shape = shape_of(arguments.gigabytes)
        size = make_base(base, shape)
        make_adapter(adapter, shape, arguments.rank)
        print(
            f"base {size / 1e9:.1f} GB, {shape.layers} layers of {shape.hidden}; adapter of rank {arguments.rank}",
            flush=True,
        )
        results: dict[str, list[tuple[float, float]]] = {"copy + fsync": [], "merge": []}
        for _ in range(arguments.rounds):
            results["copy + fsync"].append(measure(_copy, base, output))
            shutil.rmtree(output)
            results["merge"].append(measure(_merge, base, adapter, output, arguments.device))
            shutil.rmtree(output)
    copied = min(results["copy + fsync"])[0]
    print(f"{'':14}{'seconds':>9}{'MB/s':>8}{'of a copy':>11}{'peak GB':>9}")
    for name, found in results.items():
        seconds, memory = min(found)[0], max(peak for _, peak in found)
        print(f"{name:14}{seconds:9.1f}{size / seconds / 1e6:8.0f}{seconds / copied:10.2f}x{memory:9.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
