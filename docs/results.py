"""Copy headlines of reports and a table into the README, so that its numbers are of the files.

    python docs/results.py         tell whether the README says what its reports say
    python docs/results.py --fix   make it so

The files are named in the comments that begin the parts: ``<!-- results: report/a_report.md -->``
takes the headline of each report, ``<!-- table: benchmarks/README.md -->`` a page's first table.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PART = re.compile(r"(<!-- results:([^>]*) -->\n).*?(<!-- end of results -->)", re.DOTALL)
TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
NONE = "No report is committed yet; `bash speedrun.sh local-smoke` writes yours.\n"


def section(report: str, title: str) -> str:
    """Text below a heading of level 2 or 3, up to the next heading."""
    found = re.search(rf"^##+ {re.escape(title)}\n\n(.*?)(?=^##|\Z)", report, re.S | re.M)
    return found[1] if found else ""


def headline(name: str) -> str:
    """Link, machine, time, command and the table of gains of one report."""
    report = (ROOT / name).read_text(encoding="utf-8")
    commands = re.search(r"```bash\n(.*?)^#", section(report, "How to reproduce"), re.S | re.M)
    machine = re.search(r"^\| hardware *\| (.*?) *\|$", report, re.M)
    took = re.search(r"^Training took .*$", report, re.M)
    table = re.match(r"(\|.*\n)+", section(report, "What each stage gained"))
    facts = " ".join(f"{m[i].rstrip('.')}." for m, i in ((machine, 1), (took, 0)) if m)
    title = Path(name).name.removesuffix("_report.md")
    told = [f"### `{title}`: [report]({name})\n", f"{facts}\n"]
    told += [f"```bash\n{commands[1]}```\n"] if commands else []
    return "\n".join([*told, table[0] if table else "No stage has two comparable numbers.\n"])


def first_table(name: str) -> str:
    """The first table of a page."""
    found = re.search(r"^(\|.*\n)+", (ROOT / name).read_text(encoding="utf-8"), re.M)
    return found[0] if found else ""


def expected(readme: str) -> str:
    """The README with the headlines and the table of the files that it names."""

    def part(m: re.Match[str]) -> str:
        return f"{m[1]}\n{chr(10).join(map(headline, m[2].split())) or NONE}\n{m[3]}"

    def table(m: re.Match[str]) -> str:
        return f"{m[1]}\n{first_table(m[2])}\n{m[3]}"

    return TABLE.sub(table, PART.sub(part, readme))


def main(*, fix: bool) -> int:
    """Compare, and with ``fix`` rewrite; 1 when the README said something else."""
    page = ROOT / "README.md"
    readme = page.read_text(encoding="utf-8")
    wanted = expected(readme)
    if fix and wanted != readme:
        page.write_text(wanted, encoding="utf-8")
    print("the README says what its reports say" if wanted == readme else "they differed")
    return 0 if wanted == readme else 1


if __name__ == "__main__":
    raise SystemExit(main(fix="--fix" in sys.argv[1:]))
