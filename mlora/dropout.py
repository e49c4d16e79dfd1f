"""Dropout masks as a function of what they mask, so that they agree at every layout and in recomputation.

Whether feature f of token t is dropped depends only on (seed, step, module, t, f): t counts the tokens of the whole global batch
and f the features of the whole linear. A rank computes its own piece of the mask; nothing is stored or communicated, and the
backward pass computes it again.

Which step and tokens a forward pass sees is kept among the states of Megatron's random number tracker, because every
activation recomputation of Megatron's puts those states back before it runs the layer again.
"""

import hashlib
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

_STATE = "mlora-dropout"
_MASK32, _SIGN = 0xFFFFFFFF, 1 << 31


@dataclass(frozen=True)
class MicroBatch:
    """The tokens of one forward pass.

    Attributes:
        step: of the optimizer.
        first_row: number of the micro batch's first row in the global batch.
        row_length: tokens of a row where the rows stand one after another in one sequence; None where each row is a sequence.
    """

    step: int
    first_row: int
    row_length: int | None = None


def set_micro_batch(batch: MicroBatch) -> None:
    """Say which tokens the next forward pass holds. On this rank, for every chunk and adapter."""
    tracker = get_cuda_rng_tracker()
    state = torch.tensor([batch.step, batch.first_row, batch.row_length or 0], device="cpu")
    tracker.set_states({**tracker.get_states(), _STATE: state})


def current_micro_batch() -> MicroBatch:
    """The micro batch last set, or, during recomputation, the one that the layer saw at first.

    Raises:
        RuntimeError: if none was ever set, or a CUDA graph is being captured, which would repeat this step's masks for ever.
    """
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():  # type: ignore[no-untyped-call]
        raise RuntimeError(
            "a CUDA graph cannot hold dropout: its masks are a function of the step; set lora_dropout to 0, or capture no graph"
        )
    state = get_cuda_rng_tracker().get_states().get(_STATE)
    if state is None:
        raise RuntimeError(
            "dropout needs to know the micro batch: call mlora.set_micro_batch() before the forward pass"
        )
    step, first_row, row_length = state.tolist()
    return MicroBatch(step, first_row, row_length or None)


@dataclass(frozen=True)
class Dropout:
    """The mask of one module's input in one forward pass.

    Attributes:
        probability: of a zero.
        key: 64-bit key of (seed, step, module).
        first_row, length: the micro batch's first row in the global batch, and the tokens of a row.
    """

    probability: float
    key: int
    first_row: int
    length: int

    @classmethod
    def of(cls, probability: float, seed: int, module: str, length: int) -> "Dropout":
        """The mask of ``module``'s input in the current micro batch, of sequences of ``length`` tokens.

        Token t of a sequence that holds several rows is the token that it would be at its place in its row: a token's number in
        the global batch is ``first_row * length + t`` either way.
        """
        batch = current_micro_batch()
        digest = hashlib.sha256(f"{seed}/{batch.step}/{module}".encode()).digest()
        return cls(probability, int.from_bytes(digest[:8], "big"), batch.first_row, batch.row_length or length)

    def __call__(self, x: torch.Tensor, *, first_token: int = 0, first_feature: int = 0) -> torch.Tensor:
        """``x`` with dropped features at zero and the others divided by the probability of being kept.

        Args:
            x: [s, b, features], tokens ``first_token ...`` of each sequence and features ``first_feature ...`` of the whole.
        """
        kept = self.kept(x.shape, x.device, first_token=first_token, first_feature=first_feature)
        # The scale is no tensor: in x's dtype it would be off by 0.15 % in bfloat16 at probability 0.1.
        return torch.where(kept, x * (1 / (1 - self.probability)), 0)

    def kept(
        self, shape: torch.Size, device: torch.device, *, first_token: int = 0, first_feature: int = 0
    ) -> torch.Tensor:
        """What is not dropped, bool [s, b, features].

        Everything is 32-bit integers: element (t, f) is kept if ``c(h(t ^ low) ^ h(f ^ high)) >= probability * 2**32``, where
        low and high are the halves of the key, and c is h without its first and last step: what it is of is mixed already, and
        the last step changes the lower half alone.
        """
        tokens, rows, features = shape
        position = torch.arange(first_token, first_token + tokens, device=device)[:, None, None]
        row = torch.arange(self.first_row, self.first_row + rows, device=device)[:, None]
        feature = torch.arange(first_feature, first_feature + features, device=device)
        # Conversion keeps the low 32 bits; torch has no arithmetic on unsigned 32-bit integers.
        token_hash = _hash(((row * self.length + position) ^ (self.key & _MASK32)).to(torch.int32))
        feature_hash = _hash((feature ^ (self.key >> 32)).to(torch.int32))
        # torch compares int32 as signed: turning the sign bit of both sides makes that the unsigned order.
        return _combined(token_hash ^ feature_hash).bitwise_xor_(-_SIGN) >= int(self.probability * 2**32) - _SIGN


def _hash(x: torch.Tensor) -> torch.Tensor:
    """A 32-bit integer mixer (the multiplicative xorshift of C. Wellons' hash prospector), in place on an int32 tensor.

    In place and on 32 bits, this takes a sixth of the time and half of the memory that it takes on int64.
    """
    return _xor_shifted(_combined(_xor_shifted(x, 16)), 16)


def _combined(x: torch.Tensor) -> torch.Tensor:
    return _xor_shifted(x.mul_(0x7FEB352D), 15).mul_(0x846CA68B - 2 * _SIGN)


def _xor_shifted(x: torch.Tensor, by: int) -> torch.Tensor:
    return x.bitwise_xor_((x >> by).bitwise_and_(_MASK32 >> by))
