"""Two adapters are the same if they add the same to the base, and every way in which they are not has a name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlora.conversion import open_adapter
from mlora.conversion.delta import product_norm
from mlora.conversion.difference import Difference, compare
from tests.mlora.conversion.adapters import DOWN, PREFIX, SMALL, Q, tensors_of, write_adapter

A_KEY, B_KEY = f"{PREFIX}{Q}.lora_A.weight", f"{PREFIX}{Q}.lora_B.weight"


def differ(first: Path, second: Path) -> dict[str, Difference]:
    found = compare(open_adapter(first), open_adapter(second))
    assert {difference.name: difference.relative for difference in found} == pytest.approx(
        {difference.name: difference.relative for difference in compare(open_adapter(second), open_adapter(first))},
        rel=1e-6,
    )
    return {difference.name: difference for difference in found}


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "plain")


def test_identical_matrices_are_exactly_the_same(plain: Path, tmp_path: Path) -> None:
    other = write_adapter(tmp_path / "other", pickled=True)
    assert [difference.relative for difference in differ(plain, other).values()] == [0.0, 0.0]


def test_the_same_product_from_other_factors(plain: Path, tmp_path: Path) -> None:
    """Another rank, another scaling, rotated factors."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for key, value in tensors_of(*SMALL).items():
        value = value.double()
        mix = torch.tensor([[2.0, 1.0], [-1.0, 3.0]], dtype=torch.float64)
        pad = torch.randn(value.shape[0], 3, generator=generator, dtype=torch.float64)
        if "lora_A" in key:
            tensors[key] = torch.cat(
                [torch.linalg.solve(mix, value), torch.zeros(3, value.shape[1], dtype=torch.float64)]
            )
        else:
            tensors[key] = torch.cat([value @ mix * 2, pad], 1)
    other = write_adapter(tmp_path / "other", tensors, r=5, lora_alpha=5, use_rslora=False)
    assert max(difference.relative for difference in differ(plain, other).values()) < 1e-15


@settings(max_examples=50, deadline=None)
@given(noise=st.floats(-12, 0).map(lambda power: 10**power), seed=st.integers(0, 1000))
def test_the_number_is_the_norm_of_the_difference(noise: float, seed: int) -> None:
    """Also far below what squared norms could show."""
    generator = torch.Generator().manual_seed(seed)
    B, A, change = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((9, 3), (3, 7), (9, 3)))
    exact = noise * torch.linalg.matrix_norm(change @ A)
    found = product_norm(torch.cat([B + noise * change, -B], 1), torch.cat([A, A]))
    assert found == pytest.approx(float(exact), rel=1e-6, abs=1e-13)


def test_a_changed_element_is_found_and_measured(plain: Path, tmp_path: Path) -> None:
    tensors = tensors_of(*SMALL)
    before = tensors[B_KEY] @ tensors[A_KEY]
    tensors[B_KEY][2, 1] += 0.01
    found = differ(plain, write_adapter(tmp_path / "other", tensors))
    after = tensors[B_KEY] @ tensors[A_KEY]
    assert found[DOWN].relative == 0
    assert found[Q].relative == pytest.approx(
        float((after - before).norm() / max(after.norm(), before.norm())), rel=1e-4
    )


@pytest.mark.parametrize(
    ("config", "relative"), [({"lora_alpha": 8}, 0.5), ({"use_rslora": True}, 1 - 0.5**0.5), ({"lora_alpha": -4}, 2.0)]
)
def test_another_scaling_is_another_adapter(plain: Path, tmp_path: Path, config: Any, relative: float) -> None:
    found = differ(plain, write_adapter(tmp_path / "other", **config))
    assert [difference.relative for difference in found.values()] == pytest.approx([relative] * 2)


def test_a_module_of_one_only_is_compared_with_zero(plain: Path, tmp_path: Path) -> None:
    tensors = tensors_of(*SMALL)
    alone = {key: value for key, value in tensors.items() if Q in key}
    found = differ(plain, write_adapter(tmp_path / "other", alone))
    assert (found[Q].relative, found[DOWN].relative, found[DOWN].why) == (0, 1, "only in the first")
    zeroed = tensors | {f"{PREFIX}{DOWN}.lora_B.weight": torch.zeros(5, 2)}
    found = differ(tmp_path / "other", write_adapter(tmp_path / "zeroed", zeroed))
    assert found[DOWN].relative == 0


def test_shapes_dora_and_whole_parameters(plain: Path, tmp_path: Path) -> None:
    wide = write_adapter(tmp_path / "wide", tensors_of((Q, 2, 6, 6), SMALL[1]))
    assert differ(plain, wide)[Q] == Difference(Q, float("inf"), "shapes [6, 5] and [6, 6]")
    magnitudes = {
        f"{PREFIX}{Q}.lora_magnitude_vector": torch.ones(6),
        f"{PREFIX}{DOWN}.lora_magnitude_vector": torch.ones(5),
    }
    dora = write_adapter(tmp_path / "dora", tensors_of(*SMALL) | magnitudes, use_dora=True)
    assert "DoRA only in the" in differ(plain, dora)[Q].why and differ(plain, dora)[Q].relative == float("inf")
    magnitudes[f"{PREFIX}{Q}.lora_magnitude_vector"] = torch.full((6,), 1.25)
    other = write_adapter(tmp_path / "other", tensors_of(*SMALL) | magnitudes, use_dora=True)
    assert differ(dora, other)[Q] == Difference(Q, pytest.approx(0.2), "magnitude")
    assert differ(dora, other)[DOWN].relative == 0
    paths = []
    for number, head in enumerate((torch.ones(3, 4), torch.ones(3, 4) * 1.1, torch.ones(3, 5), None)):
        extra = {} if head is None else {f"{PREFIX}lm_head.weight": head}
        saved = [] if head is None else ["lm_head"]
        paths.append(write_adapter(tmp_path / f"head{number}", tensors_of(*SMALL) | extra, modules_to_save=saved))
    relative = [differ(paths[0], path)["lm_head.weight"].relative for path in paths]
    assert relative == pytest.approx([0, 1 - 1 / 1.1, float("inf"), float("inf")], rel=1e-5)


def test_an_embedding_and_the_linear_that_is_its_transpose(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(2, 5, generator=generator), torch.randn(6, 2, generator=generator)
    linear = write_adapter(
        tmp_path / "linear", {f"{PREFIX}x.lora_A.weight": A, f"{PREFIX}x.lora_B.weight": B}, target_modules=["x"]
    )
    tensors = {f"{PREFIX}x.lora_embedding_A": B.T.contiguous(), f"{PREFIX}x.lora_embedding_B": A.T.contiguous()}
    embedding = write_adapter(tmp_path / "embedding", tensors, target_modules=["x"])
    assert differ(linear, embedding)["x"].relative < 1e-15


def test_progress_counts_the_first(plain: Path) -> None:
    seen: list[int] = []
    state = open_adapter(plain)
    compare(state, state, seen.append)
    assert sum(seen) == sum(tensor.nbytes for tensor in state.tensors) > 0
    assert json.loads((plain / "adapter_config.json").read_text())["r"] == 2
