"""The trainer's options for who computes the layers, and in what precision the base's products are."""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from mlora_tools.options import Help, UsageError

if TYPE_CHECKING:
    from mlora.families import Architecture
    from mlora.spec import TransformerImpl

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """layers"""

    transformer_impl: Annotated[
        Literal["local", "transformer_engine"] | None,
        Help(
            "whose layers (default: Transformer Engine's where it is installed, there is a GPU and it can hold the model)"
        ),
    ] = None
    fp8_format: Annotated[
        Literal["e4m3", "hybrid"] | None, Help("compute the base's products in FP8; the adapter stays in its own dtype")
    ] = None
    fp8_recipe: Annotated[
        Literal["delayed", "tensorwise", "blockwise", "mxfp8"], Help("how FP8's scales are found")
    ] = "delayed"
    fp8_param_gather: Annotated[bool, Help("hold the base's weights in FP8 too")] = False

    def __post_init__(self) -> None:
        if self.fp8_format is None and (self.fp8_param_gather or self.fp8_recipe != "delayed"):
            raise UsageError("--fp8-recipe and --fp8-param-gather go with --fp8-format")
        if self.fp8_format is not None and self.transformer_impl == "local":
            raise UsageError("--fp8-format needs --transformer-impl transformer_engine")

    def choose(self, architecture: "Architecture") -> "TransformerImpl":
        """The spec to build: the one asked for, or the fastest that can hold the model.

        Raises:
            UsageError: FP8 was asked for, and Transformer Engine cannot be used.
        """
        from mlora.spec import transformer_engine_obstacle

        if self.transformer_impl is not None:
            return self.transformer_impl
        why = transformer_engine_obstacle(architecture)
        if why is None:
            return "transformer_engine"
        if self.fp8_format is not None:
            raise UsageError(f"--fp8-format: {why}")
        logger.info("layers of Megatron's local spec: %s", why)
        return "local"

    def overrides(self) -> dict[str, Any]:
        """Fields of Megatron's TransformerConfig."""
        if self.fp8_format is None:
            return {}
        return {"fp8": self.fp8_format, "fp8_recipe": self.fp8_recipe, "fp8_param": self.fp8_param_gather}
