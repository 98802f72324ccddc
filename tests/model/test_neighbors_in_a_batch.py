"""The vector of a text does not depend on the texts beside it: alone, in any batch and order, with padding."""

import pytest
import torch

from pyqemb.data.batch import PackedBatch
from pyqemb.testing.tiny import tiny_embedder, write_tiny_folder

FORMS = {"causal, last": dict(pooling="last"), "bidirectional, mean": dict(pooling="mean", is_causal=False)}


def texts(seed):
    """Token ids of 1 to 10 texts of 1 to 70 tokens."""
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, 11, (), generator=generator))
    lengths = torch.randint(1, 71, (count,), generator=generator).tolist()
    return [torch.randint(0, 384, (n,), generator=generator).tolist() for n in lengths], generator


def vectors(model, rows):
    with torch.no_grad():
        return model(PackedBatch.pack(rows)).float()


def check(form, seeds, dtype=torch.float32):
    model = tiny_embedder(seed=1, initializer_range=0.2, **FORMS[form]).to(dtype)
    for seed in seeds:
        rows, generator = texts(seed)
        together = vectors(model, rows)
        order = torch.randperm(len(rows), generator=generator)
        strangers, _ = texts(seed + 10_000)
        some = order[: (len(rows) + 1) // 2].tolist()
        with_strangers = vectors(model, [*strangers, *(rows[i] for i in some)])[len(strangers) :]
        found = [
            (together, torch.cat([vectors(model, [row]) for row in rows])),
            (together[order], vectors(model, [rows[i] for i in order.tolist()])),
            (together[some], with_strangers),
        ]
        for one, other in found:
            if dtype == torch.float32:
                assert (one - other).abs().max() <= 1e-6, seed
            else:
                assert torch.cosine_similarity(one.double(), other.double()).min() >= 0.9999, seed


@pytest.mark.promise("R15", "vectors of 20 random batches: alone, in another order, among others; float32, bfloat16")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_alone_in_any_batch_and_order(form, dtype):
    check(form, range(20), dtype)


@pytest.mark.deep
@pytest.mark.promise("R15", "vectors of 500 random batches: alone, in another order, among others; float32, bfloat16")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_alone_in_any_of_500_batches(form, dtype):
    check(form, range(500), dtype)


def check_padded(tmp_path, seeds):
    transformers = pytest.importorskip("transformers")
    import pyqemb

    pyqemb.register_transformers()
    folder = write_tiny_folder(tmp_path / "model", seed=1, initializer_range=0.2)
    theirs = transformers.AutoModel.from_pretrained(folder, attn_implementation="pyqemb", dtype=torch.float32).eval()
    model = pyqemb.Embedder.from_pretrained(folder, device="cpu")
    for seed in seeds:
        rows, _ = texts(seed)
        truth, longest = torch.cat([vectors(model, [row]) for row in rows]), max(map(len, rows))
        for left in (False, True):
            ids, mask = (torch.zeros(len(rows), longest, dtype=torch.int64) for _ in range(2))
            for at, row in enumerate(rows):
                place = slice(longest - len(row), longest) if left else slice(0, len(row))
                ids[at, place], mask[at, place] = torch.tensor(row), 1
            with torch.no_grad():
                hidden = theirs(input_ids=ids, attention_mask=mask).last_hidden_state
            last = torch.arange(longest).expand_as(mask).masked_fill(mask == 0, -1).amax(1)
            found = torch.nn.functional.normalize(hidden[torch.arange(len(rows)), last], dim=1)
            assert (found - truth).abs().max() <= 1e-6, (seed, left)


@pytest.mark.promise("R15", "vectors of 10 random batches that transformers pads on either side")
def test_padded_on_either_side(tmp_path):
    check_padded(tmp_path, range(10))


@pytest.mark.deep
@pytest.mark.promise("R15", "vectors of 500 random batches that transformers pads on either side")
def test_500_batches_padded_on_either_side(tmp_path):
    check_padded(tmp_path, range(500))
