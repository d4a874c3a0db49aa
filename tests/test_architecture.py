"""The house is built as docs/rooms.md says."""

import ast
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "bigseg"
MOST_LINES = 400
EVERYWHERE = sys.stdlib_module_names | {"numpy"}
HEAVY = {"torch", "ray", "zarr", "dask", "numpy", "scipy", "openvino", "ome_zarr", "fsspec", "PIL"}
PRINTING = ("cli", "console", "result_commands")
ROOMS = sorted(p.stem for p in PACKAGE.glob("[!_]*.py"))


@dataclass(frozen=True)
class Row:
    level: int
    rooms: frozenset[str] | None  # None: any
    third_party: frozenset[str]


@dataclass(frozen=True)
class Imports:
    rooms: set[str]
    type_only_rooms: set[str]
    third_party: set[str]


def table() -> dict[str, Row]:
    rows = {}
    for line in (ROOT / "docs" / "rooms.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if re.match(r"\| *\d", line):
            level, file, _, rooms, third_party = cells
            name = file.removesuffix(".py")
            assert name not in rows, f"{file} has two rows"
            allowed = None if rooms == "any" else names(rooms)
            rows[name] = Row(int(level), allowed, names(third_party))
    return rows


def names(cell: str) -> frozenset[str]:
    return frozenset(n for n in re.split(r", *", cell) if n not in ("", "–"))


def imports_of(room: str) -> Imports:
    tree = ast.parse((PACKAGE / f"{room}.py").read_text())
    found = Imports(set(), set(), set())
    type_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        for module in modules_of(node):
            top, _, rest = module.partition(".")
            if top == "bigseg":
                target = rest.partition(".")[0]
                if target in ROOMS and target != "errors":
                    (found.type_only_rooms if id(node) in type_only else found.rooms).add(target)
            elif top not in EVERYWHERE:
                found.third_party.add(top)
    return found


def modules_of(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative import"
        if node.module == "bigseg":
            return [f"bigseg.{alias.name}" for alias in node.names]
        return [str(node.module)]
    return []


def test_every_room_has_a_row_and_every_row_a_room():
    assert sorted(table()) == ROOMS


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_its_row_allows(room: str):
    row, imports = table()[room], imports_of(room)
    if row.rooms is not None:
        assert imports.rooms <= row.rooms, "add them to docs/rooms.md, or do without"
    assert imports.third_party <= row.third_party, "add them to docs/rooms.md, or do without"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_knows_only_rooms_below_it(room: str):
    rows, imports = table(), imports_of(room)
    used = imports.rooms | imports.type_only_rooms | (rows[room].rooms or set())
    above = {name for name in used if rows[name].level >= rows[room].level}
    assert not above, f"{room} is on level {rows[room].level}"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_has_at_most_400_lines(room: str):
    assert len((PACKAGE / f"{room}.py").read_text().splitlines()) <= MOST_LINES


def test_three_rooms_import_ray():
    assert {room for room in ROOMS if "ray" in imports_of(room).third_party} == {
        "cluster",
        "infer_actor",
        "train_ddp",
    }


@pytest.mark.parametrize("room", [r for r in ROOMS if r not in PRINTING])
def test_only_the_command_line_prints(room: str):
    tree = ast.parse((PACKAGE / f"{room}.py").read_text())
    calls = (ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call))
    banned = {"print", "sys.stdout.write", "sys.stderr.write", "click.echo", "logging.basicConfig"}
    assert not banned & set(calls)


@pytest.mark.parametrize("module", ["bigseg", "bigseg.cli"])
def test_importing_loads_nothing_heavy(module: str):
    code = f"import sys, {module}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not HEAVY & set(run.stdout.split())
