# ruff: noqa: INP001 - a script
"""Are the parts of each upstream release where we say they are? For `models/*.py`, by hand: `make releases`.

Each release is fetched from PyPI without its dependencies into a folder of its own; a fresh process builds its true
classes at full size beside what is installed, with memory that nothing is written to, and asks `describe`.

    python .ci/releases.py [NAME==VERSION ...]
    python .ci/releases.py --here NAME     # the release that is installed beside this Python, with all that it asks for
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

RELEASES = {
    "chatterbox-light": ("1.0.1", "1.0.2"),
    "chatterbox-tts": ("0.1.1", "0.1.2", "0.1.3", "0.1.4", "0.1.5", "0.1.6", "0.1.7"),
    "coqui-tts": ("0.27.0", "0.27.1", "0.27.2", "0.27.3", "0.27.4", "0.27.5", "0.28.0"),
    "resemblyzer": ("0.1.3", "0.1.4"),
    "boson-multimodal": ("0.1.0", "0.1.1"),
    "transformers": ("4.48.3", "4.57.6", "5.23.0"),
}

# Requirements of a release that newer releases of its dependencies no longer meet.
BESIDE = {
    "boson-multimodal": ("transformers==4.46.3", "tokenizers==0.20.3", "huggingface-hub==0.36.0"),
    "chatterbox-tts 0.1.1": ("conformer==0.3.2",),
    "transformers 4.48.3": ("tokenizers==0.21.0", "huggingface-hub==0.36.0"),
    "transformers 4.57.6": ("tokenizers==0.22.1", "huggingface-hub==0.36.0"),
}

# Modules that some import and these classes do not use: a watermarker, readers of configuration files, phonemisers.
_STUBS = ("perth", "omegaconf", "pykakasi", "gruut", "gruut_ipa", "pyloudnorm", "spacy_pkuseg", "russian_text_stresser")

_CHATTERBOX = """
from chatterbox.models.s3gen import S3Gen
from chatterbox.models.t3 import T3
from chatterbox.models.voice_encoder import VoiceEncoder
check(T3(), ["tfmr"])
check(S3Gen(), ["flow.encoder", "flow.decoder.estimator", "mel2wav"])
check(VoiceEncoder(), ["VoiceEncoder"])
"""
_COQUI = """
import transformers.pytorch_utils
if not hasattr(transformers.pytorch_utils, "isin_mps_friendly"):  # until coqui-tts 0.27.5, gone in transformers 5
    transformers.pytorch_utils.isin_mps_friendly = torch.isin
from TTS.tts.configs.vits_config import VitsConfig
from TTS.tts.configs.xtts_config import XttsConfig
from TTS.tts.models.vits import Vits
from TTS.tts.models.xtts import Xtts
check(Vits(VitsConfig()), ["text_encoder", "duration_predictor", "flow", "waveform_decoder"])
config = XttsConfig()
for name, value in dict(gpt_number_text_tokens=6681, gpt_start_text_token=261, gpt_stop_text_token=0,
                        gpt_num_audio_tokens=1026, gpt_start_audio_token=1024, gpt_stop_audio_token=1025,
                        gpt_use_perceiver_resampler=True).items():
    setattr(config.model_args, name, value)
model = Xtts(config)
model.init_models()
model.gpt.init_gpt_for_inference(kv_cache=True)
check(model, ["gpt.gpt", "hifigan_decoder.waveform_decoder"])
"""
_BOSON = """
from boson_multimodal.model.higgs_audio import HiggsAudioConfig, HiggsAudioModel
text = {"model_type": "llama", "vocab_size": 128256, "num_hidden_layers": 2}
check(HiggsAudioModel(HiggsAudioConfig(text_config=text)), ["HiggsAudioModel"])
"""
_RESEMBLYZER = """
from resemblyzer import VoiceEncoder
check(VoiceEncoder("cpu"), ["VoiceEncoder"])
"""
_TRANSFORMERS = """
import transformers
from transformers import VitsConfig, VitsModel
check(VitsModel(VitsConfig(vocab_size=38)), ["text_encoder", "duration_predictor", "flow", "decoder"])
if hasattr(transformers, "HiggsAudioV2Config"):
    from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration
    from transformers import HiggsAudioV2TokenizerConfig, HiggsAudioV2TokenizerModel
    check(HiggsAudioV2ForConditionalGeneration(HiggsAudioV2Config(num_hidden_layers=2)), ["model"])
    check(HiggsAudioV2TokenizerModel(HiggsAudioV2TokenizerConfig()), ["acoustic_decoder"])
"""
_BUILD = {
    "chatterbox-light": _CHATTERBOX, "chatterbox-tts": _CHATTERBOX, "coqui-tts": _COQUI, "boson-multimodal": _BOSON,
    "resemblyzer": _RESEMBLYZER, "transformers": _TRANSFORMERS,
}  # fmt: skip
_CHECK = """
import importlib.abc, importlib.machinery, importlib.util, sys, warnings
from unittest.mock import MagicMock
warnings.simplefilter("ignore")

class Stub(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in STUBS else None
    def create_module(self, spec):
        return MagicMock(name=spec.name)
    def exec_module(self, module):
        pass

sys.meta_path.append(Stub())
import torch
for name in [name for name in dir(torch.nn.init) if name.endswith("_") and not name.startswith("_")]:
    setattr(torch.nn.init, name, lambda tensor, *args, **kwargs: tensor)
from accelerate_tts import add_hook
from accelerate_tts.events import NotApplied
from accelerate_tts.models import describe

said = []
add_hook(lambda event: said.append(event.reason) if isinstance(event, NotApplied) else None)

def check(model, expected):
    found = [part.name for part in describe(model).parts]
    assert found == expected and not said, f"{type(model).__name__}: {found or said}, not {expected}; {said}"
    print(type(model).__name__ + ": " + ", ".join(found))
"""


def tried(name: str, version: str, folder: Path) -> tuple[bool, str]:
    """Check a release; return True if its parts are where this library expects them, and the findings or the error."""
    beside = (*BESIDE.get(name, ()), *BESIDE.get(f"{name} {version}", ()))
    fetch = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps",
             "--no-compile", "--target", str(folder), f"{name}=={version}", *beside]  # fmt: skip
    done = subprocess.run(fetch, capture_output=True, text=True, check=False)  # noqa: S603 - from the table above
    if done.returncode:
        return False, "not fetched: " + done.stderr.strip().splitlines()[-1]
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", f"STUBS = {_STUBS}\n{_CHECK}{_BUILD[name]}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)  # noqa: S603 - ours
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines() or ["no output"]
    return done.returncode == 0, lines[-1] if done.returncode else "; ".join(lines)


def here(name: str) -> None:
    """Look at the release that is installed, in this process; an AssertionError says what is not as we know it."""
    exec(f"STUBS = ()\n{_CHECK}{_BUILD[name]}", {"__name__": "here"})  # noqa: S102 - ours


def main() -> int:
    """Try each release; 1 if one of them is not as we know it."""
    if sys.argv[1:2] == ["--here"]:
        here(*sys.argv[2:])
        return 0
    chosen = [tuple(text.split("==")) for text in sys.argv[1:]]
    chosen = chosen or [(name, version) for name, versions in RELEASES.items() for version in versions]
    bad = 0
    for name, version in chosen:
        with tempfile.TemporaryDirectory() as folder:
            right, said = tried(name, version, Path(folder))
        bad += not right
        sys.stdout.write(f"{name} {version}: {'as known' if right else 'NOT AS KNOWN'}: {said}\n")
        sys.stdout.flush()
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
