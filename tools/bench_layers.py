"""What :mod:`bench_lora` times: Llama-3-8B's layer on Transformer Engine, adapted or not, and how a time is taken."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

import mlora
from mlora import LoraConfig, dropout, te
from mlora.attach import factors

HIDDEN, FFN, HEADS, GROUPS, WIDTH, LAYERS, VOCAB = 4096, 14336, 32, 8, 128, 32, 128256
INPUTS = 4  # rotating sets, so that no run finds its input in the cache
Step = Callable[[int], None]


def transformer_config(layers: int = 1, shards: int = 1) -> Any:
    """Llama-3-8B's, or one tensor-parallel rank's piece of it for ``shards`` ranks."""
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(
        num_layers=layers,
        hidden_size=HIDDEN,
        ffn_hidden_size=FFN // shards,
        num_attention_heads=HEADS // shards,
        num_query_groups=GROUPS // shards,
        kv_channels=WIDTH,
        normalization="RMSNorm",
        layernorm_epsilon=1e-5,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        calculate_per_token_loss=True,
        bf16=True,
        params_dtype=torch.bfloat16,
        bias_activation_fusion=True,
        bias_dropout_fusion=True,
        apply_rope_fusion=True,
    )


class Layer(torch.nn.Module):
    """One decoder layer of Transformer Engine's spec under the names that a whole model has."""

    def __init__(self, shards: int = 1) -> None:
        from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
        from megatron.core.transformer.spec_utils import build_module

        super().__init__()
        self.config = transformer_config(shards=shards)
        layer = build_module(get_gpt_layer_with_transformer_engine_spec(), config=self.config, layer_number=1)
        self.decoder = torch.nn.Module()
        self.decoder.layers = torch.nn.ModuleList([layer])
        self.rope = RotaryEmbedding(WIDTH, 1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, 1, h] -> [T, 1, h]."""
        layers: Any = self.decoder.layers
        output: torch.Tensor = layers[0](x, attention_mask=None, rotary_pos_emb=self.rope(x.shape[0]))[0]
        return output


def prepared(model: torch.nn.Module, lora: LoraConfig | None, trained: bool = False) -> torch.nn.Module:
    """``model`` with random weights on the GPU, adapted (B not zero) or frozen, or with ``trained`` neither."""
    torch.manual_seed(0)
    model.cuda()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.02)
    if lora is not None:
        mlora.apply([model], lora)
        with torch.no_grad():
            for factor in factors([model]):
                factor.parameter.normal_(0, 0.02)
    elif not trained:
        model.requires_grad_(False)
    return model


def adapter(rank: int = 16, **fields: Any) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=rank, **fields)


@contextmanager
def beside() -> Iterator[None]:
    """The plain torch way for every linear while it lasts: PEFT's order of operations."""
    rules = te._RULES
    te._RULES = [(lambda module, adapter: False, "the benchmark asks for the plain way")]
    try:
        yield
    finally:
        te._RULES = rules


def layer_step(model: torch.nn.Module, tokens: int, plain: bool = False) -> Step:
    """Forward and backward of a layer on input number i."""
    xs = [torch.randn(tokens, 1, HIDDEN, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(INPUTS)]
    dys = [torch.randn_like(x) for x in xs]

    def step(i: int) -> None:
        x = xs[i % INPUTS]
        x.grad = None
        model(x).backward(dys[i % INPUTS])
        for parameter in model.parameters():
            parameter.grad = None

    return in_plain_torch(step) if plain else step


def in_plain_torch(step: Step) -> Step:
    """``step`` with every linear on the plain way."""

    def plain_step(i: int) -> None:
        with beside():
            step(i)

    return plain_step


@contextmanager
def one_mask() -> Iterator[None]:
    """Dropout's masks are those of one step while it lasts, so that a CUDA graph can hold them: good for a time alone."""
    ask, now = dropout.current_micro_batch, dropout.current_micro_batch()
    dropout.current_micro_batch = lambda: now
    try:
        yield
    finally:
        dropout.current_micro_batch = ask


@one_mask()
def graphed(step: Step) -> Step:
    """``step`` as a CUDA graph for each input."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(INPUTS):
            step(i)
    torch.cuda.current_stream().wait_stream(stream)
    graphs = [torch.cuda.CUDAGraph() for _ in range(INPUTS)]
    for i, graph in enumerate(graphs):
        with torch.cuda.graph(graph):
            step(i)
    # A graph knows addresses only: what it was captured from must stay.
    return lambda i, held=step: graphs[i % INPUTS].replay()  # type: ignore[misc]


def medians(steps: Mapping[str, Step], rounds: int, inner: int = 4, ahead_ms: float = 40.0) -> dict[str, float]:
    """Milliseconds of each step. The GPU sleeps ``ahead_ms`` first, so that the CPU is ahead of it all the time."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 2):
        for name, step in steps.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            torch.cuda._sleep(int(ahead_ms * 1.8e6))  # type: ignore[no-untyped-call]
            begin.record()
            for i in range(inner):
                step(i)
            end.record()
            torch.cuda.synchronize()
            if number >= 2:
                times[name].append(begin.elapsed_time(end) / inner)
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


def launch_ms(step: Step, count: int = 4) -> float:
    """Milliseconds in which the CPU launches a step, while the GPU sleeps."""
    torch.cuda.synchronize()
    torch.cuda._sleep(int(100 * 1.8e6))  # type: ignore[no-untyped-call]
    begin = time.perf_counter()
    for i in range(count):
        step(i)
    taken = time.perf_counter() - begin
    torch.cuda.synchronize()
    return taken / count * 1e3


def seconds(step: Step) -> float:
    """Of one step, the CPU's work included."""
    begin = time.perf_counter()
    step(0)
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def held(model: torch.nn.Module, tokens: int) -> float:
    """MB of activations that one layer holds between forward and backward."""
    x = torch.randn(tokens, 1, HIDDEN, device="cuda", dtype=torch.bfloat16).requires_grad_()
    model(x).sum().backward()
    before = torch.cuda.memory_allocated()
    y = model(x)
    after = torch.cuda.memory_allocated()
    del y
    return (after - before) / 1e6
