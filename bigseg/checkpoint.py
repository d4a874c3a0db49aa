"""Self-describing model files, and the state of a training run: atomic save, safe load.

One safetensors file; its header carries what it is, and a hash over everything else:

    | 8 bytes: length | header: {"__metadata__": {"bigseg": card, "sha256": hash}, tensors} | data |

Nothing in it is code. A file is read only when it is whole: its announced length, the places of its
tensors, its hash and, for models, the shape and type of every tensor are checked before a network
is built. The same network and card give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pydantic
import safetensors.torch
import torch
from safetensors import SafetensorError

from bigseg import store
from bigseg.config import ModelCard
from bigseg.errors import ModelFileError
from bigseg.model import UNet

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from bigseg.config import UNetSpec

MAX_HEADER_BYTES = 4 << 20
MAX_FILE_BYTES = 16 << 30

# Bytes of one value of the types that safetensors knows by whole bytes.
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}

MODEL_KEY = "bigseg"
STATE_KEY = "bigseg-training"

_ADVICE = "give the model.safetensors of a training run"
# What Python, safetensors and torch raise for a file that somebody made by hand.
_DAMAGED = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def save_model(url: str, net: UNet, card: ModelCard) -> None:
    """Write the weights of `net` and its card to one file, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    assert card.spec.widths == net.spec.widths, (card.spec, net.spec)
    store.write_atomic(url, _encode(net.state_dict(), MODEL_KEY, card.model_dump(mode="json")))


def load_model(url: str) -> tuple[UNet, ModelCard]:
    """The network, in evaluation mode and with the padding it was trained with, and its card.

    Raises:
        InputNotFoundError: there is no such file.
        ModelFileError: it is truncated, damaged, something else, or does not fit its own card.
    """
    file = _decode(url, MODEL_KEY)
    card = _card(url, file)
    net = _without_memory(url, card.spec)
    _check_tensors(url, file.tensors, net.state_dict())
    net.load_state_dict(file.tensors, assign=True)
    return net.eval(), card


def read_card(url: str) -> ModelCard:
    """The card of a model file; the whole file is checked. Raises like `load_model`."""
    return _card(url, _decode(url, MODEL_KEY))


def hash_model(url: str) -> str:
    """The sha256 of a model file's card and tensors: its identity. Raises like `load_model`."""
    return _decode(url, MODEL_KEY).digest


def save_state(url: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write the state of a training run: any tensors, and `meta` as JSON.

    Raises:
        OutputError: it cannot be written.
    """
    store.write_atomic(url, _encode(tensors, STATE_KEY, dict(meta)))


def load_state(url: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_state` wrote; tensors on the CPU.

    Raises:
        InputNotFoundError: there is no such file.
        ModelFileError: it is truncated, damaged, or something else.
    """
    file = _decode(url, STATE_KEY)
    return file.tensors, file.description


@dataclass(frozen=True)
class _File:
    tensors: dict[str, Tensor]
    description: dict[str, Any]
    digest: str


def _encode(tensors: Mapping[str, Tensor], key: str, description: dict[str, Any]) -> bytes:
    whole = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    plain = safetensors.torch.save(whole)
    start = 8 + int.from_bytes(plain[:8], "little")
    table = json.loads(plain[8:start])
    text, data = _canonical(description), memoryview(plain)[start:]
    # safetensors writes its metadata in random order (0.8.0); one order makes the bytes the same.
    metadata = {key: text, "sha256": _digest(text, table, data)}
    header = json.dumps({"__metadata__": metadata, **table}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return b"".join((len(header).to_bytes(8, "little"), header, data))


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _digest(text: str, table: object, data: memoryview) -> str:
    digest = hashlib.sha256(text.encode())
    digest.update(_canonical(table).encode())
    digest.update(data)
    return digest.hexdigest()


def _decode(url: str, key: str) -> _File:
    # Before all of something else, which can be large, is read.
    _check_start(url, store.read_start(url, 9))
    raw = store.read_bytes(url, limit_bytes=MAX_FILE_BYTES)
    header, data = _split(url, raw)
    metadata = header.pop("__metadata__", {})
    if not {key, "sha256"} <= set(metadata):
        what = "model" if key == MODEL_KEY else "training state"
        raise ModelFileError(
            f"{url} is a safetensors file without the description of a bigseg {what}: {_ADVICE}"
        )
    if (digest := _digest(metadata[key], header, data)) != metadata["sha256"]:
        raise ModelFileError(
            f"{url} was damaged after it was written: its sha256 is {digest[:12]}…, its header "
            f"says {metadata['sha256'][:12]}…; copy it again or train anew"
        )
    try:
        return _File(safetensors.torch.load(raw), _parse_json(metadata[key]), digest)
    except (SafetensorError, *_DAMAGED) as error:
        reason = str(error)[:200]
        raise ModelFileError(f"{url} cannot be decoded: {reason}; {_ADVICE}") from None


def _check_start(url: str, raw: bytes) -> None:
    """Refuse what cannot be a model file by its first bytes."""
    if len(raw) > 8 and raw[8:9] != b"{":
        if raw[:2] in (b"PK", b"\x80\x02", b"\x80\x04"):
            raise ModelFileError(
                f"{url} is a PyTorch pickle, which can run code when it is loaded, so bigseg never "
                f"loads one: {_ADVICE}"
            )
        raise ModelFileError(f"{url} is not a model file, it begins with {raw[:8]!r}: {_ADVICE}")
    length = int.from_bytes(raw[:8], "little")
    if len(raw) > 8 and length > MAX_HEADER_BYTES:
        raise ModelFileError(
            f"{url} announces a header of {length} bytes, more than the {MAX_HEADER_BYTES} that a "
            f"model may have: {_ADVICE}"
        )


def _split(url: str, raw: bytes) -> tuple[dict[str, Any], memoryview]:
    """The header and the data of a safetensors file whose length is as announced."""
    _check_start(url, raw)
    length = int.from_bytes(raw[:8], "little")
    if len(raw) < 10 or len(raw) < 8 + length:
        raise ModelFileError(f"{url} is truncated: it ends after {len(raw)} bytes; copy it again")
    header = _parse_header(url, raw[8 : 8 + length])
    announced, data = _announced_bytes(header), memoryview(raw)[8 + length :]
    if len(data) != announced:
        raise ModelFileError(
            f"{url} has {len(data)} bytes of weights and announces {announced}: it is truncated or "
            "was appended to; copy it again"
        )
    return header, data


def _parse_header(url: str, text: bytes) -> dict[str, Any]:
    try:
        header = _parse_json(text)
        metadata = header.get("__metadata__", {})
        for word in (*metadata, *metadata.values()):
            # What is no text, or no text that can be written, has no hash.
            str.encode(word)
        _check_places(_tensors(header))
    except _DAMAGED as error:
        reason = str(error)[:200]
        raise ModelFileError(f"{url} has a header that is damaged ({reason}): {_ADVICE}") from None
    return header


def _parse_json(text: str | bytes) -> dict[str, Any]:
    """A mapping whose keys are given once and whose numbers are finite."""
    value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    if not isinstance(value, dict):
        raise ValueError("no mapping")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is given twice")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _tensors(header: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [entry for name, entry in header.items() if name != "__metadata__"]


def _check_places(tensors: Sequence[Mapping[str, Any]]) -> None:
    """Refuse tensors that overlap, leave gaps, or have other bytes than their shape."""
    end = 0
    for entry in sorted(tensors, key=lambda entry: tuple(entry["data_offsets"])):
        start, stop = entry["data_offsets"]
        numbers = [start, stop, *entry["shape"]]
        if any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
            raise ValueError("sizes that are no whole numbers")
        n_bytes = math.prod(entry["shape"]) * ITEM_BYTES[entry["dtype"]]
        if start != end or stop - start != n_bytes:
            raise ValueError("tensors that overlap or do not fit their places")
        end = stop


def _announced_bytes(header: Mapping[str, Any]) -> int:
    return max((entry["data_offsets"][1] for entry in _tensors(header)), default=0)


def _card(url: str, file: _File) -> ModelCard:
    try:
        return ModelCard.model_validate(file.description)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ModelFileError(
            f"{url} has a description that this bigseg does not understand ({where[:100]}: "
            f"{first['msg'][:200]}): use the version of bigseg that wrote it, or train anew"
        ) from None


def _without_memory(url: str, spec: UNetSpec) -> UNet:
    """The network with shapes and types only, so that a hostile description costs nothing."""
    try:
        with torch.device("meta"):
            return UNet(spec)
    except (RuntimeError, ArithmeticError, MemoryError, TypeError, ValueError) as error:
        reason = str(error).split("\n", 1)[0][:200]
        raise ModelFileError(
            f"{url} describes a network that cannot be built ({reason}): {_ADVICE}"
        ) from None


def _check_tensors(url: str, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    if different := sorted(tensors.keys() ^ wanted.keys()):
        raise ModelFileError(
            f"{url} does not fit its own description: the tensor {different[0]!r} is "
            f"{'missing' if different[0] in wanted else 'superfluous'}; {_ADVICE}"
        )
    for name, like in wanted.items():
        tensor = tensors[name]
        if tensor.shape != like.shape or tensor.dtype != like.dtype:
            raise ModelFileError(
                f"{url} does not fit its own description: the tensor {name!r} is {tensor.dtype} "
                f"{tuple(tensor.shape)}, not {like.dtype} {tuple(like.shape)}; {_ADVICE}"
            )
        if not torch.isfinite(tensor).all():
            raise ModelFileError(
                f"{url} holds numbers that are not finite in {name!r}: its training diverged; "
                "train anew with a smaller optim.lr"
            )
