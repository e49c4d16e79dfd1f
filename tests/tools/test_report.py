"""The page of a run: what stands on it, that it needs nothing else, and that it works in a browser."""

import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlora_tools.charts import smoothed
from mlora_tools.report import main

LAYERS = 12
LINEARS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def _records(iterations: int) -> Iterator[dict[str, Any]]:
    for number in range(1, iterations + 1):
        yield {
            **{"iteration": number, "loss": 1 + 2 * math.exp(-number / 20), "grad_norm": 0.5, "lr": 2e-4 / number},
            **{
                "tokens": 4096,
                "seconds": 90.0,
                "tokens_per_second": 15_000.5 + number,
                "peak_memory": 61_000_000_000 + number,
            },
        }
        if number % 20 == 0:
            yield {"iteration": number, "eval_loss": 1.1 + 2 * math.exp(-number / 20)}
            norms = {
                f"model.layers.{layer}.{linear}": {"A": 3.0, "B": 0.1, "BA": number * (1 + layer) / 1e4, "W": 50.0}
                for layer in range(LAYERS)
                for linear in LINEARS
            }
            yield {"iteration": number, "adapter_norms": norms}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two hosts that is still going on, with a name that is no HTML."""
    path = tmp_path / "a<b>&run"
    path.mkdir()
    lines = [json.dumps(record) for record in _records(60)]
    (path / "metrics.jsonl").write_text("\n".join([*lines, '{"iteration": 61, "lo']))
    start = {
        **{"iteration": 0, "time": "2026-01-02T03:04:05+0000", "world_size": 8, "tensor": 2, "pipeline": 2, "data": 2},
        **{"sequence_parallel": True, "virtual_pipeline": None, "device": "NVIDIA H100", "backend": "nccl"},
    }
    config = {
        "arguments": {
            "objective": "sft",
            "data": ["train.jsonl"],
            "eval_data": [],
            "global_batch_size": 128,
            "seq_length": 4096,
            "bf16": True,
        },
        "settings": {},
        "train_iters": 100,
        "base": {"path": "/models/<script>alert(1)</script>", "model_type": "llama"},
        "data": {"rows": 1000},
        "eval_data": None,
        "lora": {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]},
        "parameters": {"trainable": 41_943_040, "total": 8_072_204_288},
        "starts": [{**start, "versions": {"torch": "2.13.0"}}],
    }
    (path / "config.json").write_text(json.dumps(config))
    flow = {"kind": "all_reduce", "axis": "tensor model parallel", "size": 2, "direction": "forward"}
    ranks = [
        {
            **{"rank": rank, "host": f"node{rank // 4}", "device": "NVIDIA H100"},
            **{"tensor": rank % 2, "pipeline": rank // 4, "data": rank // 2 % 2},
            "collectives": [{**flow, "count": 64 + rank // 4, "bytes": 2_000_000_000 + rank}],
        }
        for rank in range(8)
    ]
    (path / "ranks.json").write_text(json.dumps({"iteration": 1, "ranks": ranks}))
    return path


def page(run: Path, *words: str) -> str:
    assert main([str(run), *words]) == 0
    return (run / "report.html").read_text(encoding="utf-8")


def test_everything_is_on_the_page_and_nothing_is_elsewhere(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = page(run)
    for words in (
        *("iteration 60 of 100, last written", "<b>Loss</b>", "<b>Gradient norm</b>", "<b>Learning rate</b>"),
        *("<b>Throughput</b>", "<b>Memory</b>", "61 GB", "41,943,040", "0.520% of 8.07 billion"),
        *("a&lt;b&gt;&amp;run", "/models/&lt;script&gt;alert(1)", "r 16, lora_alpha 32", "train.jsonl (1,000 rows)"),
        *("TP 2 × PP 2 × DP 2, sequence parallel", "NVIDIA H100, nccl", "2026-01-02 03:04", "2.13.0"),
        *("<h3>node0</h3>", "<h3>node1</h3>", "T1 P1 D1", "all-reduce", "64 to 65", "2 GB"),
        *("of 100; 1:00:00 left", "Line 67 of metrics.jsonl, its last, is half a record"),
    ):
        assert words in text, words
    assert "<script>alert" not in text
    assert not re.search(r"https?://|@import|url\(|\bsrc=|<link(?! rel=\"icon\" href=\"data:)", text)
    assert [int(number) for number in re.findall(r'<th scope="col">(\d+)</th>', text)] == list(range(LAYERS))
    out = capsys.readouterr()
    assert out.out == f"{run / 'report.html'}\n" and "note: Line 67 of metrics.jsonl" in out.err
    assert sorted(path.name for path in run.iterdir()) == ["config.json", "metrics.jsonl", "ranks.json", "report.html"]


def test_each_file_may_be_missing(run: Path, tmp_path: Path) -> None:
    for name, lost, kept in (
        ("config.json", "TP 2", "<b>Loss</b>"),
        ("metrics.jsonl", "<b>Loss</b>", "TP 2"),
        ("ranks.json", "<h3>node0</h3>", "<b>Loss</b>"),
    ):
        other = tmp_path / name.partition(".")[0]
        shutil.copytree(run, other)
        (other / name).unlink()
        text = page(other)
        assert f"{name} is missing" in text and lost not in text and kept in text


def test_a_run_without_norms_says_how_to_get_them(run: Path) -> None:
    kept = [line for line in (run / "metrics.jsonl").read_text().splitlines() if "adapter_norms" not in line]
    (run / "metrics.jsonl").write_text("\n".join(kept[:-1]) + "\n")
    assert "--log-adapter-norms-interval N records them" in page(run)


def test_a_run_on_pairs_shows_its_rewards(run: Path) -> None:
    assert "nats per target token" in page(run) and "<b>Reward margin</b>" not in page(run)
    config = json.loads((run / "config.json").read_text())
    config["arguments"]["objective"] = "dpo"
    (run / "config.json").write_text(json.dumps(config))
    records = [
        {"iteration": 1, "loss": 0.7, "reward_margin": 0.1, "reward_accuracy": 0.5},
        {"iteration": 1, "eval_reward_margin": 0.2},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    text = page(run)
    assert "<b>Reward margin</b>" in text and "<b>Reward accuracy</b>" in text and "per pair" in text


def test_another_place_and_no_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--output", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").is_file() and not (run / "report.html").exists()
    capsys.readouterr()
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "empty")]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'empty'} holds no run: config.json is missing")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_in_a_browser(run: Path) -> None:
    """At the width of a desk and of a hand, in light and dark: no error, no request, nothing too wide, and it moves."""
    sync_api = pytest.importorskip("playwright.sync_api")
    page(run)
    backgrounds = set()
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        for width in (1280, 390):
            for scheme in ("light", "dark"):
                tab = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
                told: list[str] = []
                tab.on("console", lambda message, told=told: told.append(message.text))
                tab.on("pageerror", lambda error, told=told: told.append(str(error)))
                tab.on("request", lambda request, told=told: told.append(request.url))
                tab.goto((run / "report.html").as_uri())
                _check(tab)
                assert [line for line in told if not line.startswith(("file://", "data:"))] == []
                assert len([line for line in told if line.startswith("file://")]) == 1
                backgrounds.add(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
        browser.close()
    assert len(backgrounds) == 2


def _check(tab: Any) -> None:
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    small = "[...document.querySelectorAll('body *')].filter(e => e.innerText && parseFloat(getComputedStyle(e).fontSize) < 11)"
    assert tab.evaluate(f"{small}.every(e => e.classList.contains('quiet'))")
    heights = tab.evaluate("[...document.querySelectorAll('.plot path')].map(e => e.getBoundingClientRect().height)")
    assert len(heights) == 7 and sum(height > 20 for height in heights) >= 4

    plot = tab.locator(".chart .plot").first
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    tab.mouse.move(box["x"] + box["width"] / 3, box["y"] + box["height"] / 2)
    tip = tab.locator(".chart .tip").first
    mean = smoothed([1 + 2 * math.exp(-number / 20) for number in range(1, 61)])[19]
    lines = ["iteration 20", f"training, smoothed {mean:.4g}", f"evaluation {1.1 + 2 * math.exp(-1):.4g}"]
    assert tip.is_visible() and tip.inner_text().splitlines() == lines
    tab.mouse.move(0, 0)
    assert not tip.is_visible()

    cell = tab.locator(".heat tbody td").last
    shade = "e => getComputedStyle(e).backgroundColor"
    last = cell.evaluate(shade)
    assert cell.get_attribute("title") == f"layer 11, down_proj: {60 * 12 / 1e4 / 50:.4g}"
    tab.locator(".heat input").fill("0")
    assert tab.locator(".heat output").inner_text() == "20" and cell.evaluate(shade) != last
    tab.get_by_role("button", name="‖A‖").click()
    assert cell.get_attribute("title") == "layer 11, down_proj: 3"
    tab.get_by_text("Options", exact=True).click()
    assert tab.get_by_text("global_batch_size").is_visible()
