"""examples/voice_cloning.py with VoxCPM's real code and a tiny checkpoint of random weights: `make test-examples`.
Random weights make noise, so that nothing here is about how it sounds."""
import base64
import contextlib
import io
import json
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import requests
from conftest import Service, need

pytest.importorskip("voxcpm", reason="VoxCPM is not installed: make test-examples")
soundfile = pytest.importorskip("soundfile")
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")  # VoxCPM's own

RATE = 16_000
PATCH = 2 * 2 * 5 * 8 * 8  # samples: patch_size latent frames of as many samples as the strides' product
HIDDEN, LATENT = 32, 8
TEXT, WORDS = "Hi.", "What is said."


@pytest.fixture(scope="module")
def checkpoint(shared):
    """A folder laid out like the downloaded one: VoxCPM-0.5B with its strides and patches, 32 instead of 1024 wide."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models
    from transformers import LlamaTokenizerFast
    from voxcpm.model.voxcpm import AudioVAE, VoxCPMConfig, VoxCPMModel
    folder = shared("voxcpm")
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *map(chr, range(33, 127)), "▁"]
    Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)).save(
        str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizerFast"}))
    local = {"hidden_dim": HIDDEN, "ffn_dim": HIDDEN, "num_heads": 2, "num_layers": 1}
    rope = {"type": "longrope", "long_factor": [1.0] * 8, "short_factor": [1.0] * 8,
            "original_max_position_embeddings": 4096}
    config = VoxCPMConfig.model_validate({
        "lm_config": {"bos_token_id": 1, "eos_token_id": 2, "hidden_size": HIDDEN, "intermediate_size": HIDDEN,
                      "max_position_embeddings": 4096, "num_attention_heads": 2, "num_hidden_layers": 2,
                      "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "rope_scaling": rope, "vocab_size": len(words),
                      "scale_emb": 12, "dim_model_base": 256, "scale_depth": 1.4, "rope_theta": 10_000},
        "feat_dim": LATENT, "residual_lm_num_layers": 1, "scalar_quantization_latent_dim": 16,
        "encoder_config": local, "dit_config": {**local, "cfm_config": {}}, "dtype": "float32", "device": "cpu",
        "audio_vae_config": {"encoder_dim": 4, "latent_dim": LATENT, "decoder_dim": 32, "sample_rate": RATE}})
    torch.manual_seed(5)
    voice = AudioVAE(config.audio_vae_config)
    model = VoxCPMModel(config, LlamaTokenizerFast.from_pretrained(folder), voice)
    with torch.no_grad():  # it never stops by itself, so that lengths are known
        model.stop_proj.weight.zero_(), model.stop_proj.bias.fill_(1)
        model.stop_head.weight[0], model.stop_head.weight[1] = 1, -1
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith("audio_vae.")}
    save_file(weights, folder / "model.safetensors")
    torch.save({"state_dict": voice.state_dict()}, folder / "audiovae.pth")
    (folder / "config.json").write_text(json.dumps({**config.model_dump(exclude_none=True), "architecture": "voxcpm"}))
    return folder


@pytest.fixture(scope="module")
def service(tmp_path_factory, checkpoint):
    """One ready Service for the tests of this module. service.temporary: where it would put temporary files."""
    need("ffmpeg")
    temporary = tmp_path_factory.mktemp("temporary")
    running = Service(tmp_path_factory.mktemp("service"), {
        "MODEL_NAME": "examples.voice_cloning:VoiceCloning", "MODEL_PATH": str(checkpoint), "DEVICE": "cpu",
        "WORKERS": "1", "REQUEST_TIMEOUT": "1200", "TMPDIR": str(temporary)})
    running.temporary = temporary
    yield running.wait_ready(600)
    running.kill()


def recording(seconds=2.0, rate=RATE, channels=1, seed=0, value=None, format="WAV", subtype=None):
    """A file's bytes: noise, or one value throughout."""
    shape = (int(seconds * rate), channels)
    samples = np.random.default_rng(seed).normal(0, 0.1, shape) if value is None else np.full(shape, value)
    buffer = io.BytesIO()
    soundfile.write(buffer, samples.astype("float32"), rate, format=format, subtype=subtype)
    return buffer.getvalue()


def speak(service, file=None, timeout_s=1300, headers=None, **fields):
    """POST a form: four diffusion steps, one try and a fixed seed unless told otherwise."""
    fields = {"text": TEXT, "inference_timesteps": 4, "retry_badcase": "false", "seed": 1, **fields}
    parts = {name: (None, str(value)) for name, value in fields.items() if value is not None}
    if file is not None:
        parts["file"] = ("voice.wav", file)
    return requests.post(service.url + "/predict", files=parts, headers=headers, timeout=timeout_s)


def samples_of(response):
    assert response.status_code == 200, response.text
    assert response.headers["Content-Type"] == "audio/wav"
    samples, rate = soundfile.read(io.BytesIO(response.content), dtype="int16")
    assert rate == RATE
    return samples


def message_of(response):
    assert response.status_code == 400, response.text
    assert response.json()["error"] == "INVALID_PARAMETER"
    return response.json()["message"]


def kept(service):
    """Recordings that the workers hold open, and files that they left."""
    descriptors = [fd for pid in service.workers() for fd in Path(f"/proc/{pid}/fd").iterdir()]
    return [fd for fd in descriptors if fd.is_symlink() and "memfd:recording" in str(fd.readlink())] + [
        path for path in service.temporary.rglob("*") if path.is_file()]


def test_text_becomes_speech_of_the_length_that_the_text_allows(service):
    samples = samples_of(speak(service))
    assert len(samples) == (6 * (len(TEXT) + 1) + 10) * PATCH  # VoxCPM's limit, by tokens: characters and a start
    assert len(np.unique(samples)) > 100


def test_a_recording_and_its_words_change_the_speech_and_the_seed_repeats_it(service):
    plain = samples_of(speak(service))
    cloned = samples_of(speak(service, recording(), prompt_text=WORDS))
    assert len(cloned) == len(plain)  # the recording itself is not in it
    for other in (plain, samples_of(speak(service, recording(seed=1), prompt_text=WORDS)),
                  samples_of(speak(service, recording(), prompt_text="Something else.")),
                  samples_of(speak(service, recording(), prompt_text=WORDS, seed=2)),
                  samples_of(speak(service, recording(), prompt_text=WORDS, cfg_value=3)),
                  samples_of(speak(service, recording(), prompt_text=WORDS, inference_timesteps=5)),
                  samples_of(speak(service, recording(), prompt_text=WORDS, retry_badcase="true"))):
        assert not np.array_equal(other, cloned)
    assert np.array_equal(samples_of(speak(service, recording(), prompt_text=WORDS)), cloned)
    assert np.array_equal(samples_of(speak(service)), plain)  # nothing of the voice stays
    assert kept(service) == []


def test_concurrent_requests_do_not_disturb_each_other(service):
    voices = [recording(seed=i) for i in range(4)]
    alone = [samples_of(speak(service, voice, prompt_text=WORDS)) for voice in voices]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda voice: samples_of(speak(service, voice, prompt_text=WORDS)), voices))
    assert all(map(np.array_equal, alone, together))


def test_without_a_seed_speech_varies(service):
    assert not np.array_equal(samples_of(speak(service, seed=None)), samples_of(speak(service, seed=None)))


@pytest.mark.parametrize("sent", [{"subtype": "PCM_24"}, {"subtype": "FLOAT"}, {"format": "FLAC"}, {"format": "OGG"},
                                  {"channels": 2, "rate": 44_100}, {"seconds": 1}, {"seconds": 30, "rate": 8000}])
def test_recordings_of_many_formats_are_read(service, sent):
    samples_of(speak(service, recording(**sent), text="A", prompt_text=WORDS))


def test_json_with_base64_gives_the_same_speech(service):
    cloned = samples_of(speak(service, recording(), prompt_text=WORDS))
    body = {"text": TEXT, "prompt_text": WORDS, "file": base64.b64encode(recording()).decode(), "seed": 1,
            "inference_timesteps": 4, "retry_badcase": False}
    answer = requests.post(service.url + "/predict", json=body, timeout=1300)
    assert np.array_equal(samples_of(answer), cloned)
    answer = requests.post(service.url + "/predict", json=body, timeout=1300, headers={"Accept": "application/json"})
    assert answer.json()["predictions"]["media_type"] == "audio/wav"
    assert base64.b64decode(answer.json()["predictions"]["b64"])[:4] == b"RIFF"


FILE = "file must be a WAV, FLAC or Ogg file of 1 to 30 s with one or two channels"


def lying(data, offset, value):
    """A WAV file with four bytes of its header replaced."""
    return data[:offset] + value.to_bytes(4, "little") + data[offset + 4:]


@pytest.mark.parametrize(("file", "message"), [
    (b"", "file must be sent with prompt_text: a voice needs a recording and its words, got one"),
    (b"no audio", f"{FILE}, got something else"),
    (b"RIFF but nothing more", f"{FILE}, got one that cannot be decoded"),
    (recording(format="FLAC")[:60], f"{FILE}, got one that cannot be decoded"),
    (recording(0), f"{FILE}, got 0.00 s"),
    (recording(0.9), f"{FILE}, got 0.90 s"),
    (recording(30.1, 8000), f"{FILE}, got a longer one"),
    (recording(31, 8000, format="OGG"), f"{FILE}, got a longer one"),
    (lying(recording(0.5), 40, 2**31), f"{FILE}, got 0.50 s"),  # the number of bytes of samples
    (recording(rate=47_999), f"{FILE} and a usual sample rate, got 1 and 47999 Hz"),
    (lying(recording(), 24, 2**31 - 1), f"{FILE} and a usual sample rate, got 1 and 2147483647 Hz"),
    (recording(channels=3), f"{FILE} and a usual sample rate, got 3 and 16000 Hz"),
    (recording(value=np.nan, subtype="FLOAT"), f"{FILE}, got samples that are no numbers"),
    (b"RIFF" + bytes(10 * 2**20), "file must be a file of at most 10.5 MB, got a file of 10,485,764 bytes"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_a_recording_that_cannot_be_used_gets_400(service, file, message):
    assert message_of(speak(service, file, prompt_text=WORDS)) == message
    assert kept(service) == []


def test_an_hour_of_silence_is_not_decoded():
    from examples.voice_cloning import InvalidInput, read_recording
    file = recording(3600, 8000, value=0, format="FLAC")
    tracemalloc.start()
    with pytest.raises(InvalidInput, match="a longer one"):
        read_recording(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * 2**20  # 30 s as float32 are 1 MB


@pytest.mark.parametrize(("sent", "message"), [
    ({"file": recording()}, "prompt_text must be sent with file: a voice needs a recording and its words, got one"),
    ({"file": recording(), "prompt_text": " "},
     "prompt_text must be sent with file: a voice needs a recording and its words, got one"),
    ({"prompt_text": WORDS}, "file must be sent with prompt_text: a voice needs a recording and its words, got one"),
    ({"text": " "}, "text must be a text of 1 to 400 characters, got 0"),
    ({"text": "a" * 401}, "text must be a text of 1 to 400 characters, got 401"),
    ({"prompt_text": "a" * 301}, "prompt_text must be a text of at most 300 characters, got " + "a" * 40),
    ({"cfg_value": 0.5}, "cfg_value must be a number from 1 to 3, got 0.5"),
    ({"inference_timesteps": 31}, "inference_timesteps must be an integer from 4 to 30, got 31"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_invalid_fields_get_400(service, sent, message):
    assert message_of(speak(service, **sent)) == message


def test_the_longest_of_everything_fits_into_the_cache_and_ends_at_the_limit_of_patches(service):
    """Characters outside the tokenizer's vocabulary take four tokens."""
    answer = speak(service, recording(30, 8000), text="\U0001f600" * 400, prompt_text="\U0001f600" * 300)
    assert len(samples_of(answer)) == 750 * PATCH


def test_a_recording_is_gone_after_an_exception():
    from examples.voice_cloning import path_of
    with contextlib.suppress(KeyError), path_of(b"a voice") as path:
        assert Path(path).read_bytes() == b"a voice"
        raise KeyError
    assert not Path(path).exists()


def test_a_recording_is_gone_after_the_deadline(service):
    late = speak(service, recording(), text="a" * 12, prompt_text=WORDS, inference_timesteps=30,
                 headers={"X-Request-Timeout": "0.1"})
    assert late.status_code == 504, late.text
    until = time.monotonic() + 600
    while kept(service) and time.monotonic() < until:
        time.sleep(0.1)
    assert kept(service) == []
