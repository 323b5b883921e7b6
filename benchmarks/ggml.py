"""llama.cpp (ggml) in a process of its own, with the weights of a transformers Llama: for peers.py, against_others.py.

It needs `llama_cpp` and `gguf` (pip install llama-cpp-python gguf). The process has threads of its own, which would
spin beside torch's, so it is asked to run when nothing else does.

The functions at the top are what a user writes, and their lines count: llama.cpp has no reader of a model in memory,
and its own converter takes whole checkpoints with a tokenizer.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

MODULES = ("llama_cpp", "gguf")
_FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}
_BYTES = {"F32": 4.0, "F16": 2.0, "Q8_0": 34 / 32, "BF16": 2.0}  # of a weight
_ENVIRONMENT = dict(os.environ)
"""As the user has it: the library sets variables later, OMP_WAIT_POLICY among them, that slow a child's threads."""

# --- what a user writes -----------------------------------------------------------------------------------------------


def write(model: Any, kind: str, path: Path) -> None:
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(_FILE_TYPES[kind])
    of = gguf.GGMLQuantizationType[kind]
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        part = name.split(".")[-2]
        if part in heads:
            values = neighbours(values, heads[part])
        linear = part.endswith("_proj")
        told = gguf.quants.quantize(values, of) if linear else values
        writer.add_tensor(name_of(name), told, raw_dtype=of if linear else None)
    writer.add_tensor("output.weight", model.embed_tokens.weight.detach().numpy())  # never read: hidden states are
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def neighbours(weight: Any, heads: int) -> Any:
    # transformers rotates the halves of a head, ggml neighbours: 0, n, 1, n + 1 and so on.
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def name_of(name: str) -> str:
    names = {
        "embed_tokens": "token_embd", "norm": "output_norm", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    if not name.startswith("layers."):
        return f"{names[name.removesuffix('.weight')]}.weight"
    _, layer, part = name.removesuffix(".weight").split(".", 2)
    return f"blk.{layer}.{names[part]}.weight"


def opened(path: Path, rows: int, positions: int, threads: int, exact: bool) -> Any:
    import llama_cpp as ll

    ll.llama_backend_init()
    model = ll.llama_model_load_from_file(str(path).encode(), ll.llama_model_default_params())
    options = ll.llama_context_default_params()
    options.n_ctx, options.n_seq_max = rows * 256 * -(-positions // 256), rows
    options.n_batch = options.n_ubatch = rows * positions
    options.n_threads = options.n_threads_batch = threads
    options.embeddings = True
    if exact:  # keys and values are in 16 bits otherwise, and its flash attention makes them so
        options.type_k = options.type_v = ll.GGML_TYPE_F32
        options.flash_attn_type = ll.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return ll.llama_init_from_model(model, options)


def decode(context: Any, batch: Any, values: Any, first: int) -> Any:
    import llama_cpp as ll

    rows, count, width = values.shape
    batch.n_tokens = rows * count
    np.ctypeslib.as_array(batch.embd, (rows * count, width))[:] = values.reshape(-1, width)
    for i in range(rows * count):
        row, position = divmod(i, count)
        batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = first + position, 1, row, 1
    if status := ll.llama_decode(context, batch):
        raise RuntimeError(f"llama_decode gave {status}")
    last = range(count - 1, rows * count, count)
    return np.stack([np.ctypeslib.as_array(ll.llama_get_embeddings_ith(context, i), (width,)) for i in last])


# --- what asks for it -------------------------------------------------------------------------------------------------


class Engine:
    """A model in a process. It lives as long as this object.

    Args:
        model: A `LlamaModel` in fp32, with positions as they are by default.
        kind: Format of the weights: "F32", "F16", "BF16" or "Q8_0". Keys and values are fp32 with "F32", else fp16.
        threads: Number of threads.
        prompt: Inputs of shape (rows, positions, width), fp32.
        tokens: Inputs of the steps behind it, of shape (steps, rows, 1, width), fp32.
    """

    def __init__(self, model: Any, kind: str, threads: int, prompt: Any, tokens: Any) -> None:
        with ExitStack() as stack:  # no process and no file is left of one that fails
            self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            need_room(model, kind, self._folder)
            write(model, kind, self._folder / "model.gguf")
            np.save(self._folder / "prompt.npy", prompt.numpy())
            np.save(self._folder / "tokens.npy", tokens.numpy())
            command = [sys.executable, __file__, str(self._folder), "--threads", str(threads)]
            command += ["--exact"] if kind == "F32" else []
            said = stack.enter_context((self._folder / "said.txt").open("w"))
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": said}
            self._child = stack.enter_context(subprocess.Popen(command, env=_ENVIRONMENT, text=True, **pipes))
            stack.callback(self._child.kill)
            self._read()  # it is loaded
            self._all = stack.pop_all()

    def prompt(self) -> float:
        """Return the seconds of a prompt."""
        return self._ask("prompt")

    def steps(self) -> tuple[float, Any]:
        """Return the seconds of a step, and the hidden states of the last one, of shape (rows, 1, width)."""
        import torch

        seconds = self._ask("steps")
        return seconds, torch.from_numpy(np.load(self._folder / "hidden.npy"))

    def close(self) -> None:
        """End the process."""
        self._all.close()

    def _ask(self, what: str) -> float:
        assert self._child.stdin is not None
        self._child.stdin.write(what + "\n")
        self._child.stdin.flush()
        return float(self._read())

    def _read(self) -> str:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            said = (self._folder / "said.txt").read_text("utf-8", "replace").splitlines()
            raise RuntimeError(f"llama.cpp ended with status {self._child.wait()}: {'; '.join(said[-2:])}")
        return line


def need_room(model: Any, kind: str, folder: Path, free: int | None = None) -> None:
    """Raise an error if the file of a model would not fit into a folder, or into `free` bytes if they are given."""
    size = sum(tensor.numel() for tensor in model.state_dict().values()) * _BYTES[kind] * 1.05
    free = shutil.disk_usage(folder).free if free is None else free
    if size > free:
        raise OSError(f"a file of {size / 1e9:.1f} GB is needed in {folder}, and {free / 1e9:.1f} GB are free")


def serve(folder: Path, threads: int, exact: bool) -> None:
    """Answer each line, "prompt" or "steps", with the seconds of a prompt, or of one of the steps behind it."""
    import llama_cpp as ll

    prompt, tokens = np.load(folder / "prompt.npy"), np.load(folder / "tokens.npy")
    rows, positions, width = prompt.shape
    context = opened(folder / "model.gguf", rows, positions + len(tokens), threads, exact)
    if not context:
        sys.exit("no model was loaded")
    batch = ll.llama_batch_init(rows * positions, width, rows)
    print("ready", flush=True)
    for line in sys.stdin:
        ll.llama_memory_clear(ll.llama_get_memory(context), True)
        start = time.perf_counter()
        decode(context, batch, prompt, 0)
        seconds = time.perf_counter() - start
        if line.strip() == "steps":
            start = time.perf_counter()
            for number, token in enumerate(tokens):
                hidden = decode(context, batch, token, positions + number)
            seconds = (time.perf_counter() - start) / len(tokens)
            np.save(folder / "hidden.npy", hidden[:, None])
        print(seconds, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--exact", action="store_true")
    serve(**vars(parser.parse_args()))
