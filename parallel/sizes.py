"""The sizes of a parallel run: how many ranks each kind of parallelism takes."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ParallelSizes:
    """How a world of ranks is divided. Data parallelism takes what the others leave.

    Attributes:
        tensor: ranks that share each linear (Megatron's ``tensor_model_parallel_size``).
        pipeline: pipeline stages.
        virtual_pipeline: model chunks per stage of the interleaved schedule; None for the plain 1F1B schedule.
        sequence_parallel: activations outside the linears are cut along the sequence over the tensor-parallel ranks.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int | None = None
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        for field in ("tensor", "pipeline"):
            value = getattr(self, field)
            if value < 1:
                raise ValueError(f"{field} parallel size is {value}; it must be at least 1")
        if self.virtual_pipeline is not None:
            if self.virtual_pipeline < 2:
                raise ValueError(
                    f"virtual pipeline size is {self.virtual_pipeline}; it must be at least 2, or not given"
                )
            if self.pipeline < 2:
                raise ValueError("a virtual pipeline needs pipeline parallel size 2 or more")
        if self.sequence_parallel and self.tensor < 2:
            raise ValueError("sequence parallelism needs tensor parallel size 2 or more")

    def data(self, world_size: int) -> int:
        """The data-parallel size in a world of ``world_size`` ranks.

        Raises:
            ValueError: if the world does not divide into whole model replicas.
        """
        model = self.tensor * self.pipeline
        if world_size % model:
            raise ValueError(
                f"world size {world_size} does not fit tensor {self.tensor} x pipeline {self.pipeline} = {model} ranks a "
                f"model replica; start a multiple of {model} ranks or change the sizes"
            )
        return world_size // model
