"""Frames as HTML. Pictures travel inside it: the page reads and writes no files."""

import base64
import io
import math
from html import escape

import numpy as np

from page.job import Frame
from page.settings import Pictures
from sampling.grids import MIN_SIDE, draw_grid

SHOWN_PIXELS = 560  # a side's width in the page: a wider sheet is shrunk, which wants smoothing


def data_url(images: np.ndarray, columns: int, titles: list[str]) -> str:
    """The contact sheet of images (N, H, W, 3) uint8 as the URL of a PNG. titles: of the rows."""
    file = io.BytesIO()
    draw_grid(images, columns, titles).save(file, format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def picture(frame: Frame, url: str, side: str, pictures: Pictures) -> str:
    """url: of the frame's sheet. side: A or B."""
    wide = pictures.per_class * max(frame.images.shape[2], MIN_SIDE) > SHOWN_PIXELS
    marks = f'id="picture-{side}" class="{"wide" if wide else ""}" data-step="{frame.step}" data-done="{int(frame.done)}"'
    image = f'<img {marks} alt="side {side}, step {frame.step} of {frame.num_steps}" src="{url}">'
    take = f"this.href = document.getElementById('picture-{side}').src"  # a URL is long: it is sent once
    save = f'<a class="save" download="{side}-seed{pictures.seed}.png" href="#" onclick="{take}">Save PNG</a>' * frame.done
    bar = f'<div class="bar"><div style="width:{frame.step / frame.num_steps:.0%}"></div></div>'
    return f"<figure>{bar}{image}<figcaption>{caption(frame)}{save}</figcaption></figure>"


def placeholder(side: str) -> str:
    return f'<figure><div class="bar"></div><div class="empty">{side}</div><figcaption>&nbsp;</figcaption></figure>'


def caption(frame: Frame) -> str:
    steps = f"{frame.num_steps} steps" if frame.done else f"step {frame.step} of {frame.num_steps}"
    facts = [
        f"<b>{steps}</b>",
        f"<b>{frame.seconds:.2f} s</b>",
        f"<b>{frame.evaluations:g}</b> network calls an image",
        f"<b>{frame.gmac:.3g}</b> GMAC an image",
    ]
    if frame.switches:
        when = ", ".join("never" if math.isnan(step) else f"{step:.1f}" for step in frame.switches)
        facts.append(f"switched after step <b>{when}</b> (mean)")
    return "<span>" + "</span><span>".join(facts) + "</span>"


def comparison(frames: list[Frame | None], urls: list[str]) -> str:
    """Both pictures in one place, and how far they are apart; nothing until both are finished. urls: of their sheets."""
    if not all(frame and frame.done for frame in frames):
        return ""
    a, b = frames
    if a.images.shape != b.images.shape:
        return '<p class="hint">The two sides have different resolutions.</p>'
    difference = np.abs(a.images.astype(np.int16) - b.images)
    same = int((difference.reshape(len(difference), -1).max(1) == 0).sum())
    images = "".join(f'<img alt="{side}" src="{url}">' for side, url in zip("AB", urls, strict=True))
    return (
        '<figure class="flip" tabindex="0"><p class="hint">Point at it: <b>A</b> turns into <b>B</b>.</p>'
        f'<div class="stack">{images}<span class="which"></span></div><figcaption>'
        f"<span>They differ by <b>{difference.mean():.1f}</b> grey levels of 255 on average, at most {difference.max()}</span>"
        f"<span><b>{same}</b> of {len(difference)} pictures are the same</span></figcaption></figure>"
    )


def heading(title: str, lines: list[str]) -> str:
    return f"<header><h1>{escape(title)}</h1><p>{'<br>'.join(map(escape, lines))}</p></header>"
