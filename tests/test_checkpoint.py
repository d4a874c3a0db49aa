"""Model files: what is saved comes back, and nothing else is ever loaded."""

import json
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from bigseg import store
from bigseg.checkpoint import (
    hash_model,
    load_model,
    load_state,
    read_card,
    save_model,
    save_state,
)
from bigseg.config import ModelCard, UNetSpec
from bigseg.errors import InputNotFoundError, ModelFileError
from bigseg.model import UNet


def card_of(**changes) -> ModelCard:
    spec = UNetSpec.build(2, out_channels=2, depth=1, width=4, **changes)
    return ModelCard(spec=spec, classes=("background", "cell"), voxel_um=(0.5, 0.5))


def trained_net(card: ModelCard) -> UNet:
    """A network with running statistics that are not the initial ones."""
    torch.manual_seed(3)
    net = UNet(card.spec)
    net(torch.randn(2, 1, 32, 32))
    return net


@pytest.fixture
def model_url(tmp_path) -> str:
    url = str(tmp_path / "model.safetensors")
    card = card_of()
    save_model(url, trained_net(card), card)
    return url


def test_loading_a_model_loads_no_compiler(model_url):
    code = (
        "import sys; from bigseg.checkpoint import load_model\n"
        "from bigseg.model import valid_copy\n"
        f"net, _ = load_model({model_url!r}); valid_copy(net)\n"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def refusal(url: str, loader=load_model) -> str:
    with pytest.raises(ModelFileError) as caught:
        loader(url)
    assert url in str(caught.value)
    return str(caught.value)


def rewrite(url: str, change) -> None:
    """Write the file again with a changed header table, description and hash left as they are."""
    raw = store.read_bytes(url, limit_bytes=1 << 30)
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    data = change(header, raw[8 + length :])
    text = json.dumps(header).encode()
    store.write_atomic(url, len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("base", ["{tmp}/deep/model.safetensors", "memory://models/a.safetensors"])
def test_a_loaded_model_computes_what_the_saved_one_did(tmp_path, base, padding):
    url = base.format(tmp=tmp_path)
    card = card_of(padding=padding)
    net = trained_net(card)
    save_model(url, net, card)
    loaded, loaded_card = load_model(url)
    x = torch.randn(1, 1, 32, 32)
    assert loaded_card == card == read_card(url)
    assert not loaded.training
    assert torch.equal(loaded(x), net.eval()(x))
    assert all(p.requires_grad for p in loaded.parameters())


def test_the_same_model_gives_the_same_bytes(tmp_path):
    card = card_of()
    files = set()
    for i in range(8):
        url = str(tmp_path / f"{i}.safetensors")
        save_model(url, trained_net(card), card)
        files.add(store.read_bytes(url, limit_bytes=1 << 20))
    assert len(files) == 1


def test_a_channels_last_model_gives_the_same_bytes(tmp_path, model_url):
    url = str(tmp_path / "other.safetensors")
    card = card_of()
    save_model(url, trained_net(card).to(memory_format=torch.channels_last), card)
    assert store.read_bytes(url, limit_bytes=1 << 20) == store.read_bytes(
        model_url, limit_bytes=1 << 20
    )


def test_the_digest_changes_with_the_card_and_with_the_weights(tmp_path, model_url):
    card = card_of()
    named = card.model_copy(update={"classes": ("background", "nucleus")})
    other = trained_net(card)
    with torch.no_grad():
        other.head.bias += 1e-3
    urls = [model_url, str(tmp_path / "b"), str(tmp_path / "c")]
    save_model(urls[1], trained_net(card), named)
    save_model(urls[2], other, card)
    assert len({hash_model(url) for url in urls}) == 3


def test_other_programs_can_read_the_weights(model_url):
    tensors = safetensors.torch.load_file(model_url)
    assert torch.equal(tensors["head.bias"], load_model(model_url)[0].head.bias)


@pytest.mark.parametrize("kept", [0, 4, 8, 30, 900, -1, -400])
def test_a_truncated_file_is_refused(model_url, kept):
    raw = store.read_bytes(model_url, limit_bytes=1 << 20)
    store.write_atomic(model_url, raw[:kept])
    assert "truncated" in refusal(model_url)


def test_a_file_with_something_appended_is_refused(model_url):
    raw = store.read_bytes(model_url, limit_bytes=1 << 20)
    store.write_atomic(model_url, raw + b"more")
    assert "was appended to" in refusal(model_url)


def test_every_flipped_bit_is_noticed(model_url):
    raw = store.read_bytes(model_url, limit_bytes=1 << 20)
    for place in range(0, len(raw), max(1, len(raw) // 150)):
        damaged = bytearray(raw)
        damaged[place] ^= 1 << place % 8
        if bytes(damaged).replace(b" ", b"") == raw.replace(b" ", b""):
            continue
        store.write_atomic(model_url, bytes(damaged))
        refusal(model_url)
        refusal(model_url, read_card)


def test_damaged_weights_name_both_hashes(model_url):
    raw = bytearray(store.read_bytes(model_url, limit_bytes=1 << 20))
    raw[-3] ^= 4
    store.write_atomic(model_url, bytes(raw))
    assert "was damaged after it was written: its sha256 is" in refusal(model_url)


def test_a_pickle_is_refused_without_being_loaded(tmp_path):
    class Evil:
        def __reduce__(self):
            return (pytest.fail, ("the pickle ran",))

    for i, modern in enumerate([True, False]):
        path = tmp_path / f"{i}.pt"
        torch.save({"weights": Evil()}, path, _use_new_zipfile_serialization=modern)
        assert "is a PyTorch pickle, which can run code" in refusal(str(path))


def test_text_is_refused(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("Dear diary, today I trained a network.")
    assert "is not a model file, it begins with b'Dear dia'" in refusal(str(path))


def test_a_foreign_safetensors_file_is_refused(tmp_path):
    path = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(3)}, path)
    assert "without the description of a bigseg model" in refusal(str(path))


def test_a_training_state_is_no_model_and_a_model_no_state(tmp_path, model_url):
    url = str(tmp_path / "state.safetensors")
    save_state(url, {"a": torch.zeros(2)}, {"step": 3})
    assert "without the description of a bigseg model" in refusal(url)
    assert "without the description of a bigseg training state" in refusal(model_url, load_state)


def test_a_header_that_is_too_large_is_refused_before_it_is_parsed(tmp_path):
    path = tmp_path / "huge.safetensors"
    path.write_bytes((1 << 40).to_bytes(8, "little") + b'{"a":' + b"[" * 1000)
    assert f"announces a header of {1 << 40} bytes, more than the 4194304" in refusal(str(path))


@pytest.mark.parametrize("text", [b"[1, 2]", b"{" * 9, b'{"a": 3}', b'{"a":{"data_offsets":[0]}}'])
def test_a_senseless_header_is_refused(tmp_path, text):
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"12345678")
    assert "damaged" in refusal(str(path)) or "is not a model file" in refusal(str(path))


def test_a_missing_file_is_not_found(tmp_path):
    with pytest.raises(InputNotFoundError, match="no such file"):
        load_model(str(tmp_path / "nothing.safetensors"))


def honest(url: str, spec: UNetSpec, tensors: dict[str, torch.Tensor], **changes) -> None:
    """A file with a right hash whose tensors need not fit its card."""
    from bigseg.checkpoint import MODEL_KEY, _encode

    card = ModelCard(spec=spec, classes=("a", "b")).model_dump(mode="json") | changes
    store.write_atomic(url, _encode(tensors, MODEL_KEY, card))


def test_tensors_that_do_not_fit_the_card_are_refused(tmp_path):
    url, card = str(tmp_path / "m"), card_of()
    state = trained_net(card).state_dict()
    honest(url, UNetSpec.build(2, out_channels=2, depth=1, width=8), state)
    assert "(4, 1, 3, 3), not torch.float32 (8, 1, 3, 3)" in refusal(url)
    honest(url, UNetSpec.build(2, out_channels=2, depth=2, width=4), state)
    assert "is missing" in refusal(url)
    honest(url, card.spec, {**state, "extra": torch.zeros(1)})
    assert "the tensor 'extra' is superfluous" in refusal(url)
    honest(url, card.spec, {n: t.double() for n, t in state.items()})
    assert "is torch.float64 (4, 1, 3, 3), not torch.float32" in refusal(url)


def test_a_hostile_card_costs_no_memory(tmp_path):
    url, card = str(tmp_path / "m"), card_of()
    state = trained_net(card).state_dict()
    honest(url, card.spec.model_copy(update={"widths": (10**5, 10**6)}), state)
    assert "does not fit its own description" in refusal(url)
    honest(url, card.spec.model_copy(update={"widths": (10**15, 10**18)}), state)
    assert "describes a network that cannot be built" in refusal(url)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    url, card = str(tmp_path / "m"), card_of()
    net = trained_net(card)
    with torch.no_grad():
        net.head.bias[0] = float("nan")
    save_model(url, net, card)
    assert "not finite in 'head.bias'" in refusal(url)


def test_a_card_from_the_future_is_refused(tmp_path):
    url, card = str(tmp_path / "m"), card_of()
    honest(url, card.spec, trained_net(card).state_dict(), format=2)
    message = refusal(url)
    assert "a description that this bigseg does not understand (format: Input should be 1)" in (
        message
    )


def test_a_training_state_comes_back_exactly(tmp_path):
    url = str(tmp_path / "state.safetensors")
    tensors = {"a": torch.randn(3, 4), "b.step": torch.tensor(7.0), "c": torch.arange(5)}
    meta = {"step": 12, "score": 0.1 + 0.2, "none": None}
    save_state(url, tensors, meta)
    loaded, loaded_meta = load_state(url)
    assert loaded_meta == meta
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[k], tensors[k]) for k in tensors)
