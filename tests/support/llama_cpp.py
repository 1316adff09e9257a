"""A real llama.cpp, through the package xllamacpp: loads a GGUF file, tokenizes, predicts.

The server tells of one next token at a time; `every_position` calls the library's C functions for whole samples.
Of their structs only `llama_batch` is laid out here; parameters are passed on as they come, with their defaults but for
three.
"""

import ctypes
import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch


class LlamaCpp:
    """A running server with one model."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, special tokens parsed, none added."""
        return list(self._post("tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"])

    def next_token(self, prompt: list[int], count: int) -> dict[int, float]:
        """The `count` likeliest next tokens with their log-probabilities, the likeliest first.

        Empty where the likeliest is a part of a character: the server holds such a token back.
        """
        found = self._complete(prompt, n_predict=1, n_probs=count).get("completion_probabilities")
        return {token["id"]: token["logprob"] for token in found[0]["top_logprobs"]} if found else {}

    def generate(self, prompt: list[int], count: int) -> str:
        """Text of at most `count` greedily chosen tokens."""
        return str(self._complete(prompt, n_predict=count)["content"])

    def _complete(self, prompt: list[int], **options: Any) -> dict[str, Any]:
        return self._post("completion", {"prompt": prompt, "temperature": 0, "cache_prompt": True, **options})

    def _post(self, path: str, content: dict[str, Any]) -> dict[str, Any]:
        address = f"{self._server.listening_address}/{path}"
        request = urllib.request.Request(address, json.dumps(content).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return dict(json.load(answer))


@contextmanager
def llama_cpp(path: Path) -> Iterator[LlamaCpp]:
    """Loads a GGUF file."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx = 1024
    parameters.n_parallel = 1
    parameters.warmup = False
    parameters.verbosity = -1
    parameters.cpuparams.n_threads = 1
    server = xllamacpp.Server(parameters)
    yield LlamaCpp(server)


class _Parameters(ctypes.Structure):
    """Any of llama.cpp's structs of parameters, with room for more than they hold."""

    _fields_ = (("content", ctypes.c_byte * 4096),)


class _Batch(ctypes.Structure):
    """llama.h's `llama_batch`."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_SILENT = _LOG(lambda *_: None)


def _library() -> ctypes.CDLL:
    """llama.cpp's C functions that `every_position` calls."""
    import xllamacpp

    llama = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    pointer, count = ctypes.c_void_p, ctypes.c_int32
    for name, result, *arguments in (
        ("llama_log_set", None, _LOG, pointer),
        ("llama_backend_init", None),
        ("llama_model_default_params", _Parameters),
        ("llama_context_default_params", _Parameters),
        ("llama_model_load_from_file", pointer, ctypes.c_char_p, _Parameters),
        ("llama_init_from_model", pointer, pointer, _Parameters),
        ("llama_set_n_threads", None, pointer, count, count),
        ("llama_model_get_vocab", pointer, pointer),
        ("llama_vocab_n_tokens", count, pointer),
        ("llama_get_memory", pointer, pointer),
        ("llama_memory_clear", None, pointer, ctypes.c_bool),
        ("llama_batch_init", _Batch, count, count, count),
        ("llama_batch_free", None, _Batch),
        ("llama_decode", count, pointer, _Batch),
        ("llama_get_logits", ctypes.POINTER(ctypes.c_float), pointer),
        ("llama_free", None, pointer),
        ("llama_model_free", None, pointer),
    ):
        function = getattr(llama, name)
        function.restype, function.argtypes = result, arguments
    llama.llama_log_set(_SILENT, None)
    llama.llama_backend_init()
    return llama


# Places of numbers of 32 bits in `llama_context_params` -> their defaults, and what keeps keys and values in F32.
_FLASH_ATTENTION, _TYPE_OF_KEYS, _TYPE_OF_VALUES = 13, 26, 27
_IN_F32 = {_FLASH_ATTENTION: (-1, 0), _TYPE_OF_KEYS: (1, 0), _TYPE_OF_VALUES: (1, 0)}
# The place of what `--yarn-beta-fast` says, and how it says nothing.
_BETA_FAST, _UNSAID = 18, -1.0


def _context_parameters(llama: ctypes.CDLL, in_f32: bool, beta_fast: float) -> _Parameters:
    parameters = llama.llama_context_default_params()
    floats = (ctypes.c_float * 1024).from_buffer(parameters)
    assert floats[_BETA_FAST] == _UNSAID, f"llama_context_params has changed: place {_BETA_FAST}"
    floats[_BETA_FAST] = beta_fast
    numbers = (ctypes.c_int32 * 1024).from_buffer(parameters)
    for place, (default, wanted) in _IN_F32.items():
        assert numbers[place] == default, f"llama_context_params has changed: place {place} is {numbers[place]}"
        numbers[place] = wanted if in_f32 else default
    return parameters


def every_position(
    path: Path, tokens_NT: torch.Tensor, tokens_at_once: int = 512, in_f32: bool = False, beta_fast: float = _UNSAID
) -> torch.Tensor:
    """What llama.cpp predicts after every token, with its defaults and one thread.

    Args:
        path: a GGUF file.
        tokens_NT: int64 [N, T]; T at most 512, the default context.
        tokens_at_once: tokens of a batch, all of one sample.
        in_f32: keys and values are kept in F32 and multiplied so; by default in F16.
        beta_fast: what `--yarn-beta-fast` says.

    Returns:
        Log-probabilities, float64 [N, T, V].
    """
    llama = _library()
    model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    context = llama.llama_init_from_model(model, _context_parameters(llama, in_f32, beta_fast))
    assert model and context, f"llama.cpp does not load {path}"
    llama.llama_set_n_threads(context, 1, 1)
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    batch = llama.llama_batch_init(tokens_at_once, 0, 1)
    found = []
    for sample_T in tokens_NT:
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        for start, part_T in enumerate(sample_T.split(tokens_at_once)):
            batch.n_tokens = len(part_T)
            for place, token in enumerate(part_T.tolist()):
                batch.token[place], batch.pos[place], batch.logits[place] = token, start * tokens_at_once + place, 1
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
            assert llama.llama_decode(context, batch) == 0
            logits_TV = np.ctypeslib.as_array(llama.llama_get_logits(context), shape=(len(part_T), vocabulary))
            found.append(torch.from_numpy(logits_TV.copy()).double().log_softmax(-1))
    llama.llama_batch_free(batch)
    llama.llama_free(context)
    llama.llama_model_free(model)
    return torch.cat(found).view(*tokens_NT.shape, vocabulary)


def decoded(path: Path, copy: Path) -> Path:
    """Writes the weights of a GGUF file as float32: llama.cpp then multiplies them without rounding activations.

    Args:
        path: a GGUF file.
        copy: the file to write.

    Returns:
        `copy`.
    """
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(copy, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            element = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=element)
    scales = {
        one.name.removesuffix("scale"): float(one.data[0]) for one in reader.tensors if one.name.endswith(".scale")
    }
    for tensor in reader.tensors:
        if not tensor.name.endswith(".scale"):  # it is multiplied into its matrix
            scale = np.float32(scales.get(f"{tensor.name.removesuffix('weight')}scale", 1))
            writer.add_tensor(tensor.name, scale * gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return copy
