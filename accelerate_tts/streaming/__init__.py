"""Speech in pieces while the rest is still being made.

`stream` knows some systems. The pieces that it is made of serve others, too: `field_of` measures how far a vocoder
looks, `Pieces` runs it on overlapping pieces, `Tapped` takes the tokens of a loop as they are sampled, and `sentences`
splits a text.
"""

from accelerate_tts.inspection.receptive_field import ReceptiveField, measure
from accelerate_tts.streaming.options import StreamOptions
from accelerate_tts.streaming.pieces import Pieces
from accelerate_tts.streaming.receptive_field import field_of
from accelerate_tts.streaming.sentences import sentences
from accelerate_tts.streaming.stream import Stream, stream
from accelerate_tts.streaming.tokens import Pulled, Reporting, Tapped, Tokens, twin

__all__ = [
    "Pieces",
    "Pulled",
    "ReceptiveField",
    "Reporting",
    "Stream",
    "StreamOptions",
    "Tapped",
    "Tokens",
    "field_of",
    "measure",
    "sentences",
    "stream",
    "twin",
]
