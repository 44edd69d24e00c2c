"""The files of docs/adding_a_component.md, as a reader would use them."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "adding_a_component.md").read_text()
FILES = dict(re.findall(r"<!-- file: (\w+\.py) -->\n```python\n(.*?)```", PAGE, re.DOTALL))
CHOICES = {
    "my_norm.py": ["model.norm=absnorm"],
    "my_position.py": ["model.position=logbias", "model.position.strength=0.5"],
    "my_ffn.py": ["model.ffn=glu", "model.moe.n_experts=2"],
}
DECODES = """
import sys, torch
from pathlib import Path
from modern_llm.registry import load_plugin
for path in sys.argv[1:]:
    load_plugin(Path(path))
from modern_llm.config import ModelConfig
from modern_llm.models import ModernDecoderLM
torch.manual_seed(0)
sizes = dict(vocab_size=23, d_model=32, n_layers=2, n_heads=4, d_ff=32, max_seq_len=16)
parts = dict(norm="absnorm", position="logbias", ffn="glu", init_std=0.3)
model = ModernDecoderLM(ModelConfig(**sizes, **parts)).eval()
tokens = torch.randint(0, 23, (2, 12))
cache = model.new_cache(2, 12)
parts = [model(tokens[:, a:b], cache=cache) for a, b in ((0, 7), (7, 8), (8, 12))]
torch.testing.assert_close(torch.cat(parts, 1), model(tokens), rtol=1e-4, atol=1e-4)
"""


def write(folder: Path) -> dict[str, Path]:
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return {name: folder / name for name in FILES}


def test_the_page_has_the_three() -> None:
    assert set(FILES) == set(CHOICES)
    for name, choice in CHOICES.items():
        assert f"--plugin {name} {choice[0]}" in PAGE


@pytest.mark.parametrize("name", sorted(CHOICES))
def test_a_plugin_trains(
    name: str, cli: Callable[..., Any], write_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    plugin = write(tmp_path)[name]
    config = write_tiny(tmp_path / "place")
    arguments = ["--config", config, "--plugin", plugin, "--stage", "pretrain"]
    done = cli("run", *arguments, *CHOICES[name])
    assert done.returncode == 0, done.stderr
    run = tmp_path / "place" / "runs" / "tiny"
    assert (run / "pretrain" / "final" / "model.safetensors").exists()

    again = cli("run", *arguments, *CHOICES[name])
    assert again.returncode == 0 and "finished already" in again.stderr
    plugin.write_text(plugin.read_text() + "# another\n")
    changed = cli("run", *arguments, *CHOICES[name])
    assert changed.returncode == 0
    assert len(list(run.parent.glob("tiny_2*/pretrain/final"))) == 1

    without = cli("run", "--config", run / "config.json", "--stage", "pretrain")
    assert without.returncode == 2
    assert f"give --plugin PATH/TO/{name}" in without.stderr


def test_all_three_decode_as_they_read(tmp_path: Path) -> None:
    paths = [str(path) for path in write(tmp_path).values()]
    subprocess.run([sys.executable, "-c", DECODES, *paths], check=True)


def test_a_plugin_that_is_no_python(cli: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("x = 1")
    done = cli("plan", "--plugin", tmp_path / "text.txt")
    assert done.returncode == 2 and "is no Python file" in done.stderr
