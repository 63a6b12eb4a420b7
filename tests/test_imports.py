"""Which part may import which: STYLE of the house, kept by a test (see CONTRIBUTING)."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import fcunet

PACKAGE = Path(fcunet.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
HEAVY = {"torch", "dask", "distributed", "xarray", "zarr", "matplotlib", "scipy", "pandas"}
DISTRIBUTED = {"dask", "distributed", "dask_jobqueue", "xarray", "zarr"}
# each may import those before it; names that are not here are free
LAYERS = [
    {"schema", "config"},
    {"kernels", "nn"},
    {"blocks", "store", "calibrate"},
    {"pipeline", "plot", "report"},
    {"runner", "explore"},
    {"cli", "demo"},
]
RESTRICTED = {"simulation", "training"}
MAY_IMPORT_RESTRICTED = {"cli", "demo", "doctor", "simulation", "training", "__init__"}


def part_of(file: Path) -> str:
    """``kernels`` of ``fcunet/kernels/peaks.py``, ``blocks`` of ``fcunet/blocks.py``."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def imports_of(file: Path) -> set[str]:
    """Absolute names of all modules a file imports, anywhere; ``from a import b`` gives ``a`` and ``a.b``."""
    package = ("fcunet", *file.relative_to(PACKAGE).with_suffix("").parts)
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level] if node.level else ()
            name = ".".join([*base, *([node.module] if node.module else [])])
            found |= {name} | {f"{name}.{alias.name}" for alias in node.names}
    return found


def own_parts(file: Path) -> set[str]:
    """Parts of fcunet that a file imports."""
    return {name.split(".")[1] for name in imports_of(file) if name.startswith("fcunet.")} - {part_of(file)}


def named(*parts: str) -> list[Path]:
    return [file for file in FILES if part_of(file) in parts]


def where(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


def test_kernels_and_networks__know_nothing_of_labels_stores_and_clusters():
    wrong = {
        where(file): bad
        for file in named("kernels", "nn")
        if (
            bad := {n.split(".")[0] for n in imports_of(file)} & DISTRIBUTED
            | own_parts(file) - {"kernels", "nn"}
        )
    }
    assert wrong == {}


def test_kernels__read_no_environment_variables():
    wrong = [where(f) for f in named("kernels") if "os.environ" in f.read_text() or "getenv" in f.read_text()]
    assert wrong == []


def test_schema_and_config__import_nothing_of_ours():
    assert own_parts(PACKAGE / "schema.py") == set()
    assert own_parts(PACKAGE / "config.py") == {"schema"}  # the number of peaks, spelt once


def test_layers__point_one_way():
    level = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    wrong = {
        where(file): above
        for file in FILES
        if part_of(file) in level
        and (above := {n for n in own_parts(file) if level.get(n, -1) > level[part_of(file)]})
    }
    assert wrong == {}


def test_simulation_and_training__are_imported_by_commands_only():
    wrong = [
        where(file)
        for file in FILES
        if part_of(file) not in MAY_IMPORT_RESTRICTED and own_parts(file) & RESTRICTED
    ]
    assert wrong == []


def test_cluster__knows_nothing_of_diffraction():
    assert own_parts(PACKAGE / "cluster.py") == {"allocation", "slurm", "watch"}
    assert own_parts(PACKAGE / "allocation.py") == {"slurm", "watch"}
    assert own_parts(PACKAGE / "watch.py") == {"slurm"}
    assert own_parts(PACKAGE / "slurm.py") == set()


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("fcunet, fcunet.config, fcunet.cli", HEAVY),
        ("fcunet.kernels.correlation, fcunet.kernels.lattice, fcunet.nn, fcunet.blocks", DISTRIBUTED),
        ("fcunet.report, fcunet.pipeline", {"torch"}),
    ],
)
def test_import__pulls_in_no_more_than_it_must(module, unwanted):
    code = f"import sys, {module}; print(*sorted({unwanted!r} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == []
