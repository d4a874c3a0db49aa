"""YAML files of settings: the part of YAML that makes plain values, each of them once.

PyYAML's safe loader runs no code, but takes more than a file of settings needs: aliases, by which a
small file becomes a huge value, keys given twice, of which it keeps the last, and endless numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

from bigseg.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

MAX_SCALAR = 4096

# PyYAML lets through what Python raises where a value is not what its tag or form promises.
_DAMAGED = (
    yaml.YAMLError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


def read_yaml(path: Path, *, limit_bytes: int) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        ConfigError: the file cannot be read, is too large, is not YAML, or holds something else.
    """
    try:
        if path.stat().st_size > limit_bytes:
            raise ConfigError(
                f"configuration {path} has more than {limit_bytes} bytes: give a smaller file"
            )
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration {path} cannot be read: {error}; check the path") from None
    try:
        values = yaml.load(text, Loader=_PlainLoader)
    except _DAMAGED as error:
        where = " ".join(str(error).split())[:500]
        raise ConfigError(f"configuration {path} is not valid YAML: {where}; correct it") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"configuration {path} must be a mapping of settings, such as `steps: 500`"
        )
    return values


class _PlainLoader(yaml.SafeLoader):
    """A safe loader that refuses aliases, repeated keys and endless scalars."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:  # noqa: ANN401
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not taken, write the value again")
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > MAX_SCALAR:
            raise yaml.YAMLError(f"a value has more than {MAX_SCALAR} characters")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.YAMLError(f"key {key!r} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)
