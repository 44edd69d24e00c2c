"""Every link of every page leads somewhere; lines, quotations, excerpts and results are true."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
OWN = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = (".", "docs", "report", "experiments", "benchmarks")
PAGES = sorted({page for folder in FOLDERS for page in (ROOT / folder).glob("*.md")})
LINK = re.compile(r"(?<!`)\[[^\]\n]*\]\(([^)\s]+)\)")
PATH = re.compile(r"`((?:src|configs|docs|scripts|tests|benchmarks)/[\w./-]*)`")
MAX_PICTURE_BYTES = 200_000


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """Fragments of a page's headings as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?) *$", prose(page), re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        repeats = sum(1 for other in found if re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other))
        found.add(f"{slug}-{repeats}" if repeats else slug)
    return found


def broken_links(page: Path) -> Iterator[str]:
    for target in LINK.findall(prose(page)):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        name, _, fragment = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists():
            yield f"{target}: no such file"
        elif fragment and path.suffix == ".md" and fragment not in anchors(path):
            yield f"{target}: no such heading (there are: {', '.join(sorted(anchors(path)))})"
        elif fragment and path.suffix != ".md" and not re.fullmatch(r"L\d+", fragment):
            yield f"{target}: a source has lines (#L12), not headings"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    assert not list(broken_links(page))


@pytest.mark.parametrize("page", OWN, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_named_paths_exist(page: Path) -> None:
    missing = [path for path in PATH.findall(prose(page)) if not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("page", OWN, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_equation_is_eaten_by_markdown(page: Path) -> None:
    """Between ``$$`` a backslash before punctuation is lost, and ``}_`` may begin an emphasis."""
    for equation in re.findall(r"^\$\$\n(.*?)^\$\$$", prose(page), re.M | re.S):
        eaten = re.findall(r"\\[!-/:-@\[-`{-~]|[^\w\s]_|\*|^[=+-]", equation, re.M)
        assert not eaten, f"{eaten} in {equation}"


def test_lines_quotations_and_excerpts_are_those_of_the_source() -> None:
    told: list[str] = []
    for page in OWN:
        load("links").corrected(page, told)
    assert not told, "run: python docs/links.py --fix\n" + "\n".join(told)


def test_results_are_those_of_the_reports() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert load("results").expected(readme) == readme, "run: python docs/results.py --fix"


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen, todo = set[Path](), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        seen.add(page)
        names = [target.partition("#")[0] for target in LINK.findall(prose(page))]
        found = {(page.parent / name).resolve() for name in names if name.endswith(".md")}
        todo += sorted(found - seen - set(todo))
    assert set(OWN) <= seen


def test_pictures_are_used_and_small() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for picture in sorted((ROOT / "docs" / "images").iterdir()):
        assert picture.relative_to(ROOT).as_posix() in readme, f"{picture.name} is not shown"
        assert picture.stat().st_size <= MAX_PICTURE_BYTES, f"{picture.name} is too large"


SOURCE = '''class Thing:
    """A thing."""

    @property
    def size(self) -> int:
        """How large."""
        return 3 + 4


LIMIT = 5
'''
GOOD = """[`Thing.size`](thing.py#L5), `3 + 4` in [`Thing.size`](thing.py#L5)
and [`LIMIT`](thing.py#L10)

<!-- code: thing.py Thing.size -->
```python
@property
def size(self) -> int:
    return 3 + 4
```
"""


@pytest.fixture
def links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load("links")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "thing.py").write_text(SOURCE)
    return module


def test_the_check_lets_a_true_page_pass(links: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(GOOD)
    assert links.main([page], fix=True) == 0
    assert page.read_text() == GOOD


@pytest.mark.parametrize(
    ("true", "false", "told", "is_mended"),
    [
        ("#L5", "#L7", "begins at line 5, not 7", True),
        ("#L10", "#L1", "begins at line 10, not 1", True),
        ("    return 3 + 4", "    return 34", "the excerpt of Thing.size is not its source", True),
        ("`3 + 4`", "`3 - 4`", "Thing.size does not say `3 - 4`", False),
        ("`Thing.size`]", "`Thing.width`]", "cannot find Thing.width in thing.py", False),
        ("thing.py Thing.size", "thing.py Thing.gone", "cannot find Thing.gone", False),
        ("(thing.py#L10", "(no.py#L10", "cannot find LIMIT in no.py", False),
    ],
)
def test_the_check_tells_and_mends_what_is_false(
    links: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    true: str,
    false: str,
    told: str,
    is_mended: bool,
) -> None:
    page = tmp_path / "page.md"
    page.write_text(GOOD.replace(true, false))
    assert links.main([page], fix=True) == 1
    assert told in capsys.readouterr().out
    assert (page.read_text() == GOOD) is is_mended


def test_results_are_copied_from_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = load("results")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    (tmp_path / "a_report.md").write_text(
        "# Report\n\n## What each stage gained\n\n| stage |\n| --- |\n| sft 62.0 % |\n\nA note.\n\n"
        "### Training\n\n| x |\n\nTraining took 9 s in all; losses are in nats.\n\n"
        "### Hardware\n\n| what | value |\n| --- | --- |\n| hardware | cpu Z, cores 2 |\n\n"
        "## How to reproduce\n\n```bash\nmodern-llm run\n# the resolved config\nx\n```\n"
    )
    page = "before\n<!-- results: a_report.md -->\nold 99 %\n<!-- end of results -->\nafter\n"
    made = results.expected(page)
    assert "| sft 62.0 % |" in made and "old" not in made and "A note." not in made
    assert "cpu Z, cores 2. Training took 9 s in all" in made
    assert "```bash\nmodern-llm run\n```" in made
    assert results.expected(made) == made
    assert made.startswith("before\n") and made.endswith("after\n")
    (tmp_path / "b.md").write_text("# B\n\n| speed |\n| --- |\n| 7 |\n\n| other |\n")
    shown = results.expected("<!-- table: b.md -->\nold\n<!-- end of table -->")
    assert shown == ("<!-- table: b.md -->\n\n| speed |\n| --- |\n| 7 |\n\n<!-- end of table -->")
    none = results.expected(page.replace(" a_report.md", ""))
    assert "No report is committed yet" in none
