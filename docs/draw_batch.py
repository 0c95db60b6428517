"""Draws docs/batch.svg: one batch, from the file to the loss, in the bands of the package's folders.

``python docs/draw_batch.py``. Plain SVG text, so that the picture is small and a change of it can be read in git.
"""

from pathlib import Path

WIDTH, HEIGHT = 1000, 690
OUT = Path(__file__).with_name("batch.svg")

_HEAD = f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"
 font-family="Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif" text-anchor="middle">
<title>One batch, from the file to the loss and the update of the weights</title>
<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">
<path d="M0 0 L8 4 L0 8 z" fill="#56616d"/></marker></defs>
<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#fff"/>
"""
_VIDEO, _AUDIO, _BOTH = "#dbe9f6", "#fce8d5", "#eceff2"


def band(top: int, height: int, room: str) -> str:
    return (
        f'<rect x="6" y="{top}" width="{WIDTH - 12}" height="{height}" rx="6" fill="#f7f8fa"/>'
        f'<text x="18" y="{top + 22}" font-size="15" text-anchor="start" fill="#8a4b14">{room}</text>\n'
    )


def box(left: int, top: int, width: int, *lines: str, fill: str = _BOTH, dashed: bool = False) -> str:
    """A box with a first line in bold and further ones below it."""
    height = 16 + 18 * len(lines)
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    parts = [
        f'<rect x="{left}" y="{top}" width="{width}" height="{height}" rx="5" fill="{fill}" stroke="#56616d"{dash}/>'
    ]
    for number, line in enumerate(lines):
        style = 'font-size="14" font-weight="bold"' if number == 0 else 'font-size="13"'
        parts.append(
            f'<text x="{left + width / 2:g}" y="{top + 21 + 18 * number}" {style} fill="#1d2329">{line}</text>'
        )
    return "".join(parts) + "\n"


def arrow(*points: tuple[int, int], dashed: bool = False) -> str:
    path = " ".join(f"{x},{y}" for x, y in points)
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<polyline points="{path}" fill="none" stroke="#56616d" stroke-width="1.4"{dash} marker-end="url(#tip)"/>\n'


def note(x: int, y: int, text: str, anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" font-size="12.5" text-anchor="{anchor}" fill="#4b5560">{text}</text>\n'


def picture() -> str:
    parts = [
        _HEAD,
        *(band(10, 222, "clips/"), band(240, 86, "encoders/"), band(334, 128, "negatives/")),
        *(band(470, 108, "objectives/"), band(586, 96, "pretraining/")),
        # Files to what the encoders take.
        box(440, 20, 120, "file.mp4"),
        *(arrow((440, 37), (300, 37), (300, 78)), arrow((560, 37), (700, 37), (700, 78))),
        *(note(312, 66, "decode"), note(688, 66, "decode", "end")),
        box(180, 80, 240, "frames", "(M, T, H, W, 3) uint8", fill=_VIDEO),
        box(580, 80, 240, "waveforms", "(M, S) float32", fill=_AUDIO),
        *(arrow((300, 132), (300, 166)), arrow((700, 132), (700, 166))),
        *(note(312, 154, "crop, flip, colour"), note(688, 154, "gain, log-mel, masks", "end")),
        box(180, 168, 240, "video", "(M, 3, T, H, W)", fill=_VIDEO),
        box(580, 168, 240, "spectrograms", "(M, mels, 1 + S / hop)", fill=_AUDIO),
        # Encoders.
        *(arrow((240, 220), (180, 260)), arrow((340, 220), (340, 260), dashed=True)),
        *(arrow((760, 220), (820, 260)), arrow((660, 220), (660, 260), dashed=True)),
        box(110, 262, 140, "f_v", "queries q_v (M, d)", fill=_VIDEO),
        box(270, 262, 140, "h_v", "keys k_v (M, d)", fill=_VIDEO, dashed=True),
        box(590, 262, 140, "h_a", "keys k_a (M, d)", fill=_AUDIO, dashed=True),
        box(750, 262, 140, "f_a", "queries q_a (M, d)", fill=_AUDIO),
        # Pools, choices, dictionaries.
        *(arrow((286, 314), (286, 370), dashed=True), arrow((714, 314), (714, 370), dashed=True)),
        *(note(278, 357, "pushed last", "end"), note(722, 357, "pushed last")),
        box(206, 372, 96, "pool", "N keys", fill=_VIDEO, dashed=True),
        box(316, 372, 88, "choose M", "for q_a", fill=_VIDEO, dashed=True),
        box(418, 372, 76, "video", "K keys", fill=_VIDEO, dashed=True),
        box(506, 372, 76, "audio", "K keys", fill=_AUDIO, dashed=True),
        box(596, 372, 88, "choose M", "for q_v", fill=_AUDIO, dashed=True),
        box(698, 372, 96, "pool", "N keys", fill=_AUDIO, dashed=True),
        *(arrow((302, 398), (314, 398)), arrow((404, 398), (416, 398))),
        *(arrow((698, 398), (686, 398)), arrow((596, 398), (584, 398))),
        note(500, 364, "dictionaries", "middle"),
        *(note(316, 446, "k-means++ on g = r pᵀ", "middle"), note(684, 446, "k-means++ on g = r pᵀ", "middle")),
        # Loss.
        *(arrow((150, 314), (150, 494)), arrow((850, 314), (850, 494))),
        *(arrow((440, 424), (440, 494), dashed=True), arrow((560, 424), (560, 494), dashed=True)),
        box(
            110, 496, 780, "loss, over τ",
            "video finds its audio: q_v · [ own k_a | other audio keys of the batch (M − 1) | audio dictionary (K) ]",
            "audio finds its video: q_a · [ own k_v | other video keys of the batch (M − 1) | video dictionary (K) ]",
        ),
        # Update.
        arrow((500, 566), (500, 612)),
        box(300, 614, 400, "AdamW on f_v and f_a", "then h ← m h + (1 − m) f", fill=_BOTH),
        "</svg>\n",
    ]  # fmt: skip
    return "".join(parts)


if __name__ == "__main__":
    OUT.write_text(picture())
