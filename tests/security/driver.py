"""Runs commands on booby-trapped folders, each in a forked child. Started with one thread.

    python driver.py FOLDER "one command"       each trap with the next of the commands that read such a folder
    python driver.py FOLDER "every command"     each trap with all of them

It prints a JSON object: "attacks": trap -> command -> what happened; "naive": trap -> whether a loader without our
checks falls for it.
"""

import json
import os
import pickle
import shlex
import shutil
import signal
import sys
import traceback
from pathlib import Path

import network
import numpy as np
import torch
import traps
import yaml
from traps import COMMANDS, TRAPS, VERBS

import pyqemb
from pyqemb.testing.tiny import tiny_embedder, write_tiny_folder
from pyqemb.training import stage2

SECONDS = 60
NETWORK = "connects beyond this machine:"
beyond = network.watch()


def prepare(folder):
    """A sound folder of every kind, and what the commands need beside it."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    tiny_embedder().save_pretrained(folder / "model")
    tiny_embedder(seed=1).save_pretrained(folder / "other")
    write_tiny_folder(folder / "base")
    causal = write_tiny_folder(folder / "generator", prefix=True, max_position_embeddings=4096)
    traps.edit(causal / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", eos_token="<|endoftext|>")
    pyqemb.Reranker.from_pretrained(causal, device="cpu").save_pretrained(folder / "reranker")
    teacher(folder)
    model = tiny_embedder()
    pyqemb.model.lora.add_lora(model.model, pyqemb.model.lora.LoraConfig(rank=2))
    pyqemb.model.lora.save_adapter(model.model, folder / "adapter", base="base")

    rows = [{"query": f"q {i}", "positive": f"d {i * i}"} for i in range(8)]
    negatives = [{**row, "negatives": [f"n {row['query']}"]} for row in rows]
    (folder / "texts.txt").write_text("one\ntwo\n")
    lines(folder / "rows.jsonl", rows)
    lines(folder / "negatives.jsonl", negatives)
    lines(folder / "pairs.jsonl", [{"query": "q", "document": "d"}])
    lines(
        folder / "passages.jsonl",
        [{"text": f"The bridge number {i} was built long ago, and it still stands."} for i in range(2)],
    )
    (folder / "rows").mkdir()
    lines(folder / "rows" / "train.jsonl", negatives)
    (folder / "parquet").mkdir()
    pq.write_table(pa.Table.from_pylist(negatives), folder / "parquet" / "rows.parquet")
    datasets.Dataset.from_list(negatives).save_to_disk(folder / "saved")

    def run(name, data, base="model", out="out", **more):
        train = {"steps": 1, "global_batch_size": 4, "num_negatives": 1, "device": "cpu", "memory": None, **more}
        settings = {"model": {"base": base}, "data": [{"path": data}], "train": train, "save": {"dir": out, "every": 1}}
        (folder / name).write_text(json.dumps(settings))
        return settings

    run("saved.json", "saved", "other")
    run("rows.json", "rows", "other")
    run("parquet.json", "parquet/rows.parquet", "other")
    run("run.json", "negatives.jsonl")
    evaluated = {**run("swept.json", "negatives.jsonl"), "eval": {"data": "rows.jsonl"}}
    (folder / "swept.json").write_text(json.dumps(evaluated))
    lines(folder / "corpus.jsonl", [{"text": "a document", "source": "a page"}])
    settings = run("resumed.json", "negatives.jsonl", out="run")
    ranked = {"input": ["rows.jsonl"], "out": "out", "step": [{"kind": "rank", "model": "model"}]}
    (folder / "ranked.json").write_text(json.dumps(ranked))
    endpoint = {"model": "generator", "backend": "transformers", "max_tokens": 4, "structured": "off"}
    synthesis = {"passages": "passages.jsonl", "out": "out", "endpoint": endpoint}
    (folder / "synthesis.json").write_text(json.dumps(synthesis))
    (folder / "yaml").mkdir()
    for name, values in (
        ("run", {**settings, "save": {"dir": "out", "every": 1}}),
        ("curate", ranked),
        ("synthesis", synthesis),
    ):
        (folder / "yaml" / f"{name}.yaml").write_text(yaml.safe_dump(values))
    pyqemb.train(stage2(**{**settings, "save": {"dir": "run", "every": 1}}))
    shutil.rmtree(folder / "run" / "final")


def teacher(folder):
    """A model of another make, for sentence-transformers."""
    import tokenizers
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Dense, Pooling, Transformer
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer.from_file(str(folder / "base" / "tokenizer.json"))
    bert = folder / "bert"
    config = BertConfig(
        vocab_size=384, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(bert)
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=end, unk_token=end, model_max_length=64
    ).save_pretrained(bert)
    transformer = Transformer(str(bert))
    modules = [transformer, Pooling(32, pooling_mode="mean"), Dense(32, 16)]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder / "teacher"))


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def in_a_child(work, log):
    """What a child does: its exit status (of a signal: negative), its output, its peak memory in MB."""
    child = os.fork()
    if child == 0:
        status = 1
        beyond.clear()
        try:
            signal.alarm(SECONDS)
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))
            status = work()
        except BaseException:
            traceback.print_exc()
        finally:
            for attempt in beyond:
                print(f"{NETWORK} {attempt}", file=sys.stderr)
            os._exit(status)
    _, status, usage = os.wait4(child, 0)
    said = log.read_bytes().decode("utf-8", "replace")
    return {"status": os.waitstatus_to_exitcode(status), "said": said[-3000:], "MB": usage.ru_maxrss // 1024}


def command(place, kind, words):
    def work():
        from pyqemb.cli import main

        os.chdir(place)
        sys.path.insert(0, str(place / kind))  # the code of a folder is easy to import
        return main(shlex.split(words))

    return work


def attack(folder, share):
    """With every command that reads such a folder, or with one of them."""
    template, work = folder / "template", folder / "work"
    template.mkdir()
    os.chdir(template)
    prepare(template)
    found = {}
    for name, verb in cases(share == "every command"):
        kind, words = COMMANDS[verb]
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(template, work / "place")
        canary = work / "canary"
        if name in TRAPS:
            TRAPS[name].arm(work / "place" / kind, canary)
        result = in_a_child(command(work / "place", kind, words), folder / "log")
        found.setdefault(name, {})[verb] = {**result, "canary": canary.exists()}
    return found


def cases(every):
    """(trap, command); "nothing" is a sound folder."""
    used = dict.fromkeys(COMMANDS, 0)
    found = []
    for name, trap in TRAPS.items():
        verbs = [verb for verb, (kind, _) in COMMANDS.items() if kind in trap.targets]
        chosen = verbs if every else [min(verbs, key=used.get)]
        found += [(name, verb) for verb in chosen]
        used = {verb: count + (verb in chosen) for verb, count in used.items()}
    return found + [("nothing", verb) for verb in (COMMANDS if every else VERBS)]


def naive(folder):
    """Loaders without our checks: does the canary appear?"""
    import zipfile

    def trapped(name, load):
        work = folder / "naive"
        shutil.rmtree(work, ignore_errors=True)
        (work / "model").mkdir(parents=True)
        (work / "model" / "run.yaml").write_text("a: 1\n")
        write_tiny_folder(work / "model")
        TRAPS[name].arm(work / "model", work / "canary")
        in_a_child(lambda: load(work / "model") and 0, folder / "log")
        return (work / "canary").exists()

    def imported(model):
        from transformers import AutoModel

        AutoModel.from_pretrained(model, trust_remote_code=True)

    def foreign(model):
        from sentence_transformers.util import import_from_string

        sys.path.insert(0, str(model))
        import_from_string(json.loads((model / "modules.json").read_text())[-1]["type"])

    def rendered(model):
        import jinja2

        jinja2.Template((model / "chat_template.jinja").read_text()).render()

    def slipped(model):
        with zipfile.ZipFile(model / "model.safetensors") as archive:
            for name in archive.namelist():
                path = model / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.read(name))

    return {
        "a pickle as pytorch_model.bin": trapped(
            "a pickle as pytorch_model.bin", lambda model: pickle.loads((model / "pytorch_model.bin").read_bytes())
        ),
        "a pickle beside other weights": trapped(
            "a pickle beside other weights", lambda model: torch.load(model / "pytorch_model.bin", weights_only=False)
        ),
        "arrays of objects": trapped(
            "arrays of objects", lambda model: np.load(model / "vectors.npy", allow_pickle=True)
        ),
        "arrays of objects in .npz": trapped(
            "arrays of objects", lambda model: np.load(model / "vectors.npz", allow_pickle=True)["arr_0"]
        ),
        "a distributed checkpoint": trapped(
            "a distributed checkpoint", lambda model: pickle.loads((model / ".metadata").read_bytes())
        ),
        "a YAML object": trapped("a YAML object", lambda model: yaml.unsafe_load((model / "run.yaml").read_text())),
        "auto_map": trapped("auto_map", imported),
        "a foreign module": trapped("a foreign module", foreign),
        "a template that runs a command": trapped("a template that runs a command", rendered),
        "a zip archive as weights": trapped("a zip archive as weights", slipped),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    place = Path(sys.argv[1]).resolve()
    print(json.dumps({"attacks": attack(place, sys.argv[2]), "naive": naive(place)}))
