"""The documentation's links into the source, held true; run it after a change of the source.

    python docs/links.py         tell every line number, quotation and excerpt that is off
    python docs/links.py --fix   put line numbers and excerpts right, tell what cannot be

[`Norm.cost`](path/norms.py#L26) names a symbol and the line where it begins; `code` in front of
" in " and such a link is quoted from it. A python block below the comment
<!-- code: src/path.py Norm.cost --> is the symbol's source without its docstring.
"""

import ast
import re
import sys
import textwrap
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(\[`?([\w.]+)`?\]\(([^)\s#]+\.py)#L)(\d+)\)")
QUOTE = re.compile(r"`([^`\n]+)` in " + LINK.pattern)
BLOCK = re.compile(r"(<!-- code: (\S+) (\S+) -->\n```python\n)(.*?)(?=```)", re.DOTALL)


@cache
def symbols(path: Path) -> dict[str, tuple[int, str]]:
    """Qualified name -> first line and source (no docstring) of what a file defines."""
    lines = path.read_text(encoding="utf-8").splitlines()
    found: dict[str, tuple[int, str]] = {}

    def walk(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            first, doc = node.lineno, range(0)
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                names = [node.name]
                first = min([first, *(d.lineno for d in node.decorator_list)])
                if ast.get_docstring(node):
                    doc = range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)
                walk(node.body, f"{prefix}{node.name}.")
            else:
                targets = getattr(node, "targets", [getattr(node, "target", None)])
                names = [target.id for target in targets if isinstance(target, ast.Name)]
            kept = range(first, (node.end_lineno or first) + 1)
            text = "\n".join(lines[at - 1] for at in kept if at not in doc)
            for name in names:
                found[prefix + name] = node.lineno, textwrap.dedent(text) + "\n"

    walk(ast.parse("\n".join(lines)).body, "")
    return found


def corrected(page: Path, told: list[str]) -> str:
    """Text of a page with right line numbers and excerpts; what was off goes to ``told``."""

    def find(path: Path, name: str) -> tuple[int, str] | None:
        found = symbols(path.resolve()).get(name) if path.is_file() else None
        return found or told.append(f"{page.name}: cannot find {name} in {path.name}")

    def relink(m: re.Match[str]) -> str:
        line = (find(page.parent / m[3], m[2]) or [m[4]])[0]
        if str(line) != m[4]:
            told.append(f"{page.name}: {m[2]} begins at line {line}, not {m[4]}")
        return f"{m[1]}{line})"

    def refill(m: re.Match[str]) -> str:
        fresh = (find(ROOT / m[2], m[3]) or ["", m[4]])[1]
        if fresh != m[4]:
            told.append(f"{page.name}: the excerpt of {m[3]} is not its source")
        return m[1] + fresh

    text = LINK.sub(relink, page.read_text(encoding="utf-8"))
    for code, _, name, path, _ in QUOTE.findall(text):
        if code not in (find(page.parent / path, name) or ["", code])[1]:
            told.append(f"{page.name}: {name} does not say `{code}`")
    return BLOCK.sub(refill, text)


def main(pages: list[Path], *, fix: bool) -> int:
    """Check pages, and with ``fix`` put them right; 1 when something was off."""
    told: list[str] = []
    for page in pages:
        text = corrected(page, told)
        if fix and text != page.read_text(encoding="utf-8"):
            page.write_text(text, encoding="utf-8")
    print("\n".join(told) or "all links and excerpts are true")
    return 1 if told else 0


if __name__ == "__main__":
    PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    raise SystemExit(main(PAGES, fix="--fix" in sys.argv[1:]))
