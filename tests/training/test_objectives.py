"""From the task of a set to its objective, and from a batch to the loss of its vectors."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import pyqemb
from pyqemb import ops
from pyqemb.data.example import Example
from pyqemb.errors import ConfigError, DataError, PyqembError
from pyqemb.testing.tiny import tiny_embedder, write_tiny_folder
from pyqemb.training import LossPart, Objective, Section, register_objective, stage2
from pyqemb.training.config import LossSection
from pyqemb.training.objectives import CoSENT, LossParameters, objective_class, objective_of, registry
from pyqemb.training.parallel.world import World
from pyqemb.training.state import Checkpoint, checkpoints
from pyqemb.training.steps import StepBatch, checked_part


def examples(count=9):
    generator = torch.Generator().manual_seed(0)

    def numbers(size):
        return tuple(torch.randn(size, generator=generator).tolist())

    return [
        Example(
            f"q{i}", f"p{i // 2}", tuple(f"n{i * n}" for n in range(1, i % 3 + 2)), score=float(i % 4),
            scores=numbers(i % 3 + 2), query_embedding=numbers(20), positive_embedding=numbers(20),
        )
        for i in range(count)
    ]  # fmt: skip


def vectors(batch, dim=16):
    generator = torch.Generator().manual_seed(1)
    return [
        normalize(torch.randn(len(x), dim, dtype=torch.float64, generator=generator), dim=1).requires_grad_()
        for x in (batch.query_text, batch.document_text)
    ]


def test_tasks_have_objectives():
    config = LossSection(tasks={"my set": "cosent", "sts": "info_nce"})
    expected = {None: "info_nce", "retrieval": "info_nce", "bitext": "info_nce", "anything": "info_nce"}
    expected |= {
        "classification": "classification",
        "distillation": "distillation",
        "my set": "cosent",
        "sts": "info_nce",
    }
    assert {task: objective_of(task, config).name for task in expected} == expected
    assert objective_of("sts", LossSection()).name == "cosent"
    assert objective_of("retrieval", LossSection(preset="classification")).name == "classification"


def test_what_an_objective_lacks_is_named():
    plain = Example("q", "p")
    for objective, message in {
        "cosent": "set 'x': example 2 has no score",
        "classification": "example 2 has no negatives",
        "distillation": "example 2 has neither scores nor query_embedding",
    }.items():
        with pytest.raises(DataError, match=message):
            objective_class(objective).check("x", [examples(1)[0], plain])
    mixed = [Example("q", "p", scores=(1.0,)), Example("q", "p", query_embedding=(1.0,))]
    with pytest.raises(DataError, match="cannot share a batch"):
        objective_class("distillation").check("x", mixed)
    objective_class("info_nce").check("x", [plain])


def direct(objective, batch, queries, documents, temperature=0.05):
    """The loss by the op itself."""
    rows = batch.examples
    if objective == "cosent":
        return ops.cosent(queries, documents[batch.positive], torch.tensor([e.score for e in rows]), temperature)
    if objective == "distillation":
        teacher = torch.zeros(batch.candidates.shape)
        for row, example in enumerate(rows):
            teacher[row, : len(example.scores)] = torch.tensor(example.scores)
        return ops.distill_scores(queries, documents, batch.candidates, teacher, temperature)
    if objective == "vectors":
        query, positive = (
            torch.tensor([getattr(e, f"{side}_embedding") for e in rows]) for side in ("query", "positive")
        )
        return (
            ops.distill_embeddings(queries, query) + ops.distill_embeddings(documents[batch.positive], positive)
        ) / 2
    preset = "classification" if objective == "classification" else "qwen3"
    return ops.info_nce(
        queries, documents, batch.positive, owner=batch.owner, document_ids=batch.document_text,
        temperature=temperature, preset=preset,
    )  # fmt: skip


OBJECTIVES = ["info_nce", "classification", "cosent", "distillation", "vectors"]


def batch_of(objective):
    rows = examples()
    if objective == "vectors":
        rows = [
            Example(e.query, e.positive, query_embedding=e.query_embedding, positive_embedding=e.positive_embedding)
            for e in rows
        ]
    kind = "distillation" if objective == "vectors" else objective
    return objective_class(kind).build_batch(rows, tiny_embedder())


@pytest.mark.parametrize("dims", [None, (4, 16)])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_parts_of_processes_are_the_loss_of_the_op(objective, dims):
    batch = batch_of(objective)
    leaves = vectors(batch)
    config = LossSection(temperature=0.05, matryoshka=dims, matryoshka_weights=dims and (0.5, 2.0))
    if dims is None:
        truth = direct(objective, batch, *leaves)
    else:
        cut = [[normalize(x[:, :dim], dim=1) for x in leaves] for dim in dims]
        truth = 0.5 * direct(objective, batch, *cut[0]) + 2 * direct(objective, batch, *cut[1])
    kind = "distillation" if objective == "vectors" else objective
    loss_of = objective_class(kind)(config)
    whole = loss_of.loss(batch, *leaves, slice(0, 9))
    torch.testing.assert_close(whole.loss, truth, rtol=1e-9, atol=1e-12)
    parts = [loss_of.loss(batch, *leaves, rows) for rows in (slice(0, 4), slice(4, 9), slice(9, 9))]
    losses = [part.loss for part in parts]
    torch.testing.assert_close(sum(losses), truth, rtol=1e-9, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(x, leaves) for x in (sum(losses), truth)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)
    totals = sum(part.totals for part in parts)
    torch.testing.assert_close(totals, whole.totals, rtol=1e-9, atol=1e-9)
    stats = loss_of.stats(totals, len(batch.positive))
    assert tuple(stats) == loss_of.statistics
    last = leaves if dims is None else cut[1]
    assert stats["positive"] == pytest.approx(float((last[0] * last[1][batch.positive]).sum(1).mean()))


def test_the_configuration_reaches_the_op():
    batch = batch_of("info_nce")
    leaves = vectors(batch)
    config = LossSection(
        preset="ms_swift", margin=0.2, softmax="split", focal=1.0, temperature=0.1,
        groups={"query_query": False, "own_hard": True, "doc_hard": {"mask": False, "hardness": 2.0}},
    )  # fmt: skip
    groups = {"query_query": False, "own_hard": True, "doc_hard": ops.Group(mask=None, hardness=2.0)}
    truth = ops.info_nce(
        *leaves, batch.positive, owner=batch.owner, document_ids=batch.document_text, preset="ms_swift", margin=0.2,
        softmax="split", focal=1.0, temperature=0.1, groups=groups,
    )  # fmt: skip
    assert objective_class("info_nce")(config).loss(batch, *leaves, slice(0, 9)).loss == truth


def test_a_learned_temperature_gets_a_gradient():
    batch, config = batch_of("info_nce"), LossSection(learn_temperature=True, temperature=0.1)
    parameters = LossParameters(config)
    objective_class("info_nce")(config, parameters).loss(batch, *vectors(batch), slice(0, 9)).loss.backward()
    assert float(parameters.log_temperature.detach().exp()) == pytest.approx(0.1)
    assert parameters.log_temperature.grad != 0
    assert not list(LossParameters(LossSection()).parameters())


@pytest.fixture
def workplace(tmp_path):
    write_tiny_folder(tmp_path / "base")
    generator = torch.Generator().manual_seed(0)
    kinds = {
        "sts": ["score"],
        "classification": [],
        "scores": ["scores"],
        "vectors": ["query_embedding", "positive_embedding"],
    }
    for kind, columns in kinds.items():
        with (tmp_path / f"{kind}.jsonl").open("w") as file:
            for number in range(32):
                words = [str(n) for n in torch.randint(0, 99, (5,), generator=generator).tolist()]
                extra = {
                    "score": number % 3, "scores": [2.0, 0.0, -1.0],
                    "query_embedding": [float(number % 2)] * 16 + [1.0] * 16,
                    "positive_embedding": [float(number % 2)] * 16 + [1.0] * 16,
                }  # fmt: skip
                second = words[: 2 + number % 3] + ["7"] * (3 - number % 3)
                row = {"query": " ".join(words), "positive": " ".join(second), "negatives": ["1 1 1", f"{number}"]}
                task = "distillation" if kind in ("scores", "vectors") else kind
                file.write(json.dumps({**row, "task": task, **{key: extra[key] for key in columns}}) + "\n")
    return tmp_path


def run(folder, kind, loss=None, name=None, **train):
    settings = {
        "steps": 16,
        "global_batch_size": 16,
        "learning_rate": 3e-3,
        "num_negatives": 2,
        "tokens_per_chunk": 200,
        "device": "cpu",
    }
    config = stage2(
        model={"base": str(folder / "base")}, data=[{"path": str(folder / f"{kind}.jsonl")}],
        loss={"temperature": 0.1, **(loss or {})}, train={**settings, **train},
        save={"dir": str(folder / (name or f"run_{kind}")), "every": 4},
    )  # fmt: skip
    return pyqemb.train(config, resume="auto")


@pytest.mark.parametrize("kind", ["sts", "classification", "scores", "vectors"])
def test_every_task_trains(workplace, kind):
    losses = [row["loss"] for row in run(workplace, kind).metrics]
    assert losses[-1] < 0.95 * losses[0]  # (a teacher's scores leave a loss that nobody gets below)


def test_a_learned_temperature_is_kept_by_checkpoints(workplace):
    options = dict(loss={"learn_temperature": True}, schedule="constant")
    straight = run(workplace, "classification", name="straight", **options).metrics
    run(workplace, "classification", name="halves", **options, steps=8)
    halves = run(workplace, "classification", name="halves", **options).metrics
    assert straight[0]["temperature"] != straight[-1]["temperature"]
    assert [row["temperature"] for row in halves] == [row["temperature"] for row in straight[8:]]
    assert [row["loss"] for row in halves] == [row["loss"] for row in straight[8:]]
    kept = Checkpoint.load(checkpoints(workplace / "straight" / "checkpoints")[-1])
    assert "loss.log_temperature/value" in kept.optimizer
    assert "loss.log_temperature" not in kept.weights


def test_a_set_without_its_columns_stops_before_training(workplace):
    with pytest.raises(DataError, match="set 'sts': example 1 has neither scores nor query_embedding"):
        run(workplace, "sts", loss={"tasks": {"sts": "distillation"}})
    assert not (workplace / "run_sts" / "final").exists()


class Settings(Section):
    slope: float = 1.0


@pytest.fixture
def mean_objective():
    """Pulls every query to its positive; with settings, a required column and a statistic of its own."""

    @register_objective
    class Mean(Objective):
        name, tasks, columns, statistics = "mean", ("mean",), ("negatives",), ("distance",)
        Settings = Settings

        @classmethod
        def missing(cls, example):
            return None if example.negatives else "has no negatives, which the mean counts"

        def loss(self, batch, queries_BE, documents_ME, rows):
            def part(queries_BE, documents_ME):
                distance_R = 1 - (queries_BE[rows] * documents_ME[batch.positive[rows]]).sum(1)
                total = distance_R.sum()
                return LossPart(self.settings.slope * total / len(queries_BE), total.detach().double().reshape(1))

            return self.over_prefixes(part, queries_BE, documents_ME)

    yield Mean
    registry._BY_NAME.pop("mean", None)


def test_a_registered_objective_trains(workplace, mean_objective):
    rows = [json.loads(line) | {"task": "mean"} for line in (workplace / "classification.jsonl").open()]
    (workplace / "mean.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run(workplace, "mean", {"objectives": {"mean": {"slope": 2.0}}, "matryoshka": [8, 32]})
    distances = [row["distance"] for row in result.metrics]
    assert distances[-1] < 0.5 * distances[0]
    assert "positive" not in result.metrics[0]
    assert result.metrics[0]["loss"] != pytest.approx(distances[0])  # two prefixes, twice the slope
    rows[3]["negatives"] = []
    (workplace / "mean.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="dataset 'mean': example 4 has no negatives, which the mean counts"):
        run(workplace, "mean", name="other")


def test_a_registered_objective_is_chosen(mean_objective):
    assert objective_of("mean", LossSection()) is mean_objective
    assert objective_of(None, LossSection(objective="mean")) is mean_objective
    assert objective_of("x", LossSection(tasks={"x": "mean"}, objective="cosent")) is mean_objective
    assert mean_objective(LossSection()).settings.slope == 1.0
    assert mean_objective(LossSection(objectives={"mean": {"slope": 3}})).settings.slope == 3.0


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"objective": "none"}, "loss.objective: expected one of info_nce, .*register_objective, got 'none'"),
        ({"objectives": {"none": {}}}, "loss.objectives: none: no objective is called that"),
        ({"objectives": {"mean": {"slop": 1}}}, "loss.objectives: mean.slop: unknown key"),
        ({"objectives": {"mean": {"slope": "steep"}}}, "loss.objectives: mean.slope: "),
        ({"objectives": {"info_nce": {"focal": 1.0}}}, "loss.objectives: info_nce: its settings are those of .loss."),
    ],
)
def test_unknown_objectives_and_settings_are_refused(mean_objective, loss, message):
    with pytest.raises(ConfigError, match=message):
        stage2(model={"base": "m"}, data=[{"path": "d"}], loss=loss)


def test_what_cannot_be_registered(mean_objective):
    class Other(mean_objective):
        pass

    class NoLoss(Objective):
        name = "no loss"

    class InfoNCE(mean_objective):
        name = "info_nce"

    class Sts(mean_objective):
        name, tasks = "mine", ("sts",)

    for given, error, message in (
        (5, TypeError, "objective must be a subclass of Objective, got 5"),
        (NoLoss, TypeError, "NoLoss needs a `name` and a method `loss`"),
        (Other, ValueError, "Mean is called 'mean' already"),
        (InfoNCE, ValueError, "InfoNCE is called 'info_nce' already"),
        (Sts, ValueError, "task 'sts' belongs to 'cosent'"),
    ):
        with pytest.raises(error, match=message):
            register_objective(given)
    register_objective(mean_objective)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            LossPart(torch.zeros(2, requires_grad=True), torch.zeros(0)),
            r"the loss must be a scalar, .* \[2\]",
        ),
        (LossPart(torch.tensor(1.0), torch.zeros(0)), "the loss does not depend on the vectors"),
        (
            LossPart(torch.tensor(1.0, requires_grad=True), torch.tensor(1.0)),
            r"totals must have the shape .*, got \[\]",
        ),
    ],
)
def test_a_part_that_cannot_be_added_up_is_refused_by_the_objectives_name(part, message):
    with pytest.raises(PyqembError, match=f"objective 'cosent': {message}"):
        checked_part(part, CoSENT)


@pytest.mark.parametrize(
    ("preset", "tau_plus"),
    [("qwen3", 0.0), ("mnrl", 0.0), ("ms_swift", 0.01), ("memeff", 0.01), ("gte", 0.0), ("classification", 0.0)],
)
def test_a_ring_counts_the_candidates_of_a_gather(preset, tau_plus):
    """Neither the positive of a query nor the query itself is a candidate."""
    rows, model = examples(), tiny_embedder()
    rows = [replace(row, negatives=(*row.negatives, row.positive)) for row in rows]
    section = LossSection(preset=preset, tau_plus=tau_plus, temperature=0.1)
    objective = objective_of(None, section)(section, LossParameters(section))
    texts = objective.build_batch(rows, model)
    own = normalize(torch.randn(len(texts.texts), 16, generator=torch.Generator().manual_seed(0)), dim=1)
    step = StepBatch("rows", 0, objective, texts, [np.arange(len(texts.texts))], None)
    found = [step.stats(step.loss(own.clone().requires_grad_(), World(), ring).totals) for ring in (False, True)]
    assert found[0]["masked"] > 0 or preset == "mnrl"
    assert found[1] == pytest.approx(found[0], rel=1e-6)
