"""Tiny random Hugging Face models on disk: every family and every way in which one family's checkpoints differ.

They are made to tell apart what a wrong loader would mix up: grouped-query attention (8 heads in 4 groups, of a width that is not
hidden / heads where the family allows it), biases and norms that are not at their neutral start, a vocabulary that has to be
padded at any tensor parallel size, several safetensors files.
"""

from pathlib import Path
from typing import Any

import torch

VOCAB, HIDDEN, LAYERS, HEADS, GROUPS = 101, 32, 4, 8, 4

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "max_position_embeddings": 128,
}
# Short enough that within 64 tokens some wavelengths are kept, some blended and some stretched.
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# 64 tokens are short enough for the angles of short sequences. Half of each head is rotated.
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "short_factor": [1.0, 1.5],
    "long_factor": [2.0, 4.0],
    "original_max_position_embeddings": 64,
    "partial_rotary_factor": 0.5,
}
_GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 2.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
}
# Windows of less than a sequence; caps and scales that bend scores and logits, and are not those of a head's or layer's width.
_GEMMA: dict[str, Any] = {
    "head_dim": 16,
    "sliding_window": 12,
    "query_pre_attn_scalar": 25,
    "final_logit_softcapping": 2.0,
}
# Kind -> (model_type, what differs from the common shape).
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama3.1": ("llama", {"head_dim": 16, "rope_parameters": _LLAMA3_ROPE}),
    "llama-linear-rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}}),
    "llama-attention-bias": ("llama", {"attention_bias": True}),
    "llama-mlp-bias": ("llama", {"mlp_bias": True}),
    "llama-all-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-bias": ("qwen3", {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"head_dim": 16, "sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 12}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2}),
    "phi3": ("phi3", {"pad_token_id": None, "eos_token_id": None}),
    "phi3-longrope": (
        "phi3",
        {
            "pad_token_id": None,
            "eos_token_id": None,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": _LONGROPE,
            "original_max_position_embeddings": 64,
            "sliding_window": 20,
        },
    ),
    "gemma2": ("gemma2", {**_GEMMA, "attn_logit_softcapping": 1.5}),
    "gemma2-untied": (
        "gemma2",
        {**_GEMMA, "attn_logit_softcapping": None, "tie_word_embeddings": False, "attention_bias": True},
    ),
    "gemma3": ("gemma3_text", {**_GEMMA, "rope_parameters": _GEMMA3_ROPE, "sliding_window_pattern": 3}),
    "olmo2": ("olmo2", {}),
    "olmo2-bias": ("olmo2", {"attention_bias": True, "num_key_value_heads": HEADS}),
}


def make_model(kind: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A ``transformers`` model of ``kind`` in evaluation mode; ``changes`` are fields of its configuration."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, fields = KINDS[kind]
    config = AutoConfig.for_model(model_type, **{**_SHAPE, **fields, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # A matrix keeps the size of what it multiplies; a norm stays near one; a bias is large enough to matter.
            matrix = parameter.dim() == 2
            parameter.copy_(noise / parameter.shape[-1] ** 0.5 if matrix else parameter.round() + 0.3 * noise)
    return model


def write_model(
    path: Path,
    kind: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "20KB",
    **changes: Any,
) -> Path:
    """Write a model of ``kind`` to the directory ``path`` and return it.

    Args:
        seed: of the weights; the same seed gives the same bytes.
        shard_size: of a safetensors file; "1GB" gives one file without an index.
        changes: fields of the configuration.
    """
    make_model(kind, seed=seed, dtype=dtype, **changes).save_pretrained(path, max_shard_size=shard_size)
    return path


def tokens(rows: int = 2, length: int = 48, *, vocab: int = VOCAB, seed: int = 1) -> torch.Tensor:
    """Random token ids, int64 [rows, length]."""
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def hf_logits(path: Path, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Hugging Face's logits for ids [b, s], [b, s, vocab]: what a loaded model must give."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()
    logits: torch.Tensor = model(ids).logits
    return logits
