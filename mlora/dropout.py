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
_MASK32 = 0xFFFFFFFF


@dataclass(frozen=True)
class MicroBatch:
    """The tokens of one forward pass.

    Attributes:
        step: of the optimizer.
        first_row: number of the micro batch's first sequence in the global batch.
    """

    step: int
    first_row: int


def set_micro_batch(batch: MicroBatch) -> None:
    """Say which tokens the next forward pass holds. On this rank, for every chunk and adapter."""
    tracker = get_cuda_rng_tracker()
    tracker.set_states({**tracker.get_states(), _STATE: torch.tensor([batch.step, batch.first_row])})


def current_micro_batch() -> MicroBatch:
    """The micro batch last set, or, during recomputation, the one that the layer saw at first.

    Raises:
        RuntimeError: if none was ever set.
    """
    state = get_cuda_rng_tracker().get_states().get(_STATE)
    if state is None:
        raise RuntimeError(
            "dropout needs to know the micro batch: call mlora.set_micro_batch() before the forward pass"
        )
    step, first_row = state.tolist()
    return MicroBatch(step, first_row)


@dataclass(frozen=True)
class Dropout:
    """The mask of one module's input in one forward pass.

    Attributes:
        probability: of a zero.
        key: 64-bit key of (seed, step, module).
        first_row, length: the micro batch's first sequence in the global batch, and the whole sequence length.
    """

    probability: float
    key: int
    first_row: int
    length: int

    @classmethod
    def of(cls, probability: float, seed: int, module: str, length: int) -> "Dropout":
        """The mask of ``module``'s input in the current micro batch, of sequences of ``length`` tokens."""
        batch = current_micro_batch()
        digest = hashlib.sha256(f"{seed}/{batch.step}/{module}".encode()).digest()
        return cls(probability, int.from_bytes(digest[:8], "big"), batch.first_row, length)

    def __call__(self, x: torch.Tensor, *, first_token: int = 0, first_feature: int = 0) -> torch.Tensor:
        """``x`` with dropped features at zero and the others divided by the probability of being kept.

        Args:
            x: [s, b, features], tokens ``first_token ...`` of each sequence and features ``first_feature ...`` of the whole.
        """
        return x * self.mask(x, first_token=first_token, first_feature=first_feature)

    def mask(self, x: torch.Tensor, *, first_token: int = 0, first_feature: int = 0) -> torch.Tensor:
        """The factor that each element of ``x`` is multiplied with: 0 or 1 / (1 - probability)."""
        tokens, rows, features = x.shape
        position = torch.arange(first_token, first_token + tokens, device=x.device)[:, None]
        row = torch.arange(self.first_row, self.first_row + rows, device=x.device)[None, :]
        feature = torch.arange(first_feature, first_feature + features, device=x.device)
        token_hash = _hash((row * self.length + position) ^ (self.key & _MASK32))
        feature_hash = _hash(feature ^ (self.key >> 32))
        keep = _hash(token_hash[:, :, None] ^ feature_hash) >= int(self.probability * 2**32)
        return keep.to(x.dtype) / (1 - self.probability)


def _hash(x: torch.Tensor) -> torch.Tensor:
    """A 32-bit integer mixer (the multiplicative xorshift of C. Wellons' hash prospector), on int64 tensors."""
    x = x & _MASK32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK32
    return x ^ (x >> 16)
