"""Voice cloning with VoxCPM (https://github.com/OpenBMB/VoxCPM): speech from text, in a voice of the model's choice or
in that of a recording. Serve it with MODEL_NAME=examples.voice_cloning:VoiceCloning.
"""
import contextlib
import io
import os
import secrets

import numpy as np
import soundfile

from app.tasks.own import InvalidInput, Media, OwnTask, file, integer, number, text, yes_or_no

MODEL = "openbmb/VoxCPM-0.5B"  # downloaded unless MODEL_PATH names a folder
# A character takes at most 4 tokens and VoxCPM-0.5B makes 12.5 patches per second, so that the longest of everything,
# 1600 + 1200 tokens and 375 + 750 patches, fits into its cache of 4096 positions.
LONGEST_TEXT, LONGEST_PROMPT_TEXT, MOST_PATCHES = 400, 300, 750
SHORTEST_S, LONGEST_S = 1, 30
RECORDING = f"a WAV, FLAC or Ogg file of {SHORTEST_S} to {LONGEST_S} s with one or two channels"
# Others would be resampled with huge filters: gigabytes for 95,999 samples per second.
SAMPLE_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 88200, 96000)


def read_recording(data):
    """The samples of a file's bytes as float32 (frames,), mono, and their number per second; never decodes more than
    LONGEST_S, whatever the header claims. Raises InvalidInput."""
    if not data.startswith((b"RIFF", b"fLaC", b"OggS")):  # libsndfile reads many more formats, less well tested
        raise InvalidInput(f"must be {RECORDING}, got something else", "file")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as sound:
            rate, channels = sound.samplerate, sound.channels
            if rate not in SAMPLE_RATES or channels > 2:
                raise InvalidInput(f"must be {RECORDING} and a usual sample rate, got {channels} and {rate} Hz", "file")
            samples = sound.read(LONGEST_S * rate + 1, dtype="float32", always_2d=True).mean(1)
    except soundfile.SoundFileError as e:
        raise InvalidInput(f"must be {RECORDING}, got one that cannot be decoded", "file") from e
    if not SHORTEST_S * rate <= len(samples) <= LONGEST_S * rate:
        got = "a longer one" if len(samples) > LONGEST_S * rate else f"{len(samples) / rate:.2f} s"
        raise InvalidInput(f"must be {RECORDING}, got {got}", "file")
    if not np.isfinite(samples).all():
        raise InvalidInput(f"must be {RECORDING}, got samples that are no numbers", "file")
    return samples, rate


def wav(samples, rate):
    """Samples, (frames,) float32 in -1..1, as the bytes of a WAV file of 16 bits per sample."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


@contextlib.contextmanager
def path_of(data):
    """A path for a library that only opens files: of memory, never on a disk, and gone even if the process is killed.
    None for None."""
    if data is None:
        yield None
    else:
        with open(os.memfd_create("recording"), "wb", buffering=0) as memory:
            memory.write(data)
            yield f"/proc/self/fd/{memory.fileno()}"


class VoiceCloning(OwnTask):
    """Speaks a text, in the voice of a recording if there is one."""
    takes = "text"
    options = (
        file("file", meaning="A recording of the voice, of 1 to 30 s; needs prompt_text."),
        text("prompt_text", most=LONGEST_PROMPT_TEXT, meaning="What is said in the recording, word for word."),
        number("cfg_value", 1, 3, default=2.0, meaning="How closely the speech follows the text and the voice."),
        integer("inference_timesteps", 4, 30, default=10, meaning="Diffusion steps: more sound better and are slower."),
        yes_or_no("retry_badcase", default=True, meaning="Whether speech far too long for its text is made anew."),
        integer("seed", 0, 999_999_999, meaning="The same seed gives the same speech; a random one by default."),
    )
    media_types = ("audio/wav",)
    threads = 1  # the model keeps one request's attention cache
    deterministic = False

    def load(self):
        os.environ.setdefault("TQDM_DISABLE", "1")  # its progress bars do not belong in a log
        from voxcpm import VoxCPM
        # optimize=True would record CUDA graphs, which only the thread that records them can replay.
        self.model = VoxCPM.from_pretrained(str(self.settings.model_path or MODEL), load_denoiser=False,
                                            optimize=False, device=self.device)
        self.rate = self.model.tts_model.sample_rate
        with path_of(wav(np.zeros(8000), 8000)) as path:  # what cloning imports takes seconds, or lacks FFmpeg
            self.model.generate("Hi.", prompt_wav_path=path, prompt_text="Hi.", max_len=3, retry_badcase=False)

    def decode(self, value, options):
        spoken, recording, prompt_text = value.strip(), options["file"], (options["prompt_text"] or "").strip()
        if not 1 <= len(spoken) <= LONGEST_TEXT:
            raise InvalidInput(f"must be a text of 1 to {LONGEST_TEXT} characters, got {len(spoken)}")
        if (recording is None) != (not prompt_text):
            given, missing = ("prompt_text", "file") if recording is None else ("file", "prompt_text")
            raise InvalidInput(f"must be sent with {given}: a voice needs a recording and its words, got one", missing)
        if recording is not None:
            recording = wav(*read_recording(recording))
        return spoken, recording, prompt_text or None, options

    def predict(self, batch):
        return [self.speak(*one) for one in batch]

    def speak(self, spoken, recording, prompt_text, options):
        """Speech as float32 (frames,) in -1..1, self.rate per second."""
        import torch
        torch.manual_seed(secrets.randbits(63) if options["seed"] is None else options["seed"])
        with path_of(recording) as path:
            return self.model.generate(
                spoken, prompt_wav_path=path, prompt_text=prompt_text, max_len=MOST_PATCHES,
                **{name: options[name] for name in ("cfg_value", "inference_timesteps", "retry_badcase")})

    def encode(self, output, options):
        return Media(wav(output, self.rate), "audio/wav")
