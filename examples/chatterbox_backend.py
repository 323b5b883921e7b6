"""Chatterbox as a backend.

    python examples/chatterbox_backend.py "Hello there." -o out.wav --reference voice.wav
    python examples/chatterbox_backend.py "Guten Tag." -o out.wav --variant multilingual --language de
    python examples/chatterbox_backend.py "Hello there." -o out.wav --random-weights --seconds 1   # noise, offline

Needs: pip install accelerate_tts chatterbox-light (or chatterbox-tts)
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable, Iterator, Sequence
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from _common import at_most, letters, parse, sentences, write_wav
from chatterbox.models.s3gen import s3gen
from chatterbox.models.t3 import T3
from chatterbox.models.t3.llama_configs import LLAMA_CONFIGS
from chatterbox.models.t3.modules.cond_enc import T3Cond
from chatterbox.models.t3.modules.t3_config import T3Config
from chatterbox.models.voice_encoder import VoiceEncoder
from chatterbox.tts import Conditionals

from accelerate_tts import cached_embedding, inference, optimized_model, receipt_of

TOKENS_A_SECOND = 25
SOUNDS = 6561  # of the tokens; T3 can write more, which trained weights do not choose
# The classes take the same voice and say things in the same way. Older releases of chatterbox-tts have the first only.
VARIANTS = {
    "english": ("chatterbox.tts", "ChatterboxTTS"),
    "multilingual": ("chatterbox.mtl_tts", "ChatterboxMultilingualTTS"),
    "turbo": ("chatterbox.tts_turbo", "ChatterboxTurboTTS"),
}


class ChatterboxBackend:
    """Speaks a text sentence by sentence."""

    def __init__(self, make: Callable[[], Any], **options: str) -> None:
        self._make = make
        self.options = options  # of upstream's `generate`: the multilingual one must be told its language

    @optimized_model(warmup="Hello there.")
    async def initialize(self) -> None:
        """Load the model without holding up the event loop."""
        self.model = await asyncio.to_thread(self._make)

    @cached_embedding
    def voice(self, reference: Path) -> Any:
        """The voice of a recording, as upstream's `generate` takes it. A service meets the same ones again."""
        self.model.prepare_conditionals(reference)
        return self.model.conds

    def speak_as(self, reference: Path) -> None:
        """Speak with the voice of a recording from here on."""
        self.model.conds = self.voice(reference)

    @inference
    def synthesize(self, text: str) -> torch.Tensor:
        """The speech, as one row of samples."""
        return torch.cat([self.model.generate(sentence, **self.options) for sentence in sentences(text)], dim=-1)

    @inference
    def stream(self, text: str) -> Iterator[torch.Tensor]:
        """The speech of each sentence as soon as it is there."""
        for sentence in sentences(text):
            yield self.model.generate(sentence, **self.options)


def class_of(variant: str) -> Any:
    """Upstream's class of a variant."""
    module, name = VARIANTS[variant]
    return getattr(importlib.import_module(module), name)


def pretrained(device: str, variant: str = "english") -> Any:
    """The model from the hub, with upstream's own voice."""
    return class_of(variant).from_pretrained(device)


def random(
    device: str = "cpu", seconds: float = 1.0, *, tiny: bool = False, variant: str = "english", layers: int = 0
) -> Any:
    """The architecture with seeded weights, a voice of noise, and a limit on tokens for each sentence.

    A tiny one may have a T3 of full width with a few layers.
    """
    turbo = variant == "turbo"
    config, meanflow = config_of(variant), {"meanflow": True} if turbo else {}
    t3, s3 = (
        (small_t3(config, layers), small_s3gen(**meanflow)) if tiny else (T3(config), s3gen.S3Token2Wav(**meanflow))
    )
    if tiny and "n_cfm_timesteps" in signature(s3.inference).parameters:  # since chatterbox-tts 0.1.6
        s3.inference = at_most(s3.inference, n_cfm_timesteps=2)  # of ten, except turbo's two
    # Chatterbox's loops end at the stop token, which random weights hardly ever choose.
    tokens = max(1, round(seconds * TOKENS_A_SECOND))
    only_sounds(t3)
    if turbo:
        del t3.tfmr.wte  # as upstream does: its words are T3's own
        limit(t3, "inference_turbo", max_gen_len=tokens)
    else:
        limit(t3, "inference", max_new_tokens=tokens)
    voice = Conditionals(
        T3Cond(torch.rand(1, 256), None, torch.randint(0, SOUNDS, (1, 150)), emotion_adv=0.5 * torch.ones(1, 1, 1)),
        recording(0.4 if tiny else 2.0),
    )
    parts = [part.to(device).eval() for part in (t3, s3, VoiceEncoder())]
    return class_of(variant)(*parts, Letters(), device, voice.to(device))


def recording(seconds: float) -> dict[str, Any]:
    """Return what S3Gen keeps of a voice's recording, of which upstream takes up to ten seconds."""
    tokens = round(seconds * TOKENS_A_SECOND)
    return {
        "prompt_token": torch.randint(0, SOUNDS, (1, tokens)), "prompt_token_len": torch.tensor([tokens]),
        "prompt_feat": torch.randn(1, 2 * tokens, 80), "prompt_feat_len": None, "embedding": torch.randn(1, 192),
    }  # fmt: skip


def limit(t3: T3, method: str, **limits: int) -> None:
    """Give T3 a class whose method has these limits. A stream calls the method on a copy of the object."""
    plain = type(t3)

    def limited(self: T3, *args: Any, **kwargs: Any) -> torch.Tensor:
        return getattr(plain, method)(self, *args, **{**kwargs, **limits})

    t3.__class__ = type(plain.__name__, (plain,), {method: limited})


def only_sounds(t3: T3) -> None:
    """Have T3 choose tokens with a sound only, as trained weights do: `generate` drops the others, or expects none."""
    head = torch.nn.Linear(t3.speech_head.in_features, t3.speech_head.out_features)
    head.weight = t3.speech_head.weight
    with torch.no_grad():
        head.bias.copy_(torch.where(torch.arange(len(head.bias)) < SOUNDS, 0.0, -1e4))
    t3.speech_head = head


class Letters:
    """Stands in for the tokenisers, whose vocabularies are files of the hub."""

    def text_to_tokens(self, text: str, language_id: str | None = None) -> torch.Tensor:
        """Ids between those of the stop and the start token."""
        del language_id
        return torch.tensor([letters(text, 255)])

    def __call__(self, text: str, **_options: Any) -> SimpleNamespace:
        """The same in the way of transformers' tokenisers, of which turbo has one."""
        return SimpleNamespace(input_ids=self.text_to_tokens(text))


def config_of(variant: str) -> T3Config:
    """T3's configuration as upstream's `from_local` has it."""
    if variant == "english":
        return T3Config()
    if variant == "multilingual":
        return T3Config.multilingual()
    config = T3Config(text_tokens_dict_size=50_276)
    config.llama_config_name, config.speech_tokens_dict_size = "GPT2_medium", 6563
    config.input_pos_emb, config.speech_cond_prompt_len = None, 375
    config.use_perceiver_resampler = config.emotion_adv = False
    return config


def small_t3(config: T3Config, layers: int = 0) -> T3:
    """The class at small size, or with a few layers of full width, without the Perceiver, which has one size only."""
    llama = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16,
             "num_attention_heads": 4, "num_key_value_heads": 4}  # fmt: skip
    gpt2 = {"hidden_size": 64, "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 1024, "n_ctx": 1024}
    large = LLAMA_CONFIGS[config.llama_config_name]
    # The multilingual one's analyzer looks at the fourteenth layer and the last of 16 heads; so does the English one's
    # of releases before 0.1.3, which have no other, at the tenth layer.
    if getattr(config, "is_multilingual", True):
        llama |= {"num_hidden_layers": 14, "num_attention_heads": 16, "num_key_value_heads": 16}
    size = {"num_hidden_layers": layers} if layers else gpt2 if large["model_type"] == "gpt2" else llama
    config.llama_config_name, config.use_perceiver_resampler = "small", False
    with patch.dict(LLAMA_CONFIGS, small={**large, **size}):
        return T3(config)


def small_s3gen(**options: bool) -> s3gen.S3Token2Wav:
    """The classes at small size. Upstream writes the sizes into the constructor, so its classes are given others."""

    def smaller(name: str, **size: Any) -> Callable[..., Any]:
        cls = getattr(s3gen, name)
        return lambda *args, **kwargs: cls(*args, **{**kwargs, **size})

    replaced = {
        "S3Tokenizer": lambda _name: torch.nn.Linear(1, 1),  # for references; whose device upstream asks
        "UpsampleConformerEncoder": smaller(
            "UpsampleConformerEncoder", attention_heads=2, linear_units=64, num_blocks=1
        ),
        "ConditionalDecoder": smaller("ConditionalDecoder", channels=[64], n_blocks=1, num_mid_blocks=1, num_heads=2),
        "HiFTGenerator": smaller(
            "HiFTGenerator", base_channels=32, resblock_kernel_sizes=[7], resblock_dilation_sizes=[[1, 3, 5]]
        ),
        "ConvRNNF0Predictor": smaller("ConvRNNF0Predictor", cond_channels=32),
    }
    with patch.multiple(s3gen, **replaced):
        return s3gen.S3Token2Wav(**options)


def main(arguments: Sequence[str] | None = None) -> None:
    """Load, speak, write the file while it is being spoken."""
    options = parse(
        arguments, __doc__,
        reference={"type": Path, "help": "a WAV file of the voice to speak with"},
        variant={"choices": list(VARIANTS), "default": "english", "help": "which of upstream's models"},
        language={"default": "en", "help": "of the text, for the multilingual one"},
    )  # fmt: skip

    def make() -> Any:
        if options.random_weights:
            return random(options.device, options.seconds, tiny=options.tiny, variant=options.variant)
        return pretrained(options.device, options.variant)

    told = {"language_id": options.language} if options.variant == "multilingual" else {}
    backend = ChatterboxBackend(make, **told)
    asyncio.run(backend.initialize())
    if options.reference is not None:
        backend.speak_as(options.reference)
    torch.manual_seed(0)
    write_wav(options.output, backend.stream(options.text), backend.model.sr)
    print(receipt_of(backend))


if __name__ == "__main__":
    main()
