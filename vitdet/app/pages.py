"""Pages that are whole in one file: the templates of `vitdet/app/templates`, pictures inside."""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from vitdet.utils.checks import printable


def render(template: str, **values: Any) -> str:
    """Fill a template. Whatever is in a name becomes text; fractions have a digit, nan a dash."""

    def shown(value: Any) -> Any:
        if isinstance(value, float):
            return "-" if math.isnan(value) else f"{value:.1f}"
        odd = isinstance(value, str) and not value.isprintable()
        return type(value)(printable(value)) if odd else value  # what is markup stays so

    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=jinja2.Undefined,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return made.get_template(template).render(values)


def jpeg(image: Image.Image, quality: int = 82) -> str:
    """Return a picture as an address of an <img>."""
    written = io.BytesIO()
    image.save(written, format="JPEG", quality=quality)
    return address("jpeg", written)


def address(kind: str, written: io.BytesIO) -> str:
    """Return a file of a MIME type image/`kind` as an address of an <img>."""
    return f"data:image/{kind};base64,{base64.b64encode(written.getvalue()).decode('ascii')}"
