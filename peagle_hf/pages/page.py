"""Render a command's page, one HTML file that needs no other, from its Jinja template."""

from pathlib import Path
from typing import Any

import jinja2

_FOLDER = Path(__file__).parent


def render(template: str | Path, /, **values: Any) -> str:
    """The page of a template that extends `page.html`; values are escaped unless they are `Markup`.

    Args:
        template: path of the template's file.
        values: the variables of the template.
    """
    template = Path(template)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, _FOLDER]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(**values)
