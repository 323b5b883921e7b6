"""Loader of Piper voices (VITS, exported to ONNX) into transformers' `VitsModel`, the class of all MMS voices.

The export keeps most weights under their training names. The flow's convolutions have weight norm, so their folded
weights are anonymous constants, which are found through the convolution node with the named bias. Piper's vocoder of
medium quality has residual blocks of two single convolutions (HiFi-GAN's type 2), unlike MMS with three pairs (type 1).
A block for it is defined here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Voice:
    """A loaded voice.

    Attributes:
        model: The `VitsModel`, in eval mode, fp32.
        sampling_rate: Sampling rate of its waveforms, in Hz.
        phoneme_ids: Token ids by phoneme (one Unicode code point).
        language: espeak's name of its language.
    """

    model: nn.Module
    sampling_rate: int
    phoneme_ids: dict[str, list[int]]
    language: str


class TwoConvolutionBlock(nn.Module):
    """HiFi-GAN's residual block of type 2: single dilated convolutions, each with its own residual.

    Input and output are `(batch, channels, time)`.
    """

    def __init__(self, channels: int, kernel_size: int, dilations: tuple[int, ...], slope: float) -> None:
        super().__init__()
        self.slope = slope
        self.convs = nn.ModuleList(
            nn.Conv1d(channels, channels, kernel_size, dilation=d, padding=(kernel_size - 1) * d // 2)
            for d in dilations
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run the block."""
        for conv in self.convs:
            hidden = conv(nn.functional.leaky_relu(hidden, self.slope)) + hidden
        return hidden


def load_voice(model_path: Path, config_path: Path) -> Voice:
    """Build the model from a Piper voice's two files.

    Args:
        model_path: The `.onnx` file.
        config_path: The `.onnx.json` file beside it.

    Raises:
        ValueError: The file is not a single-speaker Piper voice of a known structure. The message says what is missing.
    """
    import onnx
    from transformers import VitsModel

    description = json.loads(config_path.read_text(encoding="utf-8"))
    if description["num_speakers"] != 1:
        raise ValueError(f"{model_path.name} has {description['num_speakers']} speakers; only one can be loaded")
    graph = onnx.load(str(model_path)).graph
    weights = _Weights(graph)
    config = _config(weights, description)
    model = VitsModel(config)
    slope = config.leaky_relu_slope
    shapes = list(zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True))
    model.decoder.resblocks = nn.ModuleList(
        TwoConvolutionBlock(config.upsample_initial_channel // 2 ** (level + 1), kernel, tuple(dilations), slope)
        for level in range(len(config.upsample_rates))
        for kernel, dilations in shapes
    )
    del model.posterior_encoder  # used in training only; a Piper export has none
    _fill(model, weights)
    return Voice(
        model=model.eval(),
        sampling_rate=int(description["audio"]["sample_rate"]),
        phoneme_ids=description["phoneme_id_map"],
        language=description["espeak"]["voice"],
    )


class _Weights:
    """The tensors of an ONNX graph by their training names."""

    def __init__(self, graph: Any) -> None:
        from onnx import numpy_helper

        self._tensors = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}
        self.convolutions: dict[str, Any] = {}
        for node in graph.node:
            if node.op_type in {"Conv", "ConvTranspose"}:
                bias = node.input[2] if len(node.input) > 2 else ""  # noqa: PLR2004 - data, weight, bias
                name = bias.removesuffix(".bias") if bias.endswith(".bias") else node.input[1].removesuffix(".weight")
                self.convolutions.setdefault(name, node)
                if node.input[1] in self._tensors:  # names an anonymous, folded weight
                    self._tensors.setdefault(f"{name}.weight", self._tensors[node.input[1]])
            elif node.op_type == "Gather" and node.input[1] == "input":
                self._tensors["enc_p.emb.weight"] = self._tensors[node.input[0]]

    def __getitem__(self, name: str) -> torch.Tensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise ValueError(f"this ONNX file has no tensor {name!r}: not a Piper voice of a known shape") from None

    def count(self, pattern: str) -> int:
        """Count the tensors `pattern.format(0)`, `pattern.format(1)`, ..."""
        number = 0
        while pattern.format(number) in self._tensors:
            number += 1
        return number

    def attribute(self, convolution: str, name: str) -> int:
        """Return the first value of an attribute of a convolution node."""
        node = self.convolutions[convolution]
        return next(int(item.ints[0]) for item in node.attribute if item.name == name)


def _config(weights: _Weights, description: dict[str, Any]) -> Any:
    from transformers import VitsConfig

    inference = description["inference"]
    flow, channels = weights["dec.conv_pre.weight"].shape[1::-1]
    levels = weights.count("dec.ups.{}.weight")
    kernels = weights.count("dec.resblocks.{}.convs.0.weight") // levels
    convolutions = weights.count("dec.resblocks.0.convs.{}.weight")
    vocabulary, hidden = weights["enc_p.emb.weight"].shape
    relative = weights["enc_p.encoder.attn_layers.0.emb_rel_k"].shape
    ffn = weights["enc_p.encoder.ffn_layers.0.conv_1.weight"].shape
    return VitsConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=weights.count("enc_p.encoder.attn_layers.{}.conv_q.weight"),
        num_attention_heads=hidden // relative[2],
        window_size=(relative[1] - 1) // 2,
        ffn_dim=ffn[0],
        ffn_kernel_size=ffn[2],
        flow_size=flow,
        upsample_initial_channel=channels,
        upsample_rates=[weights.attribute(f"dec.ups.{i}", "strides") for i in range(levels)],
        upsample_kernel_sizes=[weights[f"dec.ups.{i}.weight"].shape[2] for i in range(levels)],
        resblock_kernel_sizes=[weights[f"dec.resblocks.{i}.convs.0.weight"].shape[2] for i in range(kernels)],
        resblock_dilation_sizes=[
            [weights.attribute(f"dec.resblocks.{i}.convs.{j}", "dilations") for j in range(convolutions)]
            for i in range(kernels)
        ],
        prior_encoder_num_wavenet_layers=weights.count("flow.flows.0.enc.in_layers.{}.bias"),
        wavenet_kernel_size=weights["flow.flows.0.enc.in_layers.0.weight"].shape[2],
        duration_predictor_kernel_size=weights["dp.convs.convs_sep.0.weight"].shape[2],
        depth_separable_num_layers=weights.count("dp.convs.convs_sep.{}.weight"),
        sampling_rate=description["audio"]["sample_rate"],
        noise_scale=inference["noise_scale"],
        noise_scale_duration=inference["noise_w"],
        speaking_rate=1.0 / inference["length_scale"],
    )


def _fill(model: nn.Module, weights: _Weights) -> None:
    filled: set[str] = set()
    with torch.no_grad():
        for module_name, module in model.named_modules():
            if ".parametrizations" in module_name:
                continue
            own = {name for name, _ in module.named_parameters(recurse=False)}
            if hasattr(module, "parametrizations"):
                own.add("weight")  # assigning it sets both factors of the weight norm
            for parameter in own:
                name = f"{module_name}.{parameter}" if module_name else parameter
                # `post_*` is used in training only. Synthesis skips the first convolution flow ("a useless vflow"), and
                # the export does not have it.
                if name.startswith(("duration_predictor.post_", "duration_predictor.flows.1.")):
                    continue
                value = _value(weights, name).reshape(getattr(module, parameter).shape)
                if hasattr(module, "parametrizations") and parameter == "weight":
                    module.weight = value
                else:
                    getattr(module, parameter).copy_(value)
                filled.add(name)
    if not filled:
        raise ValueError("no weight was filled: not a Piper voice of a known shape")


# From transformers' names to Piper's, applied in order to a dotted path.
_NAMES = (
    ("text_encoder.embed_tokens", "enc_p.emb"),
    ("text_encoder.project", "enc_p.proj"),
    ("text_encoder.encoder.layers.", "enc_p.encoder.layers."),
    ("duration_predictor.", "dp."),
    ("decoder.upsampler", "dec.ups"),
    ("decoder.", "dec."),
    (".wavenet.", ".enc."),
    (".conv_pre", ".pre"),
    (".conv_post", ".post"),
    (".conv_proj", ".proj"),
    (".conv_dds.", ".convs."),
    (".convs_dilated.", ".convs_sep."),
    (".convs_pointwise.", ".convs_1x1."),
)
_LAYER = {
    "attention.q_proj": "attn_layers.{}.conv_q",
    "attention.k_proj": "attn_layers.{}.conv_k",
    "attention.v_proj": "attn_layers.{}.conv_v",
    "attention.out_proj": "attn_layers.{}.conv_o",
    "attention": "attn_layers.{}",
    "layer_norm": "norm_layers_1.{}",
    "final_layer_norm": "norm_layers_2.{}",
    "feed_forward.conv_1": "ffn_layers.{}.conv_1",
    "feed_forward.conv_2": "ffn_layers.{}.conv_2",
}


def _value(weights: _Weights, name: str) -> torch.Tensor:
    """Return Piper's tensor for one of transformers' parameter names."""
    path, _, parameter = name.rpartition(".")
    if path == "duration_predictor.flows.0":  # the affine flow; the export folded exp(-logs) into a constant
        return weights["dp.flows.0.m"] if parameter == "translate" else -torch.log(weights["/dp/flows.0/Exp_output_0"])
    is_norm = "norm" in path
    for ours, theirs in _NAMES:
        if ours in {".conv_pre", ".conv_post"} and path.startswith("dec."):
            continue  # the vocoder's two layers keep these names
        path = path.replace(ours, theirs)
    parts = path.split(".")
    if path.startswith("enc_p.encoder.layers."):
        path = "enc_p.encoder." + _LAYER[".".join(parts[4:])].format(parts[3])
        parts = []
    if parts[:1] == ["flow"]:
        parts[2] = str(2 * int(parts[2]))  # Piper counts the flips between the flows
    elif parts[:2] == ["dp", "flows"]:
        parts[2] = str(2 * int(parts[2]) - 1)
    path = ".".join(parts) or path
    if is_norm:
        parameter = {"weight": "gamma", "bias": "beta"}[parameter]
    return weights[f"{path}.{parameter}"]
