"""Frozen parameters and learning rates by part of the model, against float64 and against runs without them."""

import pytest
import torch

import pyqemb
from pyqemb import ops
from pyqemb.data.batch import PackedBatch
from pyqemb.errors import CheckpointError, ConfigError
from pyqemb.testing.tiny import tiny_embedder, write_tiny_folder
from pyqemb.training import groups, resume, stage2
from pyqemb.training.config import TrainSection
from pyqemb.training.dry_run import plan
from pyqemb.training.grad_cache import GradCache
from pyqemb.training.groups import freeze, parameter_groups, part_of, rate_scales
from pyqemb.training.optim import Optimizer
from pyqemb.training.setup import load_model
from pyqemb.training.state import Checkpoint, checkpoints


def config(run="run", every=2, base="base", lora=None, task="embedding", **train):
    defaults = {"steps": 6, "global_batch_size": 8, "learning_rate": 3e-3, "device": "cpu", "memory": None}
    return stage2(
        model={"base": base}, data=[{"path": "pairs.jsonl"}], train={**defaults, **train}, lora=lora, task=task,
        save={"dir": run, "every": every},
    )  # fmt: skip


def adamw_in_float64(weight, gradients, rates, section, weight_decay):
    """Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2."""
    weight, first, second = weight.double(), 0.0, 0.0
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        gradient = gradient.double()
        first = section.betas[0] * first + (1 - section.betas[0]) * gradient
        second = section.betas[1] * second + (1 - section.betas[1]) * gradient.square()
        scaled = (second / (1 - section.betas[1] ** step)).sqrt() + section.epsilon
        weight = weight - rate * (weight_decay * weight + first / (1 - section.betas[0] ** step) / scaled)
    return weight


# The rate of each part of a model with two layers, as a factor; by hand.
RATES = [
    ({}, dict.fromkeys(("embeddings", "layer 0", "layer 1", "rest"), 1.0)),
    ({"layer_decay": 0.5}, {"embeddings": 0.125, "layer 0": 0.25, "layer 1": 0.5, "rest": 1.0}),
    ({"embedding_learning_rate": 4e-3}, {"embeddings": 4.0, "layer 0": 1.0, "layer 1": 1.0, "rest": 1.0}),
    (
        {"layer_decay": 0.5, "embedding_learning_rate": 2e-3},
        {"embeddings": 2.0, "layer 0": 0.25, "layer 1": 0.5, "rest": 1.0},
    ),
]


@pytest.mark.parametrize(("settings", "scales"), RATES)
def test_each_part_has_its_rate(settings, scales):
    section = TrainSection(learning_rate=1e-3, **settings)
    names = [name for name, _ in tiny_embedder().named_parameters()]
    assert rate_scales(names, section) == pytest.approx(scales, rel=1e-12)
    assert {part_of(name) for name in names} == set(scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [settings for settings, _ in RATES])
def test_the_optimizer_steps_as_float64_does(settings, dtype):
    section = TrainSection(learning_rate=1e-2, weight_decay=0.1, max_grad_norm=None, **settings)
    model = tiny_embedder()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Optimizer(model, section, dtype)
    generator = torch.Generator().manual_seed(0)
    gradients = [{name: torch.randn(w.shape, generator=generator) for name, w in start.items()} for _ in range(3)]
    rates = [1e-2, 5e-3, 2e-3]
    for step, rate in zip(gradients, rates, strict=True):
        for name, weight in optimizer.weights.items():
            weight.grad = step[name].clone()
        optimizer.step(rate)
    scales = rate_scales(start, section)
    for name, weight in optimizer.weights.items():
        decay = 0.1 if weight.ndim > 1 else 0.0
        scaled = [rate * scales[part_of(name)] for rate in rates]
        truth = adamw_in_float64(start[name], [step[name] for step in gradients], scaled, section, decay)
        torch.testing.assert_close(weight.detach().double(), truth, rtol=3e-6, atol=3e-7)


def test_without_settings_the_groups_are_those_of_before():
    norms, matrices = (
        [name for name, p in tiny_embedder().named_parameters() if (p.ndim == 1) == vector] for vector in (True, False)
    )
    found = parameter_groups(tiny_embedder(), TrainSection(weight_decay=0.3))
    assert found == [("adamw", 1.0, 0.3, matrices), ("adamw", 1.0, 0.0, norms)]
    assert [len(g.names) for g in parameter_groups(tiny_embedder(), TrainSection(layer_decay=0.9))] == [
        1,
        7,
        4,
        7,
        4,
        1,
    ]


PATTERNS = [
    ["embed_tokens"],
    ["embed_tokens.weight", "layers.0"],
    ["layers.*.mlp.*"],
    ["*norm.weight"],
    ["layers.1", "norm"],
    ["*_proj.weight", "embed_tokens"],
]


@pytest.mark.parametrize("patterns", PATTERNS, ids=str)
@pytest.mark.parametrize("tokens", [40, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_the_others_are_those_of_a_run_that_trains_all(patterns, tokens, dtype):
    def batch(count, seed):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, 20, (count,), generator=generator).tolist()
        return PackedBatch.pack([torch.randint(0, 380, (n,), generator=generator).tolist() for n in lengths])

    def gradients(patterns):
        model = tiny_embedder()
        freeze(model, patterns)
        optimizer = Optimizer(model, TrainSection(max_grad_norm=None), dtype)
        loss = lambda queries, documents: ops.info_nce(queries, documents, torch.arange(len(queries)), temperature=0.1)  # noqa: E731
        GradCache(model, loss, tokens, parameters=optimizer.weights.values()).step(batch(6, 0), batch(9, 1))
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        optimizer.clip()
        optimizer.step(1e-3)
        kinds = {key.rpartition("/")[0] for key in optimizer.state_tensors()}
        assert kinds == set(optimizer.weights) == {name for name, p in model.named_parameters() if p.requires_grad}
        return {name: weight.grad for name, weight in optimizer.weights.items()}

    everything, some = gradients([]), gradients(patterns)
    assert 0 < len(some) < len(everything)
    for name, gradient in some.items():
        torch.testing.assert_close(gradient, everything[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            ["embed_token"],
            r"freeze: 'embed_token' matches no parameter of the model; did you mean 'embed_tokens'",
        ),
        (["model.layers.7"], r"'model\.layers\.7' matches no parameter .*did you mean 'layers\.[01]'"),
        (["visual.*"], r"'visual\.\*' matches no parameter of the model; its parameters are called like embed_tokens"),
        (["layers", "*"], r"train\.freeze: layers, \* freezes every parameter; nothing is left to train"),
    ],
)
def test_patterns_that_do_nothing_useful_are_refused(patterns, message):
    with pytest.raises(ConfigError, match=message):
        freeze(tiny_embedder(), patterns)


def test_the_prefix_of_a_causal_language_model_is_optional():
    for pattern in ("model.layers.0.mlp.*", "layers.0.mlp"):
        model = tiny_embedder()
        freeze(model, [pattern])
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        assert frozen == {f"model.layers.0.mlp.{kind}_proj.weight" for kind in ("gate", "up", "down")}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"freeze": ["embed_tokens"], "lora": {"rank": 2}}, r"^train\.freeze: with \[lora\] only adapters are trained"),
        (
            {"freeze": ["embed_tokens"], "embedding_learning_rate": 1e-3},
            r"embedding_learning_rate: has no effect",
        ),
        ({"embedding_learning_rate": 1e-3, "lora": {"rank": 2}}, r"embedding_learning_rate: has no effect"),
        ({"head_learning_rate": 1e-3}, r"train\.head_learning_rate: has no effect .* untied embeddings"),
        ({"freeze": ["embed_tok"]}, r"train\.freeze: 'embed_tok' matches no parameter"),
        ({"freeze": []}, r"train\.freeze: "),
        ({"layer_decay": 1.5}, r"train\.layer_decay: .* got 1\.5"),
    ],
)
def test_what_has_no_effect_is_refused_before_the_run(workplace, settings, message):
    for attempt in (lambda: list(plan(config(**settings))), lambda: pyqemb.train(config(**settings))):
        with pytest.raises(ConfigError, match=message):
            attempt()
    assert not (workplace / "run" / "final").exists()


def test_the_head_of_a_reranker_has_its_own_rate(workplace):
    write_tiny_folder("answering", prefix=True, tie_word_embeddings=False, max_position_embeddings=1024)
    model = load_model(config(base="answering", task="rerank", head_learning_rate=6e-3, layer_decay=0.5))
    found = {name: group.scale for group in parameter_groups(model, config(head_learning_rate=6e-3).train)
             for name in group.names}  # fmt: skip
    assert found["head"] == 2.0
    assert {scale for name, scale in found.items() if name != "head"} == {1.0}
    frozen = load_model(config(base="answering", task="rerank", freeze=["lm_head.weight"]))
    assert [name for name, p in frozen.named_parameters() if not p.requires_grad] == ["head"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_with_frozen_weights_resumes_and_consolidates(workplace, precision):
    class StopError(Exception):
        pass

    def stop(row):
        if row["step"] == 3:
            raise StopError

    settings = {"freeze": ["embed_tokens", "layers.0"], "layer_decay": 0.8, "precision": precision}
    result = pyqemb.train(config("straight", **settings))
    with pytest.raises(StopError):
        pyqemb.train(config("stopped", **settings), on_step=stop)
    pyqemb.train(config("stopped", **settings), resume="auto")
    final = (result.folder / "model.safetensors").read_bytes()
    assert (workplace / "stopped" / "final" / "model.safetensors").read_bytes() == final
    out = pyqemb.consolidate("stopped", out="consolidated")
    assert (out / "model.safetensors").read_bytes() == final
    base, model = (pyqemb.Embedder.from_pretrained(path, dtype="float32") for path in ("base", result.folder))
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    for (name, before), after in zip(base.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(before.to(dtype).float(), after) == ("embed" in name or "layers.0." in name), name
    saved = Checkpoint.load(checkpoints(workplace / "straight" / "checkpoints")[-1])
    assert not [name for name in (*saved.weights, *saved.optimizer) if "embed" in name or "layers.0." in name]
    with pytest.raises(ConfigError, match=r"train\.freeze was \['embed_tokens', 'layers\.0'\], now None"):
        pyqemb.train(config("stopped", **{**settings, "freeze": None, "steps": 8}), resume="auto")
    write_tiny_folder("base", seed=1)
    with pytest.raises(ConfigError, match="cannot resume: the base model base has changed"):
        pyqemb.train(config("stopped", **settings, **{"steps": 8}), resume="auto")
    with pytest.raises(CheckpointError, match="base: the base model has changed"):
        pyqemb.consolidate("stopped", out="again")


def test_a_checkpoint_from_before_the_keys_continues(workplace):
    """Earlier versions wrote no key `freeze` or `layer_decay`, and no section `log`."""
    pyqemb.train(config(steps=3))
    before = Checkpoint.load(checkpoints(workplace / "run" / "checkpoints")[-1]).state["config"]
    for key in ("freeze", "layer_decay", "embedding_learning_rate", "head_learning_rate"):
        del before["train"][key]
    del before["log"], before["loss"]["temperature"]
    filled = resume._with_new_keys(before)
    assert not resume.differences(filled, config(steps=3).model_dump(mode="json"), set())
    assert resume.differences(filled, config(steps=3, layer_decay=0.9).model_dump(mode="json"), set()) == [
        "train.layer_decay was None, now 0.9"
    ]


def test_the_plan_shows_rates_and_frozen_weights(workplace):
    shown = list(plan(config(layer_decay=0.5, embedding_learning_rate=1e-4)))
    assert "rates      at the peak: embeddings 0.0001, layer 0 0.00075, layer 1 0.0015, final norm 0.003" in shown
    shown = list(plan(config(freeze=["embed_tokens"])))
    assert "frozen     0.01 M of 0.04 M parameters, in 1 of 24 tensors" in shown
    assert not [line for line in plan(config()) if line.startswith(("rates", "frozen"))]
    model = tiny_embedder(num_hidden_layers=5)
    (line,) = groups.lines(model, TrainSection(learning_rate=1.0, layer_decay=0.5))
    assert line.endswith("embeddings 0.0156, layer 0 0.0312, layer 4 0.5, final norm 1")
