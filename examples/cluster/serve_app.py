"""Speech from replicas on a cluster, with Ray Serve, in the shape of OpenAI's audio API.

    cd examples
    serve run cluster.serve_app:app system=joe threads=2 most=8
    curl http://127.0.0.1:8000/v1/audio/speech -H 'Content-Type: application/json' -o out.wav \
      -d '{"model": "joe", "voice": "joe", "input": "Hello there.", "response_format": "wav"}'

A replica is ready when its model is loaded and warm. It takes the warm pack of its machine, or tunes and leaves one. It
speaks one text at a time; the others wait in Serve's queue, whose length decides the number of replicas.

Needs: pip install 'accelerate_tts[demo,service,cluster]'
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator
from importlib import import_module
from pathlib import Path

from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from ray import serve
from ray.serve.schema import LoggingConfig
from service.api import SpeechRequest
from service.options import KNOWN
from service.sound import FORMATS, encoder
from service.worker import Refused, Speaker, Utterance

EXAMPLES = Path(__file__).parents[1]
_api = FastAPI(title="accelerate_tts speech on a cluster")
