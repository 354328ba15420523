"""Token files: the bytes are Megatron-Core's own, and damage is caught before training."""

from pathlib import Path

import numpy as np
import pytest

from megatron_sharedproj.data.indexed import IndexedWriter, token_dtype
from megatron_sharedproj.data.inspection import validate_indexed

DOCUMENTS = [np.arange(length, dtype=np.int64) * 7 % 300 for length in (1, 5, 300, 2, 64)]


def write(prefix: Path, documents: list[np.ndarray], vocab_size: int) -> None:
    """In bulk, two calls."""
    with IndexedWriter(prefix, vocab_size) as writer:
        for part in (documents[:2], documents[2:]):
            lengths = np.array([len(document) for document in part], dtype=np.int32)
            writer.add(np.concatenate([*part, np.zeros(0, np.int64)]), lengths)
        writer.close()
        writer.publish()


@pytest.mark.parametrize("vocab_size", [300, 65499, 65500, 200_000])
def test_bytes_equal_those_of_megatron_core(tmp_path: Path, vocab_size: int) -> None:
    torch = pytest.importorskip("torch")
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    write(tmp_path / "ours", DOCUMENTS, vocab_size)
    dtype = megatron.DType.optimal_dtype(vocab_size)
    assert token_dtype(vocab_size) == dtype
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in DOCUMENTS:
        builder.add_document(torch.from_numpy(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    dataset = megatron.IndexedDataset(str(tmp_path / "ours"))
    assert all(np.array_equal(dataset[i], document) for i, document in enumerate(DOCUMENTS))


def test_nothing_is_left_when_interrupted(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), IndexedWriter(tmp_path / "a", 300) as writer:
        writer.add(DOCUMENTS[1], np.array([5], dtype=np.int32))
        writer.write_extra(".json", "{}")
        writer.close()
        assert list(tmp_path.iterdir())
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_publish_leaves_only_the_pair_and_replaces_an_old_one(tmp_path: Path) -> None:
    for documents in (DOCUMENTS, DOCUMENTS[:3]):
        write(tmp_path / "a", documents, 300)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]
        assert validate_indexed(tmp_path / "a", 300) == (len(documents), sum(map(len, documents)))


def test_wrong_ids_and_lengths_are_refused(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", 300) as writer:
        with pytest.raises(ValueError, match="outside the vocabulary of 300"):
            writer.add(np.array([1, 300]), np.array([2], dtype=np.int32))
        with pytest.raises(ValueError, match="do not add up"):
            writer.add(np.array([1, 2]), np.array([3], dtype=np.int32))


def test_validate_catches_an_id_beyond_the_vocabulary(tmp_path: Path) -> None:
    documents = [np.array([1, 2, 3]), np.array([4, 299])]
    write(tmp_path / "a", documents, 300)
    with pytest.raises(
        ValueError, match=r"a\.bin holds token id 299, outside the vocabulary of 299; train with"
    ):
        validate_indexed(tmp_path / "a", 299)
    assert validate_indexed(tmp_path / "a", 299, max_tokens=4) == (2, 5)
    assert validate_indexed(str(tmp_path / "a"), 300) == (2, 5)


def test_validate_catches_damage(tmp_path: Path) -> None:
    prefix = tmp_path / "a"
    write(prefix, DOCUMENTS, 300)
    data, idx = (prefix.with_suffix(suffix) for suffix in (".bin", ".idx"))
    whole_data, whole_idx = data.read_bytes(), idx.read_bytes()

    def fails(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            validate_indexed(prefix, 300)

    data.write_bytes(whole_data[:-2])
    fails("truncated copy")
    data.write_bytes(whole_data)
    for damaged, message in (
        (whole_idx[:-8], "not the .* of its header"),
        (whole_idx[:10], "is not a Megatron-Core index"),
        (b"X" + whole_idx[1:], "is not a Megatron-Core index"),
        (whole_idx[:17] + b"\x07" + whole_idx[18:], "dtype code 7"),
        (whole_idx[:34] + b"\x09" + whole_idx[35:], "contradicts itself"),
    ):
        idx.write_bytes(damaged)
        fails(message)
    idx.unlink()
    fails(r"no such file: .*a\.idx; give the prefix")
