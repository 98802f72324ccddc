"""The reranker's folder: a causal language model, or a sequence classifier, with the template as a chat template.

There is no modules.json, because every version of sentence-transformers' CrossEncoder detects the kind of a folder by
its architecture. From 6.0 on it renders pairs with the chat template; older versions need the rendered text.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pyqemb import __version__
from pyqemb.data.pairs import INSTRUCTION, PREFIX, SUFFIX, PairTokenizer
from pyqemb.model.checkpoint import LM_HEAD
from pyqemb.model.config import DecoderConfig
from pyqemb.model.model_card import contract, model_card, write_json_files
from pyqemb.model.portable import WriteFiles, with_last
from pyqemb.model.sentence import CONTRACT, read_contract, read_instruction

FORMATS = ("causal-lm", "seq-cls")
SCORE = "score.weight"


def write_reranker_files(
    folder: Path,
    name: str,
    dtype: torch.dtype,
    digests: Mapping[str, str],
    *,
    format: str,
    config: DecoderConfig,
    tokenizer: PairTokenizer,
    tied: bool,
    instruction: str,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write the files of a reranker, see WriteFiles; `provenance` is stored in pyqemb.json."""
    tokenizer.save(folder)
    (folder / "chat_template.jinja").write_text(chat_template(instruction), encoding="utf-8")
    facts = {
        "kind": "reranker",
        "format": format,
        "instruction": instruction,
        "yes_id": tokenizer.yes_id,
        "no_id": tokenizer.no_id,
        "end_token": tokenizer.end_token,
        "max_length": tokenizer.max_length,
    }
    files = {
        "config.json": _config_json(config, tokenizer, format, tied, str(dtype).removeprefix("torch.")),
        CONTRACT: contract(digests, provenance, facts),
    }
    write_json_files(folder, files)
    body = _card_body(name, format, instruction)
    card = model_card(name, "text-ranking", ("cross-encoder", "reranker"), body, provenance or {})
    (folder / "README.md").write_text(card, encoding="utf-8")


def files_like(folder: Path, config: DecoderConfig, provenance: Mapping[str, Any]) -> WriteFiles:
    """A function that writes the files of the reranker in `folder` for other weights."""
    return partial(
        write_reranker_files, format=read_contract(folder).get("format", FORMATS[0]), config=config,
        tokenizer=PairTokenizer.from_folder(folder), tied=config.tie_word_embeddings,
        instruction=read_instruction(folder, INSTRUCTION), provenance=provenance,
    )  # fmt: skip


def reranker_name(name: str) -> str:
    """The name of a tensor of the decoder, or of a head, in the folder of a reranker."""
    return name if name in (LM_HEAD, SCORE) else f"model.{name}"


def chat_template(instruction: str) -> str:
    """A Jinja template that renders messages of the roles query and document, and system for another instruction.

    All text is in string literals, because Jinja drops a newline at the end of a template, and the suffix ends with
    two.
    """
    prefix, body, suffix = json.dumps(PREFIX + "<Instruct>: "), json.dumps("\n<Document>: "), json.dumps(SUFFIX)
    return (
        f"{{%- set pair = namespace(system={json.dumps(instruction)}, query='', document='') -%}}\n"
        "{%- for message in messages -%}\n"
        "{%- if message.role == 'system' -%}{%- set pair.system = message.content -%}{%- endif -%}\n"
        "{%- if message.role == 'query' -%}{%- set pair.query = message.content -%}{%- endif -%}\n"
        "{%- if message.role == 'document' -%}{%- set pair.document = message.content -%}{%- endif -%}\n"
        "{%- endfor -%}\n"
        f'{{{{- {prefix} + pair.system + "\\n<Query>: " + pair.query + {body} + pair.document + {suffix} -}}}}\n'
    )


def _config_json(
    config: DecoderConfig, tokenizer: PairTokenizer, format: str, tied: bool, dtype: str
) -> dict[str, Any]:
    architecture, own = config.architectures[0], dict[str, Any]()
    if format == "seq-cls":
        architecture = architecture.replace("ForCausalLM", "ForSequenceClassification")
        own |= {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        own["sentence_transformers"] = {"activation_fn": "torch.nn.modules.activation.Sigmoid", "version": "5.1.2"}
    own |= {"architectures": [architecture], "dtype": dtype, "torch_dtype": dtype, "pad_token_id": tokenizer.end_id}
    own["tie_word_embeddings"] = tied and format == "causal-lm"
    if config.eos_token_id is None:
        own["eos_token_id"] = tokenizer.end_id
    return with_last(config.to_dict(), own)


def _card_body(name: str, format: str, instruction: str) -> str:
    overrides = (
        '{"architectures": ["Qwen3ForSequenceClassification"], "classifier_from_token": ["no", "yes"], '
        '"is_original_qwen3_reranker": true}'
    )
    serve = f"vllm serve {name} --runner pooling" + (f" --hf-overrides '{overrides}'" if format == "causal-lm" else "")
    return f"""This is a reranker: it scores how well a document answers a query, from 0 to 1.
It was saved by pyqemb {__version__}.

## Usage

```python
from sentence_transformers import CrossEncoder  # 6.0 or later, which applies the chat template to pairs

model = CrossEncoder("{name}")
print(model.predict([("How do I print a page?", "Open the Print dialog.")], prompt="{instruction}"))
```

To serve the model with vLLM:

```bash
{serve}
```

With other libraries, apply `chat_template.jinja` to each pair first: it takes messages with the roles `query` and
`document`, and `system` for the instruction. The score is sigmoid(logit of "yes" - logit of "no") at the last token.
"""
