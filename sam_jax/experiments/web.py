"""A Markdown text with figures as one HTML file that needs no other."""

import base64
import html
import io
import re
from collections.abc import Sequence

import markdown
from matplotlib.figure import Figure

from sam_jax.experiments import figures

# Inches of a picture that is still to be read when a narrow window makes it smaller.
_SHRINKS = 6.5

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">{refresh}
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em;
  color: #222; background: #fff; overflow-wrap: break-word }}
div.box {{ overflow-x: auto }}
table {{ border-collapse: collapse }}
th, td {{ padding: .25em .8em; border-bottom: 1px solid #ddd; text-align: left;
  vertical-align: top; font-variant-numeric: tabular-nums; overflow-wrap: normal }}
th {{ vertical-align: bottom }}
td {{ white-space: nowrap }}
code {{ font-size: .9em }}
pre {{ white-space: pre-wrap }}
img {{ max-width: 100%; height: auto }}
div.box img {{ max-width: none }}
</style></head><body>
{body}
</body></html>
"""


def page(text: str, pictures: dict[str, Sequence[Figure]], refresh: int = 0) -> str:
    """Returns a document as HTML.

    Wide tables and pictures scroll in a box of their own. Of a picture's figures as many stand side
    by side as there is room for.

    Args:
      text: Markdown; its first line is the title.
      pictures: {name of a picture in the text: its figures}.
      refresh: after how many seconds a browser loads the page anew; 0 for never.
    """
    body = markdown.markdown(text, extensions=['tables'])
    body = body.replace('<table>', '<div class="box" tabindex="0"><table>')
    body = body.replace('</table>', '</table></div>')
    for name, drawn in pictures.items():
        body = re.sub(
            f'<img alt="([^"]*)" src="{re.escape(name)}" />',
            lambda found, drawn=drawn: _images(found[1], drawn),
            body,
        )
    again = f'\n<meta http-equiv="refresh" content="{refresh}">' if refresh else ''
    title = html.escape(text.partition('\n')[0].lstrip('# '))
    return _PAGE.format(title=title, refresh=again, body=body)


def _images(alt, drawn):
    titles = [html.escape(figure.axes[0].get_title()) for figure in drawn]
    alts = [alt] if len(drawn) == 1 else [f'{alt}: {title}' for title in titles]
    return '\n'.join(_image(alt, figure) for alt, figure in zip(alts, drawn))


def _image(alt, figure):
    image = f'<img alt="{alt}" src="{_address(figure)}">'
    if figure.get_figwidth() <= _SHRINKS:
        return image
    # Markdown has the picture in a paragraph, which can hold no box.
    return f'</p><div class="box" tabindex="0">{image}</div><p>'


def _address(figure):
    buffer = io.BytesIO()
    figures.save(figure, buffer, format='svg', metadata={'Date': None})
    return f'data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}'
