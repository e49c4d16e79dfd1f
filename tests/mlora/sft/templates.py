"""Chat templates of well-known formats, in a short form of our own. « and » stand around what the assistant says.

Each renders what the published template of its family renders for messages with text, without tools.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """A chat format.

    Attributes:
        marked: the template with « and ».
        special: its special tokens beside BOS, EOS and padding.
        system: whether it takes a system message.
    """

    marked: str
    special: tuple[str, ...]
    system: bool = True

    @property
    def template(self) -> str:
        """As it is published: without saying where the assistant speaks."""
        return re.sub("[«»]", "", self.marked)

    @property
    def with_generation(self) -> str:
        """With Hugging Face's markers."""
        marked = self.marked.replace("»\n", "»{{ '\n' }}")  # Jinja is set to drop a line's end behind a tag
        return marked.replace("«", "{% generation %}").replace("»", "{% endgeneration %}")


def _turns(user: str, assistant: str, prompt: str) -> str:
    """A template of two kinds of turns and a generation prompt."""
    return (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        + assistant
        + "{% else %}"
        + user
        + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}" + prompt + "{% endif %}"
    )


_ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% endfor %}"
)

_CHATML = _turns(
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n",
    "<|im_start|>assistant\n«{{ m.content }}<|im_end|>»\n",
    "<|im_start|>assistant\n",
)

CHATML = Format(_CHATML, ("<|im_start|>", "<|im_end|>"))

QWEN2_5 = Format(
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful "
    "assistant.<|im_end|>\n{% endif %}" + _CHATML,
    ("<|im_start|>", "<|im_end|>"),
)

# Thinking is dropped from turns before the last user message; the last answer always shows a place for it.
QWEN3 = Format(
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set parts = m.content.split('</think>') %}{% set answer = parts[-1].lstrip('\n') %}"
    "{% set thought = parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' %}"
    "<|im_start|>assistant\n«{% if loop.index0 > ns.last and (loop.last or thought) %}<think>\n{{ thought }}\n</think>\n\n"
    "{% endif %}{{ answer }}<|im_end|>»\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ("<|im_start|>", "<|im_end|>"),
)

LLAMA2 = Format(
    _ALTERNATING + "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content.strip() }} [/INST]"
    "{% else %} «{{ m.content.strip() }} </s>»{% endif %}{% endfor %}",
    (),
    system=False,
)

LLAMA3 = Format(
    "<s>"
    + _turns(
        "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n«{{ m.content | trim }}<|eot_id|>»",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)

MISTRAL = Format(
    "<s>"
    + _ALTERNATING
    + "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} «{{ m.content }}</s>»"
    "{% endif %}{% endfor %}",
    ("[INST]", "[/INST]"),
    system=False,
)

GEMMA = Format(
    "<s>"
    + _turns(
        "<start_of_turn>{{ m.role }}\n{{ m.content | trim }}<end_of_turn>\n",
        "<start_of_turn>model\n«{{ m.content | trim }}<end_of_turn>»\n",
        "<start_of_turn>model\n",
    ),
    ("<start_of_turn>", "<end_of_turn>"),
)

# EOS stands after the last turn only, so it closes none.
PHI3 = Format(
    _turns("<|{{ m.role }}|>\n{{ m.content }}<|end|>\n", "<|assistant|>\n«{{ m.content }}<|end|>»\n", "<|assistant|>\n")
    + "{% if not add_generation_prompt %}</s>{% endif %}",
    ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
)

# Without any special token: a turn is closed by its line's end.
PLAIN = Format(_turns("{{ m.role }}: {{ m.content }}\n", "assistant: «{{ m.content }}\n»", "assistant: "), ())

# Closed by a space, which stands before a special token: a token of its own.
SPACED = Format(
    _turns("<|{{ m.role }}|>{{ m.content }} ", "<|assistant|>«{{ m.content }} »", "<|assistant|>"),
    ("<|user|>", "<|assistant|>"),
)

FORMATS = {
    "chatml": CHATML,
    "qwen2.5": QWEN2_5,
    "qwen3": QWEN3,
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "phi3": PHI3,
    "plain": PLAIN,
    "spaced": SPACED,
}
