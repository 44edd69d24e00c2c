"""The house's walls: import directions, one door a heavy library, one writer, sizes, safety.

Read from the syntax trees of ``src`` and ``scripts``; nothing of the package is imported.
"""

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src" / "modern_llm"
FILES = sorted(SRC.rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))

LAYER_0 = {"errors", "registry", "runtime"}
LAYER_1 = LAYER_0 | {"config"}
LAYER_2 = LAYER_1 | {"data", "models"}
LAYER_3 = LAYER_2 | {"training", "evaluation"}
MAY_IMPORT = {  # package -> what it may import; a package may always import itself
    "errors": set(),
    "registry": {"errors"},
    "runtime": LAYER_0,
    "config": LAYER_0,
    "data": LAYER_1,
    "models": LAYER_1,
    "training": LAYER_2,
    "evaluation": LAYER_2,
    "alignment": LAYER_3,
    "experiments": LAYER_3 | {"reporting"},  # writes its own reports
    "interop": LAYER_3,
    "inference": LAYER_3,
    "reporting": LAYER_1,  # reads result files, never live objects
    "cli": LAYER_3 | {"alignment", "experiments", "interop", "inference", "reporting"},
    "__init__": set(),
    "__main__": {"cli"},
}
SCRIPTS_MAY_IMPORT = {"cli", "experiments", "reporting"}

DOORS = {  # library -> the modules (or packages) that may import it
    "accelerate": ("runtime/devices", "runtime/logs"),
    "datasets": ("data/sources",),
    "evaluate": ("evaluation/text_metrics", "evaluation/metrics"),
    "huggingface_hub": ("data/sources", "evaluation/baselines", "interop"),
    "matplotlib": ("reporting/plots",),
    "packaging": ("runtime/environment",),
    "pandas": ("experiments/compare",),
    "pyarrow": ("data/sources",),
    "pydantic": ("config",),
    "rich": (
        "runtime/logs",  # the console itself
        *("training/progress", "reporting/console"),  # a bar and a table on that console
        *("alignment/plan", "alignment/comparison"),  # tables on standard output: their result
    ),
    "safetensors": ("training/checkpoint", "interop"),
    "scipy": ("experiments/verdicts",),
    "tokenizers": ("data/tokenizer",),
    "transformers": ("interop", "evaluation/baselines"),
    "yaml": ("config",),
}

WRITERS = {  # file -> why it may write: everything else goes through runtime/artifacts.py
    "runtime/artifacts.py": "the writer",
    "runtime/files.py": "lock files",
    "training/checkpoint.py": "fills the staging folder of artifacts.published_folder",
    "data/store.py": "publishes what data/writer.py has filled, by one rename",
    "data/sources/copies.py": "fills the staging folder of artifacts.published_folder",
    "data/writer.py": "fills the staging folder of data/store.py, shard by shard",
    "interop/transformers_export.py": "fills the staging folder of artifacts.published_folder",
    "training/retention.py": "prunes checkpoints: one rename out of sight, then removal",
}
WRITE_CALLS = {  # module.function that makes or changes a file
    *("json.dump", "yaml.dump", "yaml.safe_dump", "pickle.dump", "torch.save"),
    *("np.savez_compressed", "np.savetxt"),
    *("shutil.copy", "shutil.copy2", "shutil.copyfile", "shutil.copytree", "shutil.move"),
    *("shutil.rmtree", "os.remove", "os.unlink", "os.rmdir"),
    *("os.link", "os.rename", "os.renames", "os.replace", "os.symlink", "os.truncate"),
    *("tempfile.mkstemp", "tempfile.NamedTemporaryFile"),
}
WRITE_METHODS = {"write_text", "write_bytes", "save_pretrained", "save_file", "tofile", "unlink"}
TO_A_BUFFER = {
    "savefig",
    "np.save",
    "np.savez",
}  # fine into memory
FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "os.system", "os.popen"),
    *("pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load", "yaml.full_load"),
}
FORBIDDEN_KEYWORDS = {"weights_only": False, "trust_remote_code": True, "shell": True}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def relative(path: Path) -> str:
    return path.relative_to(SRC if path.is_relative_to(SRC) else ROOT).as_posix()


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports_of(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Dotted names imported anywhere in ``tree`` (functions included), relative ones as '.'."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield ".", node.lineno
            elif node.module == "modern_llm":
                yield from ((f"modern_llm.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield str(node.module), node.lineno
        elif isinstance(node, ast.Call) and dotted(node.func).endswith("import_module"):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant):
                yield str(first.value), node.lineno


def packages_of(tree: ast.AST) -> dict[str, int]:
    """Sub-packages of modern_llm that are imported, each with a line."""
    split = ((name.split("."), line) for name, line in imports_of(tree))
    own = ((parts[1:], line) for parts, line in split if parts[0] == "modern_llm")
    return {rest[0]: line for rest, line in own if rest and rest[0] != "__version__"}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def calls_of(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Calls with the dotted name of what is called; local names resolved through the imports."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {a.asname: a.name for a in node.names if a.asname}
        elif isinstance(node, ast.ImportFrom):
            aliases |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    aliases = {k: "np" if v == "numpy" else v for k, v in aliases.items()}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            head, dot, rest = dotted(node.func).partition(".")
            yield aliases.get(head, head) + dot + rest, node


def mode_of(call: ast.Call, position: int) -> str:
    """The mode of an ``open`` call, '?' when it is not a literal."""
    mode: ast.expr | None = call.args[position] if len(call.args) > position else None
    mode = next((k.value for k in call.keywords if k.arg == "mode"), mode)
    if mode is None:
        return "r"
    return str(mode.value) if isinstance(mode, ast.Constant) else "?"


def writes_in(tree: ast.AST) -> Iterator[str]:
    """Every call that can make or change a file, as 'name at line'."""
    for name, call in calls_of(tree):
        method = name.rpartition(".")[2]
        if name.startswith(("artifacts.", "modern_llm.runtime.artifacts.")):
            continue
        is_open = name in ("open", "io.open", "gzip.open", "bz2.open", "lzma.open")
        if is_open:
            found = bool(set(mode_of(call, 1)) & set("wax+?"))
        elif method == "open" and "." in name and not name.startswith("os."):
            found = bool(set(mode_of(call, 0)) & set("wax+?"))
        elif method == "memmap":
            found = mode_of(call, 2) not in ("r", "c")
        elif name in TO_A_BUFFER or method in TO_A_BUFFER:
            target = dotted(call.args[0]) if call.args else "?"
            found = "buffer" not in target
        elif name == "dataclasses.replace":
            found = False
        elif method in ("rename", "replace") and name not in WRITE_CALLS:
            found = len(call.args) == 1 and not call.keywords  # Path's; str.replace takes two
        else:
            found = name in WRITE_CALLS or method in WRITE_METHODS
        if found:
            yield f"{name} at line {call.lineno}"


def test_there_is_source_to_check() -> None:
    assert len(FILES) > 5


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_point_down(path: Path) -> None:
    package = path.relative_to(SRC).parts[0].removesuffix(".py")
    assert package in MAY_IMPORT, f"{package} has no place in the layers; see docs/architecture.md"
    upward = packages_of(tree_of(path)).keys() - MAY_IMPORT[package] - {package}
    assert not upward, f"{relative(path)} imports {sorted(upward)}; {package} may not"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_are_absolute(path: Path) -> None:
    lines = [line for name, line in imports_of(tree_of(path)) if name == "."]
    assert not lines, f"{relative(path)}: relative imports at lines {lines}"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_heavy_libraries_have_one_door(path: Path) -> None:
    module = relative(path).removesuffix(".py")
    for name, line in imports_of(tree_of(path)):
        doors = DOORS.get(name.split(".")[0])
        is_door = doors is None or any(module == d or module.startswith(f"{d}/") for d in doors)
        assert is_door, f"{relative(path)}:{line} imports {name}; only {doors} may"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_models_need_torch_only(path: Path) -> None:
    if not relative(path).startswith("models/"):
        return
    allowed = {"torch", "numpy", "modern_llm"}
    roots = {name.split(".")[0] for name, _ in imports_of(tree_of(path))}
    foreign = roots - allowed - set(sys.stdlib_module_names)
    assert not foreign, f"{relative(path)} imports {sorted(foreign)}"


@pytest.mark.parametrize("path", [p for p in FILES if relative(p) not in WRITERS], ids=relative)
def test_results_have_one_writer(path: Path) -> None:
    found = list(writes_in(tree_of(path)))
    assert not found, f"{relative(path)} writes files ({'; '.join(found)}); use runtime.artifacts"


def test_every_exception_for_writers_is_needed() -> None:
    for name in WRITERS:
        path = SRC / name
        if path.exists():
            assert list(writes_in(tree_of(path))), f"{name} writes nothing: remove its exception"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_no_code_comes_out_of_files(path: Path) -> None:
    for name, call in calls_of(tree_of(path)):
        assert name not in FORBIDDEN_CALLS, f"{relative(path)}:{call.lineno} calls {name}"
        for keyword in call.keywords:
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            forbidden = FORBIDDEN_KEYWORDS.get(str(keyword.arg))
            assert forbidden is None or value is not forbidden, (
                f"{relative(path)}:{call.lineno} passes {keyword.arg}={value}"
            )


@pytest.mark.parametrize("path", [*FILES, *SCRIPTS], ids=relative)
def test_files_and_functions_are_small(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE_LINES, f"{relative(path)} has {lines} lines"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{relative(path)}: {node.name} has {length} lines"


@pytest.mark.parametrize("path", [*FILES, *SCRIPTS], ids=relative)
def test_source_is_ascii(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    bad = [n for n, line in enumerate(text.splitlines(), 1) if not line.isascii()]
    assert not bad, f"{relative(path)}: not ASCII at lines {bad}"


@pytest.mark.parametrize("path", SCRIPTS, ids=relative)
def test_scripts_hold_no_logic(path: Path) -> None:
    packages = packages_of(tree_of(path)).keys()
    assert packages <= SCRIPTS_MAY_IMPORT, f"{path.name} imports {sorted(packages)}"


@pytest.mark.parametrize(
    "code",
    [
        "open('x', 'w')",
        "from pathlib import Path\nPath('x').open('ab')",
        "Path('x').write_text('y')",
        "from shutil import move\nmove('a', 'b')",
        "import torch as t\nt.save(1, 'x')",
        "import numpy\nnumpy.memmap('x', 'u2', 'w+')",
        "figure.savefig('x.png')",
        "Path('a').replace('b')",
        "import numpy as np\nnp.save(path, values)",
        "import shutil\nshutil.rmtree(folder)",
        "path.unlink()",
    ],
)
def test_the_writer_rule_sees(code: str) -> None:
    assert list(writes_in(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    [
        "open('x')",
        "Path('x').open('rb')",
        "artifacts.write_text(path, 'y')",
        "from modern_llm.runtime.artifacts import write_json\nwrite_json(path, 1)",
        "'abc'.replace('a', 'b')",
        "figure.savefig(buffer, format='png')",
        "import numpy as np\nnp.save(buffer, values)",
        "from dataclasses import replace\nreplace(config)",
        "import numpy as np\nnp.memmap(path, np.uint16, 'r')",
    ],
)
def test_the_writer_rule_lets_readers_pass(code: str) -> None:
    assert not list(writes_in(ast.parse(code)))
