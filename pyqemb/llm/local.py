"""A causal language model of transformers in this process, for small models and machines without a server."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyqemb.errors import CheckpointError, ConfigError
from pyqemb.llm.request import Answer, Endpoint, Request
from pyqemb.model.safety import check_safe

_GATHER = 0.01  # seconds to wait for more requests before a batch starts


def _downloaded(model: str) -> Path:
    """A local folder, or the folder of `org/name` in the hub's cache; nothing is downloaded."""
    if Path(model).is_dir():
        return Path(model)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model, local_files_only=True))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{model}: no such folder, and not in the hub's cache: {error}") from error


class LocalClient:
    """The same interface as ServerClient. Waiting requests form a padded batch of at most `concurrency`."""

    def __init__(self, endpoint: Endpoint, on_retry: Callable[[str], None] = lambda reason: None):
        try:
            import torch
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ModuleNotFoundError as error:
            raise ConfigError("a local generator needs transformers: pip install 'pyqemb[hf]'") from error
        self.endpoint, self._torch = endpoint, torch
        self._tokenizer: Any
        self._model: Any
        device = "cuda" if torch.cuda.is_available() else "cpu"
        folder = check_safe(_downloaded(endpoint.model))
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", local_files_only=True)
            self._model = AutoModelForCausalLM.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, dtype="auto"
            )
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{endpoint.model}: cannot be opened as a causal language model: {error}") from error
        self._model.to(device)
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._waiting: list[tuple[Request, asyncio.Future[Answer]]] = []
        self._runner: asyncio.Task[None] | None = None

    async def answer(self, request: Request) -> Answer:
        """Return the answer to one request; requests that wait at the same time are generated as one batch."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._drain())
        return await future

    async def close(self) -> None:
        """Stop generating answers."""
        if self._runner is not None:
            self._runner.cancel()

    async def _drain(self) -> None:
        while self._waiting:
            await asyncio.sleep(_GATHER)
            size = self.endpoint.concurrency
            batch, self._waiting = self._waiting[:size], self._waiting[size:]
            try:
                answers = await asyncio.to_thread(self._generate, [request for request, _ in batch])
            except Exception as error:
                for _, future in batch:
                    future.set_exception(error)
                continue
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():
                    future.set_result(answer)

    def _generate(self, requests: list[Request]) -> list[Answer]:
        torch, endpoint = self._torch, self.endpoint
        prompts = [self._prompt(request) for request in requests]
        inputs = self._tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        inputs = inputs.to(self._model.device)
        sampling: dict[str, Any] = {"do_sample": False}
        if endpoint.temperature > 0:
            sampling = {"do_sample": True, "temperature": endpoint.temperature, "top_p": endpoint.top_p}
        torch.manual_seed(requests[0].seed)
        with torch.inference_mode():
            out = self._model.generate(
                **inputs, **sampling, max_new_tokens=endpoint.max_tokens, pad_token_id=self._tokenizer.pad_token_id
            )
        answers = []
        for row, mask in zip(out[:, inputs["input_ids"].shape[1] :].tolist(), inputs["attention_mask"], strict=True):
            end = row.index(self._tokenizer.eos_token_id) if self._tokenizer.eos_token_id in row else len(row)
            text = self._tokenizer.decode(row[:end], skip_special_tokens=True)
            answers.append(Answer(text, "stop" if end < len(row) else "length", int(mask.sum()), end))
        return answers

    def _prompt(self, request: Request) -> str:
        messages = [{"role": role, "content": text} for role, text in request.messages]
        if self._tokenizer.chat_template:
            try:
                return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            except Exception as error:  # of the template, which may raise anything, or of jinja2 and its sandbox
                raise CheckpointError(f"{self.endpoint.model}: its chat template cannot be used: {error}") from error
        return "\n\n".join(text for _, text in request.messages) + "\n\n"
