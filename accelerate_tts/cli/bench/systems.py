"""The five systems of the bench: upstream's own classes, the true architecture, seeded random weights.

The speaker encoder has its real weights, which its package ships. Files from a hub (a tokeniser's vocabulary, a
recorded voice) are replaced by seeded noise of the same shapes, which does not change the times.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from accelerate_tts.errors import MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Callable

Size = Literal["tiny", "full"]


@dataclass(frozen=True)
class Built:
    """A loaded system.

    Attributes:
        model: The object that is tuned.
        speak: Generates (or embeds) about the given seconds of speech, and returns the output.
        hot: The module that takes most of the time, to which users would apply `torch.compile`.
        decoder: The module that a decode loop calls for each token, if there is a loop.
        note: Differences to a system with real weights.
    """

    model: Any
    speak: Callable[[float], Any]
    hot: Any
    decoder: Any = None
    note: str = ""


@dataclass(frozen=True)
class System:
    """A system that can be benched.

    Attributes:
        promised: The promised range of its speed-up.
        package: The package to install for it.
        build: Builds it. Takes the size, the number of layers (`None` for all), and torch's name of the device.
        seconds: Seconds of speech of one measured call at full size.
        warm_up: Seconds of speech of a warm-up call at full size.
        rate: Tokens a second of speech; `None` if it generates none.
    """

    promised: tuple[float, float]
    package: str
    build: Callable[[Size, int | None, str], Built]
    seconds: float
    warm_up: float
    rate: float | None = None


def _module(name: str, package: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingExtraError(f"{name} could not be imported ({error}); pip install {package}") from error


def _letters(count: int, size: int, device: str) -> Any:
    import torch

    return torch.randint(1, size, (1, count), generator=torch.Generator().manual_seed(0)).to(device)


_SECONDS_A_LETTER = 0.07


_CHATTERBOX = "chatterbox-light"
_SOUNDS = 6561
"""Upstream's number of speech tokens. T3's vocabulary has more, which trained weights do not choose."""


def _t3(size: Size, layers: int | None, device: str, variant: Literal["english", "multilingual", "turbo"]) -> Built:
    """Build T3 of a variant with upstream's own configuration for it, and its function that generates tokens."""
    import torch

    t3s = _module("chatterbox.models.t3", _CHATTERBOX)
    conditions = _module("chatterbox.models.t3.modules.cond_enc", _CHATTERBOX)
    kind = _module("chatterbox.models.t3.modules.t3_config", _CHATTERBOX).T3Config
    known = _module("chatterbox.models.t3.llama_configs", _CHATTERBOX).LLAMA_CONFIGS
    turbo = variant == "turbo"
    needed, since = {
        "english": (True, ""), "multilingual": (hasattr(kind, "multilingual"), "chatterbox-tts 0.1.3"),
        "turbo": ("GPT2_medium" in known, "chatterbox-tts 0.1.6"),
    }[variant]  # fmt: skip
    if not needed:
        raise MissingExtraError(f"this release of Chatterbox has no {variant} model; there is one since {since}")
    config = kind.multilingual() if variant == "multilingual" else kind()
    if turbo:
        config.text_tokens_dict_size, config.speech_tokens_dict_size = 50_276, 6563
        config.input_pos_emb, config.speech_cond_prompt_len = None, 375
        config.use_perceiver_resampler = config.emotion_adv = False
    shape = dict(known["GPT2_medium" if turbo else config.llama_config_name])
    if size == "tiny":
        shape |= _SMALL[variant]
        config.use_perceiver_resampler = False  # it has a fixed size
    if layers is not None:
        shape["n_layer" if turbo else "num_hidden_layers"] = layers
    config.llama_config_name = "bench"
    known["bench"] = shape
    try:
        t3 = t3s.T3(config).eval().to(device)
    finally:
        del known["bench"]
    voice = conditions.T3Cond(
        torch.rand(1, 256), None, torch.randint(0, _SOUNDS, (1, 150)), emotion_adv=0.5 * torch.ones(1, 1, 1)
    ).to(device=device)
    text = _letters(60, 255, device)
    if turbo:
        del t3.tfmr.wte  # as upstream does: T3 has its own embeddings

        def written(seconds: float) -> Any:
            return t3.inference_turbo(t3_cond=voice, text_tokens=text, max_gen_len=max(4, round(25 * seconds)))
    else:
        text = text.repeat(2, 1)  # two rows: classifier-free guidance
        start, stop = t3.hp.start_text_token, t3.hp.stop_text_token
        text = torch.nn.functional.pad(torch.nn.functional.pad(text, (1, 0), value=start), (0, 1), value=stop)

        def written(seconds: float) -> Any:
            # The loop would also end at a stop token, which random weights hardly ever choose.
            count = max(4, round(25 * seconds))
            return t3.inference(t3_cond=voice, text_tokens=text, max_new_tokens=count, cfg_weight=0.5)

    return Built({"t3": t3}, written, t3.tfmr, t3.tfmr, f"T3 alone, {variant}")


_SMALL_LLAMA: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16, "num_attention_heads": 4,
    "num_key_value_heads": 4,
}  # fmt: skip
_SMALL: dict[str, dict[str, Any]] = {
    "english": _SMALL_LLAMA,
    # Upstream's analyzer reads the last of sixteen heads, and the fourteenth layer.
    "multilingual": {**_SMALL_LLAMA, "num_hidden_layers": 14, "num_attention_heads": 16, "num_key_value_heads": 16},
    "turbo": {"hidden_size": 64, "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 1024, "n_ctx": 1024},
}


def _chatterbox(size: Size, layers: int | None, device: str) -> Built:
    import torch

    decoder = _t3(size, layers, device, "english")
    t3 = decoder.model["t3"]
    if size == "tiny":

        def tokens(seconds: float) -> Any:
            return decoder.speak(seconds)[0]

        return replace(decoder, speak=tokens, note="T3 alone: S3Gen's sizes are written into its constructor")
    wave = _module("chatterbox.models.s3gen.s3gen", _CHATTERBOX).S3Token2Wav().eval().to(device)
    reference: dict[str, Any] = {
        "prompt_token": torch.randint(0, _SOUNDS, (1, 50)), "prompt_token_len": torch.tensor([50]),
        "prompt_feat": torch.randn(1, 100, 80), "prompt_feat_len": None, "embedding": torch.randn(1, 192),
    }  # fmt: skip
    reference = {name: None if tensor is None else tensor.to(device) for name, tensor in reference.items()}

    def speak(seconds: float) -> Any:
        tokens = decoder.speak(seconds)[0]
        tokens = tokens[tokens < _SOUNDS]
        return tokens, wave.inference(speech_tokens=tokens, ref_dict=reference)[0]

    return Built({"t3": t3, "s3gen": wave}, speak, t3.tfmr, t3.tfmr)


def _xtts(size: Size, layers: int | None, device: str) -> Built:
    import torch

    package = "'coqui-tts[codec]' six 'transformers<5.24'"
    config = _module("TTS.tts.configs.xtts_config", package).XttsConfig()
    module = _module("TTS.tts.models.xtts", package)
    sizes: dict[str, Any] = {
        "gpt_number_text_tokens": 6681, "gpt_start_text_token": 261, "gpt_stop_text_token": 0,
        "gpt_num_audio_tokens": 1026, "gpt_start_audio_token": 1024, "gpt_stop_audio_token": 1025,
        "gpt_use_perceiver_resampler": True,
    }  # fmt: skip
    if size == "tiny":
        sizes |= {"gpt_layers": 2, "gpt_n_model_channels": 64, "gpt_n_heads": 2, "decoder_input_dim": 64}
    if layers is not None:
        sizes["gpt_layers"] = layers
    for name, value in sizes.items():
        setattr(config.model_args, name, value)
    model = module.Xtts(config)
    model.eval()  # also builds the generation model
    model.tokenizer = _Letters()
    width = config.model_args.gpt_n_model_channels
    latents, voice = torch.randn(1, 32, width), torch.randn(1, config.model_args.d_vector_dim, 1)
    model, latents, voice = model.to(device), latents.to(device), voice.to(device)

    def speak(seconds: float) -> Any:
        model.gpt.max_gen_mel_tokens = max(6, round(21.5 * seconds))
        letters = min(390, max(8, round(seconds / _SECONDS_A_LETTER)))  # XTTS accepts at most 400
        return model.inference("x" * letters, "en", latents, voice)["wav"]

    decoder = model.gpt.gpt_inference.transformer
    return Built(model, speak, decoder, decoder)


class _Letters:
    """Replaces XTTS's tokeniser, whose vocabulary is a file of the hub."""

    tokenizer = None

    def encode(self, text: str, lang: str) -> list[int]:
        """Return ids below that of the start token."""
        del lang
        return [1 + ord(letter) % 259 for letter in text]


_HIGGS = "'transformers>=5.3'"


def _higgs(size: Size, layers: int | None, device: str) -> Built:
    import torch

    transformers = _module("transformers", _HIGGS)
    if not hasattr(transformers, "HiggsAudioV2Config"):
        raise MissingExtraError(f"transformers {transformers.__version__} has no Higgs Audio v2; pip install {_HIGGS}")
    sizes: dict[str, Any] = {"num_hidden_layers": 28 if layers is None else layers, "codebook_size": 1026}
    if size == "tiny":
        sizes |= {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
                  "num_hidden_layers": layers or 2, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 290,
                  "eos_token_id": 291, "audio_token_id": 292, "audio_bos_token_id": 293,
                  "audio_delay_token_id": 294}  # fmt: skip
    config = transformers.HiggsAudioV2Config(**sizes)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # the released dtype; building in it takes half the memory
    try:
        with torch.device(device):
            model = transformers.HiggsAudioV2ForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)
    text = torch.cat([_letters(60, 256, device), torch.tensor([[config.audio_bos_token_id]], device=device)], dim=1)

    def speak(seconds: float) -> Any:
        frames = max(10, round(25 * seconds))
        return model.generate(input_ids=text, max_new_tokens=frames, do_sample=False)

    return Built(model, speak, model.model, model.model, "the codec is left out: a fraction of the loop's time")


def _mms(size: Size, layers: int | None, device: str) -> Built:
    transformers = _module("transformers", "transformers")
    sizes: dict[str, Any] = {} if layers is None else {"num_hidden_layers": layers}
    if size == "tiny":
        sizes |= {"hidden_size": 32, "num_hidden_layers": layers or 2, "ffn_dim": 64, "flow_size": 32,
                  "upsample_initial_channel": 64, "upsample_rates": [4, 4], "upsample_kernel_sizes": [8, 8],
                  "duration_predictor_filter_channels": 32, "posterior_encoder_num_wavenet_layers": 1}  # fmt: skip
    config = transformers.VitsConfig(vocab_size=38, spectrogram_bins=513, **sizes)
    model = transformers.VitsModel(config).eval().to(device)

    def speak(seconds: float) -> Any:
        return model(_letters(max(4, round(seconds * 25)), 38, device)).waveform

    return Built(model, speak, model)


def _voice_clone(_size: Size, _layers: int | None, device: str) -> Built:
    import numpy as np

    encoder = _module("resemblyzer", "resemblyzer 'setuptools<81'").VoiceEncoder(device, verbose=False).eval()
    recording = np.random.default_rng(0).normal(0, 0.1, 16_000 * 30).astype(np.float32)

    def speak(seconds: float) -> Any:
        return encoder.embed_utterance(recording[: round(16_000 * max(1.6, seconds))])

    return Built(encoder, speak, encoder)


SYSTEMS: dict[str, System] = {
    "chatterbox": System((1.5, 1.8), _CHATTERBOX, _chatterbox, 4.0, 1.0, 25.0),
    "higgs": System((1.4, 1.6), _HIGGS, _higgs, 1.0, 0.6, 25.0),
    "voice-clone": System((1.3, 1.5), "resemblyzer", _voice_clone, 12.0, 12.0),
    "mms": System((1.1, 1.2), "transformers", _mms, 4.0, 4.0),
    "xtts": System((1.2, 1.4), "'coqui-tts[codec]' six 'transformers<5.24'", _xtts, 4.0, 1.0, 21.5),
}
"""Systems by their names in the command."""

PARTS: dict[str, System] = {
    "t3": System((1.5, 1.8), _CHATTERBOX, partial(_t3, variant="english"), 4.0, 1.0, 25.0),
    "t3-multilingual": System((1.5, 1.8), _CHATTERBOX, partial(_t3, variant="multilingual"), 4.0, 1.0, 25.0),
    "t3-turbo": System((1.5, 1.8), _CHATTERBOX, partial(_t3, variant="turbo"), 4.0, 1.0, 25.0),
}
"""Decoders that can be benched alone, by their names in the command. "all" does not include them."""


def system_of(name: str) -> System:
    """Return one of `SYSTEMS` or `PARTS`.

    Raises:
        KeyError: There is none of that name.
    """
    return SYSTEMS[name] if name in SYSTEMS else PARTS[name]
