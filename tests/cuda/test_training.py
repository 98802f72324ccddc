"""Training and using a model on a GPU gives what the CPU gives; skipped where there is none."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import pyqemb
from pyqemb import ops
from pyqemb.data.batch import PackedBatch
from pyqemb.data.example import Example
from pyqemb.evaluation import rank
from pyqemb.testing.tiny import TEXTS, tiny_embedder, write_tiny_folder
from pyqemb.training import stage1, stage2

DEVICE = "cuda"
SHAPE = dict(hidden_size=128, intermediate_size=192, num_attention_heads=4, num_key_value_heads=2, head_dim=64)

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
    pytest.mark.skipif(not ops.cuda_is_built(), reason="this build of pyqemb has no CUDA kernels"),
]


@pytest.fixture
def workplace(tmp_path):
    write_tiny_folder(tmp_path / "base", **SHAPE)
    generator = torch.Generator().manual_seed(0)
    with (tmp_path / "pairs.jsonl").open("w") as file:
        for _ in range(64):
            words = [str(n) for n in torch.randint(0, 99, (6,), generator=generator).tolist()]
            row = {"query": " ".join(words), "positive": " ".join(words[::-1]), "negatives": [" ".join(sorted(words))]}
            file.write(json.dumps(row) + "\n")
    return tmp_path


def train(folder, run, stage=stage2, device=DEVICE, on_step=None, **options):
    """Five steps in bfloat16, which the CPU stores and a GPU computes in; returns losses and final weights."""
    rows = []
    settings = stage(
        model={"base": str(folder / "base"), "attention": "bidirectional"},
        data=[{"path": str(folder / "pairs.jsonl")}], train={
            "steps": 5, "global_batch_size": 16, "learning_rate": 1e-3, "tokens_per_chunk": 200,
            "precision": "bfloat16", "device": device,
        },
        save={"dir": str(folder / run), "every": 2},
    )  # fmt: skip

    def keep(row):
        rows.append(row)
        if on_step is not None:
            on_step(row)

    result = pyqemb.train(settings, on_step=keep, **options)
    checkpoint = result.folder.parent / "checkpoints" / "step_00000005" / "model.safetensors"
    return torch.tensor([row["loss"] for row in rows]), load_file(checkpoint)


@pytest.mark.parametrize("stage", [stage1, stage2])
def test_training_equals_that_on_the_cpu(workplace, stage):
    losses, weights = train(workplace, "here", stage)
    theirs, expected = train(workplace, "there", stage, "cpu")
    assert losses[-1] < losses[0]
    assert (losses - theirs).abs().max() < 0.1 * theirs.max()
    before = load_file(workplace / "base" / "model.safetensors")
    for name, weight in weights.items():
        start = before[name.removeprefix("model.")]
        moved, difference = (expected[name] - start).norm(), (weight - expected[name]).norm()
        # Adam moves a weight by its gradient's sign: where that is rounding, the two part ways.
        assert moved > 0, name
        assert difference < 0.3 * moved, name


def test_training_repeats_and_resumes_bit_by_bit(workplace):
    losses, weights = train(workplace, "one")
    again, same = train(workplace, "two")
    assert torch.equal(losses, again)
    assert all(torch.equal(weights[name], same[name]) for name in weights)

    class StopTrainingError(Exception):
        pass

    def stop(row):
        if row["step"] == 3:
            raise StopTrainingError

    with pytest.raises(StopTrainingError):
        train(workplace, "three", on_step=stop)
    _, resumed = train(workplace, "three", resume="auto")
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)


@pytest.fixture
def models():
    """The same bfloat16 weights on both devices."""

    def make(pooling, device):
        return tiny_embedder(pooling=pooling, **SHAPE).bfloat16().to(device)

    return lambda pooling="last": (make(pooling, DEVICE), make(pooling, "cpu"))


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_encode_equals_the_cpu(models, pooling):
    texts = [*TEXTS, *(text * 5 for text in TEXTS)]
    ours, theirs = (model.encode(texts, dim=64, tokens_per_chunk=300) for model in models(pooling))
    assert (ours * theirs).sum(axis=1).min() > 0.999
    assert np.abs(ours - theirs).max() < 0.02


def test_a_batch_may_lie_anywhere(models):
    model, _ = models()
    batch = PackedBatch.pack([[5, 6, 7], [], [8], list(range(9, 200))])
    assert torch.equal(model(batch), model(batch.to(DEVICE)))
    assert model(batch).device == model.device
    assert batch.to(DEVICE).select([3, 0]).split(100)[0].lengths.tolist() == [191]
    assert torch.equal(
        PackedBatch.concat([batch.to(DEVICE), batch.to(DEVICE)]).positions_T.cpu()[-191:], torch.arange(191)
    )


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_pass_never_waits_for_the_device(models, pooling):
    model, _ = models(pooling)
    batch = PackedBatch.pack([[5, 6, 7], [8], list(range(9, 200))])
    model(batch).sum().backward()  # first calls may set things up
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(batch).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_search_on_the_device():
    generator = np.random.default_rng(0)
    queries, documents = (generator.standard_normal((n, 64)).astype(np.float32) for n in (50, 3000))
    exclude = generator.integers(0, 3000, (50, 2))
    (scores, indices), (expected, order) = (rank(queries, documents, 20, exclude, device=d) for d in (DEVICE, "cpu"))
    assert np.abs(scores - expected).max() < 1e-4
    assert (indices == order).mean() > 0.99


def test_mining_on_the_device(models):
    ours, theirs = models()
    examples = [Example(f"query {i}", f"the document number {i} of them") for i in range(40)]
    mined = [pyqemb.mine(model, examples, k=3, max_positive_ratio=None) for model in (ours, theirs)]
    assert mined[0].report.short == mined[1].report.short == 0
    assert mined[0].report.negative_score == pytest.approx(mined[1].report.negative_score, abs=0.01)


def test_loading_chooses_the_device(workplace):
    model = pyqemb.Embedder.from_pretrained(workplace / "base")
    assert model.device.type == DEVICE
    assert model.dtype == torch.bfloat16
    assert pyqemb.Embedder.from_pretrained(workplace / "base", device="cpu").dtype == torch.float32
    write_tiny_folder(workplace / "small")  # head_dim 16: no CUDA kernel
    assert pyqemb.Embedder.from_pretrained(workplace / "small").device.type == "cpu"
