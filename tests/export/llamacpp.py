"""llama.cpp itself, by the wheel `xllamacpp`: a server within the test's process, on loopback."""

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

xllamacpp: Any = pytest.importorskip("xllamacpp", reason="no llama.cpp: pip install xllamacpp")


class LlamaCpp:
    """A loaded model."""

    def __init__(self, address: str) -> None:
        self.address = address

    def _post(self, path: str, **body: Any) -> Any:
        data = json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.address}/{path}", data, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def ids(self, text: str, *, special: bool = True, begin: bool = False) -> list[int]:
        """Of a text; with what the model wants at the start, if `begin`."""
        body = {"content": text, "parse_special": special, "add_special": begin}
        return self._post("tokenize", **body)["tokens"]

    def prompt(self, messages: list[dict[str, str]]) -> str:
        """What the file's chat template writes, without what llama.cpp itself puts before it."""
        return self._post("apply-template", messages=messages)["prompt"]

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """The likeliest tokens, one after another, and none that ends an answer."""
        body = {"temperature": 0.0, "ignore_eos": True, "return_tokens": True, "n_predict": count}
        return self._post("completion", prompt=ids, cache_prompt=False, **body)["tokens"]

    def logprobs(self, ids: list[int], top: int) -> dict[int, float]:
        """Of the likeliest next tokens, by id."""
        # They come with a token that ends a letter: another one is drawn, which changes nothing.
        drawn = [[self.ids("a")[0], 1000.0]]
        body = {"temperature": 0.0, "n_probs": top, "n_predict": 1, "logit_bias": drawn}
        found = self._post("completion", prompt=ids, cache_prompt=False, **body)
        best = found["completion_probabilities"][0]["top_logprobs"]
        return {one["id"]: one["logprob"] for one in best}


@contextmanager
def loaded(file: Path, adapter: Path | None = None) -> Iterator[LlamaCpp]:
    """A model, with an adapter on top if one is given; all that is not stored is computed in fp32.

    Raises:
        RuntimeError: llama.cpp does not take the file.
    """
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.offline, params.verbosity, params.port = True, -1, 0
    params.n_ctx, params.n_parallel, params.warmup = 512, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.n_threads_http, params.fit_params = 1, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = xllamacpp.Server(params)
    try:
        yield LlamaCpp(server.listening_address)
    finally:
        del server
