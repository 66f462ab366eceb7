"""The bones: who may import whom, and what the package's face costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dcp_storage

ROOT = Path(dcp_storage.__file__).parent
MODULES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))

FLOORS = [
    {"errors", "observe", "geometry", "collector", "raw", "version", "words"},
    {"config"},
    {"format", "progress"},
    {"store"},
    {"transfer"},
    {"checkpoint"},
    {"verify", "prune"},
    {"dcp"},
    {"steps"},
    {"commands"},
    {"cli"},
    {"__main__", "testing"},
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}

OUTSIDE = {
    "torch": ("dcp/", "steps/"),
    "fsspec": ("store/",),
    "s3fs": ("store/",),
    "aiofiles": ("store/",),
    "aiobotocore": ("store/",),
    "aiohttp": ("store/",),
    "msgspec": ("format/", "transfer/", "checkpoint/"),
    "xxhash": ("format/", "checkpoint/", "dcp/replicas/", "dcp/loads/"),
    "botocore": ("store/",),
    "zstandard": ("format/", "dcp/stock/"),
    "rich": ("progress.py", "words.py", "commands/", "dcp/saves/summary.py"),
}


def imports(module):
    """Every module that a file names in an import, wherever it stands."""
    for node in ast.walk(ast.parse((ROOT / module).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner.removeprefix("dcp_storage.").replace(".", "/") + ".py" in MODULES else node.module


def place(module):
    return module.split("/")[0].removesuffix(".py")


@pytest.mark.parametrize("module", [module for module in MODULES if module != "__init__.py"])
def test_imports_only_run_downwards(module):
    assert place(module) in FLOOR, f"{module} has no floor: say where it stands"
    for name in imports(module):
        if name.startswith("dcp_storage."):
            other = name.split(".")[1]
            assert other == place(module) or FLOOR[other] < FLOOR[place(module)], f"{module} imports {name}"


def test_there_are_no_circles():
    graph = {
        module.removesuffix(".py").removesuffix("/__init__").replace("/", "."): {
            name.removeprefix("dcp_storage.") for name in imports(module) if name.startswith("dcp_storage.")
        }
        for module in MODULES
        if module != "__init__.py"
    }
    while graph:
        free = [name for name, used in graph.items() if not used & graph.keys() - {name}]
        assert free, f"these import each other in a circle: {sorted(graph)}"
        for name in free:
            del graph[name]


@pytest.mark.parametrize("module", MODULES)
def test_each_library_is_known_in_one_layer_only(module):
    for name in imports(module):
        homes = OUTSIDE.get(name.split(".")[0])
        assert homes is None or module == "__init__.py" or module.startswith(homes), f"{module} imports {name}"


def test_a_copy_that_is_not_installed_works():
    assert not [module for module in MODULES if "importlib.metadata" in imports(module)]


@pytest.mark.parametrize(
    "module", [m for m in MODULES if m.startswith("format/") or m in {"transfer/layout.py", "transfer/ranges.py"}]
)
def test_planning_and_format_are_not_asynchronous(module):
    tree = ast.parse((ROOT / module).read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.AsyncFunctionDef | ast.Await)]


def test_files_stay_small():
    lines = sorted(len((ROOT / module).read_text().splitlines()) for module in MODULES)
    assert lines[-1] <= 400
    assert lines[len(lines) // 2] <= 150


def test_the_face_costs_nothing_and_has_every_name():
    code = (
        "import sys, dcp_storage; assert not {'torch', 'fsspec', 'zstandard', 'rich'} & set(sys.modules);"
        "[getattr(dcp_storage, name) for name in dcp_storage.__all__]; assert 'torch' in sys.modules;"
        "assert set(dcp_storage.__all__) == set(dir(dcp_storage))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dcp_storage.nothing


def test_the_package_is_typed():
    assert (ROOT / "py.typed").is_file()


def test_names_as_the_readme_writes_them():
    code = "import dcp_storage as d; d.verify.verify, d.prune.prune, d.errors.BlockCorrupt; print(d.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode()[0].isdigit()
