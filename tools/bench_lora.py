"""What LoRA costs over the frozen model: one table, on one GPU with Transformer Engine.

Every time is a median over interleaved rounds of forward and backward with the GPU kept busy, on random data, and is given as a
ratio to the frozen layer of the same run (its input gradient is computed, its weights' are not). A Llama-3-8B decoder layer in
bf16, 8192 tokens, HF-exact adapters (q, k, v and gate, up each with an A of their own) unless a row says otherwise.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

import mlora
from mlora import LoraConfig, te
from mlora.attach import factors
from mlora.dropout import MicroBatch, set_micro_batch
from parallel.launch import distributed
from parallel.sizes import ParallelSizes

HIDDEN, FFN, HEADS, GROUPS, WIDTH, LAYERS, VOCAB = 4096, 14336, 32, 8, 128, 32, 128256
INPUTS = 4  # rotating sets, so that no run finds its input in the cache
SECTIONS = ("layer", "graph", "shard", "peer", "model")
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

    def plain_step(i: int) -> None:
        with beside():
            step(i)

    return plain_step if plain else step


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
    return lambda i: graphs[i % INPUTS].replay()


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


def held(model: torch.nn.Module, tokens: int) -> float:
    """MB of activations that one layer holds between forward and backward."""
    x = torch.randn(tokens, 1, HIDDEN, device="cuda", dtype=torch.bfloat16).requires_grad_()
    model(x).sum().backward()
    before = torch.cuda.memory_allocated()
    y = model(x)
    after = torch.cuda.memory_allocated()
    del y
    return (after - before) / 1e6


def layer_rows(tokens: int, rounds: int) -> dict[str, float]:
    """The decoder layer's rows: ratios to frozen."""
    models = {
        "frozen": prepared(Layer(), None),
        "LoRA r 16": prepared(Layer(), adapter(16)),
        "LoRA r 64": prepared(Layer(), adapter(64)),
        "LoRA r 128": prepared(Layer(), adapter(128)),
        "LoRA r 16, dropout 0.1": prepared(Layer(), adapter(16, lora_dropout=0.1)),
        "LoRA r 16, shared A": prepared(Layer(), adapter(16, shared_A=True)),
    }
    steps = {name: layer_step(model, tokens) for name, model in models.items()}
    steps["plain torch, r 16"] = layer_step(prepared(Layer(), adapter(16)), tokens, plain=True)
    steps["full fine-tuning"] = layer_step(prepared(Layer(), None, trained=True), tokens)
    times = medians(steps, rounds)
    rows = {"frozen layer, ms": times["frozen"]}
    rows |= {f"layer, {name}": time / times["frozen"] for name, time in times.items() if name != "frozen"}
    activations = {name: held(models[name], tokens) for name in ("frozen", "LoRA r 16", "LoRA r 64")}
    rows |= {
        f"activation memory, {name}": size / activations["frozen"]
        for name, size in activations.items()
        if name != "frozen"
    }
    return rows


def graph_rows(rounds: int) -> dict[str, float]:
    """1024 tokens with CUDA graphs."""
    steps = {
        name: graphed(layer_step(prepared(Layer(), lora), 1024)) for name, lora in (("f", None), ("l", adapter(16)))
    }
    times = medians(steps, rounds, inner=8, ahead_ms=1.0)
    return {"layer, 1024 tokens, CUDA graph, LoRA r 16": times["l"] / times["f"]}


def shard_rows(rounds: int) -> dict[str, float]:
    """One rank's piece at tensor parallel 8, compute only."""
    steps = {name: layer_step(prepared(Layer(8), lora), 8192) for name, lora in (("f", None), ("l", adapter(16)))}
    times = medians(steps, rounds, inner=6)
    return {"layer, TP 8 shard shapes, LoRA r 16": times["l"] / times["f"]}


def peer_rows(tokens: int, rounds: int) -> dict[str, float]:
    """Hugging Face's layer and PEFT on it, where they are installed: ratios to Hugging Face's own frozen layer."""
    try:
        from peft import LoraConfig as PeftConfig
        from peft import get_peft_model
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        return {}
    shape = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        num_hidden_layers=1,
        vocab_size=1024,
        attn_implementation="sdpa",
    )
    ids = torch.randint(0, 1024, (1, tokens), device="cuda")
    dy = torch.randn(1, tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)

    def step_of(lora: bool) -> Step:
        model: Any = LlamaForCausalLM(shape).to("cuda", torch.bfloat16)
        body = model.model
        if lora:
            config = PeftConfig(r=16, target_modules="all-linear", init_lora_weights=False)
            body = get_peft_model(model, config, autocast_adapter_dtype=False).base_model.model.model
        else:
            model.requires_grad_(False)

        def step(i: int) -> None:
            embedded = body.embed_tokens(ids).detach().requires_grad_()
            body(inputs_embeds=embedded).last_hidden_state.backward(dy)

        return step

    times = medians({"f": step_of(False), "l": step_of(True)}, rounds)
    return {"HF frozen layer, ms": times["f"], "HF layer, PEFT bf16 r 16": times["l"] / times["f"]}


def model_rows(tokens: int, layers: int) -> dict[str, float]:
    """A whole Llama-3-8B with random weights: tokens a second."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    ids = torch.randint(0, VOCAB, (1, tokens), device="cuda")
    position = torch.arange(tokens, device="cuda")[None]

    def step_of(lora: LoraConfig | None) -> Step:
        model: Any = GPTModel(
            config=transformer_config(layers),
            transformer_layer_spec=get_gpt_layer_with_transformer_engine_spec(),
            vocab_size=VOCAB,
            max_sequence_length=tokens,
            position_embedding_type="rope",
        )
        prepared(model, lora)
        model.embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_())

        def step(i: int) -> None:
            model(ids, position, None, labels=ids).mean().backward()

        return step

    rows = {}
    for name, lora in (("frozen", None), ("LoRA r 16", adapter(16))):
        time = medians({name: step_of(lora)}, 5, inner=1, ahead_ms=300.0)[name]
        rows[f"Llama-3-8B, {layers} layers, {name}, tokens/s"] = tokens / time * 1e3
        torch.cuda.empty_cache()
    values = list(rows.values())
    return {**rows, f"Llama-3-8B, {layers} layers, LoRA / frozen": values[1] / values[0]}


def main(argv: Sequence[str] | None = None) -> int:
    """The benchmark's command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="of the decoder layer, default: %(default)s")
    parser.add_argument("--rounds", type=int, default=15, help="of each measurement, default: %(default)s")
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the whole model, default: %(default)s")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS, help="default: all of them")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("a GPU with Transformer Engine is needed")
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "python": platform.python_version()}
    everything: dict[str, str | float] = dict(about)
    if not arguments.json:
        print(", ".join(f"{key} {value}" for key, value in about.items()))
    with distributed(ParallelSizes()):
        set_micro_batch(MicroBatch(step=0, first_row=0))
        for section in arguments.sections:
            rows = _rows(section, arguments)
            everything |= rows
            for name, value in () if arguments.json else rows.items():
                print(f"{name:<52}{value:>12.4f}" if value < 100 else f"{name:<52}{value:>12.0f}", flush=True)
    if arguments.json:
        print(json.dumps(everything, indent=1))
    return 0


def _rows(section: str, arguments: argparse.Namespace) -> dict[str, float]:
    if section == "layer":
        return layer_rows(arguments.tokens, arguments.rounds)
    if section == "graph":
        return graph_rows(arguments.rounds)
    if section == "shard":
        return shard_rows(arguments.rounds)
    if section == "peer":
        return peer_rows(arguments.tokens, arguments.rounds)
    return model_rows(arguments.tokens, arguments.layers)


if __name__ == "__main__":
    sys.exit(main())
