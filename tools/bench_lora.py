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
from collections.abc import Sequence
from typing import Any

import torch

from mlora import LoraConfig
from mlora.dropout import MicroBatch, set_micro_batch
from mlora.train import OptimizerSettings, Trainer
from mlora_tools.bench_layers import (
    FFN,
    GROUPS,
    HEADS,
    HIDDEN,
    INPUTS,
    LAYERS,
    VOCAB,
    Layer,
    Step,
    adapter,
    graphed,
    held,
    in_plain_torch,
    launch_ms,
    layer_step,
    medians,
    prepared,
    seconds,
    transformer_config,
)
from mlora_tools.bench_linear import errors, inputs, linear_step, linears
from mlora_tools.bench_profile import profile_rows
from parallel.launch import distributed
from parallel.sizes import ParallelSizes

SECTIONS = ("layer", "graph", "shard", "linear", "peer", "model", "profile")


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
    first, second = (seconds(steps["LoRA r 16"]) for _ in range(2))
    times = medians(steps, rounds)
    rows = {"compilation of a layer's kernels, if not cached, s": first - second, "frozen layer, ms": times["frozen"]}
    rows |= {f"layer, {name}": time / times["frozen"] for name, time in times.items() if name != "frozen"}
    rows |= {f"launching a layer, {name}, ms": launch_ms(steps[name]) for name in ("frozen", "LoRA r 16")}
    activations = {name: held(models[name], tokens) for name in ("frozen", "LoRA r 16", "LoRA r 64")}
    rows |= {
        f"activation memory, {name}": size / activations["frozen"]
        for name, size in activations.items()
        if name != "frozen"
    }
    return rows


def graph_rows(rounds: int) -> dict[str, float]:
    """With CUDA graphs, where nothing waits for the CPU: few tokens, many, and one rank's piece at tensor parallel 8."""
    rows: dict[str, float] = {}
    r16 = {"LoRA r 16": adapter(16)}
    many = {f"LoRA r {rank}": adapter(rank) for rank in (16, 64, 128)}
    cases = (
        ("1024 tokens", 1, 1024, r16),
        ("8192 tokens", 1, 8192, many | {"LoRA r 16, dropout 0.1": adapter(16, lora_dropout=0.1)}),
        ("TP 8 shard shapes", 8, 8192, r16),
    )
    for name, shards, tokens, adapters in cases:
        steps = {"frozen": graphed(layer_step(prepared(Layer(shards), None), tokens))}
        steps |= {key: graphed(layer_step(prepared(Layer(shards), lora), tokens)) for key, lora in adapters.items()}
        times = medians(steps, rounds, inner=4, ahead_ms=1.0)
        rows |= {f"layer, {name}, CUDA graph, {key}": times[key] / times["frozen"] for key in adapters}
    return rows


def shard_rows(rounds: int) -> dict[str, float]:
    """One rank's piece at tensor parallel 8, compute only, launched one by one."""
    steps = {name: layer_step(prepared(Layer(8), lora), 8192) for name, lora in (("f", None), ("l", adapter(16)))}
    times = medians(steps, rounds, inner=6)
    return {"layer, TP 8 shard shapes, LoRA r 16": times["l"] / times["f"]}


def linear_rows(tokens: int, rounds: int) -> dict[str, float]:
    """Each linear alone, in CUDA graphs: ratios to frozen, and relative errors against float32, ours and the plain order's."""
    frozen, adapted = (linears(prepared(Layer(), lora).decoder.layers[0]) for lora in (None, adapter(16)))  # type: ignore[union-attr,index]
    plain = linears(prepared(Layer(), adapter(16)).decoder.layers[0])  # type: ignore[union-attr,index]
    rows: dict[str, float] = {}
    for name, linear in adapted.items():
        given = inputs(linear, tokens, INPUTS)
        steps = {
            "frozen": graphed(linear_step(frozen[name], *given)),
            "ours": graphed(linear_step(linear, *given)),
            "plain": graphed(in_plain_torch(linear_step(plain[name], *given))),
        }
        times = medians(steps, rounds, inner=8, ahead_ms=1.0)
        rows[f"{name}, CUDA graph, LoRA r 16"] = times["ours"] / times["frozen"]
        rows[f"{name}, CUDA graph, plain torch, r 16"] = times["plain"] / times["frozen"]
        for kind, (ours, theirs) in errors(linear, 1024).items():
            rows[f"{name}, error of {kind}, ours"] = ours
            rows[f"{name}, error of {kind}, plain bf16"] = theirs
    return rows


def profiles(tokens: int) -> dict[str, float]:
    """Where the time goes: in the layer, and in the linear of which LoRA is the greatest part."""
    models: dict[str, Any] = {"frozen": prepared(Layer(), None), "LoRA r 16": prepared(Layer(), adapter(16))}
    rows = profile_rows({name: layer_step(model, tokens) for name, model in models.items()})
    found = {name: linears(model.decoder.layers[0])["4096 -> 4096"] for name, model in models.items()}
    given = inputs(found["frozen"], tokens, INPUTS)
    alone = profile_rows({name: linear_step(linear, *given) for name, linear in found.items()})
    return rows | {f"4096 -> 4096: {name}": value for name, value in alone.items()}


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
    """A whole Llama-3-8B with random weights: tokens a second, and what the optimizer takes."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    ids = torch.randint(0, VOCAB, (1, tokens), device="cuda")
    position = torch.arange(tokens, device="cuda")[None]

    def model_of(lora: LoraConfig | None) -> Any:
        model: Any = GPTModel(
            config=transformer_config(layers),
            transformer_layer_spec=get_gpt_layer_with_transformer_engine_spec(),
            vocab_size=VOCAB,
            max_sequence_length=tokens,
            position_embedding_type="rope",
        )
        prepared(model, lora)
        model.embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
        return model

    name, rows = f"Llama-3-8B, {layers} layers", {}
    rates = {}
    for kind, lora in (("frozen", None), ("LoRA r 16", adapter(16))):
        model = model_of(lora)

        def step(i: int, model: Any = model) -> None:
            model(ids, position, None, labels=ids).mean().backward()

        rates[kind] = tokens / medians({kind: step}, 5, inner=1, ahead_ms=300.0)[kind] * 1e3
        rows[f"{name}, {kind}, tokens/s"] = rates[kind]
        if lora is not None:
            rows[f"{name}, LoRA / frozen"] = rates["LoRA r 16"] / rates["frozen"]
            rows |= {f"{name}, {key}": value for key, value in optimizer_rows(model).items()}
        del model, step
        torch.cuda.empty_cache()
    return rows


def optimizer_rows(model: Any) -> dict[str, float]:
    """A step of Megatron's distributed optimizer on an adapted model, on one rank, and what it adds to the memory."""
    for parameter in model.parameters():
        parameter.grad = None
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    trainer = Trainer([model], OptimizerSettings(lr=1e-4))

    def step(i: int) -> None:
        for chunk in trainer.wrapped:
            for buffer in chunk.buffers:
                buffer.grad_data.normal_()
        trainer.optimizer.step()

    time = medians({"step": step}, 5, inner=2)["step"]
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {
        "trainable parameters, millions": count / 1e6,
        "optimizer step, ms": time,
        "gradients and optimizer, MB": (torch.cuda.memory_allocated() - before) / 1e6,
    }


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
    if section == "linear":
        return linear_rows(arguments.tokens, arguments.rounds)
    if section == "profile":
        return profiles(arguments.tokens)
    if section == "peer":
        return peer_rows(arguments.tokens, arguments.rounds)
    return model_rows(arguments.tokens, arguments.layers)


if __name__ == "__main__":
    sys.exit(main())
