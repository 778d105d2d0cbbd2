"""Docstrings of this project as Markdown: for the pages of the methods and for the reference."""

import inspect
import re

try:
    from griffe import Extension
except ImportError:  # the pages are checked without the tools that build them
    Extension = object

SECTION = re.compile(r'(Args|Attributes|Returns|Raises|Yields)(?: \((.*)\))?:')
ITEM = re.compile(r'(\*{0,2}\w+(?:, \w+)*): (.*)')


# What Markdown would take for its own. Entities, since griffe reads a backslash as Python does.
ESCAPES = str.maketrans({c: f'&#{ord(c)};' for c in '*_[]|<>&'})


def escaped(text):
    """Returns text as Markdown shows it unchanged; `code` is left as it is."""
    parts = re.split(r'(`[^`]*`)', text)
    return ''.join(part if part.startswith('`') else part.translate(ESCAPES) for part in parts)


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
        if SECTION.fullmatch(line):
            name = line.removesuffix(':')
            found[name] = []
        elif name and line.startswith('Source: '):
            name = 'Source'
            found[name] = [line.removeprefix('Source: ')]
        else:
            found[name].append(line)
    return {
        name: inspect.cleandoc('\n' + '\n'.join(lines)).strip('\n') for name, lines in found.items()
    }


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
                if name in ('Args', 'Attributes', 'Raises', 'Returns', 'Yields'):
                    text += f'\n\n{name}:\n' + '\n'.join(f'  {x}' for x in entries(name, body))
                else:  # `Raises (from update):` is no section to griffe
                    text += f'\n\n{name}: {escaped(" ".join(body.split()))}'
            obj.docstring.value = text


def entries(name, body):
    """Yields the lines of a section; `a, b: ...` is one entry for each."""
    lines = body.splitlines()
    if name in ('Returns', 'Yields'):
        yield from map(escaped, lines)
        return
    together = []
    for line in lines:
        item = None if line.startswith(' ') else ITEM.fullmatch(line)
        if item:
            yield from (x for entry in together for x in entry)
            together = [[f'{one}: {escaped(item[2])}'] for one in item[1].split(', ')]
        else:
            for entry in together:
                entry.append(f'  {escaped(line.strip())}')
    yield from (x for entry in together for x in entry)
