"""RMSNorms that Megatron's local spec can use under tensor and sequence parallelism."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig

from parallel import collectives


class SequenceParallelRMSNorm(torch.nn.RMSNorm):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension (Zhang and Sennrich 2019, eq. 4).

    Megatron's own torch norm refuses sequence parallelism, whose only demand on a norm is that its weight says that its
    gradient is a partial sum over each rank's piece of the sequence. With ``layernorm_zero_centered_gamma`` the factor is
    1 + weight, in float32.

    Raises:
        ValueError: the configuration asks for another norm.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        _check_rms(config, type(self))
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden_size] -> the same."""
        if not self.zero_centered:
            return super().forward(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        normed = torch.nn.functional.rms_norm(x.to(wide), self.weight.shape, 1 + self.weight.to(wide), self.eps)
        return normed.to(x.dtype)


class PostNorm(SequenceParallelRMSNorm):
    """Norm of a block's output before it is added to the residual stream; stands in the place of Megatron's bias-dropout-add."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config, config.hidden_size, config.layernorm_epsilon)
        if config.hidden_dropout:
            raise ValueError(f"PostNorm cannot stand for a hidden_dropout of {config.hidden_dropout}")

    def forward(self, training: bool, fused: bool) -> Callable[..., torch.Tensor]:  # type: ignore[override]
        """Megatron's way to ask: the function that adds ((output, its bias or None), residual, dropout probability)."""
        return self._add

    def _add(
        self, x_with_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, dropout: float
    ) -> torch.Tensor:
        x, bias = x_with_bias
        return residual + super().forward(x if bias is None else x + bias)


class HeadsRMSNorm(torch.nn.Module):
    """RMSNorm over all heads together of queries or keys, which are cut over the tensor-parallel ranks.

    A collective in forward and in backward, of one number for each token. Where there are fewer query groups than ranks, several
    ranks hold the same key: the mean over ranks of their means is the mean over all groups then too.

    Attributes:
        features: of all heads.
        first: place of this rank's first feature among all.

    Raises:
        ValueError: the configuration asks for another norm.
    """

    def __init__(self, config: TransformerConfig, heads: int, width: int, eps: float) -> None:
        _check_rms(config, type(self))
        if config.layernorm_zero_centered_gamma:
            raise ValueError(f"{type(self).__name__} cannot stand for layernorm_zero_centered_gamma")
        super().__init__()
        self.eps = eps
        self.group: dist.ProcessGroup = parallel_state.get_tensor_model_parallel_group()
        rank, size = self.group.rank(), self.group.size()
        self.features = heads * width
        self.first = rank * heads // size * width
        held = max(heads // size, 1) * width
        self.weight = torch.nn.Parameter(
            torch.ones(held, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.tensor_model_parallel = size > 1  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[s, b, heads/t, width] -> the same."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(-2)
        mean: torch.Tensor = _SumOverRanks.apply(wide.square().mean(-1, keepdim=True), self.group)  # type: ignore[no-untyped-call]
        normed = wide * torch.rsqrt(mean / self.group.size() + self.eps) * self.weight
        return normed.to(x.dtype).view(x.shape)


class QueryRMSNorm(HeadsRMSNorm):
    """Over all query heads."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(config, config.num_attention_heads, hidden_size, eps)


class KeyRMSNorm(HeadsRMSNorm):
    """Over all key heads."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(config, config.num_query_groups or config.num_attention_heads, hidden_size, eps)


class _SumOverRanks(torch.autograd.Function):
    """All-reduce in forward and in backward: every rank uses the sum, so every rank's gradient reaches every summand."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return collectives.all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        return collectives.all_reduce(dy, ctx.group), None


def _check_rms(config: TransformerConfig, cls: type) -> None:
    if config.normalization != "RMSNorm":
        raise ValueError(f"{cls.__name__} cannot stand for normalization {config.normalization!r}")
