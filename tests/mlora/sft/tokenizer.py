"""Small tokenizers for tests, made here with the tokenizers library."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
TEXT = [
    "The quick brown fox jumps over the lazy dog.",
    "You are a helpful assistant. What is the capital of France? The capital of France is Paris.",
    "user\n\nassistant\n\nsystem\n\nHello, how are you today?\n\nI am fine, thank you!",
]


def byte_level(
    *, bos: bool = False, eos: bool = True, added: tuple[str, ...] = (), trim: bool = True
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with merges, such as Llama 3's and Qwen's.

    Args:
        bos: put BOS before every text.
        eos: whether there is an EOS token.
        added: further special tokens.
        trim: character offsets leave out the white space at either end of a token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=[BOS, EOS, PAD, *added],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    steps = [processors.ByteLevel(trim_offsets=trim)]
    if bos:
        steps.append(
            processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))])
        )
    tokenizer.post_processor = processors.Sequence(steps)
    names = {"bos_token": BOS, "pad_token": PAD} | ({"eos_token": EOS} if eos else {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=list(added), **names)


def metaspace(*, after: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer that marks word starts and puts BOS before a text, such as Llama 2's; ``after`` also puts EOS behind it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    alphabet = sorted({letter for text in TEXT for letter in text} | set("0123456789+=:"))
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", BOS, EOS, PAD], initial_alphabet=alphabet, show_progress=False
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    ids = [(name, tokenizer.token_to_id(name)) for name in (BOS, EOS)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}" if after else f"{BOS} $A", special_tokens=ids
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, unk_token="<unk>"
    )
