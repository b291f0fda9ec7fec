"""Pages that are whole in one file: the templates of `vitdet/app/templates`, pictures inside."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure
from PIL import Image

from vitdet.utils.checks import printable

_FOLDER = Path(__file__).with_name("templates")


def render(template: str, **values: Any) -> str:
    """Fill a template. Whatever is in a name, it becomes text: no markup, no half characters."""

    def plain(value: Any) -> Any:
        odd = isinstance(value, str) and not value.isprintable()
        return type(value)(printable(value)) if odd else value

    loader = jinja2.FileSystemLoader(_FOLDER)
    made = jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.Undefined,
        finalize=plain,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return made.get_template(template).render(values)


def jpeg(image: Image.Image, quality: int = 82) -> str:
    """Return a picture as an address of an <img>."""
    written = io.BytesIO()
    image.save(written, format="JPEG", quality=quality)
    return _address("jpeg", written.getvalue())


def plot(figure: Figure) -> str:
    """Return a plot as an address of an <img>."""
    written = io.BytesIO()
    figure.savefig(written, format="svg", metadata={"Date": None})
    return _address("svg+xml", written.getvalue())


def _address(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
