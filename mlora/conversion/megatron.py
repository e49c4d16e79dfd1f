"""Adapter checkpoints of Megatron-Bridge and of ms-swift (mcore-bridge) as an :class:`~mlora.conversion.state.AdapterState`.

Both adapt Megatron's linears, also the fused ones, with one A and one B. Keys behind the module's name:

| | Megatron-Bridge | mcore-bridge |
|---|---|---|
| A [r, in] | ``adapter.linear_in.weight`` | ``lora_A.<adapter>.weight`` |
| B [out, r] | ``adapter.linear_out.weight`` | ``lora_B.<adapter>.weight`` |
| of one part of a fused linear (CanonicalLoRA) | ``adapter.adapter_q.linear_in.weight`` ..., likewise k, v, gate, up | |
| scaling | alpha / dim, from ``run_config.yaml`` | lora_alpha / lora_rank (rsLoRA: its root), from ``args.json`` |
| weight that trains whole (``modules_to_save``) | | ``modules_to_save.<adapter>.weight`` |
| rows of B of ``linear_qkv`` | of each query group its q, k, v | the same |
| rows of B of ``linear_fc1`` | gate, up | of each of the t ranks that saved it its gate, up |
| rows of B of ``adapter_gate``, ``adapter_up`` | of each of the t ranks the first half, then of each the second | |

The last two orders are what the libraries' code makes of t > 1 tensor-parallel ranks. t stands in no shape: it is seen from the
number of pieces that a tensor is stored in, and compared with the library's configuration. Megatron's factory for SwiGLU cuts each
rank's rows in two, which is meant for gate and up in one linear. mcore-bridge does not use it for B; Megatron-Bridge uses it also
for the adapters of gate alone and of up alone.

Checked against published sources, whose rules the tests write anew with Megatron's own classes on several ranks:
NVIDIA-NeMo/Megatron-Bridge ``peft/utils.py`` (as of commit 0361921), ``lora.py`` (0191fc5), ``canonical_lora.py`` (0584188) and
``adapter_wrapper.py`` (2afd2d3); modelscope/mcore-bridge ``tuners/lora.py`` (02fb038); modelscope/ms-swift
``megatron/utils/megatron_lm_utils.py`` (02f2bd4); megatron-core 0.16.1 and 0.19.2 ``transformer_block.py`` and ``mlp.py``. Files
that these two made themselves on two ranks (``dist_checkpointing.save``) were read, with rows in these orders; no checkpoint that
Megatron-Bridge or ms-swift made was at hand. Of the output layer and the embedding the rows beyond the vocabulary are left out.
Whole are mcore-bridge's embedding, output layer and last norm. Refused: experts, routers, embeddings' low-rank terms, DoRA, vision
towers, other ``modules_to_save``, several adapters in one checkpoint, and every format but ``torch_dist``.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from mlora.conversion.importing import base_projections
from mlora.conversion.megatron_files import MegatronFiles
from mlora.conversion.megatron_layout import LAYOUTS, Layout, Pair, detect, pairs, whole_weights
from mlora.conversion.megatron_settings import Settings
from mlora.conversion.portable import Request, config_of
from mlora.conversion.selection import selection
from mlora.conversion.state import AdapterModule, AdapterState, LazyTensor, natural_order
from mlora.names import OUTPUT_LAYER
from mlora.pretrained import Pretrained
from mlora.targets import Projection
from parallel.layout import fused_rows


def read_megatron(
    path: str | Path, base: Pretrained, layout: str | None = None, *, alpha: float | None = None
) -> AdapterState:
    """The adapter in a checkpoint, under Hugging Face's names; headers are read now, tensors when they are asked for.

    Args:
        path: of a checkpoint, or of a folder of iterations: the latest is taken, and the log says so.
        base: the model that it was trained on.
        layout: one of :data:`~mlora.conversion.megatron_layout.LAYOUTS`; None to tell it from the keys.
        alpha: numerator of the scaling, if the library's configuration is lost.

    Returns:
        The state, with the configuration that PEFT would need.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it is damaged, is for another base, or holds something that is not supported; file, key and rule are named.
    """
    files = MegatronFiles.open(path)
    found = LAYOUTS[layout] if layout else detect(files)
    layers = base.architecture.counts["layer"]
    held = list(pairs(files, found, layers))
    settings = _settings(found, files.folder, alpha)
    source = _Source(files, found, settings, base)
    modules = sorted((module for pair in held for module in source.modules(pair)), key=_order)
    words, full = f"{found.name} checkpoint {files.folder.name}", source.whole()
    state = AdapterState(files.folder, "peft", words, tuple(modules), full=full, config={})
    fields = selection({module.name: (module.rank, settings.alpha) for module in modules}, layers)
    fields |= {"use_rslora": settings.use_rslora, "lora_dropout": settings.dropout}
    fields["modules_to_save"] = [name.removesuffix(".weight") for name in full] or None
    return replace(state, config=config_of(Request(state, layers, str(base.path), None, base), **fields))


def _order(module: AdapterModule) -> list[tuple[int, str]]:
    return natural_order(module.name)


def _settings(layout: Layout, folder: Path, alpha: float | None) -> Settings:
    found = layout.settings(folder)
    if found is None and alpha is None:
        raise ValueError(
            f"there is no {layout.settings_file} in {folder} or above it, so the scaling is unknown; give alpha if you know it"
        )
    if found is not None and alpha is not None:
        raise ValueError(
            f"alpha is given, and {found.file} says {found.alpha:g}: it is to be given only where this is lost"
        )
    return found or Settings(file=None, alpha=float(alpha or 0))


@dataclass(frozen=True)
class _Source:
    """A checkpoint that is read for a base."""

    files: MegatronFiles
    layout: Layout
    settings: Settings
    base: Pretrained

    @cached_property
    def _projections(self) -> Mapping[str, Sequence[Projection]]:
        """By Megatron module."""
        found: dict[str, list[Projection]] = {}
        for projection in base_projections(self.base):
            found.setdefault(projection.module, []).append(projection)
        return found

    @cached_property
    def _config(self) -> Any:
        """As much of a ``TransformerConfig`` as the order of rows needs."""
        return SimpleNamespace(**self.base.architecture.transformer)

    @cached_property
    def _shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.base.family.tensors(self.base.architecture)

    def modules(self, pair: Pair) -> Iterator[AdapterModule]:
        """The Hugging Face modules that a pair is the low-rank term of."""
        projections = self._projections.get(pair.module)
        if projections is None:
            raise self.files.error(pair.A.key, f"{self.base.path} has no {pair.module} that can be adapted")
        parts = {projection.part: projection for projection in projections}
        held = parts if pair.part is None else {part: parts[part] for part in parts if part == pair.part}
        if not held:
            raise self.files.error(pair.A.key, f"{pair.module} has no {pair.part}, but {', '.join(parts)}")
        A, B = self._matrices(pair, list(held.values()))
        rows = self._rows(pair, B)
        for name in dict.fromkeys(projection.hf_name for projection in held.values()):
            inside = [part for part, projection in parts.items() if projection.hf_name == name]
            if not held.keys() >= set(inside):
                raise self.files.error(pair.A.key, f"{name} is {', '.join(inside)} in one module, with one A for all")
            taken = B if rows is None else _taken(B, torch.cat([rows[part] for part in inside]))
            yield AdapterModule(name, A.shape[0], self.settings.scaling(A.shape[0]), A, taken)

    def whole(self) -> dict[str, LazyTensor]:
        """The weights that train whole, by Hugging Face's names."""
        found = {}
        for module, key in sorted(whole_weights(self.files, self.layout).items()):
            name = f"{self.base.family.hf_name(module)}.weight"
            if name not in self._shapes:
                raise self.files.error(key, f"{self.base.path} has no {name} of its own")
            tensor, shape = self.files.matrix(key), self._shapes[name]
            if module != "decoder.final_layernorm":
                tensor = self._without_padding(key, tensor, shape[0])
            if tensor.shape != shape:
                raise self.files.error(
                    key, f"its shape is {list(tensor.shape)}; for {self.base.path} it would be {list(shape)}"
                )
            found[name] = tensor
        return found

    def _without_padding(self, key: str, tensor: LazyTensor, rows: int) -> LazyTensor:
        """The rows of the vocabulary, which Megatron pads to a multiple of 128 for each rank, or to less."""
        multiple = 128 * max(self.files.pieces(key), self.settings.tensor_parallel or 1)
        if not rows < tensor.shape[0] <= -(-rows // multiple) * multiple:
            return tensor
        return _taken(tensor, torch.arange(rows))

    def _matrices(self, pair: Pair, held: Sequence[Projection]) -> tuple[LazyTensor, LazyTensor]:
        """A and B, which fit the base and the configured rank."""
        A, B = (self.files.matrix(place.key, place.layer) for place in (pair.A, pair.B))
        counts = [self.base.family.rows(self.base.architecture, pair.module, projection.part)[1] for projection in held]
        columns = self._shapes[f"{held[0].hf_name}.weight"][1]
        if pair.module == OUTPUT_LAYER:
            B = self._without_padding(pair.B.key, B, counts[0])
        rank = self.settings.rank if self.settings.rank is not None else A.shape[0]
        for tensor, wanted in ((A, (rank, columns)), (B, (sum(counts), rank))):
            if tensor.shape != wanted:
                said = f" with the rank of {self.settings.file}" if self.settings.rank is not None else ""
                raise self.files.error(
                    tensor.key,
                    f"its shape is {list(tensor.shape)}; for {self.base.path}{said} it would be {list(wanted)}",
                )
        return A, B

    def _rows(self, pair: Pair, B: LazyTensor) -> Mapping[str, torch.Tensor] | None:
        """By part, where its rows stand in B, in the order of its own rows; None for the rows of B as they are."""
        if pair.part in ("gate", "up"):
            return {pair.part: _halves(B.shape[0], self._ranks(pair.B.key, pieces_of_rank=2))}
        leaf = pair.module.rpartition(".")[2]
        if pair.part is not None or leaf not in ("linear_qkv", "linear_fc1"):
            return None
        by_rank = leaf == "linear_fc1" and self.layout.fc1_by_rank
        ranks = self._ranks(pair.B.key, pieces_of_rank=1) if by_rank else 1
        places: dict[str, list[tuple[int, torch.Tensor]]] = {}
        at = 0
        for run in fused_rows(pair.module, self._config, B.shape[0], ranks):
            places.setdefault(run.part, []).append((run.start, torch.arange(at, at + run.length)))
            at += run.length
        return {
            part: torch.cat([place for _, place in sorted(runs, key=lambda run: run[0])])
            for part, runs in places.items()
        }

    def _ranks(self, key: str, pieces_of_rank: int) -> int:
        """The tensor-parallel ranks that saved a B. One that is stored whole was saved by one."""
        pieces = self.files.row_pieces(key)
        ranks, left = (1, 0) if pieces == 1 else divmod(pieces, pieces_of_rank)
        said = self.settings.tensor_parallel
        if left or said not in (None, ranks):
            words = f"; {self.settings.file} says that there were {said}" if said is not None else ""
            raise self.files.error(
                key,
                f"the order of its rows is unknown: {pieces} pieces are not {pieces_of_rank} of each tensor-parallel rank{words}",
            )
        return ranks


def _halves(rows: int, ranks: int) -> torch.Tensor:
    """Where the rows of a matrix stand if each rank's were cut in two, and all first halves come before all second ones."""
    return torch.arange(rows).view(2, ranks, -1).transpose(0, 1).reshape(-1) if ranks > 1 else torch.arange(rows)


def _taken(tensor: LazyTensor, rows: torch.Tensor) -> LazyTensor:
    return replace(tensor, shape=(len(rows), *tensor.shape[1:]), read=partial(_take, tensor, rows))


def _take(tensor: LazyTensor, rows: torch.Tensor) -> torch.Tensor:
    return tensor.load()[rows]
