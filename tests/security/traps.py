"""Booby-trapped files: each trap arms a sound folder, and leaves a canary if a loader falls for it."""

import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# What reads what: command -> the folder that is armed, and its arguments.
COMMANDS = {
    "encode": ("model", "encode model texts.txt -o out.npy --quiet"),
    "train": ("model", "train run.json --quiet"),
    "sweep": ("model", "sweep swept.json --over train.learning_rate=0.001 --out out --quiet"),
    "dry run": ("model", "train run.json --dry-run"),
    "export": ("model", "export model --out out"),
    "merge": ("model", "merge other model --out out --settings-from model --quiet"),
    "evaluate": ("model", "evaluate model rows.jsonl --bootstrap 10 --quiet"),
    "mine": ("model", "mine model rows.jsonl --out out.jsonl --k 1 --quiet"),
    "curate": ("model", "curate ranked.json --quiet"),
    "demo": ("model", "demo --ask question --out ."),
    "rerank": ("reranker", "rerank reranker pairs.jsonl --out out.jsonl"),
    "evaluate a reranker": ("reranker", "evaluate reranker negatives.jsonl --bootstrap 10 --quiet"),
    "export a reranker": ("reranker", "export reranker --out out"),
    "mine with a reranker": ("reranker", "mine model rows.jsonl --out out.jsonl --k 1 --reranker reranker --quiet"),
    "mine with a teacher": ("teacher", "mine teacher rows.jsonl --out out.jsonl --k 1 --quiet"),
    "synthesize": ("generator", "synthesize synthesis.json"),
    "export an adapter": ("adapter", "export base --adapter adapter --out out"),
    "resume": ("run", "train resumed.json --resume auto --quiet"),
    "consolidate": ("run", "consolidate run --out out"),
    "train on a saved dataset": ("saved", "train saved.json --quiet"),
    "train on a folder": ("rows", "train rows.json --quiet"),
    "train on Parquet": ("parquet", "train parquet.json --quiet"),
    "train by YAML": ("yaml", "train yaml/run.yaml --quiet"),
    "curate by YAML": ("yaml", "curate yaml/curate.yaml --quiet"),
    "synthesize by YAML": ("yaml", "synthesize yaml/synthesis.yaml"),
}
# The commands of the quick check: every verb of `pyqemb` that opens a model, data or settings, and one more.
VERBS = (
    "encode", "train", "sweep", "export", "merge", "evaluate", "mine", "curate", "demo", "rerank", "synthesize",
    "consolidate", "mine with a teacher",
)  # fmt: skip
# They open no file that somebody else has made; finish and status only the parts of a job, which tests/fuzzing changes.
OTHER_VERBS = {"init", "doctor", "schema", "completion", "finish", "status"}
MODELS = ("model", "reranker")
TRANSFORMERS = ("teacher", "generator")
EVERY_MODEL = (*MODELS, *TRANSFORMERS)


@dataclass(frozen=True)
class Trap:
    """`arm(folder, canary)` changes a folder of one of the `targets`.

    `named`: what the error names, one of these; None: the trap is in a file that no command reads, so they all succeed.
    """

    targets: tuple[str, ...]
    arm: Callable[[Path, Path], None]
    named: tuple[str, ...] | None


class Payload:
    """Unpickled, it writes the canary."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return open, (self.canary, "w")


def edit(path, **changes):
    values = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**values, **changes}))


def evil_module(folder, canary):
    code = f"open({str(canary)!r}, 'w').close()\nclass Evil: pass\nEvilModel = EvilConfig = EvilTokenizer = Evil\n"
    (folder / "evil.py").write_text(code)


def without_weights(folder):
    for path in folder.rglob("*.safetensors*"):
        path.unlink()


def torch_pickle(path, canary):
    import torch

    torch.save({"embed_tokens.weight": torch.zeros(2), "x": Payload(canary)}, path)


def pickled(name):
    def arm(folder, canary):
        without_weights(folder)
        (folder / name).write_bytes(pickle.dumps(Payload(canary)))

    return arm


def pickle_beside(folder, canary):
    """Weights without the name that loaders look for first, and a pickle that they fall back on."""
    weights = next(path for path in folder.rglob("model.safetensors"))
    weights.rename(weights.with_name("other.safetensors"))
    torch_pickle(weights.with_name("pytorch_model.bin"), canary)


def arrays(folder, canary):
    payload = np.array([Payload(canary)], dtype=object)
    np.save(folder / "vectors.npy", payload, allow_pickle=True)
    np.savez(folder / "vectors.npz", payload)


def object_arrays(folder, canary):
    """The weights themselves are an array of objects."""
    without_weights(folder)
    with (folder / "model.safetensors").open("wb") as file:
        np.save(file, np.array([Payload(canary)], dtype=object), allow_pickle=True)


def renamed_zip(folder, canary):
    """A pickle in a zip archive, under the name of safetensors; a member's path leaves the folder."""
    without_weights(folder)
    torch_pickle(folder / "model.safetensors", canary)
    with zipfile.ZipFile(folder / "model.safetensors", "a") as archive:
        archive.writestr(f"../{canary.name}", "slipped")


def distributed_checkpoint(folder, canary):
    place = next(iter(sorted(folder.glob("checkpoints/step_*"))), folder)
    (place / ".metadata").write_bytes(pickle.dumps(Payload(canary)))
    torch_pickle(place / "__0_0.distcp", canary)
    torch_pickle(place / "optimizer.pt", canary)


def setting(file, **values):
    def arm(folder, canary):
        evil_module(folder, canary)
        edit(folder / file, **values)

    return arm


def foreign_module(folder, canary):
    evil_module(folder, canary)
    path = folder / "modules.json"
    modules = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps([*modules, {"idx": 9, "name": "9", "path": "9_Evil", "type": "evil.Evil"}]))
    (folder / "9_Evil").mkdir()


def module_of_our_namespace(folder, canary):
    foreign_module(folder, canary)
    text = (folder / "modules.json").read_text()
    (folder / "modules.json").write_text(text.replace("evil.Evil", "sentence_transformers.models.evil.Evil"))


def index_to(place):
    def arm(folder, canary):
        path = folder / "model.safetensors"
        target = canary.parent / "stolen.safetensors"
        path.rename(target)
        name = str(target) if place == "absolute" else f"../{target.name}"
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"norm.weight": name}}))

    return arm


def link_out(name):
    def arm(folder, canary):
        target = canary.parent / f"secret-{Path(name).name}"
        path = folder / name
        if path.exists():
            path.rename(target)
        else:
            target.write_text("a secret")
        path.symlink_to(target)

    return arm


def rewritten(folder, change):
    """The header of model.safetensors as JSON, changed; the data stay."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.dumps(change(json.loads(content[8 : 8 + size]))).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + size :])


NASTY = "norm\x1b]0;owned\x07\x1b[2J\r\npyqemb: done {0.__class__} %n%s\u202e[/red]"


def nasty_names(folder, canary):
    rewritten(folder, lambda header: {NASTY if name.endswith("norm.weight") else name: item
                                      for name, item in header.items()})  # fmt: skip


def nasty_setting(folder, canary):
    edit(folder / "config.json", **{"hidden_size": NASTY})


def huge_header(folder, canary):
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 62) + path.read_bytes()[8:])


def deep(name):
    def arm(folder, canary):
        (folder / name).write_text('{"a":' * 200_000 + "1" + "}" * 200_000)

    return arm


def long_number(folder, canary):
    text = (folder / "config.json").read_text().rstrip().removesuffix("}")
    (folder / "config.json").write_text(f'{text}, "rope_theta_2": {"9" * 5_000_000}}}')


def template(folder, canary):
    """Runs a command in an environment of jinja2 without a sandbox."""
    attack = f"{{{{ cycler.__init__.__globals__.os.system('touch {canary}') }}}}"
    (folder / "chat_template.jinja").write_text(attack)
    edit(folder / "tokenizer_config.json", chat_template=attack)


def custom_generate(folder, canary):
    (folder / "custom_generate").mkdir()
    code = f"open({str(canary)!r}, 'w').close()\ndef generate(model, **kwargs): pass\n"
    (folder / "custom_generate" / "generate.py").write_text(code)


def adapter_in_module(folder, canary):
    """The adapter's base is elsewhere, and loaders follow it."""
    elsewhere = canary.parent / "elsewhere"
    elsewhere.mkdir()
    torch_pickle(elsewhere / "pytorch_model.bin", canary)
    modules = json.loads((folder / "modules.json").read_text())
    place = folder / "0_Transformer"
    place.mkdir()
    for path in [*folder.glob("*.json"), *folder.glob("*.safetensors"), *folder.glob("*.txt")]:
        if path.name not in ("modules.json", "config_sentence_transformers.json"):
            path.rename(place / path.name)
    modules[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    edit(place / "adapter_config.json", peft_type="LORA", base_model_name_or_path=str(elsewhere), r=1, lora_alpha=1)


def loading_script(folder, canary):
    (folder / f"{folder.name}.py").write_text(f"open({str(canary)!r}, 'w').close()\n")
    edit(folder / "dataset_infos.json", default={"builder_name": folder.name, "script_version": "1"})
    edit(folder / "dataset_info.json", builder_name=folder.name)


def extension_type(folder, canary):
    """A table of Parquet with an Arrow type that old versions of pyarrow unpickle."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "rows.parquet"
    metadata = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Payload(canary)),
    }
    rows = pq.read_table(path)
    field = pa.field("query", pa.string(), metadata=metadata)
    schema = pa.schema([field if each.name == "query" else each for each in rows.schema])
    pq.write_table(pa.table(rows.columns, schema=schema), path)


def saved_elsewhere(folder, canary):
    """A saved dataset whose file is outside of its folder."""
    state = json.loads((folder / "state.json").read_text())
    name = state["_data_files"][0]["filename"]
    (folder / name).rename(folder.parent / name)
    edit(folder / "state.json", _data_files=[{"filename": f"../{name}"}])


def manifest_elsewhere(folder, canary):
    """A manifest that names a file outside of its checkpoint, and is sealed as pyqemb seals it."""
    from pyqemb.data.sealed import seal, unseal

    for path in folder.glob("checkpoints/step_*/manifest.json"):
        manifest = unseal(path.read_bytes(), str(path))
        manifest["files"]["portable/" + "../" * 40 + "dev/zero"] = {"size": 0, "sha256": "0" * 64}
        path.write_bytes(seal(manifest))


def yaml_tag(tag):
    def arm(folder, canary):
        evil_module(folder, canary)
        for path in folder.glob("*.yaml"):
            path.write_text(path.read_text() + "\nx: " + tag.format(canary=canary, folder=folder) + "\n")

    return arm


def yaml_laughs(folder, canary):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    for path in folder.glob("*.yaml"):
        path.write_text("\n".join(lines) + "\n" + path.read_text())


def with_data_of(name, content):
    def arm(folder, canary):
        for path in folder.parent.glob("*.json"):
            path.write_text(path.read_text().replace('"rows"', json.dumps(f"rows/{name}")))
        content(folder / name, canary)

    return arm


CONFIG, TOKENIZER = ("config.json",), ("tokenizer_config.json",)
WEIGHTS = ("model.safetensors",)
TRAPS = {
    "a pickle as pytorch_model.bin": Trap(EVERY_MODEL, pickled("pytorch_model.bin"),
        ("pytorch_model.bin", "no .safetensors file")),
    "a pickle as model.pt": Trap(EVERY_MODEL, pickled("model.pt"), ("model.pt", "no .safetensors file")),
    "a pickle beside other weights": Trap(EVERY_MODEL, pickle_beside, ("pytorch_model.bin", "model.safetensors")),
    "arrays of objects": Trap(EVERY_MODEL, arrays, None),
    "an array of objects as weights": Trap(MODELS, object_arrays, WEIGHTS),
    "a zip archive as weights": Trap(MODELS, renamed_zip, WEIGHTS),
    "a distributed checkpoint": Trap((*EVERY_MODEL, "run"), distributed_checkpoint, None),
    "auto_map": Trap(EVERY_MODEL, setting("config.json", auto_map={"AutoModel": "evil.EvilModel",
        "AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}), CONFIG),
    "auto_map of a tokenizer": Trap(EVERY_MODEL, setting("tokenizer_config.json",
        auto_map={"AutoTokenizer": ["evil.EvilTokenizer", None]}, tokenizer_class="EvilTokenizer"), TOKENIZER),
    "a tokenizer class": Trap(MODELS, setting("tokenizer_config.json", tokenizer_class="evil.EvilTokenizer"), None),
    "an attention implementation": Trap(EVERY_MODEL, setting("config.json",
        _attn_implementation_internal="evil/kernels"), CONFIG),
    "trust_remote_code": Trap(("model", "teacher"), setting("sentence_bert_config.json",
        model_args={"trust_remote_code": True}), ("sentence_bert_config.json",)),
    "an activation": Trap(("teacher",), setting("2_Dense/config.json", activation_function="evil.Evil"),
        ("2_Dense/config.json",)),
    "weights in another folder": Trap(("teacher",), setting("sentence_bert_config.json",
        model_args={"subfolder": "../other"}), ("sentence_bert_config.json",)),
    "a foreign module": Trap(("model", "teacher"), foreign_module, ("modules.json",)),
    "a foreign module in a known package": Trap(("model", "teacher"), module_of_our_namespace, ("modules.json",)),
    "an index with ..": Trap(MODELS, index_to(".."), WEIGHTS),
    "an index with an absolute path": Trap(MODELS, index_to("absolute"), WEIGHTS),
    "a link of weights": Trap(EVERY_MODEL, link_out("model.safetensors"), WEIGHTS),
    "a link of a setting": Trap(MODELS, link_out("config.json"), CONFIG),
    "a link of a template": Trap(MODELS, link_out("chat_template.jinja"), ("chat_template.jinja",)),
    "names with control characters": Trap(MODELS, nasty_names, (*WEIGHTS, "norm", "model:", "reranker:")),
    "a setting with control characters": Trap(MODELS, nasty_setting, CONFIG),
    "a header of 2^62 bytes": Trap(MODELS, huge_header, WEIGHTS),
    "JSON of 200,000 levels": Trap(EVERY_MODEL, deep("config.json"), CONFIG),
    "JSON of 200,000 levels in a tokenizer": Trap(MODELS, deep("tokenizer.json"), ("tokenizer.json",)),
    "a number of 5,000,000 digits": Trap(EVERY_MODEL, long_number, CONFIG),
    "a template that runs a command": Trap((*MODELS, "teacher"), template, None),
    "a template that runs a command, rendered": Trap(("generator",), template, ("chat template",)),
    "custom_generate": Trap(EVERY_MODEL, custom_generate, None),
    "an adapter of another base": Trap(MODELS + TRANSFORMERS, setting("adapter_config.json", peft_type="LORA",
        base_model_name_or_path="evil/base", r=1, lora_alpha=1), ("adapter_config.json",)),
    "an adapter of another base in a module": Trap(("teacher",), adapter_in_module, ("adapter_config.json",)),
    "an adapter with auto_mapping": Trap(("adapter",), setting("adapter_config.json",
        auto_mapping={"base_model_class": "Evil", "parent_library": "evil"}), ("adapter_config.json",)),
    "an adapter with a base on the hub": Trap(("adapter",), setting("adapter_config.json",
        base_model_name_or_path="evil/base"), None),
    "a pickled adapter": Trap(("adapter",), pickled("adapter_model.bin"), ("adapter",)),
    "a loading script": Trap(("rows", "saved"), loading_script, None),
    "a pickled type of Arrow": Trap(("parquet",), extension_type, None),
    "data as a pickle": Trap(("rows",), with_data_of("rows.pkl",
        lambda path, canary: path.write_bytes(pickle.dumps(Payload(canary)))), ("rows.pkl",)),
    "data as arrays": Trap(("rows",), with_data_of("vectors.npz", lambda path, canary: arrays(path.parent, canary)),
        ("vectors.npz",)),
    "a saved dataset with ..": Trap(("saved",), saved_elsewhere, ("state.json",)),
    "a manifest with ..": Trap(("run",), manifest_elsewhere, ("manifest.json",)),
    "a link in a checkpoint": Trap(("run",), lambda folder, canary: link_out("tokenizer.json")(
        next(folder.glob("checkpoints/step_*/portable")), canary), ("tokenizer.json",)),
    "a YAML object": Trap(("yaml",), yaml_tag('!!python/object/apply:os.system ["touch {canary}"]'), (".yaml",)),
    "a YAML module": Trap(("yaml",), yaml_tag("!!python/module:evil"), (".yaml",)),
    "a YAML object by new": Trap(("yaml",), yaml_tag("!!python/object/new:open [{canary}, w]"), (".yaml",)),
    "YAML of 10^12 values": Trap(("yaml",), yaml_laughs, (".yaml",)),
}  # fmt: skip
