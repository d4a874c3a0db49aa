"""The README tells the truth: its commands parse, its tree is the folder, its tests run in CI."""

import re
import shlex
from pathlib import Path

import click
import pytest

from bigseg import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(name):
    found = re.search(rf"<!-- {name} -->\n```\w*\n(.*?)```", README, re.DOTALL)
    assert found, f"the README has no block {name}"
    return found.group(1)


def commands():
    """Every `bigseg ...` that a reader could copy: `$ bigseg` lines and those behind `--`."""
    found = re.findall(r"(?:\$ |-- )(bigseg [^\n#>]*)", README)
    return sorted({c.strip() for c in found})


def test_the_readme_has_commands_to_check():
    assert len(commands()) >= 5


@pytest.mark.parametrize("command", commands())
def test_every_command_in_the_readme_parses(command):
    name, *words = shlex.split(command)[1:]
    sub = cli.main.commands[name]
    with click.Context(sub) as context:
        assert sub.parse_args(context, words) == []


def test_every_command_is_in_the_table():
    named = set(re.findall(r"^\| `bigseg (\w+)`", README, re.MULTILINE))
    assert named == set(cli.main.commands)


def test_the_tree_is_the_folder():
    named = set(re.findall(r"^  (\w+\.py) ", block("tree"), re.MULTILINE))
    there = {p.name for p in (ROOT / "bigseg").glob("*.py")} - {"__init__.py", "__main__.py"}
    assert named == there


def test_ci_runs_the_readmes_test_command():
    script = (ROOT / ".ci" / "run").read_text()
    assert "<!-- test -->" in script
    assert "pytest -q" in block("test")
    assert "bigseg demo" in block("demo")


def test_files_that_the_readme_names_are_there():
    for name in re.findall(r"\]\(([\w./]+)\)", README):
        assert (ROOT / name).exists(), name
