"""Docstrings of this project as Markdown: for the pages of the methods and for the reference."""

import inspect
import re

try:
    from griffe import Extension
except ImportError:  # the pages are checked without the tools that build them
    Extension = object

SECTION = re.compile(r'(Args|Attributes|Returns|Raises|Yields)(?: \((.*)\))?:')
ITEM = re.compile(r'(\*{0,2}\w+(?:, \w+)*): (.*)')


def escaped(text):
    """Returns text with what Markdown would take for its own kept as it is, outside of `code`."""
    parts = re.split(r'(`[^`]*`)', text)
    return ''.join(part if part.startswith('`') else re.sub(
        r'([*_\[\]])', r'\\\1', part.replace('&', '&amp;').replace('<', '&lt;')).replace(
            '||', '&#124;&#124;') for part in parts)


def blocks(lines):
    """Yields (is code, lines): paragraphs, and what is indented beyond them."""
    kept, code = [], False
    for line in [*lines, None]:
        indented = bool(line) and line.startswith(' ')
        if line is None or (kept and indented != code and line) or (not line and not code):
            if any(kept):
                yield code, [*kept]
            kept, code = [], False
        if line:
            code = indented if not kept else code
            kept.append(line)
        elif line is not None and code:
            kept.append(line)


def prose(text):
    """Returns a docstring's text as Markdown: indented lines are formulas, kept as they are."""
    parts = []
    for code, lines in blocks(text.splitlines()):
        if code:
            body = inspect.cleandoc('\n' + '\n'.join(lines)).strip('\n')
            parts.append(f'```text\n{body}\n```')
        else:
            parts.append('\n'.join(map(escaped, lines)))
    return '\n\n'.join(parts)


def sections(doc):
    """Returns {'': text, 'Args': lines, ...} of a docstring, cleaned."""
    found, name = {'': []}, ''
    for line in inspect.cleandoc(doc).splitlines():
        section = SECTION.fullmatch(line)
        if section:
            name = line.removesuffix(':')
            found[name] = []
        else:
            found[name].append(line)
    return {name: inspect.cleandoc('\n' + '\n'.join(lines)).strip('\n')
            for name, lines in found.items()}


def arguments(doc):
    """Returns {name: meaning} of the Args of a docstring; `a, b: ...` stands for both."""
    found, names = {}, ()
    for line in sections(doc).get('Args', '').splitlines():
        item = None if line.startswith(' ') else ITEM.fullmatch(line)
        if item:
            names = item[1].split(', ')
            found.update(dict.fromkeys(names, item[2]))
        else:
            found.update({name: f'{found[name]} {line.strip()}' for name in names})
    return found


class Docstrings(Extension):
    """Hands mkdocstrings the docstrings as Markdown; the Args and so on stay as they are."""

    def on_instance(self, *, obj, **kwargs):
        """Rewrites an object's docstring."""
        del kwargs
        if obj.docstring:
            parts = sections(obj.docstring.value)
            text = prose(parts.pop(''))
            for name, body in parts.items():
                lines = '\n'.join(f'  {escaped(line)}' for line in body.splitlines())
                known = ' ' not in name  # `Raises (from update):` is no section to griffe
                text += f'\n\n{name}:\n{lines}' if known else f'\n\n{name}: {lines.strip()}'
            obj.docstring.value = text
