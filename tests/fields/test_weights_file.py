"""Files of weights that cannot be read: one line, with the name."""

import io
import urllib.error

import pytest
import torch

from co3d_ensemble.fields.weights_file import read_weights, reason


def saved(*, older: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": torch.arange(6.0)}, buffer, _use_new_zipfile_serialization=not older)
    return buffer.getvalue()


@pytest.mark.parametrize("older", [False, True])
def test_a_file_cut_anywhere_is_named_in_one_line(tmp_path, older):
    path, whole = tmp_path / "w.pth", saved(older=older)
    path.write_bytes(whole)
    assert read_weights(path, "w")["weight"].tolist() == [0, 1, 2, 3, 4, 5]
    for end in range(0, len(whole) - 1, 7):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"^weights=w.pth: cannot be read: [^\n]+\Z"):
            read_weights(path, "weights=w.pth")


@pytest.mark.parametrize(
    "content", [b"hello", b"<!DOCTYPE html>", b"version https://git-lfs.github.com/spec/v1", b"\x80\x02}q", b"\x8c\xff"]
)
def test_a_file_of_another_kind_is_named(tmp_path, content):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(ValueError, match="^weights: cannot be read: "):
        read_weights(tmp_path / "w.pth", "weights")
    with pytest.raises(ValueError, match="gone.pth: cannot be read"):
        read_weights(tmp_path / "gone.pth", "gone.pth")


class WrongTensor:
    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (1,)


def test_a_damaged_recipe_of_a_tensor_is_named(tmp_path):
    torch.save(WrongTensor(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="^weights: cannot be read: _rebuild_tensor_v2"):
        read_weights(tmp_path / "w.pth", "weights")


def test_an_error_without_words_is_told_by_its_kind():
    assert reason(EOFError()) == "EOFError" and reason(urllib.error.URLError("no network")) == "<urlopen error no network>"
