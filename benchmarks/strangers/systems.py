"""Small builders of speech systems with their own entry points; hardly any has a plan in `accelerate_tts/models`.

A builder is called with torch seeded, and returns true upstream classes at small size with random weights. Each
imports its package inside: a package that is not installed skips its systems, and fails none.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["SYSTEMS", "Stranger", "System", "f5_tts", "kokoro"]


@dataclass(frozen=True)
class System:
    """A built system.

    Attributes:
        model: A module, or upstream's object that holds modules.
        call: Its entry point: takes the model and one input, as a tuple of arguments.
        inputs: Two inputs, of different lengths.
        warmup: The warm-up in place of the entry point with the first input: a tensor or a mapping, as README has it.
        sampled: True if the output follows discrete choices, so that another precision may choose otherwise.
    """

    model: Any
    call: Callable[..., Any]
    inputs: tuple[tuple[Any, ...], tuple[Any, ...]]
    warmup: Any = None
    sampled: bool = False


@dataclass(frozen=True)
class Stranger:
    """One system: its name, the module to import, the distribution that has it, and its builder."""

    name: str
    package: str
    distribution: str
    build: Callable[[], System]


SYSTEMS: dict[str, Stranger] = {}


def _stranger(
    name: str, package: str, distribution: str = ""
) -> Callable[[Callable[[], System]], Callable[[], System]]:
    def register(build: Callable[[], System]) -> Callable[[], System]:
        SYSTEMS[name] = Stranger(name, package, distribution or package, build)
        return build

    return register


def _ids(length: int, vocabulary: int = 30, first: int = 3) -> torch.Tensor:
    return torch.randint(first, vocabulary, (1, length))


def _forward(model: Any, *args: Any) -> Any:
    return model(*args)


# --- transformers -----------------------------------------------------------------------------------------------------

_LLAMA: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
_MIMI: dict[str, Any] = {
    "hidden_size": 32, "num_filters": 8, "codebook_size": 64, "codebook_dim": 16, "num_quantizers": 4,
    "vector_quantization_hidden_dimension": 16, "upsample_groups": 32, "num_hidden_layers": 2, "intermediate_size": 64,
    "num_attention_heads": 2, "num_key_value_heads": 2, "upsampling_ratios": [4, 4, 2, 2],
}  # fmt: skip


@_stranger("bark", "transformers")
def _bark() -> System:
    from transformers import BarkConfig, BarkModel

    size = {"num_layers": 2, "num_heads": 4, "hidden_size": 32, "block_size": 1024, "initializer_range": 0.3}
    # Its vocabularies are written into its generation configuration.
    config = BarkConfig(
        semantic_config={**size, "input_vocab_size": 129_600, "output_vocab_size": 10_048},
        coarse_acoustics_config={**size, "input_vocab_size": 12_096, "output_vocab_size": 12_096},
        fine_acoustics_config={**size, "n_codes_total": 8, "input_vocab_size": 1056, "output_vocab_size": 1056},
        codec_config={"model_type": "encodec", "num_filters": 8, "hidden_size": 128},
    )
    model = BarkModel(config).eval()
    model.generation_config.semantic_config = {"max_new_tokens": 20, "eos_token_id": 10_000}
    model.generation_config.coarse_acoustics_config = {}
    model.generation_config.fine_acoustics_config = {}
    model.generation_config.codebook_size = 1024
    return System(
        model,
        lambda model, ids: model.generate(ids, semantic_max_new_tokens=16, do_sample=True),
        ((_ids(256, 1000),), (_ids(256, 1000),)),  # its processor pads each text to 256 tokens
        sampled=True,
    )


@_stranger("speecht5", "transformers")
def _speecht5() -> System:
    from transformers import SpeechT5Config, SpeechT5ForTextToSpeech, SpeechT5HifiGan, SpeechT5HifiGanConfig

    config = SpeechT5Config(
        hidden_size=64, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=128, decoder_layers=2,
        decoder_attention_heads=4, decoder_ffn_dim=128, speech_decoder_prenet_units=32, speech_decoder_postnet_units=32,
        speaker_embedding_dim=32, max_speech_positions=400, max_text_positions=200,
    )  # fmt: skip
    vocoder = SpeechT5HifiGan(SpeechT5HifiGanConfig(upsample_initial_channel=32)).eval()
    return System(
        (SpeechT5ForTextToSpeech(config).eval(), vocoder, torch.randn(1, 32)),
        lambda held, ids: held[0].generate_speech(ids, held[2], vocoder=held[1], maxlenratio=2.0, minlenratio=1.0),
        ((_ids(20, 80),), (_ids(34, 80),)),
    )


@_stranger("fastspeech2-conformer", "transformers")
def _fastspeech2() -> System:
    from transformers import FastSpeech2ConformerWithHifiGan, FastSpeech2ConformerWithHifiGanConfig

    config = FastSpeech2ConformerWithHifiGanConfig(
        model_config={
            "hidden_size": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_linear_units": 64,
            "decoder_linear_units": 64, "duration_predictor_channels": 32, "energy_predictor_channels": 32,
            "pitch_predictor_channels": 32, "speech_decoder_postnet_units": 32, "encoder_num_attention_heads": 2,
            "decoder_num_attention_heads": 2,
        },
        vocoder_config={"upsample_initial_channel": 32},
    )  # fmt: skip
    model = FastSpeech2ConformerWithHifiGan(config).eval()
    with torch.no_grad():  # random durations would all be rounded to nothing
        model.model.duration_predictor.linear.bias.fill_(1.2)
    return System(
        model, lambda model, ids: model(ids, return_dict=False)[-1], ((_ids(16, 70),), (_ids(27, 70),)),
        warmup={"input_ids": _ids(16, 70)}, sampled=True,  # its durations are rounded
    )  # fmt: skip


@_stranger("csm", "transformers")
def _csm() -> System:
    from transformers import CsmConfig, CsmForConditionalGeneration

    config = CsmConfig(
        **_LLAMA, num_codebooks=4, vocab_size=65, text_vocab_size=100, max_position_embeddings=256,
        codebook_pad_token_id=64,
        codebook_eos_token_id=0, bos_token_id=1, pad_token_id=2, audio_token_id=3, audio_eos_token_id=4,
        depth_decoder_config={**_LLAMA, "num_codebooks": 4, "vocab_size": 65, "backbone_hidden_size": 64,
                              "max_position_embeddings": 33, "num_hidden_layers": 2},
        codec_config={"model_type": "mimi", **_MIMI},
    )  # fmt: skip
    return System(
        CsmForConditionalGeneration(config).eval(),
        lambda model, ids: model.generate(ids, max_new_tokens=10, do_sample=True, depth_decoder_do_sample=True),
        ((_ids(12, 90, 8),), (_ids(20, 90, 8),)),
        sampled=True,
    )


@_stranger("dia", "transformers")
def _dia() -> System:
    from transformers import DiaConfig, DiaForConditionalGeneration

    attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = DiaConfig(
        encoder_config={"hidden_size": 64, "num_hidden_layers": 2, **attention, "intermediate_size": 128},
        decoder_config={
            "hidden_size": 64, "num_hidden_layers": 2, **attention, "intermediate_size": 128,
            "cross_num_attention_heads": 4, "cross_head_dim": 16, "cross_num_key_value_heads": 4,
            "cross_hidden_size": 64,
        },
    )  # fmt: skip
    model = DiaForConditionalGeneration(config).eval()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 1025, 1024
    model.generation_config.bos_token_id = 1026
    return System(
        model,
        lambda model, ids: model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=True, guidance_scale=3.0
        ),
        ((_ids(16, 250),), (_ids(24, 250),)),
        sampled=True,
    )


_T5 = {
    "model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 100,
}  # fmt: skip
_ENCODEC = {"model_type": "encodec", "num_filters": 8, "hidden_size": 32, "codebook_size": 64}


def _musicgen_decoder() -> dict[str, Any]:
    return {
        "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64,
        "num_codebooks": 4, "pad_token_id": 64, "bos_token_id": 64,
    }  # fmt: skip


def _musicgen_system(model: Any) -> System:
    for name, value in {"decoder_start_token_id": 64, "pad_token_id": 64, "bos_token_id": 64}.items():
        setattr(model.generation_config, name, value)
    return System(
        model,
        lambda model, ids: model.generate(ids, max_new_tokens=12, do_sample=True, guidance_scale=3.0),
        ((_ids(10, 90),), (_ids(17, 90),)),
        sampled=True,
    )


@_stranger("musicgen", "transformers")
def _musicgen() -> System:
    from transformers import MusicgenConfig, MusicgenForConditionalGeneration

    config = MusicgenConfig(text_encoder=_T5, audio_encoder=_ENCODEC, decoder=_musicgen_decoder())
    return _musicgen_system(MusicgenForConditionalGeneration(config).eval())


@_stranger("musicgen-melody", "transformers")
def _musicgen_melody() -> System:
    from transformers import MusicgenMelodyConfig, MusicgenMelodyForConditionalGeneration

    config = MusicgenMelodyConfig(
        text_encoder=_T5, audio_encoder=_ENCODEC, decoder=_musicgen_decoder(), num_chroma=12, chroma_length=20
    )
    return _musicgen_system(MusicgenMelodyForConditionalGeneration(config).eval())


@_stranger("moshi", "transformers")
def _moshi() -> System:
    from transformers import MoshiConfig, MoshiForConditionalGeneration

    config = MoshiConfig(
        vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=128, ffn_dim=128, audio_vocab_size=64, num_codebooks=4,
        audio_encoder_config={"model_type": "mimi", **_MIMI},
        depth_decoder_config={
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
            "ffn_dim": 64, "num_codebooks": 4, "vocab_size": 100, "audio_vocab_size": 64, "input_size": 64,
        },
    )  # fmt: skip
    codes = [torch.randint(0, 64, (1, 4, length)) for length in (6, 9)]
    return System(
        MoshiForConditionalGeneration(config).eval(),
        lambda model, ids, user: model.generate(
            input_ids=ids, user_audio_codes=user, moshi_audio_codes=user, max_new_tokens=8, do_sample=True
        ),
        ((_ids(6, 90), codes[0]), (_ids(9, 90), codes[1])),
        sampled=True,
    )


@_stranger("seamless-m4t-v2", "transformers")
def _seamless() -> System:
    from transformers import SeamlessM4Tv2Config, SeamlessM4Tv2ForTextToSpeech

    config = SeamlessM4Tv2Config(
        vocab_size=100, hidden_size=32, t2u_vocab_size=100, char_vocab_size=60, encoder_layers=2, decoder_layers=2,
        encoder_ffn_dim=64, decoder_ffn_dim=64, encoder_attention_heads=4, decoder_attention_heads=4,
        speech_encoder_layers=1, speech_encoder_attention_heads=4, speech_encoder_intermediate_size=64,
        t2u_encoder_layers=2, t2u_decoder_layers=2, t2u_encoder_ffn_dim=64, t2u_decoder_ffn_dim=64,
        t2u_encoder_attention_heads=4, t2u_decoder_attention_heads=4, t2u_variance_predictor_embed_dim=32,
        t2u_variance_predictor_hidden_dim=32, unit_embed_dim=32, lang_embed_dim=16, spkr_embed_dim=16,
        unit_hifi_gan_vocab_size=100, upsample_initial_channel=32, vocoder_num_langs=4, vocoder_num_spkrs=4,
        variance_predictor_hidden_dim=32, max_position_embeddings=128, t2u_max_position_embeddings=256,
        variance_pred_dropout=0.0, max_new_tokens=12, pad_token_id=0, bos_token_id=2, eos_token_id=3,
        t2u_pad_token_id=1, t2u_eos_token_id=2, decoder_start_token_id=3, initializer_range=0.3,
    )  # fmt: skip
    model = SeamlessM4Tv2ForTextToSpeech(config).eval()
    chosen = model.generation_config
    chosen.text_decoder_lang_to_code_id = chosen.t2u_lang_code_to_id = chosen.vocoder_lang_code_to_id = {"eng": 1}
    chosen.id_to_text = {str(number): chr(97 + number % 26) for number in range(100)}
    chosen.char_to_id = {chr(97 + number): 4 + number for number in range(26)}
    return System(
        model,
        lambda model, ids: model.generate(ids, tgt_lang="eng", max_new_tokens=10, min_new_tokens=8),
        ((_ids(10, 90, 8),), (_ids(17, 90, 8),)),
        sampled=True,
    )


@_stranger("dac", "transformers")
def _dac() -> System:
    from transformers import DacConfig, DacModel

    config = DacConfig(
        encoder_hidden_size=16, downsampling_ratios=[2, 4, 4], decoder_hidden_size=64, n_codebooks=3, codebook_size=64,
        codebook_dim=8,
    )  # fmt: skip
    return System(
        DacModel(config).eval(),
        lambda model, wave: model.decode(model.encode(wave).quantized_representation).audio_values,
        ((torch.randn(1, 1, 3200),), (torch.randn(1, 1, 4800),)),
        warmup=torch.randn(1, 1, 3200), sampled=True,
    )  # fmt: skip


@_stranger("encodec", "transformers")
def _encodec() -> System:
    from transformers import EncodecConfig, EncodecModel

    model = EncodecModel(EncodecConfig(num_filters=8, hidden_size=32, codebook_size=64)).eval()
    return System(
        model, lambda model, wave: model(wave).audio_values, ((torch.randn(1, 1, 6400),), (torch.randn(1, 1, 9600),)),
        warmup=torch.randn(1, 1, 6400), sampled=True,
    )  # fmt: skip


def _mimi_stream(model: Any, codes: torch.Tensor) -> Any:
    """Decodes four frames at a time, with the cache of the frames before, as a streaming service does."""
    cache = None
    for start in range(0, codes.shape[-1], 4):
        made = model.decode(codes[..., start : start + 4], decoder_past_key_values=cache)
        cache = made.decoder_past_key_values
        yield made.audio_values


@_stranger("mimi", "transformers")
def _mimi() -> System:
    from transformers import MimiConfig, MimiModel

    return System(
        MimiModel(MimiConfig(**_MIMI)).eval(), lambda model, wave: model(wave).audio_values,
        ((torch.randn(1, 1, 3840),), (torch.randn(1, 1, 5760),)), sampled=True,
    )  # fmt: skip


@_stranger("mimi-stream", "transformers")
def _mimi_streamed() -> System:
    from transformers import MimiConfig, MimiModel

    codes = [torch.randint(0, 64, (1, 4, length)) for length in (12, 20)]
    return System(MimiModel(MimiConfig(**_MIMI, use_cache=True)).eval(), _mimi_stream, ((codes[0],), (codes[1],)))


_XCODEC = {
    "acoustic_model_config": {
        "model_type": "dac", "encoder_hidden_size": 8, "downsampling_ratios": [8, 5, 4, 2], "decoder_hidden_size": 32,
        "upsampling_ratios": [8, 5, 4, 2], "hidden_size": 16, "codebook_size": 64,
    },
    "semantic_model_config": {
        "model_type": "hubert", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 32, "conv_dim": [16] * 7, "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 2,
    },
}  # fmt: skip


@_stranger("xcodec", "transformers")
def _xcodec() -> System:
    from transformers import XcodecConfig, XcodecModel

    config = XcodecConfig(**_XCODEC, codebook_size=64, codebook_dim=32, target_bandwidths=[0.5, 1.0])
    return System(
        XcodecModel(config).eval(), lambda model, wave: model(wave, bandwidth=0.5).audio_values,
        ((torch.randn(1, 1, 6400),), (torch.randn(1, 1, 9600),)), sampled=True,
    )  # fmt: skip


@_stranger("univnet", "transformers")
def _univnet() -> System:
    from transformers import UnivNetConfig, UnivNetModel

    config = UnivNetConfig(
        model_in_channels=16, model_hidden_channels=8, num_mel_bins=20, resblock_kernel_sizes=[3, 3],
        resblock_stride_sizes=[4, 4], resblock_dilation_sizes=[[1, 3], [1, 3]], kernel_predictor_hidden_channels=16,
        kernel_predictor_num_blocks=1,
    )  # fmt: skip
    return System(
        UnivNetModel(config).eval(),
        lambda model, mel: model(mel, generator=torch.Generator().manual_seed(0)).waveforms,
        ((torch.randn(1, 20, 20),), (torch.randn(1, 33, 20),)),
        warmup=torch.randn(1, 20, 20),
    )


@_stranger("vibevoice", "transformers")
def _vibevoice() -> System:
    from diffusers import DPMSolverMultistepScheduler
    from transformers import VibeVoiceConfig, VibeVoiceForConditionalGeneration

    codec = {"hidden_size": 16, "num_filters": 8, "downsampling_ratios": [2, 4, 4], "depths": [1, 1, 1, 1]}
    config = VibeVoiceConfig(
        text_config={"model_type": "qwen2", **_LLAMA, "vocab_size": 100, "initializer_range": 0.3},
        audio_config={"model_type": "vibevoice_acoustic_tokenizer", **codec},
        semantic_model_config={"model_type": "vibevoice_acoustic_tokenizer_encoder", **codec, "hidden_size": 24},
        diffusion_head_config={"num_hidden_layers": 2, "intermediate_size": 64, "frequency_embedding_size": 32},
        pad_token_id=0, eos_token_id=1, audio_bos_token_id=2, audio_eos_token_id=3, audio_token_id=4,
    )  # fmt: skip

    def speak(model: Any, ids: torch.Tensor) -> Any:
        scheduler = DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, min_new_tokens=6, noise_scheduler=scheduler,
            num_diffusion_steps=3,
        )  # fmt: skip

    def given(length: int) -> tuple[torch.Tensor]:
        return (torch.cat([_ids(length, 90, 8), torch.tensor([[2]])], 1),)

    return System(VibeVoiceForConditionalGeneration(config).eval(), speak, (given(10), given(17)), sampled=True)


@_stranger("vibevoice-tokenizer", "transformers")
def _vibevoice_tokenizer() -> System:
    from transformers import VibeVoiceAcousticTokenizerConfig, VibeVoiceAcousticTokenizerModel

    config = VibeVoiceAcousticTokenizerConfig(
        hidden_size=16, num_filters=8, downsampling_ratios=[2, 4, 4], depths=[1, 1, 1, 1]
    )
    return System(
        VibeVoiceAcousticTokenizerModel(config).eval(), lambda model, wave: model(wave, sample=False),
        ((torch.randn(1, 1, 3200),), (torch.randn(1, 1, 4800),)),
    )  # fmt: skip


def _pocket(name: str, **more: Any) -> System:
    import transformers

    config = getattr(transformers, f"{name}Config")(
        flow_head_config={
            "hidden_size": 32, "num_hidden_layers": 2, "latent_dim": 8, "condition_dim": 64,
            "frequency_embedding_size": 32,
        },
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, latent_dim=8, vocab_size=104,
        audio_prompt_token_id=100, audio_latent_token_id=101, audio_bos_token_id=103, **more,
    )  # fmt: skip

    def given(length: int) -> tuple[torch.Tensor]:
        return (torch.cat([_ids(length, 90, 8), torch.tensor([[103]])], 1),)

    def speak(model: Any, ids: torch.Tensor) -> Any:
        return model.generate(ids, max_new_tokens=8, do_sample=True, frames_after_eos=1, min_frames_before_eos=8)

    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    return System(model, speak, (given(10), given(17)))


@_stranger("pocket-tts-transformers", "transformers")
def _pocket_tts() -> System:
    return _pocket("PocketTTS", audio_prompt_bos_token_id=102)


@_stranger("gradium-phonon", "transformers")
def _gradium() -> System:
    return _pocket("GradiumPhononTTS")


@_stranger("pocket-tts-tokenizer", "transformers")
def _pocket_tokenizer() -> System:
    from transformers import PocketTTSAudioTokenizerConfig, PocketTTSAudioTokenizerModel

    config = PocketTTSAudioTokenizerConfig(
        hidden_size=32, num_filters=8, upsampling_ratios=[4, 4, 2], upsample_groups=32, num_hidden_layers=2,
        intermediate_size=64, num_attention_heads=2, num_key_value_heads=2, latent_dim=8, latent_stride=4,
    )  # fmt: skip
    return System(
        PocketTTSAudioTokenizerModel(config).eval(), lambda model, wave: model(wave),
        ((torch.randn(1, 1, 2560),), (torch.randn(1, 1, 3840),)),
    )  # fmt: skip


@_stranger("qwen2.5-omni-token2wav", "transformers")
def _qwen_token2wav() -> System:
    from transformers import Qwen2_5OmniToken2WavConfig, Qwen2_5OmniToken2WavModel

    config = Qwen2_5OmniToken2WavConfig(
        dit_config={
            "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16, "ff_mult": 2,
            "emb_dim": 32, "num_embeds": 100, "mel_dim": 20, "enc_dim": 16, "enc_emb_dim": 16,
            "enc_channels": [32, 32, 32, 32, 96], "enc_attention_channels": 16, "enc_lin_neurons": 16,
            "look_ahead_layers": [1], "look_backward_layers": [0],
        },
        bigvgan_config={
            "mel_dim": 20, "upsample_initial_channel": 32, "upsample_rates": [4, 4], "upsample_kernel_sizes": [8, 8],
            "resblock_kernel_sizes": [3, 5], "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5]],
        },
    )  # fmt: skip
    speaker, mel = torch.randn(1, 16), torch.randn(1, 60, 20)
    return System(
        Qwen2_5OmniToken2WavModel(config).eval(),
        lambda model, codes: model(codes, speaker, mel, num_steps=4),
        ((torch.randint(0, 100, (1, 16)),), (torch.randint(0, 100, (1, 26)),)),
    )


@_stranger("qwen2.5-omni-talker", "transformers")
def _qwen_talker() -> System:
    from transformers import Qwen2_5OmniTalkerConfig, Qwen2_5OmniTalkerForConditionalGeneration

    config = Qwen2_5OmniTalkerConfig(
        **_LLAMA, vocab_size=120, head_dim=16, embedding_size=64, tts_text_pad_token_id=100, codec_bos_token_id=101,
        codec_eos_token_id=102, codec_pad_token_id=103, codec_mask_token_id=104, pad_token_id=103,
        rope_parameters={"rope_type": "default", "mrope_section": [2, 2, 4], "rope_theta": 10000.0},
    )  # fmt: skip
    model = Qwen2_5OmniTalkerForConditionalGeneration(config).eval()

    def speak(model: Any, ids: torch.Tensor, thought: torch.Tensor, reply: torch.Tensor) -> Any:
        return model.generate(
            input_ids=ids, input_text_ids=ids, thinker_reply_part=reply, inputs_embeds=thought,
            attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=True, suppress_tokens=[101],
            eos_token_id=[102], pad_token_id=103,
        )  # fmt: skip

    def given(length: int) -> tuple[Any, ...]:
        return _ids(length, 90), torch.randn(1, length, 64), torch.randn(1, 12, 64)

    return System(model, speak, (given(10), given(16)), sampled=True)


@_stranger("qwen3-omni-code2wav", "transformers")
def _qwen3_code2wav() -> System:
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeCode2WavConfig
    from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeCode2Wav

    config = Qwen3OmniMoeCode2WavConfig(
        codebook_size=64, hidden_size=32, num_attention_heads=4, num_key_value_heads=4, intermediate_size=64,
        num_hidden_layers=2, num_quantizers=4, upsample_rates=[4, 2], upsampling_ratios=[2, 2], decoder_dim=64,
    )  # fmt: skip
    return System(
        Qwen3OmniMoeCode2Wav(config).eval(),
        lambda model, codes: model.chunked_decode(codes, chunk_size=10, left_context_size=5),
        ((torch.randint(0, 64, (1, 4, 16)),), (torch.randint(0, 64, (1, 4, 31)),)),
    )


@_stranger("xcodec2-decode", "transformers")
def _xcodec2() -> System:
    from transformers import Xcodec2Config, Xcodec2Model

    model = Xcodec2Model(
        Xcodec2Config(
            quantization_dim=64 + 1024,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=16,
        )
    ).eval()
    codes = [torch.randint(0, 64, (1, 1, length)) for length in (12, 20)]
    return System(model, lambda model, codes: model.decode(codes).audio_values, ((codes[0],), (codes[1],)))


@_stranger("kyutai-stt", "transformers")
def _kyutai() -> System:
    from transformers import KyutaiSpeechToTextConfig, KyutaiSpeechToTextForConditionalGeneration

    config = KyutaiSpeechToTextConfig(
        vocab_size=100, codebook_vocab_size=65, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, ffn_dim=128, num_codebooks=4, max_position_embeddings=128, pad_token_id=3,
        bos_token_id=98,
        audio_bos_token_id=64, audio_pad_token_id=64, codec_config={"model_type": "mimi", **_MIMI}, sliding_window=64,
        frame_size=128,
    )  # fmt: skip
    return System(
        KyutaiSpeechToTextForConditionalGeneration(config).eval(),
        lambda model, wave: model.generate(input_values=wave, max_new_tokens=8),
        ((torch.randn(1, 1, 1280),), (torch.randn(1, 1, 1920),)), sampled=True,
    )  # fmt: skip


@_stranger("clvp", "transformers")
def _clvp() -> System:
    from transformers import ClvpConfig, ClvpModelForConditionalGeneration

    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1}
    config = ClvpConfig(
        text_config={**size, "vocab_size": 300, "projection_dim": 32},
        speech_config={**size, "vocab_size": 120, "projection_dim": 32},
        decoder_config={
            "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "feature_size": 20,
            "num_mel_attn_blocks": 2, "bos_token_id": 97, "eos_token_id": 98, "max_text_tokens": 100,
            "use_attention_bias": True, "max_position_embeddings": 120, "decoder_fixing_codes": [3, 5, 7, 9],
        },
        projection_dim=32,
    )  # fmt: skip
    mel = torch.randn(1, 20, 80)
    model = ClvpModelForConditionalGeneration(config).eval()
    model.generation_config.return_dict_in_generate = True
    return System(
        model,
        lambda model, ids: model.generate(
            input_ids=ids, input_features=mel, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=True,
            num_return_sequences=2,
        ).speech_ids,
        ((_ids(10, 50),), (_ids(17, 50),)), sampled=True,
    )  # fmt: skip


@_stranger("whisper", "transformers")
def _whisper() -> System:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=100, num_mel_bins=20, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, d_model=64, encoder_ffn_dim=128, decoder_ffn_dim=128, max_source_positions=50,
        max_target_positions=40, decoder_start_token_id=97, pad_token_id=98, bos_token_id=98, eos_token_id=98,
        suppress_tokens=None, begin_suppress_tokens=None, init_std=0.3,
    )  # fmt: skip
    return System(
        WhisperForConditionalGeneration(config).eval(),
        lambda model, mel: model.generate(mel, max_new_tokens=12),
        ((torch.randn(1, 20, 100),), (torch.randn(2, 20, 100),)), sampled=True,
    )  # fmt: skip


# --- Coqui ------------------------------------------------------------------------------------------------------------


def _coqui(config: Any, **changes: Any) -> Any:
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def _tacotron_like(module: str, cls: str) -> System:
    configs = importlib.import_module(f"TTS.tts.configs.{module}_config")
    width = {"Tacotron2": (512, 80), "Tacotron": (256, 513)}[cls]
    made = _coqui(
        getattr(configs, f"{cls}Config")(), num_chars=40, r=2, decoder_output_dim=80, out_channels=width[1],
        max_decoder_steps=12, encoder_in_features=width[0], decoder_in_features=width[0],
    )  # fmt: skip
    model = getattr(importlib.import_module(f"TTS.tts.models.{module}"), cls)(made).eval()
    return System(model, lambda model, ids: model.inference(ids), ((_ids(12, 38),), (_ids(20, 38),)))


@_stranger("coqui-tacotron2", "TTS", "coqui-tts")
def _tacotron2() -> System:
    return _tacotron_like("tacotron2", "Tacotron2")


@_stranger("coqui-tacotron", "TTS", "coqui-tts")
def _tacotron() -> System:
    return _tacotron_like("tacotron", "Tacotron")


@_stranger("coqui-glow-tts", "TTS", "coqui-tts")
def _glow_tts() -> System:
    from TTS.tts.configs.glow_tts_config import GlowTTSConfig
    from TTS.tts.models.glow_tts import GlowTTS

    config = _coqui(
        GlowTTSConfig(), num_chars=40, hidden_channels_enc=32, hidden_channels_dec=32, hidden_channels_dp=32,
        out_channels=20,
        num_flow_blocks_dec=2,
        encoder_params={"kernel_size": 3, "dropout_p": 0.1, "num_layers": 2, "num_heads": 2, "hidden_channels_ffn": 64},
    )  # fmt: skip
    model = GlowTTS(config).eval()
    return System(
        model,
        lambda model, ids: model.inference(
            ids, {"x_lengths": torch.tensor([ids.shape[1]]), "d_vectors": None, "speaker_ids": None}
        ),
        ((_ids(12, 38),), (_ids(20, 38),)),
    )  # fmt: skip


def _forward_tts(config: str, cls: str) -> System:
    from TTS.tts.models.forward_tts import ForwardTTS

    made = getattr(importlib.import_module(f"TTS.tts.configs.{config}"), cls)()
    args = made.model_args
    args.num_chars, args.hidden_channels, args.out_channels = 40, 32, 20
    for params in (args.encoder_params, args.decoder_params):
        for name, value in {"hidden_channels_ffn": 64, "num_layers": 2, "num_heads": 1}.items():
            if name in params:
                params[name] = value
    made.num_chars = 40
    model = ForwardTTS(made).eval()
    with torch.no_grad():
        for layer in (*model.duration_predictor.modules(),):
            if isinstance(layer, torch.nn.Conv1d) and layer.out_channels == 1:
                layer.bias.fill_(1.2)
    return System(model, lambda model, ids: model.inference(ids), ((_ids(16, 38),), (_ids(27, 38),)))


@_stranger("coqui-fast-pitch", "TTS", "coqui-tts")
def _fast_pitch() -> System:
    return _forward_tts("fast_pitch_config", "FastPitchConfig")


@_stranger("coqui-speedy-speech", "TTS", "coqui-tts")
def _speedy_speech() -> System:
    return _forward_tts("speedy_speech_config", "SpeedySpeechConfig")


def _hmm(module: str, cls: str, config: str) -> System:
    made = getattr(importlib.import_module(f"TTS.tts.configs.{config}"), f"{cls}Config")()
    for name, value in {
        "num_chars": 40, "encoder_in_out_features": 32, "memory_rnn_dim": 32, "prenet_dim": 16, "out_channels": 20,
        "outputnet_size": [32], "hidden_channels_dec": 32, "num_flow_blocks_dec": 2, "max_sampling_time": 30,
    }.items():  # fmt: skip
        if hasattr(made, name):
            setattr(made, name, value)
    model = getattr(importlib.import_module(f"TTS.tts.models.{module}"), cls)(made).eval()
    return System(
        model,
        lambda model, ids: model.inference(
            ids,
            {
                "x_lengths": torch.tensor([ids.shape[1]]), "sampling_temp": 0.3, "max_sampling_time": 30,
                "duration_threshold": 0.55,
            },
        ),
        ((_ids(8, 38),), (_ids(12, 38),)), sampled=True,
    )  # fmt: skip


@_stranger("coqui-overflow", "TTS", "coqui-tts")
def _overflow() -> System:
    return _hmm("overflow", "Overflow", "overflow_config")


@_stranger("coqui-neural-hmm", "TTS", "coqui-tts")
def _neural_hmm() -> System:
    return _hmm("neuralhmm_tts", "NeuralhmmTTS", "neuralhmm_tts_config")


@_stranger("coqui-align-tts", "TTS", "coqui-tts")
def _align_tts() -> System:
    from TTS.tts.configs.align_tts_config import AlignTTSConfig
    from TTS.tts.models.align_tts import AlignTTS

    config = AlignTTSConfig()
    args = config.model_args
    args.num_chars, args.hidden_channels, args.hidden_channels_dp, args.out_channels = 40, 32, 32, 20
    args.encoder_params = {**args.encoder_params, "hidden_channels_ffn": 64, "num_layers": 2}
    args.decoder_params = {**args.decoder_params, "hidden_channels_ffn": 64, "num_layers": 2}
    config.num_chars = 40
    return System(AlignTTS(config).eval(), lambda model, ids: model.inference(ids), ((_ids(12, 38),), (_ids(20, 38),)))


@_stranger("coqui-delightful-tts", "TTS", "coqui-tts")
def _delightful() -> System:
    from TTS.tts.configs.delightful_tts_config import DelightfulTTSConfig
    from TTS.tts.models.delightful_tts import DelightfulTTS

    config = DelightfulTTSConfig()
    args = config.model_args
    args.num_chars, args.n_hidden_conformer_encoder, args.n_hidden_conformer_decoder = 40, 32, 32
    args.n_layers_conformer_encoder = args.n_layers_conformer_decoder = 2
    args.n_heads_conformer_encoder = args.n_heads_conformer_decoder = 2
    args.n_hidden_variance_adaptor = 32
    config.vocoder.upsample_initial_channel_decoder = 32
    config.num_chars = 40
    return System(
        DelightfulTTS(config).eval(), lambda model, ids: model.inference(ids), ((_ids(12, 38),), (_ids(20, 38),))
    )


@_stranger("coqui-wavernn", "TTS", "coqui-tts")
def _wavernn() -> System:
    from TTS.vocoder.configs import WavernnConfig
    from TTS.vocoder.models.wavernn import Wavernn

    config = WavernnConfig()
    args = config.model_args
    args.rnn_dims = args.fc_dims = args.compute_dims = args.res_out_dims = 32
    args.feat_dims, args.num_res_blocks, args.upsample_factors = 20, 2, [4, 4]
    config.audio.hop_length = 16
    return System(
        Wavernn(config).eval(), lambda model, mel: model.inference(mel, batched=False, target=100, overlap=20),
        ((torch.randn(1, 20, 8),), (torch.randn(1, 20, 13),)), sampled=True,
    )  # fmt: skip


def _vocoder(name: str, module: str, cls: str, *, mel: int = 20, **size: Any) -> None:
    @_stranger(name, "TTS", "coqui-tts")
    def _() -> System:
        generator = getattr(importlib.import_module(f"TTS.vocoder.models.{module}"), cls)(**size).eval()
        return System(
            generator, lambda model, mel: model.inference(mel), ((torch.randn(1, mel, 20),), (torch.randn(1, mel, 33),))
        )


_vocoder(
    "coqui-hifigan", "hifigan_generator", "HifiganGenerator", in_channels=20, out_channels=1, resblock_type="1",
    resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]], resblock_kernel_sizes=[3, 7], upsample_kernel_sizes=[8, 8],
    upsample_initial_channel=32, upsample_factors=[4, 4],
)  # fmt: skip
_vocoder(
    "coqui-melgan", "melgan_generator", "MelganGenerator", in_channels=20, base_channels=64, upsample_factors=(4, 4)
)
_vocoder(
    "coqui-multiband-melgan", "multiband_melgan_generator", "MultibandMelganGenerator", in_channels=20, out_channels=4,
    base_channels=64, upsample_factors=(2, 4),
)  # fmt: skip
_vocoder(
    "coqui-parallel-wavegan", "parallel_wavegan_generator", "ParallelWaveganGenerator", num_res_blocks=6, stacks=2,
    res_channels=16, gate_channels=32, skip_channels=16, aux_channels=80, upsample_factors=[4, 4], mel=80,
)  # fmt: skip
_vocoder(
    "coqui-univnet", "univnet_generator", "UnivnetGenerator", in_channels=16, out_channels=1, hidden_channels=8,
    cond_channels=20, upsample_factors=[4, 4], lvc_layers_each_block=2, lvc_kernel_size=3, kpnet_hidden_channels=16,
    kpnet_conv_size=3, dropout=0.0,
)  # fmt: skip


@_stranger("coqui-wavegrad", "TTS", "coqui-tts")
def _wavegrad() -> System:
    import numpy as np
    from TTS.vocoder.configs import WavegradConfig
    from TTS.vocoder.models.wavegrad import Wavegrad

    config = WavegradConfig()
    config.model_params.in_channels = 20
    config.model_params.base_channels, config.model_params.dblock_out_channels = 8, [16, 16, 16, 16]
    config.model_params.ublock_out_channels, config.model_params.upsample_factors = (
        [16, 16, 16, 16, 16],
        [2, 2, 2, 2, 2],
    )
    config.model_params.upsample_dilations = [[1, 2, 1, 2]] * 5
    model = Wavegrad(config).eval()
    model.compute_noise_level(np.linspace(1e-6, 0.01, 4))
    return System(
        model, lambda model, mel: model.inference(mel), ((torch.randn(1, 20, 16),), (torch.randn(1, 20, 24),))
    )


@_stranger("coqui-bark-gpt", "TTS", "coqui-tts")
def _coqui_bark() -> System:
    from TTS.tts.layers.bark.model import GPT, GPTConfig

    model = GPT(
        GPTConfig(block_size=128, input_vocab_size=120, output_vocab_size=100, n_layer=2, n_head=4, n_embd=64)
    ).eval()

    def speak(model: Any, ids: torch.Tensor) -> torch.Tensor:
        """The loop of `generate_text_semantic`, whose tokenizer must be downloaded."""
        cache, made = None, ids
        for _ in range(10):
            given = made if cache is None else made[:, -1:]
            logits, cache = model(given, merge_context=False, use_cache=True, past_kv=cache)
            probabilities = torch.softmax(logits[0, 0], -1)
            made = torch.cat([made, torch.multinomial(probabilities, 1)[None]], 1)
        return made

    return System(model, speak, ((_ids(10, 100),), (_ids(17, 100),)), sampled=True)


@_stranger("coqui-tortoise-autoregressive", "TTS", "coqui-tts")
def _tortoise_gpt() -> System:
    from TTS.tts.layers.tortoise.autoregressive import UnifiedVoice

    model = UnifiedVoice(
        layers=2, model_dim=64, heads=4, max_text_tokens=60, max_mel_tokens=60, number_mel_codes=66, start_mel_token=64,
        stop_mel_token=65, number_text_tokens=60, train_solo_embeddings=False,
    ).eval()  # fmt: skip
    model.post_init_gpt2_config(kv_cache=True)
    speaker = torch.randn(1, 64)
    return System(
        model,
        lambda model, ids: model.inference_speech(
            speaker, ids, do_sample=True, top_p=0.8, temperature=0.8, num_return_sequences=2, max_generate_length=10
        ),
        ((_ids(10, 50),), (_ids(17, 50),)), sampled=True,
    )  # fmt: skip


@_stranger("coqui-tortoise-diffusion", "TTS", "coqui-tts")
def _tortoise_diffusion() -> System:
    from TTS.tts.layers.tortoise.diffusion import SpacedDiffusion, get_named_beta_schedule, space_timesteps
    from TTS.tts.layers.tortoise.diffusion_decoder import DiffusionTts

    model = DiffusionTts(
        model_channels=64, num_layers=2, in_channels=20, out_channels=40, in_latent_channels=64, in_tokens=66,
        dropout=0,
        num_heads=4, layer_drop=0, unconditioned_percentage=0,
    ).eval()  # fmt: skip
    speaker = torch.randn(1, 128)

    def speak(model: Any, latents: torch.Tensor) -> Any:
        diffuser = SpacedDiffusion(
            use_timesteps=space_timesteps(100, [4]), model_mean_type="epsilon", model_var_type="learned_range",
            loss_type="mse", betas=get_named_beta_schedule("linear", 100), conditioning_free=True,
            conditioning_free_k=2.0, sampler="ddim",
        )  # fmt: skip
        length = latents.shape[1] * 4
        with torch.no_grad():
            prepared = model.timestep_independent(latents, speaker, length, False)
            noise = torch.randn(1, 20, length)
            return diffuser.sample_loop(
                model, noise.shape, noise=noise, model_kwargs={"precomputed_aligned_embeddings": prepared},
                progress=False,
            )  # fmt: skip

    return System(model, speak, ((torch.randn(1, 12, 64),), (torch.randn(1, 20, 64),)))


@_stranger("coqui-freevc", "TTS", "coqui-tts")
def _freevc() -> System:
    from TTS.vc.models.freevc import Generator

    size = {
        "resblock": "1", "resblock_kernel_sizes": [3, 5], "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5]],
        "upsample_rates": [4, 4], "upsample_initial_channel": 32, "upsample_kernel_sizes": [8, 8], "gin_channels": 16,
    }  # fmt: skip
    voice = torch.randn(1, 16, 1)
    return System(
        Generator(initial_channel=20, **size).eval(), lambda model, latent: model(latent, g=voice),
        ((torch.randn(1, 20, 20),), (torch.randn(1, 20, 33),)),
    )  # fmt: skip


# --- Chatterbox's tokenizer and speaker encoder -----------------------------------------------------------------------


@_stranger("s3tokenizer-v2", "s3tokenizer")
def _s3tokenizer() -> System:
    from s3tokenizer.model_v2 import ModelConfig, S3TokenizerV2

    config = ModelConfig(n_mels=20, n_audio_state=128, n_audio_head=2, n_audio_layer=2)
    model = S3TokenizerV2("small_v2", config).eval()
    return System(
        model, lambda model, mel: model.quantize(mel, torch.tensor([mel.shape[2]])),
        ((torch.randn(1, 20, 80),), (torch.randn(1, 20, 120),)), sampled=True,
    )  # fmt: skip


@_stranger("campplus", "chatterbox", "chatterbox-light")
def _campplus() -> System:
    from chatterbox.models.s3gen.xvector import CAMPPlus

    model = CAMPPlus(feat_dim=40, embedding_size=32, growth_rate=8, init_channels=16).eval()
    return System(
        model, _forward, ((torch.randn(1, 60, 40),), (torch.randn(1, 90, 40),)), warmup=torch.randn(1, 60, 40)
    )


# --- other packages ---------------------------------------------------------------------------------------------------


def _without_init(package: str) -> None:
    """Lets a package's modules be imported without its `__init__`, which imports text front ends or trainers, too."""
    if package not in sys.modules:
        found = importlib.util.find_spec(package)
        assert found is not None
        module = types.ModuleType(package)
        module.__path__ = list(found.submodule_search_locations or ())
        module.__spec__ = importlib.machinery.ModuleSpec(package, None, is_package=True)
        sys.modules[package] = module


@_stranger("vocos", "vocos")
def _vocos() -> System:
    from vocos.feature_extractors import MelSpectrogramFeatures
    from vocos.heads import ISTFTHead
    from vocos.models import VocosBackbone
    from vocos.pretrained import Vocos

    model = Vocos(
        MelSpectrogramFeatures(n_fft=256, hop_length=64, n_mels=20), VocosBackbone(20, 64, 128, 2),
        ISTFTHead(64, n_fft=256, hop_length=64),
    ).eval()  # fmt: skip
    return System(model, lambda model, mel: model.decode(mel), ((torch.randn(1, 20, 40),), (torch.randn(1, 20, 61),)))


@_stranger("snac", "snac")
def _snac() -> System:
    from snac import SNAC

    model = SNAC(
        encoder_dim=8, encoder_rates=[2, 4, 4], decoder_dim=64, decoder_rates=[4, 4, 2], attn_window_size=8,
        codebook_size=64, vq_strides=[4, 2, 1],
    ).eval()  # fmt: skip

    def codes(length: int) -> tuple[list[torch.Tensor]]:
        return ([torch.randint(0, 64, (1, length * step)) for step in (1, 2, 4)],)

    return System(model, lambda model, codes: model.decode(codes), (codes(4), codes(6)))


@_stranger("orpheus-like", "snac+transformers", "snac")
def _orpheus() -> System:
    """A Llama that writes the codes of SNAC, as Orpheus does."""
    from snac import SNAC
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = LlamaForCausalLM(LlamaConfig(**_LLAMA, vocab_size=160, max_position_embeddings=256)).eval()
    snac = SNAC(
        encoder_dim=8, encoder_rates=[2, 4, 4], decoder_dim=64, decoder_rates=[4, 4, 2], attn_window_size=None,
        codebook_size=64, vq_strides=[4, 2, 1],
    ).eval()  # fmt: skip

    def speak(held: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        made = held[0].generate(
            ids, max_new_tokens=28, min_new_tokens=28, do_sample=True, top_p=0.9, pad_token_id=0
        )[:, ids.shape[1] :]  # fmt: skip
        frames = (made % 64).view(1, 4, 7)
        codes = [frames[..., :1], frames[..., 1:3], frames[..., 3:]]
        return made, held[1].decode([code.reshape(1, -1) for code in codes])

    return System((llama, snac), speak, ((_ids(12, 150),), (_ids(20, 150),)), sampled=True)


class _Letters:
    """In place of pocket-tts's tokenizer, which must be downloaded: a letter is a token."""

    def encode(self, text: str) -> list[int]:
        return [3 + ord(letter) % 60 for letter in text]

    def decode(self, tokens: list[int]) -> str:
        return "a" * len(tokens)

    def __call__(self, text: str) -> torch.Tensor:
        return torch.tensor(self.encode(text))[None]


@_stranger("pocket-tts", "pocket_tts", "pocket-tts")
def _pocket_tts_own() -> System:
    """Kyutai's own package: it generates and decodes in threads of its own."""
    from pocket_tts.models import flow_lm
    from pocket_tts.models.tts_model import TTSModel
    from pocket_tts.modules import text_conditioner
    from pocket_tts.utils.config import CONFIGS_DIR, load_config

    config = load_config(CONFIGS_DIR / "english_2m_2026-10.yaml")
    config.weights_path = config.weights_path_without_voice_cloning = None
    config.flow_lm.transformer.num_layers = 2
    for module in (text_conditioner, flow_lm):  # no file of a tokenizer is at hand
        for name in ("SentencePieceTokenizer", "JsonTokenizer"):
            if hasattr(module, name):
                setattr(module, name, lambda *_args, **_kwargs: _Letters())
    model = TTSModel._from_pydantic_config_with_weights(config, 0.3, 1, None, 1e9).eval()
    model.max_decoder_frames_per_call = 1  # otherwise the chunks depend on the threads' timing
    with torch.no_grad():
        for parameter in model.parameters():
            if not torch.isfinite(parameter).all() or not parameter.any():
                parameter.normal_(0, 0.02)
        for name, buffer in model.named_buffers():
            if "std" in name:
                buffer.fill_(1.0)
            elif "mean" in name:
                buffer.zero_()

    def speak(model: Any, text: str) -> Any:
        from pocket_tts.modules.stateful_module import init_states

        state = init_states(model.flow_lm, batch_size=1, sequence_length=400)
        return model.generate_audio_stream(state, text, frames_after_eos=2)

    return System(model, speak, (("Hello there.",), ("Hello there, you.",)))


@_stranger("kokoro", "kokoro+loguru", "kokoro")
def kokoro(*, full: bool = False) -> System:
    """Build Kokoro; `full` has the sizes of Kokoro-82M, whose random weights speak half a second for each letter."""
    import tempfile

    _without_init("kokoro")  # its front end, misaki, brings spaCy
    from kokoro.model import KModel
    from loguru import logger

    logger.disable("kokoro")  # it prints each text

    vocab = {letter: 1 + number for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz ")}
    bert = {
        "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 2,
        "max_position_embeddings": 128, "embedding_size": 16,
    }  # fmt: skip
    if full:
        bert = {
            "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 2048, "num_hidden_layers": 12,
            "max_position_embeddings": 512,
        }  # fmt: skip
    kernels = [3, 7, 11] if full else [3]
    config = {
        "vocab": vocab, "n_token": 178 if full else 30, "hidden_dim": 512, "style_dim": 128,
        "n_layer": 3 if full else 2, "max_dur": 50 if full else 5, "dropout": 0.1, "text_encoder_kernel_size": 5,
        "n_mels": 80, "plbert": bert,
        "istftnet": {
            "upsample_kernel_sizes": [20, 12], "upsample_rates": [10, 6], "gen_istft_hop_size": 5,
            "gen_istft_n_fft": 20, "resblock_dilation_sizes": [[1, 3, 5]] * len(kernels),
            "resblock_kernel_sizes": kernels, "upsample_initial_channel": 512,
        },
    }  # fmt: skip
    with tempfile.NamedTemporaryFile(suffix=".pth") as weights:  # it loads a file of weights: an empty one
        torch.save({}, weights.name)
        model = KModel(repo_id="hexgrad/Kokoro-82M", config=config, model=weights.name).eval()
    voice = torch.randn(1, 256)
    return System(model, lambda model, text: model(text, voice), (("a fox",), ("the fox",)))


@_stranger("bigvgan", "bigvgan")
def _bigvgan() -> System:
    _without_init("bigvgan")  # it imports its training data, too
    from bigvgan.bigvgan import BigVGAN
    from bigvgan.env import AttrDict

    sizes = AttrDict(
        num_mels=20, resblock="1", resblock_kernel_sizes=[3, 7], resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]],
        upsample_rates=[4, 4], upsample_kernel_sizes=[8, 8], upsample_initial_channel=32, activation="snakebeta",
        snake_logscale=True,
    )  # fmt: skip
    return System(
        BigVGAN(sizes).eval(), _forward, ((torch.randn(1, 20, 20),), (torch.randn(1, 20, 33),)),
        warmup=torch.randn(1, 20, 20),
    )  # fmt: skip


@_stranger("f5-tts", "f5_tts+x_transformers+torchdiffeq", "f5-tts")
def f5_tts(*, full: bool = False) -> System:
    """Build F5-TTS; `full` has the sizes of F5TTS_v1_Base, and two steps of its solver in place of 32."""
    _without_init("f5_tts")
    _without_init("f5_tts.model")  # it imports its trainer, too
    from f5_tts.model.backbones.dit import DiT
    from f5_tts.model.cfm import CFM

    mels, steps = (100, 2) if full else (20, 4)
    size: dict[str, Any] = {"dim": 64, "depth": 2, "heads": 4, "dim_head": 16, "text_dim": 32, "conv_layers": 2}
    if full:
        size = {"dim": 1024, "depth": 22, "heads": 16, "text_dim": 512, "conv_layers": 4}
    transformer = DiT(**size, ff_mult=2, mel_dim=mels, text_num_embeds=60)
    with torch.no_grad():  # its modulations begin at zero, and then nothing depends on anything
        for parameter in transformer.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.05)
    model = CFM(transformer, num_channels=mels, mel_spec_kwargs={"n_mel_channels": mels}).eval()
    voice, frames = torch.randn(1, 150 if full else 16, mels), (400, 500) if full else (40, 57)
    return System(
        model, lambda model, ids, length: model.sample(voice, ids, length, steps=steps, cfg_strength=2.0, seed=3)[0],
        ((_ids(12, 50), frames[0]), (_ids(20, 50), frames[1])),
    )  # fmt: skip


@_stranger("encodec-meta", "encodec")
def _encodec_meta() -> System:
    from encodec import EncodecModel

    model = EncodecModel.encodec_model_24khz(pretrained=False).eval()
    model.set_target_bandwidth(6.0)
    return System(
        model, lambda model, wave: model.decode(model.encode(wave)),
        ((torch.randn(1, 1, 3200),), (torch.randn(1, 1, 4800),)), sampled=True,
    )  # fmt: skip


@_stranger("dac-descript", "dac+audiotools", "descript-audio-codec")
def _dac_descript() -> System:
    from dac.model.dac import DAC

    model = DAC(
        encoder_dim=8, encoder_rates=[2, 4, 4], decoder_dim=64, decoder_rates=[4, 4, 2], n_codebooks=3, codebook_size=64
    ).eval()  # fmt: skip
    return System(
        model, lambda model, wave: model(wave)["audio"], ((torch.randn(1, 1, 3200),), (torch.randn(1, 1, 4800),)),
        sampled=True,
    )  # fmt: skip


@_stranger("styletts2", "styletts2+munch", "styletts2")
def _styletts2() -> System:
    _without_init("styletts2")
    from styletts2.Modules.istftnet import Decoder

    model = Decoder(
        dim_in=512, F0_channel=32, style_dim=32, dim_out=80, resblock_kernel_sizes=[3], upsample_rates=[10, 6],
        upsample_initial_channel=512, resblock_dilation_sizes=[[1, 3, 5]], upsample_kernel_sizes=[20, 12],
        gen_istft_n_fft=20, gen_istft_hop_size=5,
    ).eval()  # fmt: skip
    style = torch.randn(1, 32)

    def given(length: int) -> tuple[torch.Tensor, ...]:
        return torch.randn(1, 512, length), torch.rand(1, 2 * length) * 200, torch.randn(1, 2 * length)

    return System(model, lambda model, *given: model(*given, style), (given(20), given(31)))


@_stranger("parler-tts", "parler_tts", "parler-tts")
def _parler() -> System:
    from parler_tts import ParlerTTSConfig, ParlerTTSForConditionalGeneration

    config = ParlerTTSConfig(
        vocab_size=100, text_encoder={**_T5}, audio_encoder={**_ENCODEC},  # it takes their types out of them
        decoder={**_musicgen_decoder(), "model_type": "parler_tts_decoder", "vocab_size": 66,
                 "max_position_embeddings": 128, "bos_token_id": 65, "eos_token_id": 64},
    )  # fmt: skip
    description = _ids(9, 90)
    model = ParlerTTSForConditionalGeneration(config).eval()
    chosen = model.generation_config
    chosen.decoder_start_token_id = chosen.bos_token_id = 65
    chosen.eos_token_id = chosen.pad_token_id = 64
    return System(
        model,
        lambda model, ids: model.generate(input_ids=description, prompt_input_ids=ids, max_new_tokens=12),
        ((_ids(10, 90),), (_ids(17, 90),)), sampled=True,
    )  # fmt: skip


class _Words:
    """In place of Qwen3-TTS's processor, which must be downloaded: a word or a letter is a token."""

    def __call__(self, text: str, **_: Any) -> dict[str, torch.Tensor]:
        import re

        marks = {"<|im_start|>": 90, "<|im_end|>": 91, "assistant": 92, "\n": 93}
        found = re.findall(r"<\|\w+\|>|assistant|\n|.", text)
        return {"input_ids": torch.tensor([[marks.get(token, ord(token[0]) % 90) for token in found]])}


@_stranger("qwen3-tts", "qwen_tts", "qwen-tts")
def _qwen3_tts() -> System:
    """The 12 Hz model with a custom voice."""
    from qwen_tts.core.models import Qwen3TTSConfig, Qwen3TTSForConditionalGeneration
    from qwen_tts.core.tokenizer_12hz.configuration_qwen3_tts_tokenizer_v2 import Qwen3TTSTokenizerV2Config
    from qwen_tts.core.tokenizer_12hz.modeling_qwen3_tts_tokenizer_v2 import Qwen3TTSTokenizerV2Model
    from qwen_tts.inference.qwen3_tts_model import Qwen3TTSModel
    from qwen_tts.inference.qwen3_tts_tokenizer import Qwen3TTSTokenizer

    code = 1024  # the last 1024 codes are no sound, as upstream has it
    config = Qwen3TTSConfig(
        talker_config={
            **_LLAMA, "vocab_size": code + 64, "text_vocab_size": 100, "text_hidden_size": 48, "num_code_groups": 4,
            "head_dim": 16, "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2], "interleaved": True},
            "code_predictor_config": {**_LLAMA, "vocab_size": 64, "head_dim": 16, "num_code_groups": 4},
            "codec_eos_token_id": 100, "codec_think_id": 101, "codec_nothink_id": 102, "codec_think_bos_id": 103,
            "codec_think_eos_id": 104, "codec_pad_id": 105, "codec_bos_id": 106, "spk_id": {"ryan": 107},
            "spk_is_dialect": {"ryan": False}, "codec_language_id": {"english": 108},
        },
        tokenizer_type="qwen3_tts_tokenizer_12hz", tts_model_size="1b7", tts_model_type="custom_voice",
        tts_pad_token_id=95, tts_bos_token_id=96, tts_eos_token_id=97,
    )  # fmt: skip
    codec = Qwen3TTSTokenizer()
    codec.model = Qwen3TTSTokenizerV2Model(
        Qwen3TTSTokenizerV2Config(
            encoder_config=_MIMI,
            decoder_config={
                "codebook_size": 64, "codebook_dim": 32, "hidden_size": 32, "latent_dim": 32, "num_attention_heads": 4,
                "num_key_value_heads": 4, "intermediate_size": 64, "num_hidden_layers": 2, "num_quantizers": 4,
                "upsample_rates": (4, 2), "upsampling_ratios": (2, 2), "decoder_dim": 64, "head_dim": 8,
            },
            decode_upsample_rate=32,
        )
    ).eval()  # fmt: skip
    codec.config, codec.device = codec.model.config, torch.device("cpu")
    model = Qwen3TTSForConditionalGeneration(config).eval()
    model.load_speech_tokenizer(codec)
    return System(
        (Qwen3TTSModel(model, _Words()), codec.model),  # both are held, as docs/guides/qwen3-tts.md has it
        lambda held, text: held[0].generate_custom_voice(
            text=text, language="English", speaker="Ryan", max_new_tokens=10
        )[0],
        (("Hello there.",), ("Hello there, you.",)), sampled=True,
    )  # fmt: skip


@_stranger("neutts", "neutts+neucodec", "neutts")
def _neutts() -> System:
    """NeuTTS with its language model in bf16, as its own loader has it, and the decoder of NeuCodec."""
    _without_init("torchtune")  # it looks for a torchao of 2025; NeuCodec needs one class of it
    _without_init("torchtune.modules")
    from torchtune.modules.position_embeddings import RotaryPositionalEmbeddings

    sys.modules["torchtune.modules"].RotaryPositionalEmbeddings = RotaryPositionalEmbeddings  # type: ignore[attr-defined]
    from neucodec import NeuCodec
    from neucodec.codec_decoder_vocos import CodecDecoderVocos
    from neutts import NeuTTS
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    marks = ["TEXT_REPLACE", "TEXT_PROMPT_START", "TEXT_PROMPT_END", "SPEECH_REPLACE", "SPEECH_GENERATION_START",
             "SPEECH_GENERATION_END", *(f"speech_{number}" for number in range(64))]  # fmt: skip
    words = Tokenizer(
        models.WordLevel({letter: number for number, letter in enumerate("?abcdefghijklmnopqrstuvwxyz ")}, "?")
    )
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    words.add_special_tokens([f"<|{mark}|>" for mark in marks])
    # Both are built by hand: their own constructors download, the codec's even for an encoder that no speech needs.
    codec = NeuCodec.__new__(NeuCodec)
    torch.nn.Module.__init__(codec)
    codec.generator = CodecDecoderVocos(hidden_dim=128, depth=2, heads=2, hop_length=480)
    codec.fc_post_a = torch.nn.Linear(2048, 128)
    speaker = NeuTTS.__new__(NeuTTS)
    vars(speaker).update(
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=words), input_format="BPE", watermarker=None,
        backbone=Qwen2ForCausalLM(Qwen2Config(**_LLAMA, vocab_size=98, max_position_embeddings=256)).bfloat16().eval(),
        codec=codec.eval(), max_context=140, _seed=5, _is_quantized_model=False, _is_onnx_codec=False,
        _supported_emotions=None,
    )  # fmt: skip
    voice = torch.randint(0, 64, (20,)).tolist()
    return System(
        speaker, lambda speaker, text: speaker.infer(text, voice, "a voice"),
        (("hello there",), ("hello there you",)), sampled=True,
    )  # fmt: skip


@_stranger("matcha-tts", "matcha", "matcha-tts")
def _matcha() -> System:
    from types import SimpleNamespace as Space

    from matcha.models.matcha_tts import MatchaTTS

    encoder = Space(
        encoder_type="RoPE Encoder",
        encoder_params=Space(
            n_feats=20, n_channels=32, filter_channels=64, filter_channels_dp=32, n_heads=2, n_layers=2, kernel_size=3,
            p_dropout=0.0, spk_emb_dim=16, n_spks=1, prenet=True,
        ),
        duration_predictor_params=Space(filter_channels_dp=32, kernel_size=3, p_dropout=0.0),
    )  # fmt: skip
    decoder = {
        "channels": [32, 32], "dropout": 0.0, "attention_head_dim": 16, "n_blocks": 1, "num_mid_blocks": 1,
        "num_heads": 2,
        "act_fn": "snakebeta",
    }  # fmt: skip
    model = MatchaTTS(
        40, 1, 16, 20, encoder, decoder, Space(name="CFM", solver="euler", sigma_min=1e-4),
        {"mel_mean": 0.0, "mel_std": 1.0}, None,
    ).eval()  # fmt: skip
    return System(
        model, lambda model, ids: model.synthesise(ids, torch.tensor([ids.shape[1]]), n_timesteps=3)["mel"],
        ((_ids(12, 38),), (_ids(20, 38),)),
    )  # fmt: skip


@_stranger("espnet-tacotron2", "espnet2", "espnet")
def _espnet() -> System:
    from espnet2.tts.tacotron2 import Tacotron2

    model = Tacotron2(
        idim=40, odim=20, embed_dim=32, elayers=1, eunits=32, econv_chans=32, dunits=32, prenet_units=16,
        postnet_chans=16,
        adim=32, aconv_chans=8,
    ).eval()  # fmt: skip
    return System(
        model, lambda model, ids: model.inference(ids[0], maxlenratio=1.0, minlenratio=0.9)["feat_gen"],
        ((_ids(12, 38),), (_ids(20, 38),)),
    )  # fmt: skip
