"""Synthesise the audio of an event: one of eight timbres, struck or sustained, then room, hum and noise."""

import math

import numpy as np
from scipy import fft

from cmacc.clips.synthetic.event import SOUND_NUISANCE, Event, Floats, WorldConfig
from cmacc.clips.synthetic.motion import trace


def synthesise(timbre: str, pitch_hz: float, seconds: Floats, struck: bool, rng: np.random.Generator) -> Floats:
    """Synthesise a timbre with peak 1, shape (samples,) as ``seconds``; decaying if ``struck``, else sustained."""
    rate_hz, t = 1 / (seconds[1] - seconds[0]), seconds
    harmonics = np.arange(1.0, 31.0)
    # (frequency ratios, levels, decay seconds) of the additive timbres. Decays are at most 0.2 s: a longer one may meet
    # the next onset in opposite phase, so that the onset is visible but not audible.
    partials: dict[str, tuple[Floats, Floats, Floats]] = {
        "marimba": (np.array([1, 3.93, 9.2]), np.array([1, 0.35, 0.15]), np.array([0.18, 0.07, 0.03])),
        "buzz": (harmonics, 1 / harmonics, np.full(30, 0.15)),
        "pluck": (2 * harmonics - 1, 1 / harmonics, 0.16 / np.sqrt(harmonics)),
        "whistle": (np.array([1.0, 2.0]), np.array([1, 0.05]), np.full(2, 0.16)),
        "voice": (harmonics, sum((np.exp(-(((harmonics * pitch_hz - f) / 180) ** 2)) * a
                                  for f, a in ((700, 1.0), (1150, 0.7), (2600, 0.4))), 0.03 / harmonics),
                  np.full(30, 0.18)),
        "glass": (np.array([1, 1.012, 2.32, 4.25, 6.63]), np.array([1, 0.8, 0.6, 0.5, 0.4]), np.full(5, 0.2)),
    }  # fmt: skip
    envelope = np.minimum(t / 0.003, 1) if struck else np.ones_like(t)
    if timbre in partials:
        ratios, levels, decays = (p[partials[timbre][0] * pitch_hz < 0.45 * rate_hz] for p in partials[timbre])
        vibrato = 0.25 * np.sin(2 * np.pi * 6 * t) if timbre == "whistle" else 0.0
        wave: Floats = np.zeros_like(t)
        for ratio, level, decay in zip(ratios, levels, decays, strict=True):
            partial_wave = level * np.sin(ratio * (2 * np.pi * pitch_hz * t + vibrato))
            wave += partial_wave * np.exp(-t / decay) if struck else partial_wave
    elif timbre == "noise":  # a band of one octave around the pitch
        spectrum = fft.rfft(rng.standard_normal(len(t)))
        octaves = np.log2(np.maximum(fft.rfftfreq(len(t), 1 / rate_hz), 1) / pitch_hz)
        wave = fft.irfft(spectrum * np.exp(-0.5 * (octaves / 0.4) ** 2), len(t)) * (np.exp(-t / 0.12) if struck else 1)
    else:  # bell: frequency modulation whose brightness decays after the onset
        fade = np.exp(-t / 0.2) if struck else np.ones_like(t)
        wave = fade * np.sin(2 * np.pi * pitch_hz * t + 2.5 * fade * np.sin(2 * np.pi * 1.41 * pitch_hz * t))
    wave *= envelope / np.abs(envelope * wave).max()
    return wave


def sound_event(config: WorldConfig, event: Event) -> Floats:
    """Synthesise the event without nuisances, (samples, 2), peak 0.5, with equal-power panning by position."""
    rate_hz = config.sample_rate_hz
    seconds = np.arange(round(config.duration_seconds * rate_hz)) / rate_hz
    rng = np.random.default_rng(event.timbre_seed)
    stereo = np.zeros((len(seconds), 2))
    if event.onset_seconds:
        onsets = np.array(event.onset_seconds)
        note = synthesise(event.timbre, event.pitch_hz, seconds[: round(0.8 * rate_hz)], True, rng)
        places = np.pi / 2 * np.clip(trace(event, onsets, config.duration_seconds).x, 0, 1)
        for onset, strength, place in zip(onsets, event.onset_strengths, places, strict=True):
            tail = stereo[round(onset * rate_hz) :][: len(note)]
            tail += strength * note[: len(tail), None] * (math.cos(place), math.sin(place))
    else:
        track = trace(event, seconds, config.duration_seconds)
        wave = track.loudness * synthesise(event.timbre, event.pitch_hz, seconds, False, rng)
        place = np.pi / 2 * np.clip(track.x, 0, 1)
        stereo = wave[:, None] * np.stack([np.cos(place), np.sin(place)], 1)
    return 0.5 * stereo / max(float(np.abs(stereo).max()), 1e-3)


def spoil(sound: Floats, config: WorldConfig, event: Event) -> Floats:
    """Add reverberation, equalisation, hum, coloured noise and gain to (samples, 2)."""
    rng = np.random.default_rng([*event.nuisance_seed, SOUND_NUISANCE])
    nuisance, rate_hz, count = config.nuisance, config.sample_rate_hz, len(sound)
    tail_seconds = np.arange(round(0.6 * rate_hz)) / rate_hz
    tail = rng.standard_normal((len(tail_seconds), 2)) * np.exp(-tail_seconds / rng.uniform(0.02, 0.12))[:, None]
    room = nuisance * rng.uniform(0, 0.7) * tail / np.sqrt((tail**2).sum(0))
    room[0] += 1  # keep the direct sound first, so that onsets do not move
    size = fft.next_fast_len(count + len(room), real=True)
    octaves = np.log2(np.maximum(fft.rfftfreq(size, 1 / rate_hz), 20) / 800)
    tone_db = nuisance * (rng.uniform(-4, 4) * octaves
                          + rng.uniform(-9, 9) * np.exp(-2 * (octaves - rng.uniform(-2, 2)) ** 2))  # fmt: skip
    shape = (10 ** (np.clip(tone_db, -30, 30) / 20))[:, None]
    wet = fft.irfft(fft.rfft(sound, size, 0) * fft.rfft(room, size, 0) * shape, size, 0)[:count]
    level = np.sqrt((wet**2).mean())
    colour = 2 ** (octaves * -rng.uniform(0, 1.2))[:, None]  # amplitude per octave: white to beyond brown
    noise = fft.irfft(fft.rfft(rng.standard_normal((size, 2)), axis=0) * colour, size, 0)[:count]
    noise *= nuisance * level * 10 ** (-rng.uniform(0, 20) / 20) / np.sqrt((noise**2).mean())
    turn = 2 * np.pi * rng.choice([50, 60]) * np.arange(count) / rate_hz + rng.uniform(0, 6)
    hum = (np.sin(turn) + 0.5 * np.sin(2 * turn) + 0.3 * np.sin(3 * turn)) * nuisance * level * rng.uniform(0, 0.5)
    spoilt: Floats = (wet + noise + hum[:, None]) * 10 ** (-nuisance * rng.uniform(0, 15) / 20)
    spoilt *= min(1.0, 0.9 / max(float(np.abs(spoilt).max()), 1e-9))
    return spoilt
