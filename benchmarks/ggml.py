"""llama.cpp (ggml) in a process of its own, with the weights of a transformers Llama: for peers.py, against_others.py.

It needs `llama_cpp` and `gguf` (pip install llama-cpp-python gguf). The process has threads of its own, which would
spin beside torch's, so it is asked to run when nothing else does.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

MODULES = ("llama_cpp", "gguf")
_FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}
_NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


class Engine:
    """A model in a process. It lives as long as this object.

    Args:
        model: A `LlamaModel` in fp32 with as many heads for keys as for queries.
        kind: Format of the weights: "F32", "F16", "BF16" or "Q8_0".
        threads: Number of threads.
        prompt: Inputs of shape (rows, positions, width), fp32.
        tokens: Inputs of the steps behind it, of shape (steps, rows, 1, width), fp32.
    """

    def __init__(self, model: Any, kind: str, threads: int, prompt: Any, tokens: Any) -> None:
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        write(model, kind, folder / "model.gguf")
        np.save(folder / "prompt.npy", prompt.numpy())
        np.save(folder / "tokens.npy", tokens.numpy())
        command = [sys.executable, __file__, str(folder), "--threads", str(threads)]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read()  # it is loaded

    def prompt(self) -> float:
        """Return the seconds of a prompt."""
        return self._ask("prompt")

    def steps(self) -> tuple[float, Any]:
        """Return the seconds of a step, and the hidden states of the last one, of shape (rows, 1, width)."""
        import torch

        seconds = self._ask("steps")
        return seconds, torch.from_numpy(np.load(Path(self._folder.name) / "hidden.npy"))

    def close(self) -> None:
        """End the process."""
        self._child.kill()
        self._child.wait()
        self._folder.cleanup()

    def _ask(self, what: str) -> float:
        assert self._child.stdin is not None
        self._child.stdin.write(what + "\n")
        self._child.stdin.flush()
        return float(self._read())

    def _read(self) -> str:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise RuntimeError(f"llama.cpp ended with status {self._child.wait()}")
        return line


def write(model: Any, kind: str, path: Path) -> None:
    """Write the weights of a `LlamaModel` as a GGUF file, in float32 but for the linear layers."""
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
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(_FILE_TYPES[kind])
    of = gguf.GGMLQuantizationType[kind]
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # ggml rotates neighbours where transformers rotates halves of a head.
            heads = values.reshape(config.num_attention_heads, 2, -1, values.shape[1])
            values = np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(values.shape)
        linear = name.endswith("proj.weight")
        told = gguf.quants.quantize(values, of) if linear else values
        writer.add_tensor(name_of(name), told, raw_dtype=of if linear else None)
    writer.add_tensor("output.weight", model.embed_tokens.weight.detach().numpy())  # never read: hidden states are
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def name_of(name: str) -> str:
    """Return ggml's name of a weight."""
    outer = {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}
    if name in outer:
        return outer[name]
    _, layer, inner = name.split(".", 2)
    return f"blk.{layer}.{_NAMES[inner.removesuffix('.weight')]}.weight"


def serve(folder: Path, threads: int) -> None:
    """Answer each line, "prompt" or "steps", with the seconds of a prompt, or of one of the steps behind it."""
    import llama_cpp as ll

    prompt, tokens = np.load(folder / "prompt.npy"), np.load(folder / "tokens.npy")
    rows, positions, width = prompt.shape
    ll.llama_backend_init()
    quiet = ll.llama_log_callback(lambda *_: None)
    ll.llama_log_set(quiet, None)
    path = str(folder / "model.gguf").encode()
    model = ll.llama_model_load_from_file(path, ll.llama_model_default_params())
    options = ll.llama_context_default_params()
    options.n_ctx, options.n_seq_max = rows * 256 * -(-(positions + len(tokens)) // 256), rows
    options.n_batch = options.n_ubatch = rows * positions
    options.n_threads = options.n_threads_batch = threads
    options.embeddings = True
    context = ll.llama_init_from_model(model, options)
    assert context
    batch = ll.llama_batch_init(rows * positions, width, rows)
    inputs = np.ctypeslib.as_array(batch.embd, (rows * positions, width))

    def decode(values: Any, first: int) -> float:
        batch.n_tokens = values.shape[0] * values.shape[1]
        inputs[: batch.n_tokens] = values.reshape(-1, width)
        for row in range(rows):
            for j in range(values.shape[1]):
                i = row * values.shape[1] + j
                batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = first + j, 1, row, 1
        start = time.perf_counter()
        assert ll.llama_decode(context, batch) == 0
        ll.llama_synchronize(context)
        return time.perf_counter() - start

    print("ready", flush=True)
    for line in sys.stdin:
        ll.llama_memory_clear(ll.llama_get_memory(context), True)
        seconds = decode(prompt, 0)
        if line.strip() == "steps":
            seconds = sum(decode(token, positions + number) for number, token in enumerate(tokens)) / len(tokens)
            hidden = [np.ctypeslib.as_array(ll.llama_get_embeddings_ith(context, row), (width,)) for row in range(rows)]
            np.save(folder / "hidden.npy", np.stack(hidden)[:, None])
        print(seconds, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    serve(**vars(parser.parse_args()))
