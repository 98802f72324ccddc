"""docs/reference/families.md: each cell of its table is measured here.

`python tests/model/test_families_page.py` measures everything and writes the page.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import pyqemb
from pyqemb.data.batch import PackedBatch
from pyqemb.errors import ConfigError
from pyqemb.model.embedder import Embedder
from pyqemb.model.families import FAMILIES, parse_config
from pyqemb.model.lora import LoraConfig, add_lora, save_adapter
from pyqemb.testing.tiny import TEXTS, tiny_embedder
from pyqemb.training import stage2
from pyqemb.training.grad_cache import GradCache, Plan

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "families.md"
NAMES = {
    "qwen3": "Qwen3", "qwen2": "Qwen2", "llama": "Llama", "mistral": "Mistral", "bert": "BERT", "roberta": "RoBERTa",
    "xlm-roberta": "XLM-RoBERTa", "distilbert": "DistilBERT",
}  # fmt: skip
WORDS = [text for text in TEXTS if text]
PAIRS = [{"query": text[:12], "positive": text} for text in WORDS]
RANKS = """
import sys
import torch, pyqemb
from pyqemb.training import TrainConfig
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
for config in sys.argv[1:]:
    pyqemb.train(TrainConfig.model_validate_json(open(config).read()))
"""


def embedder(model_type, seed=2):
    """Its texts have the token 0, and not the token 1, for which transformers computes no gradient as padding."""
    padding = {"extra": {"pad_token_id": 1}} if model_type in ("bert", "distilbert") else {}
    return tiny_embedder(seed, model_type=model_type, initializer_range=0.3, pooling="mean", **padding)


def opened(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


def distance(found, expected):
    return float(np.abs(np.asarray(found.detach()) - np.asarray(expected.detach())).max())


def encode(model_type, folder):
    """Hidden states of packed texts, and those of transformers."""
    ours = embedder(model_type)
    theirs = opened(ours.save_pretrained(folder / "m"))
    rows = ours.tokenizer.encode_documents(WORDS)
    batch = PackedBatch.pack(rows)
    expected = [theirs(torch.tensor([row])).last_hidden_state[0] for row in rows]
    return distance(ours.hidden(batch), torch.cat(expected)) < 1e-4


def train(model_type, folder):
    """Gradients of a loss in float64, and those of transformers; a training run lowers the loss."""
    ours = embedder(model_type)
    theirs = opened(ours.save_pretrained(folder / "m")).double()
    ours, rows = ours.double(), ours.tokenizer.encode_documents(WORDS)
    weights_BE = torch.randn(len(rows), 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (ours(PackedBatch.pack(rows)) * weights_BE).sum().backward()
    pooled = [theirs(torch.tensor([row])).last_hidden_state[0].mean(0) for row in rows]
    (F.normalize(torch.stack(pooled), dim=-1) * weights_BE).sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.model.named_parameters():
        gradient = expected[ours.model.family.stored_name(name)].grad
        # transformers computes the norms and the softmax of some decoders in float32.
        if (parameter.grad - gradient).norm() > 1e-5 * gradient.norm() + 1e-8:
            return False
    metrics = pyqemb.train(configuration(folder / "m", folder / "run"), data=PAIRS).metrics
    return metrics[-1]["loss"] < metrics[0]["loss"]


def lora(model_type, folder):
    """Hidden states with adapters, and those of peft."""
    peft = pytest.importorskip("peft")
    ours = embedder(model_type)
    theirs = opened(ours.save_pretrained(folder / "m"))
    add_lora(ours.model, LoraConfig(rank=2))
    with torch.no_grad():
        for name, parameter in ours.model.named_parameters():
            if name.endswith("lora.B"):
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    theirs = peft.PeftModel.from_pretrained(theirs, save_adapter(ours.model, folder / "adapter")).eval()
    (row,) = ours.tokenizer.encode_documents(WORDS[:1])
    plain, found = embedder(model_type).hidden(PackedBatch.pack([row])), ours.hidden(PackedBatch.pack([row]))
    return distance(found, theirs(torch.tensor([row])).last_hidden_state[0]) < 1e-4 < 1e-2 < distance(found, plain)


def gradient_cache(model_type, folder):
    """Gradients in chunks, and those of one pass, in float64."""
    model = embedder(model_type).double()
    batch = PackedBatch.pack(model.tokenizer.encode_documents(WORDS))
    weights_BE = torch.randn(len(WORDS), 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (model(batch) * weights_BE).sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    cache = GradCache(model, lambda q, d: (torch.cat([q, d]) * weights_BE).sum(), plan=Plan(60, boundaries=99))
    cache.step(batch.select(range(3)), batch.select(range(3, len(WORDS))))
    pairs = zip(model.parameters(), expected, strict=True)
    return cache.last.chunks > 2 and all(torch.allclose(p.grad, g, rtol=1e-9, atol=1e-10) for p, g in pairs)


def merge(model_type, folder):
    """Weights of two merged models, and the mean of their weights."""
    models = [embedder(model_type, seed) for seed in (2, 3)]
    folders = [model.save_pretrained(folder / f"{seed}") for seed, model in enumerate(models)]
    pyqemb.merge(folders, method="linear", out=folder / "merged")
    found = Embedder.from_pretrained(folder / "merged", device="cpu").model.named_parameters()
    one, two = (dict(model.model.named_parameters()) for model in models)
    return all(distance(parameter, (one[name] + two[name]) / 2) < 1e-6 for name, parameter in found)


def export(model_type, folder):
    """Vectors of sentence-transformers that loads the saved folder."""
    st = pytest.importorskip("sentence_transformers")
    ours = embedder(model_type)
    theirs = st.SentenceTransformer(str(ours.save_pretrained(folder / "m")), device="cpu")
    return distance(torch.from_numpy(theirs.encode(WORDS)), torch.from_numpy(ours.encode(WORDS))) < 1e-5


FEATURES: dict[str, Callable[[str, Path], bool]] = {
    "encode": encode, "train": train, "LoRA": lora, "gradient cache": gradient_cache, "merge": merge,
    "export": export,
}  # fmt: skip


def configuration(base, run, **sections):
    """Four steps of nine pairs."""
    return stage2(
        model={"base": str(base)}, save={"dir": str(run)},
        train={"steps": 4, "global_batch_size": 9, "learning_rate": 1e-4, "epsilon": 1e-4, "num_negatives": 0,
               "warmup": 0, "tokens_per_chunk": 60, "device": "cpu", "memory": None},
        **sections,
    )  # fmt: skip


def sharded(folder):
    """model_type -> whether two ranks that share the weights train the model that one process trains."""
    files, data = [], folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS), encoding="utf-8")
    for model_type in FAMILIES:
        base = embedder(model_type).save_pretrained(folder / model_type)
        sections = {"parallel": {"shard": -1, "reshard_after_forward": "always"}, "data": [{"path": str(data)}]}
        files.append(folder / f"{model_type}.json")
        files[-1].write_text(configuration(base, folder / f"{model_type} 2", **sections).model_dump_json())
    (folder / "ranks.py").write_text(RANKS)
    ranks = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", str(folder / "ranks.py")]
    command = [sys.executable, "-m", *ranks, *map(str, files)]
    place = os.pathsep.join([str(PAGE.parents[2]), os.environ.get("PYTHONPATH", "")])
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": place})
    found = {}
    for model_type in FAMILIES:
        alone = pyqemb.train(configuration(folder / model_type, folder / f"{model_type} 1"), data=PAIRS).folder
        one, two = (
            dict(Embedder.from_pretrained(run, device="cpu", dtype="float32").model.named_parameters())
            for run in (alone, folder / f"{model_type} 2" / "final")
        )
        base = dict(embedder(model_type).model.named_parameters())
        differences = [distance(two[name], one[name]) for name in one]
        found[model_type] = max(differences) < 1e-5 < max(distance(two[name], base[name]) for name in one)
    return found


def row(model_type, cells):
    config = FAMILIES[model_type].config
    attention = "bidirectional" if config.is_encoder else "causal or bidirectional"
    known = [NAMES[model_type], f"`{model_type}`", attention, config.default_pooling, *cells]
    return f"| {' | '.join(known)} | {'no' if config.is_encoder else 'yes'} |"


def word(value):
    return "yes" if value else "no"


def page(cells):
    """The page, given the results by model_type and feature."""
    rows = "\n".join(row(model_type, [word(cells[model_type][name]) for name in COLUMNS]) for model_type in FAMILIES)
    heads = ["family", "`model_type`", "attention", "default pooling", *COLUMNS, "reranker"]
    table = f"| {' | '.join(heads)} |\n| {' | '.join('---' for _ in heads)} |\n{rows}"
    return TEMPLATE.replace("TABLE", table)


COLUMNS = "encode", "train", "LoRA", "gradient cache", "shard", "merge", "export"
TEMPLATE = """\
# Model families

A family is a kind of model, named by `model_type` in config.json. `Embedder.from_pretrained` and
`pyqemb train` read the families of the table below:

```python
import pyqemb

model = pyqemb.Embedder.from_pretrained("sentence-transformers/all-MiniLM-L6-v2")
print(model.config.model_type, model.pooling, model.attention, model.max_seq_length)
# bert mean bidirectional 256
```

TABLE

`tests/model/test_families_page.py` measures each cell on a small random model of the family and
writes this page. The measurements use the CPU; none of them has run on a GPU.

| column | what is compared |
| --- | --- |
| default pooling | (a property) the pooling of a folder without `modules.json` |
| encode | hidden states of packed texts with those of transformers: at most 1e-4 apart (float32) |
| train | gradients with those of transformers (float64): at most 1e-5 of their norm; the loss falls in training |
| LoRA | hidden states with a saved adapter with those of peft: at most 1e-4 apart |
| gradient cache | gradients in chunks with those of one pass (float64): at most 1e-9 apart, relative to their size |
| shard | weights of two processes with a half each after four steps with those of one process: at most 1e-5 apart |
| merge | weights of two merged models with the mean of their weights: at most 1e-6 apart |
| export | vectors of the saved folder in sentence-transformers: at most 1e-5 apart |
| reranker | (a property) whether `Reranker` loads the family: it needs a causal language model |

## Encoders

For BERT, RoBERTa, XLM-RoBERTa and DistilBERT:

- Attention is always bidirectional.
- Positions are learned. `model.max_length` is at most their number: `max_position_embeddings`, and
  for RoBERTa and XLM-RoBERTa `pad_token_id` + 1 less.
- Every token has type 0 (DistilBERT has no types). Dropout is not applied in training.
- The pooler and the heads of a language model are not read, because no vector depends on them. A
  saved folder has neither; transformers reports that the pooler is missing and initializes it.
- A saved folder keeps the padding token of the tokenizer, and pads on the right.
- A cross-encoder is not trained. sentence-transformers opens it as a teacher of `pyqemb curate`.
- The CUDA kernels for attention support a head dimension of 64 and 128. A model with another one,
  such as all-MiniLM-L6-v2 with 32, uses the CPU under `device = "auto"`.

## Other families

An unknown `model_type` raises an error that lists the known ones. MPNet is not supported, because
its attention adds a relative position bias to the scores, which `varlen_attention` does not have.
[A decoder family](../dev/adding.md#a-decoder-family) describes how to add a family.
"""


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_cell_is_what_is_measured(model_type, name, tmp_path):
    text = PAGE.read_text(encoding="utf-8")
    (found,) = [line for line in text.splitlines() if f"| `{model_type}` |" in line]
    cells = found.strip("| ").split(" | ")
    assert cells[4 + COLUMNS.index(name)] == word(FEATURES[name](model_type, tmp_path))


@pytest.mark.deep
def test_two_ranks_train_what_one_process_trains(tmp_path):
    for model_type, value in sharded(tmp_path).items():
        assert value, model_type


def test_the_page_is_what_the_script_writes():
    text = PAGE.read_text(encoding="utf-8")
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.count("|") > 9][2:]
    cells = {
        line[1].strip("`"): {name: x == "yes" for name, x in zip(COLUMNS, line[4:], strict=False)} for line in lines
    }
    assert list(cells) == list(FAMILIES)
    assert page(cells) == text


def test_an_unknown_family_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=f"model_type must be one of {', '.join(FAMILIES)}, got 'unheard'"):
        parse_config({"model_type": "unheard"})


if __name__ == "__main__":
    results: dict[str, dict[str, bool]] = {}
    with TemporaryDirectory() as place:
        ranks = sharded(Path(place))
        for kind in FAMILIES:
            results[kind] = {"shard": ranks[kind]}
            for feature, measure in FEATURES.items():
                (own := Path(place) / "features" / kind / feature).mkdir(parents=True)
                results[kind][feature] = measure(kind, own)
    PAGE.write_text(page(results), encoding="utf-8")
