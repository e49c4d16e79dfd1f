"""The low-rank term of an embedding: ``y = W[id] + scaling · B A[:, id]`` (PEFT's ``lora_embedding_A`` and ``lora_embedding_B``).

As a linear of one-hot tokens its weight is Wᵀ [hidden, vocabulary], cut over its columns: A [r, vocabulary/t] is cut as the base's
rows are, B [hidden, r] is on every rank. Each rank looks up the tokens that it holds, and the sum over ranks is of size T x r:

| | forward | backward |
|---|---|---|
| without sequence parallelism | all-reduce of A[:, id] | none |
| with it | reduce-scatter of A[:, id] | all-gather of its gradient; dB is its part of a sum over the sequence |

There is no dropout: PEFT has none here.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

from mlora.adapter import LinearAdapter
from mlora.bank import AdapterBank
from mlora.initial import normal
from parallel.layout import WHOLE, LinearLayout, Segment


def embedding_layout(name: str, module: Any) -> LinearLayout:
    """The record of a ``VocabParallelEmbedding`` as a linear of one-hot tokens; padding counts among its columns."""
    hidden = module.embedding_dim
    return LinearLayout(
        name=name,
        in_features=module.num_embeddings,
        out_features=hidden,
        partition_dim=1,
        group=module.tp_group,
        sequence_parallel=module.reduce_scatter_embeddings,
        expert=False,
        parts=((WHOLE, hidden),),
        segments=(Segment(WHOLE, 0, hidden),),
    )


class EmbeddingAdapter(LinearAdapter):
    """A LoRA adapter on an embedding; its ``vocabulary`` is a number of columns."""

    def _real_sizes(self, vocabulary: int | None) -> tuple[dict[str, int], int]:
        return dict(self.layout.parts), vocabulary or self.layout.in_features

    def _draw(self, part: str, factor: str, rows: int, columns: int, rank: int) -> torch.Tensor:
        """PEFT's: A zero and B normal; both normal if ``init_lora_weights`` is False."""
        if factor == "A" and self.config.init_lora_weights is not False:
            return torch.zeros(rows, columns)
        return normal(f"{self.config.seed}/{self.layout.name}.{part}.lora_{factor}", rows, columns).float()

    def delta(self) -> torch.Tensor:
        """This rank's piece of (σ B A)ᵀ [vocabulary/t, hidden]."""
        return super().delta().T


class EmbeddingLora:
    """Forward of an adapted ``VocabParallelEmbedding``; comes before it in the instance's class."""

    lora: AdapterBank
    vocab_start_index: int
    vocab_end_index: int
    reduce_scatter_embeddings: bool
    tp_group: Any

    def forward(self, input_: torch.Tensor) -> torch.Tensor:
        """Token ids [b, s] -> [b, s, hidden], or [s/t, b, hidden] where the base scatters the sequence."""
        y: torch.Tensor = super().forward(input_)  # type: ignore[misc]
        adapter = self.lora.current()
        if adapter is None:
            return y
        (lora_A,) = adapter.lora_A.values()
        here = (input_ >= self.vocab_start_index) & (input_ < self.vocab_end_index)
        low = torch.nn.functional.embedding((input_ - self.vocab_start_index) * here, lora_A.T) * here[..., None]
        if self.reduce_scatter_embeddings:
            low = reduce_scatter_to_sequence_parallel_region(low.transpose(0, 1).contiguous(), group=self.tp_group)
        else:
            low = reduce_from_tensor_model_parallel_region(low, group=self.tp_group)
        term = torch.nn.functional.linear(low * adapter.scaling[WHOLE], adapter.lora_B[WHOLE])
        return y + term.to(y.dtype)
