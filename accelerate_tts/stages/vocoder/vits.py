"""The parts of transformers' `VitsModel` in fewer operators, exact to rounding. For CPUs, one text at a time.

Upstream computes them in (channels, time) layout: each convolution reorders its input, each norm transposes it twice,
masks of ones are multiplied in, and splines use boolean indexing. Here the layout is (time, channels). A convolution of
one frame is a matrix product, a norm needs no transpose, and a depthwise convolution is three products of shifted rows.
Relative positions are a band of the score matrix, addressed in place by strides.

Random numbers are drawn as upstream draws them. Other calls (a batch, a mask that hides positions, speakers, requested
hidden states) take upstream's own forward.
"""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from accelerate_tts.inspection.classes import plain_class
from accelerate_tts.inspection.tracing import is_plain
from accelerate_tts.kernels.packed import Kernel, is_fp32
from accelerate_tts.stages.vocoder.convolution import Convolution, narrow, wide

_MODULE = "transformers.models.vits.modeling_vits"
_LEAST_LENGTH = 10
"""Minimum tokens of a text: in a smaller matrix, the bands of relative positions would overlap."""


def _is_of(module: Any, name: str) -> bool:
    cls = plain_class(module)
    return cls.__name__ == name and cls.__module__ == _MODULE and not module.training


def _all_fp32(module: nn.Module) -> bool:
    """Check that all weights are plain fp32 tensors on the CPU."""
    tensors = [*module.parameters(), *module.buffers()]
    return all(is_plain(t) and t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)


def _parts_of(module: Any, name: str) -> Any:
    try:
        return module if _is_of(module, name) and _all_fp32(module) and _KNOWN[name](module) else None
    except (AttributeError, IndexError, TypeError):
        return None  # a release with another structure


def _hides_something(mask: Any) -> bool:
    return mask is not None and not bool(mask.all())


def _dense(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight, (inputs, outputs), and bias of a linear layer or a convolution of one frame."""
    weight = layer.weight.detach().reshape(layer.weight.shape[0], -1)
    return weight.t().contiguous(), _bias(layer)


def _bias(layer: Any) -> torch.Tensor:
    """Return the bias of a layer; zeros if it has none."""
    return layer.weight.new_zeros(layer.weight.shape[0]) if layer.bias is None else layer.bias.detach().clone()  # type: ignore[no-any-return]


def _norm(norm: Any) -> tuple[Any, Any, float]:
    """Return weight, bias and epsilon of a LayerNorm. torch takes `None` for either of the first two."""
    weight, bias = (None if tensor is None else tensor.detach() for tensor in (norm.weight, norm.bias))
    return weight, bias, norm.eps


# The text encoder


class _Text:
    def __init__(self, encoder: Any) -> None:
        self.output_class = vars(sys.modules[_MODULE])["VitsTextEncoderOutput"]
        self.embedded = encoder.embed_tokens.weight.detach() * math.sqrt(encoder.config.hidden_size)
        self.layers = [_Layer(layer) for layer in encoder.encoder.layers]
        self.project = _dense(encoder.project)
        self.flow_size = int(encoder.config.flow_size)

    def __call__(self, ids: torch.Tensor) -> Any:
        numpy: Any = sys.modules["numpy"]  # upstream has imported it, and draws from it
        length = ids.shape[1]
        hidden = functional.embedding(ids[0], self.embedded)
        edge = _edge(length, self.layers[0].window)
        for layer in self.layers:
            numpy.random.uniform(0, 1)  # upstream draws for its layer drop, which acts only in training
            hidden = layer(hidden, edge)
        stats = torch.addmm(self.project[1], hidden, self.project[0])
        stats = stats.t().contiguous().t()[None]  # the strides of upstream's result
        means, variances = torch.split(stats, self.flow_size, dim=2)
        return self.output_class(
            last_hidden_state=hidden[None], prior_means=means, prior_log_variances=variances,
            hidden_states=None, attentions=None,
        )  # fmt: skip


def _edge(length: int, window: int) -> torch.Tensor:
    """Return a mask of the band's elements inside the matrix: `(length, 2 * window + 1)` of ones and zeros."""
    column = torch.arange(length, device="cpu")[:, None] + torch.arange(-window, window + 1, device="cpu")
    return ((column >= 0) & (column < length)).to(torch.float32)


class _Layer:
    def __init__(self, layer: Any) -> None:
        attention, feed = layer.attention, layer.feed_forward
        self.heads, self.size = int(attention.num_heads), int(attention.head_dim)
        self.window = int(attention.window_size)
        three = [_dense(projection) for projection in (attention.q_proj, attention.k_proj, attention.v_proj)]
        three[0] = (three[0][0] * attention.scaling, three[0][1] * attention.scaling)
        self.three = torch.cat([w for w, _ in three], 1), torch.cat([b for _, b in three])
        self.out = _dense(attention.out_proj)
        self.keys = attention.emb_rel_k.detach()[0].t().contiguous()
        self.values = attention.emb_rel_v.detach()[0].contiguous()
        self.norms = [_norm(layer.layer_norm), _norm(layer.final_layer_norm)]
        self.first = Convolution(feed.conv_1.weight, feed.conv_1.bias, (feed.conv_1.kernel_size[0] - 1) // 2)
        self.second = Convolution(feed.conv_2.weight, feed.conv_2.bias, (feed.conv_2.kernel_size[0] - 1) // 2)
        self.activation = feed.act_fn
        self.is_relu = isinstance(feed.act_fn, torch.nn.ReLU)

    def __call__(self, hidden: torch.Tensor, edge: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self._attended(hidden, edge)
        hidden = functional.layer_norm(hidden, hidden.shape[1:], *self.norms[0])
        inner = self.first(wide(hidden), "relu") if self.is_relu else self.activation(self.first(wide(hidden)))
        hidden = narrow(self.second.plus(inner, wide(hidden)))
        return torch.layer_norm(hidden, hidden.shape[1:], *self.norms[1])

    def _attended(self, hidden: torch.Tensor, edge: torch.Tensor) -> torch.Tensor:
        length, window = hidden.shape[0], self.window
        three = torch.addmm(self.three[1], hidden, self.three[0])
        query, key, value = three.view(length, 3, self.heads, self.size).permute(1, 2, 0, 3)
        # The score matrix, padded at both ends for the corners of its band. Row i's band begins `window` elements
        # before its diagonal, and the diagonals of two rows are length + 1 elements apart.
        shape, band = (self.heads, length, length), (self.heads, length, 2 * window + 1)
        steps = (length * length, length + 1, 1)
        room = hidden.new_zeros(self.heads * length * length + 2 * window)
        weights = torch.empty_like(room)
        weights[:window] = 0
        weights[-window:] = 0
        inside = slice(window, -window)
        scores = room[inside].view(shape)
        torch.bmm(query, key.transpose(1, 2), out=scores)
        room.as_strided(band, steps).add_(torch.matmul(query, self.keys).mul_(edge))
        torch.softmax(scores, -1, out=weights[inside].view(shape))
        near = torch.matmul(weights.as_strided(band, steps) * edge, self.values)
        attended = torch.baddbmm(near, weights[inside].view(shape), value)
        return torch.addmm(self.out[1], attended.transpose(0, 1).reshape(length, -1), self.out[0])


def _serve_text(text: _Text, named: dict[str, Any]) -> Any:
    ids, mask = named.get("input_ids"), named.get("padding_mask")
    if type(ids) is not torch.Tensor or ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] < _LEAST_LENGTH:  # noqa: PLR2004
        return None
    if (
        not is_fp32(mask, (1, ids.shape[1], 1))
        or _hides_something(mask)
        or _hides_something(named.get("attention_mask"))
    ):
        return None
    known = {"input_ids", "padding_mask", "attention_mask", "return_dict"}
    if any(value for name, value in named.items() if name not in known) or named.get("return_dict") is False:
        return None
    return text(ids)


# The flow


class _Flow:
    def __init__(self, block: Any) -> None:
        layers = list(reversed(block.flows))
        self.couplings = [_Coupling(layer, flipped=number % 2 == 0) for number, layer in enumerate(layers)]

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        # Flipping all channels exchanges the halves and reverses both. The channels are not moved; instead, the weights
        # of every other coupling are reversed.
        first, second = inputs[0].t().chunk(2, dim=1)
        for coupling in self.couplings:
            first, second = second, first - coupling(second)
        if len(self.couplings) % 2:  # each half is still reversed
            first, second = first.flip(1), second.flip(1)
        return torch.cat((first, second), 1).t().contiguous()[None]


class _Coupling:
    def __init__(self, layer: Any, *, flipped: bool) -> None:
        before, after = _dense(layer.conv_pre), _dense(layer.conv_post)
        if flipped:
            before = (before[0].flip(0).contiguous(), before[1])
            after = (after[0].flip(1).contiguous(), after[1].flip(0).contiguous())
        self.before, self.after = before, after
        net = layer.wavenet
        self.width = int(net.hidden_size)
        self.steps = [
            (_gated(inner, self.width), (2 * weight, bias))
            for inner, (weight, bias) in zip(net.in_layers, map(_dense, net.res_skip_layers), strict=True)
        ]

    def __call__(self, half: torch.Tensor) -> torch.Tensor:
        hidden, width = torch.addmm(self.before[1], half, self.before[0]), self.width
        total = torch.zeros_like(hidden)
        for convolution, (weight, bias) in self.steps:
            both = narrow(convolution(wide(hidden)))
            both.sigmoid_()
            gated = both[:, :width].sub_(0.5).mul_(both[:, width:])
            result = torch.addmm(bias, gated, weight)
            if result.shape[1] != width:
                hidden = hidden + result[:, :width]
                result = result[:, width:]
            total.add_(result)
        return torch.addmm(self.after[1], total, self.after[0])


def _gated(layer: Any, width: int) -> Convolution:
    """Make a gate's convolution for `2 * sigmoid(2 * x) - 1`, a fifth of the time of `tanh(x)`.

    The inner factor of two is in these weights, and the outer one in those of the next layer. Powers of two are exact.
    """
    twice = layer.weight.new_ones(layer.out_channels)
    twice[:width] = 2
    bias = None if layer.bias is None else layer.bias * twice
    return Convolution(layer.weight * twice[:, None, None], bias, layer.padding[0], layer.dilation[0])


def _one_text(named: dict[str, Any]) -> torch.Tensor | None:
    """Return the inputs of a call for one whole text at synthesis; `None` for any other call."""
    inputs, mask = named.get("inputs"), named.get("padding_mask")
    if named.get("global_conditioning") is not None or named.get("reverse") is not True:
        return None
    if not is_fp32(inputs) or inputs.dim() != 3 or inputs.shape[0] != 1:  # type: ignore[union-attr]  # noqa: PLR2004
        return None
    if not is_fp32(mask, (1, 1, inputs.shape[2])) or _hides_something(mask):  # type: ignore[union-attr]
        return None
    return inputs


def _serve_flow(flow: _Flow, named: dict[str, Any]) -> torch.Tensor | None:
    inputs = _one_text(named)
    return None if inputs is None else flow(inputs)


# The durations


class _Separable:
    """Layers of a depthwise convolution followed by a convolution of one frame."""

    def __init__(self, module: Any) -> None:
        self.layers = [
            (
                [tap.contiguous() for tap in deep.weight.detach()[:, 0].unbind(1)], _bias(deep),
                deep.dilation[0], _dense(point), list(map(_norm, norms)),
            )
            for deep, point, *norms in zip(
                module.convs_dilated, module.convs_pointwise, module.norms_1, module.norms_2, strict=True
            )
        ]  # fmt: skip

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        length, width = rows.shape
        for taps, bias, apart, (weight, shift), norms in self.layers:
            reach = apart * (len(taps) // 2)
            padded = functional.pad(rows, (0, 0, reach, reach))
            hidden = torch.addcmul(bias, padded[:length], taps[0])
            for number, tap in enumerate(taps[1:], 1):
                hidden.addcmul_(padded[number * apart : number * apart + length], tap)
            hidden = functional.gelu(torch.layer_norm(hidden, (width,), *norms[0]))
            hidden = torch.addmm(shift, hidden, weight)
            hidden = functional.gelu(torch.layer_norm(hidden, (width,), *norms[1]))
            rows = rows + hidden
        return rows


class _Spline:
    """The inverse of a convolutional flow."""

    def __init__(self, flow: Any) -> None:

        self.before = flow.conv_pre.weight.detach().reshape(-1), _bias(flow.conv_pre)
        self.separable = _Separable(flow.conv_dds)
        weight, bias = _dense(flow.conv_proj)
        self.bins, self.bound = int(flow.num_bins), float(flow.tail_bound)
        scale = weight.new_ones(3 * self.bins - 1)
        scale[: 2 * self.bins] /= math.sqrt(flow.filter_channels)
        self.after = weight * scale, bias * scale

    def __call__(
        self, first: torch.Tensor, second: torch.Tensor, condition: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the other half, and the inverse of the spline's slope, by which errors of the input are multiplied."""
        hidden = torch.addcmul(self.before[1], first[:, None], self.before[0]).add_(condition)
        raw = torch.addmm(self.after[1], self.separable(hidden), self.after[0])
        bins, bound = self.bins, self.bound
        least = 1e-3  # of widths, heights and slopes, as upstream
        parts = functional.softmax(raw[:, : 2 * bins].view(-1, 2, bins), -1).mul_(1 - least * bins).add_(least)
        edges = functional.pad(parts.cumsum(-1), (1, 0)).mul_(2 * bound).sub_(bound)
        edges[..., 0], edges[..., -1] = -bound, bound
        sizes = edges.diff(dim=-1)
        slopes = functional.pad(functional.softplus(raw[:, 2 * bins :]).add_(least), (1, 1), value=1.0)
        inside = second.clamp(-bound, bound)
        heights = edges[:, 1].contiguous()
        heights[:, -1] += 1e-6
        place = (inside[:, None] >= heights).sum(-1, keepdim=True) - 1
        chosen = torch.cat((edges[..., :-1], sizes), 1).gather(2, place[:, None].expand(-1, 4, -1))[..., 0]
        left, low, width, height = chosen.unbind(1)
        low = heights.gather(1, place)[:, 0]
        here, there = slopes.gather(1, torch.cat((place, place + 1), 1)).unbind(1)
        steep = height / width
        bent, risen = here + there - 2 * steep, inside - low
        turned = risen * bent
        a, b, c = height * (steep - here) + turned, height * here - turned, -steep * risen
        root = 2 * c / (-b - torch.sqrt(b * b - 4 * a * c))
        within = second.abs() <= bound
        rest = 1 - root
        slope = steep * steep * (there * root * root + 2 * steep * root * rest + here * rest * rest)
        gain = (steep + bent * root * rest) ** 2 / slope
        return torch.where(within, root * width + left, second), torch.where(within, gain, 1.0)


class Amplified(NamedTuple):
    """A value and, for each element, the approximate amplification of a rounding error."""

    value: torch.Tensor
    gain: torch.Tensor


class _Durations:
    def __init__(self, predictor: Any) -> None:
        self.before, self.after = _dense(predictor.conv_pre), _dense(predictor.conv_proj)
        self.separable = _Separable(predictor.conv_dds)
        affine, _useless, *splines = predictor.flows
        self.splines = [_Spline(flow) for flow in reversed(splines)]
        deep = predictor.conv_dds.convs_dilated
        self.reach = sum(layer.dilation[0] * (layer.kernel_size[0] // 2) for layer in deep)
        shift, scale = affine.translate.detach()[:, 0], torch.exp(-affine.log_scale.detach()[:, 0])
        self.affine = [(float(shift[row]), float(scale[row])) for row in (0, 1)]

    def __call__(self, inputs: torch.Tensor, noise_scale: float) -> Amplified:
        rows = torch.addmm(self.before[1], inputs[0].t(), self.before[0])
        rows = torch.addmm(self.after[1], self.separable(rows), self.after[0])
        noise = torch.randn(1, 2, inputs.shape[2]).to(inputs)  # drawn in the user's default dtype, as upstream does
        first, second = (noise * noise_scale)[0].unbind(0)
        gain, others = inputs.new_ones(()), inputs.new_ones(())
        for number, spline in enumerate(self.splines, 1):
            first, second = second, first
            second, gain = spline(first, second, rows)
            if number < len(self.splines):  # the next spline sees all tokens within its reach
                others = others + functional.max_pool1d(gain[None], 2 * self.reach + 1, 1, self.reach)[0]
        shift, scale = self.affine[0]  # after one more flip, the second half is the first
        amplification = gain.clamp_min(1.0) * others * max(1.0, abs(scale))
        return Amplified(((second - shift) * scale)[None, None], amplification[None, None])


def _serve_durations(durations: _Durations, named: dict[str, Any]) -> Amplified | None:
    inputs, scale = _one_text(named), named.get("noise_scale", 1.0)
    if inputs is None or named.get("durations") is not None or type(scale) not in {int, float}:
        return None
    return durations(inputs, scale)


def _is_known_text(encoder: Any) -> bool:
    layers = list(encoder.encoder.layers)
    sizes = {(layer.attention.window_size, layer.feed_forward.conv_1.kernel_size[0] % 2) for layer in layers}
    return len(sizes) == 1 and all(
        window and 2 * window + 1 < _LEAST_LENGTH and odd and layer.attention.emb_rel_k.shape[0] == 1
        for (window, odd), layer in zip(list(sizes) * len(layers), layers, strict=True)
    )


def _is_known_flow(block: Any) -> bool:
    inner = [layer for flow in block.flows for layer in flow.wavenet.in_layers]
    return bool(inner) and all(
        layer.stride == (1,)
        and layer.groups == 1
        and 2 * layer.padding[0] == layer.dilation[0] * (layer.kernel_size[0] - 1)
        for layer in inner
    )


def _is_known_predictor(predictor: Any) -> bool:
    affine, *splines = predictor.flows
    deep = [d for s in (predictor, *splines) for d in (s.conv_dds.convs_dilated)]
    return (
        type(affine).__name__ == "VitsElementwiseAffine" and len(splines) > 1
        and all(flow.half_channels == 1 for flow in splines)
        and all(type(d) is nn.Conv1d and d.kernel_size[0] % 2 and d.groups == d.in_channels for d in deep)
    )  # fmt: skip


_KNOWN = {
    "VitsTextEncoder": _is_known_text,
    "VitsResidualCouplingBlock": _is_known_flow,
    "VitsStochasticDurationPredictor": _is_known_predictor,
}

TEXT = Kernel("text encoder", lambda m: _parts_of(m, "VitsTextEncoder"), _Text, _serve_text)
FLOW = Kernel("flow", lambda m: _parts_of(m, "VitsResidualCouplingBlock"), _Flow, _serve_flow)
DURATIONS = Kernel("durations", lambda m: _parts_of(m, "VitsStochasticDurationPredictor"), _Durations, _serve_durations)
