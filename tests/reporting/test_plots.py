import io
import json
import random
from pathlib import Path

import pytest
from fake_run import STEPS, dump, load
from PIL import Image

from modern_llm.reporting.plots import figures, loss_curves
from modern_llm.reporting.plots.canvas import smooth
from modern_llm.reporting.results import read_run

NAMES = ["stages.png", "loss.png", "training.png", "dpo.png", "best_of_n.png", "calibration.png"]


def test_every_figure_is_a_readable_small_png(fake: Path) -> None:
    pictures = figures(read_run(fake))

    assert list(pictures) == NAMES
    for name, png in pictures.items():
        image = Image.open(io.BytesIO(png))
        assert image.format == "PNG" and image.width >= 600 and image.height >= 300, name
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 8, f"{name} is blank"
        assert len(png) < 150_000, name


def test_the_same_numbers_give_the_same_bytes(fake: Path) -> None:
    assert figures(read_run(fake)) == figures(read_run(fake))


def test_a_long_noisy_run_stays_small(fake: Path) -> None:
    rng = random.Random(0)
    rows = [
        {"kind": "train", "step": s, "loss": 4 + rng.random(), "lr": 1e-4,
         "grad_norm": rng.random(), "tokens_per_s": 1e4 * rng.random()}
        for s in range(10_000)
    ]  # fmt: skip
    for stage in STEPS:
        path = fake / stage / "metrics.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    pictures = figures(read_run(fake))

    assert {"loss.png", "training.png"} <= set(pictures)
    assert max(map(len, pictures.values())) < 150_000


def test_figures_without_numbers_are_left_out(fake: Path) -> None:
    for stage in STEPS:
        (fake / stage / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
    (fake / "eval" / "result.json").unlink()

    assert figures(read_run(fake)) == {}


def test_rows_that_are_not_numbers_are_left_out(fake: Path) -> None:
    path = fake / "sft" / "metrics.jsonl"
    rows = [{"kind": "train", "step": s, "loss": v} for s, v in enumerate([1.0, None, "x", 2.0])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "train"}\n')

    assert loss_curves(read_run(fake)) is not None


@pytest.mark.parametrize("n", [[1], [1, 2]])
def test_short_curves_and_no_intervals(fake: Path, n: list[int]) -> None:
    path = fake / "eval" / "result.json"
    value = load(path)
    point = {"value": 0.0, "lo": None, "hi": None}
    value["reasoning"]["curves"] = {"n": n, "oracle": [point] * len(n), "verifier": None}
    value["models"] = [{"stage": "sft", "scores": [{"metric": "exact_match", "value": 0.0}]}]
    dump(path, value)

    pictures = figures(read_run(fake))

    assert {"best_of_n.png", "stages.png"} <= set(pictures)


def test_smoothing_is_a_mean_over_the_neighbours() -> None:
    values = [1.0, 2.0, 6.0, 3.0, 8.0]

    assert smooth(values, 3) == pytest.approx([1.0, 3.0, 11 / 3, 17 / 3, 5.5])
    assert smooth(values, 1) == values
    assert smooth([], 5) == []


def test_bars_of_the_reliability_diagram_are_those_of_the_record(fake: Path) -> None:
    path = fake / "eval" / "result.json"
    value = load(path)
    bins = value["reasoning"]["reliability"]
    pictures = []
    for width in (0.09, 0.2, None):
        for b in bins:
            middle = b["accuracy"] or 0.5
            b["ci95"] = None if width is None else [middle - width, middle + width]
        dump(path, value)
        pictures.append(figures(read_run(fake))["calibration.png"])
    assert len(set(pictures)) == 3
