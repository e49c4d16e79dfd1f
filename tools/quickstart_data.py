"""The quickstart's data and base model, made from text that every Python installation carries.

It reads the running Python's standard library sources and makes from them:

- instruction pairs: a function's signature -> the first line of its docstring (train and held-out);
- a byte-level BPE tokenizer;
- a small Llama-style base model, pre-trained for less than a minute on the sources themselves.

The base never sees the instruction format, nor the docstring of any held-out function. This file knows
nothing of LoRA, Megatron or process groups.
"""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import math
import platform
import shutil
import sysconfig
import textwrap
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"}
BOS, EOS, PAD = "<s>", "</s>", "<pad>"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what the base model and the data are; a change of any field makes them anew."""

    python: str = platform.python_version()
    heldout_percent: int = 4
    heldout_pairs: int = 128
    max_pair_tokens: int = 64
    vocab_size: int = 2000  # not a multiple of 128 * 2, so that the trainer has to pad it
    hidden_size: int = 128
    intermediate_size: int = 384
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    context: int = 128
    pretrain_steps: int = 420
    pretrain_batch: int = 8
    muon_lr: float = 0.02
    adamw_lr: float = 4e-3
    seed: int = 1234


@dataclass(frozen=True)
class Pair:
    """One instruction pair; `prompt` ends where `completion` starts."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Corpus:
    """Pairs on either side of the split, and excerpts of the sources without the held-out functions."""

    train: list[Pair]
    heldout: list[Pair]
    text: list[str]


def _is_heldout(pair: Pair, recipe: Recipe) -> bool:
    """The side of a pair, from a hash of its completion: the same on every machine and in every run."""
    digest = hashlib.sha256(pair.completion.lower().encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < recipe.heldout_percent


def _source_files() -> Iterator[tuple[str, str]]:
    """(dotted module name, source) of every readable standard library file, in the order of their paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if not SKIPPED_FOLDERS & set(parts):
            try:
                yield ".".join(parts).removesuffix(".__init__"), path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue


def _functions(node: ast.AST, scope: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """(qualified name, definition) of every function and method below `node`, nested ones included."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{scope}.{child.name}"
            if not isinstance(child, ast.ClassDef):
                yield name, child
            yield from _functions(child, name)
        else:
            yield from _functions(child, scope)


def _pair(name: str, function: ast.FunctionDef | ast.AsyncFunctionDef) -> Pair | None:
    """The function's pair, or None where its docstring does not start with a sentence."""
    lines = (ast.get_docstring(function) or "").splitlines()
    first = lines[0].strip() if lines else ""
    if not (first.isascii() and first[:1].isupper() and 12 <= len(first) <= 100 and " " in first):
        return None
    return Pair(f"### Signature\n{name}({ast.unparse(function.args)})\n### Summary\n", first)


def _excerpt(name: str, function: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    """The definition as it stands in the source: head, at most 5 lines of docstring, 1 line of the body."""
    docstring = function.body[0]
    end = docstring.end_lineno or docstring.lineno
    shown = lines[function.lineno - 1 : min(end, docstring.lineno + 4)] + lines[end : end + 1]
    return f"# {name}\n" + textwrap.dedent("\n".join(shown)).rstrip() + "\n"


def read_corpus(recipe: Recipe) -> Corpus:
    """Reads the standard library into pairs and text.

    The side of a pair is a function of its completion only, so functions that share a summary line share a
    side; a prompt that occurs twice counts once. The text is of every documented function not held out.
    """
    pairs: dict[str, Pair] = {}
    texts: list[str] = []
    for module, source in _source_files():
        try:
            functions = list(_functions(ast.parse(source), module))
        except (SyntaxError, ValueError):
            continue
        lines = source.splitlines()
        for name, function in functions:
            pair = _pair(name, function)
            if pair is not None:
                pairs.setdefault(pair.prompt, pair)
            if ast.get_docstring(function) and not (pair and _is_heldout(pair, recipe)):
                texts.append(_excerpt(name, function, lines))
    heldout = [pair for pair in pairs.values() if _is_heldout(pair, recipe)]
    return Corpus([pair for pair in pairs.values() if not _is_heldout(pair, recipe)], heldout, texts)


def train_tokenizer(corpus: Corpus, recipe: Recipe) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `recipe.vocab_size` entries, trained on the text of the corpus."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.text, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)
    if len(fast) != recipe.vocab_size:
        raise ValueError(f"the text is too short for {recipe.vocab_size} tokens: it gave {len(fast)}")
    return fast


def _fitting(pairs: list[Pair], tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> list[Pair]:
    """Pairs that fit `recipe.max_pair_tokens` with EOS, in the order of their prompts' hashes."""
    ordered = sorted(pairs, key=lambda pair: hashlib.sha256(pair.prompt.encode()).digest())

    def length(pair: Pair) -> int:
        return sum(len(tokenizer(text)["input_ids"]) for text in (pair.prompt, pair.completion)) + 1

    return [pair for pair in ordered if length(pair) <= recipe.max_pair_tokens]


def _windows(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> torch.Tensor:
    """The text as token ids `[windows, context]`, each excerpt ending with EOS; a short rest is dropped."""
    eos = tokenizer.convert_tokens_to_ids(EOS)
    ids: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch_fast(corpus.text, add_special_tokens=False):
        ids += encoding.ids
        ids.append(eos)
    whole = len(ids) // recipe.context
    return torch.tensor(ids[: whole * recipe.context]).view(whole, recipe.context)


def _schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate: linear warm-up over the first 10 %, then a cosine down to 5 %."""
    warmup = max(steps // 10, 1)
    if step < warmup:
        return (step + 1) / warmup
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def _optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest: in few steps that gets further than AdamW alone."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for n, p in model.named_parameters() if p.ndim < 2 or ".layers." not in n]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=recipe.muon_lr, weight_decay=0.05),
        torch.optim.AdamW(others, lr=recipe.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def _new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.convert_tokens_to_ids(BOS),
        eos_token_id=tokenizer.convert_tokens_to_ids(EOS),
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
    )
    return LlamaForCausalLM(config)


def pretrain(windows: torch.Tensor, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> LlamaForCausalLM:
    """Trains a new model on random windows `[batch, context]` of the text; fp32, next-token loss."""
    model = _new_model(recipe, tokenizer)
    model.train()
    optimizers = _optimizers(model, recipe)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(recipe.seed))
    started = time.monotonic()
    for step in range(recipe.pretrain_steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * _schedule(step, recipe.pretrain_steps)
        rows = order[torch.arange(step * recipe.pretrain_batch, (step + 1) * recipe.pretrain_batch) % len(order)]
        batch = windows[rows]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 70 == 0 or step + 1 == recipe.pretrain_steps:
            seconds = time.monotonic() - started
            logger.info(
                "   base: step %3d of %d, loss %.2f, %2.0f s",
                step + 1,
                recipe.pretrain_steps,
                loss.item(),
                seconds,
            )
    return model.eval()


def _write_pairs(path: Path, pairs: list[Pair]) -> None:
    path.write_text("".join(json.dumps(asdict(pair)) + "\n" for pair in pairs), encoding="utf-8")


def prepare(folder: Path, recipe: Recipe, *, fresh: bool = False) -> bool:
    """Makes `folder` with `train.jsonl`, `heldout.jsonl`, `base/` (Hugging Face format) and `recipe.json`.

    Returns whether it was made now: a folder made from the same recipe is kept unless `fresh`. It is made
    under a temporary name and renamed, so a folder that exists is whole.
    """
    made_from = folder / "recipe.json"
    if not fresh and made_from.is_file() and json.loads(made_from.read_text("utf-8")) == asdict(recipe):
        return False
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    building = folder.with_name(folder.name + ".building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)

    corpus = read_corpus(recipe)
    tokenizer = train_tokenizer(corpus, recipe)
    train = _fitting(corpus.train, tokenizer, recipe)
    heldout = _fitting(corpus.heldout, tokenizer, recipe)[: recipe.heldout_pairs]
    _write_pairs(building / "train.jsonl", train)
    _write_pairs(building / "heldout.jsonl", heldout)
    windows = _windows(corpus, tokenizer, recipe)
    counts = len(train), len(heldout), windows.numel()
    logger.info("   %d train pairs, %d held-out pairs, %d tokens of text", *counts)

    model = pretrain(windows, tokenizer, recipe)
    model.save_pretrained(building / "base", max_shard_size="3MB")
    tokenizer.save_pretrained(building / "base")
    (building / "recipe.json").write_text(json.dumps(asdict(recipe), indent=1), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    building.rename(folder)
    return True
