"""A small GPTModel of Megatron's local spec: the same model at every layout, and one pass of Megatron's schedule over it."""

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from mlora.attach import factors, linear_adapters
from mlora.dropout import MicroBatch, set_micro_batch
from mlora.factor import Factor
from parallel import shards
from parallel.layout import read_layout
from parallel.norm import SequenceParallelRMSNorm
from parallel.sizes import ParallelSizes
from parallel.stages import named_modules

VOCAB, HIDDEN, FFN, LAYERS, HEADS, GROUPS, LENGTH, ROWS = 64, 32, 48, 4, 8, 4, 16, 2
MICRO_BATCHES = 4  # of a global batch


def config_of(sizes: ParallelSizes, **changes: Any) -> TransformerConfig:
    """Of the small model, in float64; ``changes`` are fields of Megatron's configuration."""
    values: dict[str, Any] = {
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "ffn_hidden_size": FFN,
        "num_attention_heads": HEADS,
        "num_query_groups": GROUPS,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": sizes.tensor,
        "pipeline_model_parallel_size": sizes.pipeline,
        "virtual_pipeline_model_parallel_size": sizes.virtual_pipeline,
        "sequence_parallel": sizes.sequence_parallel,
        "params_dtype": torch.float64,
        "pipeline_dtype": torch.float64,
        "batch_p2p_comm": False,
        "masked_softmax_fusion": False,
        "perform_initialization": False,
    }
    return TransformerConfig(**{**values, **changes})


def build(
    sizes: ParallelSizes,
    *,
    experts: int | None = None,
    expert_layers: Sequence[int] = (),
    tied: bool = False,
    **changes: Any,
) -> list[GPTModel]:
    """This rank's chunks, with weights that depend on nothing but their global names; ``expert_layers`` have experts."""
    config = config_of(sizes, **({"num_moe_experts": experts} if experts else {}), **changes)
    chunks = []
    for stage in range(sizes.virtual_pipeline or 1):
        vp_stage = stage if sizes.virtual_pipeline else None
        first = parallel_state.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
        chunk = GPTModel(
            config=config,
            transformer_layer_spec=_spec(config, experts, expert_layers, vp_stage),
            vocab_size=VOCAB,
            max_sequence_length=LENGTH,
            pre_process=first,
            post_process=last,
            share_embeddings_and_output_weights=tied,
            position_embedding_type="rope",
            vp_stage=vp_stage,
        )
        _fill(chunk)
        chunks.append(chunk)
    return chunks


def build_to_train(sizes: ParallelSizes, dtype: torch.dtype = torch.float32) -> list[GPTModel]:
    """As :func:`build`, with what :class:`mlora.train.Trainer` asks of a model."""
    return build(
        sizes,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
    )


def _spec(
    config: TransformerConfig, experts: int | None, expert_layers: Sequence[int], vp_stage: int | None
) -> TransformerBlockSubmodules:
    first, count = get_transformer_layer_offset(config, vp_stage), get_num_layers_to_build(config, vp_stage)
    specs = []
    for number in range(first, first + count):
        layer: ModuleSpec = get_gpt_layer_local_spec(
            num_experts=experts if number in expert_layers else None,
            normalization="RMSNorm",
            qk_layernorm=config.qk_layernorm,
        )
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = SequenceParallelRMSNorm
        specs.append(layer)
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=SequenceParallelRMSNorm)


def values(name: str, *shape: int) -> torch.Tensor:
    """Random numbers of size 1/sqrt(last dimension) that depend on ``name`` only, float64."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(*shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5


@torch.no_grad()
def _fill(chunk: GPTModel) -> None:
    for name, module in named_modules(chunk):
        layout = read_layout(name, module)
        if layout is not None:
            parts = {part: values(f"{name}.{part}", rows, layout.in_features) for part, rows in layout.parts}
            shards.cut(layout, lambda part, row, rows, column, columns, parts=parts: parts[part][
                row : row + rows, column : column + columns
            ], module.weight)  # fmt: skip
            if module.bias is not None:
                biases = {part: values(f"{name}.{part}.bias", rows) for part, rows in layout.parts}
                shards.cut_bias(
                    layout, lambda part, row, rows, biases=biases: biases[part][row : row + rows], module.bias
                )
        elif isinstance(module, VocabParallelEmbedding):
            module.weight.copy_(
                values(name, VOCAB, HIDDEN)[module.vocab_start_index : module.vocab_end_index] * HIDDEN**0.5
            )
        else:
            for leaf, parameter in module.named_parameters(recurse=False):
                parameter.copy_(1 + 0.1 * values(f"{name}.{leaf}", *parameter.shape))


@torch.no_grad()
def fill_adapter(chunks: Sequence[torch.nn.Module], adapter_name: str = "default") -> None:
    """Give an adapter's factors, B too, and its start values that depend on nothing but their global names."""
    starts = [factor for adapter in linear_adapters(chunks, adapter_name) for factor in adapter.start()]
    for factor in (*factors(chunks, adapter_name), *starts):
        factor.parameter[factor.inside].copy_(piece(values(f"{adapter_name} {factor.name}", *factor.shape), factor))


def piece(whole: torch.Tensor, factor: Factor) -> torch.Tensor:
    """What the rank that has ``factor`` holds of a whole tensor."""
    return whole[place(factor.offset, factor.parameter)]


def place(offset: tuple[int, ...], tensor: torch.Tensor) -> tuple[slice, ...]:
    """Where in a whole tensor a piece stands that begins at ``offset``."""
    return tuple(slice(first, first + size) for first, size in zip(offset, tensor.shape, strict=True))


def micro_batch(number: int) -> dict[str, torch.Tensor]:
    """Tokens and labels [b, s] of a micro batch."""
    ids = torch.randint(0, VOCAB, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(number))
    return {"tokens": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}


def global_batch(iteration: int) -> list[dict[str, Any]]:
    """This rank's micro batches of an iteration, as :meth:`mlora.train.Trainer.step` takes them."""
    ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    share = MICRO_BATCHES // ranks
    return [
        {
            **micro_batch(iteration * MICRO_BATCHES + number),
            "position_ids": torch.arange(LENGTH).expand(ROWS, LENGTH),
            "loss_mask": torch.ones(ROWS, LENGTH),
            "attention_mask": None,
            "first_row": number * ROWS,
        }
        for number in range(rank * share, (rank + 1) * share)
    ]


def run(chunks: Sequence[torch.nn.Module], *, count: int = 2, step: int = 0, forward_only: bool = False) -> float:
    """Forward, and backward unless ``forward_only``, over ``count`` micro batches by Megatron's schedule.

    Returns:
        The mean loss on the last stage's ranks, 0 on the others.
    """

    def forward(data: Iterator[int], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        number = next(data)
        batch = micro_batch(number)
        set_micro_batch(MicroBatch(step=step, first_row=number * ROWS))
        positions = torch.arange(LENGTH).expand(ROWS, LENGTH)
        output = model(batch["tokens"], positions, None, labels=batch["labels"])
        return output, lambda losses: (losses.mean(), losses.detach().mean())

    iterators = [iter(range(count)) for _ in chunks]
    reports = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=count,
        seq_length=LENGTH,
        micro_batch_size=ROWS,
        forward_only=forward_only,
    )
    return float(torch.stack(list(reports)).mean()) if reports else 0.0


Pieces = dict[str, tuple[tuple[int, ...], tuple[int, ...], torch.Tensor]]


def pieces(chunks: Sequence[torch.nn.Module], what: str = "weight", adapter_name: str = "default") -> Pieces:
    """Name -> (whole shape, offset, this rank's piece) of an adapter's weights or gradients ("grad")."""
    found: Pieces = {}
    for factor in factors(chunks, adapter_name):
        tensor = factor.parameter if what == "weight" else factor.parameter.grad
        assert tensor is not None, f"{factor.name} has no gradient"
        tensor = tensor.detach().clone()
        if what == "grad" and factor.parameter.sequence_parallel:  # type: ignore[attr-defined]
            # What Megatron's finalize step does.
            torch.distributed.all_reduce(tensor, group=parallel_state.get_tensor_model_parallel_group())
        found[factor.name] = (factor.shape, factor.offset, tensor[factor.inside].cpu())
    return found


def whole(ranks: Sequence[Pieces]) -> dict[str, torch.Tensor]:
    """Name -> whole tensor from all ranks' pieces; pieces that several ranks hold must be equal.

    Raises:
        AssertionError: they are not, or some element is on no rank.
    """
    joined: dict[str, torch.Tensor] = {}
    for held in ranks:
        for name, (shape, offset, tensor) in held.items():
            target = joined.setdefault(name, torch.full(shape, torch.nan, dtype=tensor.dtype))[place(offset, tensor)]
            assert target.isnan().all() or torch.allclose(target, tensor, rtol=0, atol=1e-12), (
                f"{name} differs between ranks"
            )
            target.copy_(tensor)
    for name, tensor in joined.items():
        assert not tensor.isnan().any(), f"a part of {name} is on no rank"
    return joined
