"""The trainer's options for who computes the layers, and in what precision the base's products are."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from mlora_tools.options import Help, UsageError


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """layers"""

    transformer_impl: Annotated[
        Literal["local", "transformer_engine"],
        Help(
            "whose layers: Megatron's own, or Transformer Engine's, in which the adapter runs inside the base's products"
        ),
    ] = "local"
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

    def overrides(self) -> dict[str, Any]:
        """Fields of Megatron's TransformerConfig."""
        if self.fp8_format is None:
            return {}
        return {"fp8": self.fp8_format, "fp8_recipe": self.fp8_recipe, "fp8_param": self.fp8_param_gather}
