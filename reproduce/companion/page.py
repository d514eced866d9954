"""One page of HTML from the Markdown: MathML, pictures inside, no script, no network."""

from __future__ import annotations

import base64
import mimetypes
import os
import posixpath
import re
from pathlib import Path
from xml.etree import ElementTree

from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from mdit_py_plugins.dollarmath import dollarmath_plugin
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from reproduce.companion.markdown import TextError

TITLE = 'Extremely Large Minibatch SGD, beside the code that runs it'
_MARKER = re.compile(r'<!-- \[\[\[(?:cog\s+(\w+)\(|end)')
_TAG_OF_FORMULA = re.compile(r'\\tag\{([A-Z]\d?)\}')
_TAGGED = re.compile(r'  (?:#|//) \[[A-Z]\d?\]$')
_TAG_OF_CODE = re.compile(r'<span class="c1">(?:#|//) \[([A-Z]\d?)\]</span>')
_STYLES = {'light': 'default', 'dark': 'github-dark'}


def make(root: Path, pages, out: Path) -> str:
    """Returns the page that is to lie at ``out``. Links to other files are relative to it.

    Args:
        root (Path): The project's folder.
        pages (sequence): Paths of the Markdown files from there, in the order of reading.
        out (Path): Where the page will lie.

    Raises:
        TextError: A formula, a picture or a link is broken.
    """
    parts = [_Part(root, page, pages, out) for page in pages]
    ids = [id for part in parts for id in re.findall(r' id="([^"]*)"', part.html)]
    twice = sorted({id for id in ids if ids.count(id) > 1})
    if twice:
        raise TextError(f'{" and ".join(pages)}: two headings or tagged formulas are {twice[0]}')
    links = {id for part in parts for id in re.findall(r' href="#([^"]*)"', part.html)}
    dead = sorted(links - set(ids))
    if dead:
        raise TextError(f'{" and ".join(pages)}: there is no heading or tagged formula {dead[0]}')
    contents = ''.join(part.contents() for part in parts)
    style = Path(__file__).with_name('page.css').read_text('utf-8')
    return _PAGE.format(
        title=TITLE,
        style=style + _colours_of_code(),
        contents=contents,
        parts='\n'.join(f'<section>\n{part.html}\n</section>' for part in parts),
    )


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{style}
</style>
</head>
<body>
<header>
<p class="title">{title}</p>
<nav id="contents" aria-label="Contents">
{contents}
</nav>
</header>
<main>
{parts}
</main>
<a class="back" href="#contents">Contents</a>
</body>
</html>
"""


def _colours_of_code() -> str:
    light, dark = (
        HtmlFormatter(style=style).get_style_defs('.highlight') for style in _STYLES.values()
    )
    return f'{light}\n@media screen and (prefers-color-scheme: dark) {{\n{dark}\n}}\n'


class _Part:
    """One Markdown file."""

    def __init__(self, root, page, pages, out):
        self.root, self.page, self.pages, self.out = root, page, pages, out
        self.headings: list[tuple[int, str, str]] = []  # level, id, HTML
        self.parser = MarkdownIt('commonmark').enable('table')
        options = {'allow_labels': False, 'allow_space': False, 'allow_digits': False}
        self.parser.use(dollarmath_plugin, **options, double_inline=True)
        self.parser.renderer.rules.update(self._rules())
        text = (root / page).read_text('utf-8')
        self.html = '\n'.join(self._arranged(self._blocks(self.parser.parse(text))))

    def contents(self) -> str:
        """Links to the headings of the first two levels."""
        first, *others = [heading for heading in self.headings if heading[0] <= 2]
        items = ''.join(f'<li><a href="#{id}">{text}</a></li>\n' for _, id, text in others)
        return f'<p><a href="#{first[1]}">{first[2]}</a></p>\n<ol>\n{items}</ol>\n'

    def _blocks(self, tokens):
        """(kind, HTML) of each block of the text. What cogapp wrote has the writer's name."""
        block, writer = [], None
        for token in tokens:
            block.append(token)
            if token.level or token.nesting == 1:
                continue
            marker = _MARKER.match(token.content) if token.type == 'html_block' else None
            if marker:
                writer = marker[1]
                yield f'begin {writer}' if writer else 'end', ''
            elif token.type != 'html_block' or not token.content.startswith('<!--'):
                yield self._kind(block), self._rendered(block)
            block = []

    def _rules(self) -> dict:
        """How tokens become HTML, wherever they stand; markdown-it calls (tokens, index, ...)."""
        makers = {
            'fence': lambda token: (
                self._equation(token.content) if token.info == 'math' else self._code(token)
            ),
            'code_block': self._code,
            'code_inline': lambda token: _code_inline(token.content),
            'math_block': lambda token: self._equation(token.content),
            'math_inline': lambda token: self._formula(token.content),
            'math_inline_double': lambda token: self._formula(token.content, 'block'),
            'html_block': self._html_block,
        }
        return {
            name: lambda tokens, i, *_, maker=maker: maker(tokens[i])
            for name, maker in makers.items()
        }

    def _html_block(self, token):
        raise TextError(f'{self.page}: only Markdown, not {token.content.splitlines()[0]}')

    def _kind(self, block) -> str:
        if block[0].type == 'math_block' or block[0].info == 'math':
            return 'equation'
        return block[0].type.partition('_')[0]

    def _arranged(self, blocks):
        """Puts an excerpt beside the equations, or else the paragraph, just before it."""
        done: list[tuple[str, str]] = []
        inside: list[str] = []
        writer = ''
        for kind, text in blocks:
            if kind.startswith('begin '):
                writer, inside = kind[6:], []
            elif kind == 'end':
                done.append((writer, self._generated(writer, inside, done)))
                writer = ''
            elif writer:
                inside.append(text)
            else:
                done.append((kind, text))
        return [text for _, text in done]

    def _generated(self, writer, inside, done) -> str:
        text = ''.join(inside)
        if writer != 'excerpt':
            return f'<div class="{writer}">\n{text}</div>'
        beside: list[str] = []
        while done and done[-1][0] == 'equation':
            beside.insert(0, done.pop()[1])
        if not beside and done and done[-1][0] == 'paragraph':
            beside.append(done.pop()[1])
        return (
            f'<div class="pair">\n<div class="excerpt">\n{text}</div>\n'
            f'<div class="beside">\n{"".join(beside)}</div>\n</div>'
        )

    def _rendered(self, block) -> str:
        for token in block:
            self._prepare(token.children or [])
        if block[0].type == 'heading_open':
            return self._heading(block)
        text = self._plain(block)
        if block[0].type == 'table_open':
            return f'<div class="table">\n{text}</div>\n'
        text = re.sub(r'^<p>(<img [^>]*>)</p>', r'<p class="picture">\1</p>', text)
        return re.sub(r'^<p><em>((?:(?!</em>).)*)</em></p>', r'<p class="caption">\1</p>', text)

    def _plain(self, tokens) -> str:
        return self.parser.renderer.render(tokens, self.parser.options, {})

    def _heading(self, block) -> str:
        text = self._plain(block[1:2])
        id = self._id(self.page, _slug(block[1].content) if self.headings else '')
        self.headings.append((int(block[0].tag[1]), id, re.sub(r'</?a\b[^>]*>', '', text)))
        return f'<{block[0].tag} id="{id}">{text}</{block[0].tag}>\n'

    def _prepare(self, tokens):
        """Makes links and pictures those of the page, and looks for formulas that are none."""
        for token in tokens:
            if token.type == 'link_open':
                token.attrs['href'] = self._target(token.attrs['href'])
            elif token.type == 'image':
                token.attrs['src'] = self._picture(token.attrs['src'])
            elif token.type == 'text' and (found := re.search(r'\$\$|\\[A-Za-z]+', token.content)):
                raise TextError(
                    f'{self.page}: no formula of GitHub: {token.content} has {found[0]}. No space '
                    'stands inside of dollars, no digit beside them'
                )

    def _target(self, href) -> str:
        if re.match(r'https?:', href):
            return href
        path, _, anchor = href.partition('#')
        target = posixpath.normpath(posixpath.join(posixpath.dirname(self.page), path))
        if not path:
            target = self.page
        if target in self.pages:
            return f'#{self._id(target, anchor)}'
        if not (self.root / target).exists():
            raise TextError(f'{self.page}: the link {href} leads nowhere')
        relative = os.path.relpath(self.root / target, self.out.parent)
        return relative + (f'#{anchor}' if anchor else '')

    def _id(self, page, slug) -> str:
        name = posixpath.dirname(page) or 'top'
        return f'{name}-{slug}' if slug else name

    def _picture(self, src) -> str:
        path = (self.root / self.page).parent / src
        if not path.is_file():
            raise TextError(f'{self.page}: there is no picture {src}')
        data = base64.b64encode(path.read_bytes()).decode()
        return f'data:{mimetypes.guess_type(path.name)[0]};base64,{data}'

    def _equation(self, latex) -> str:
        tags = _TAG_OF_FORMULA.findall(latex)
        formula = self._formula(_TAG_OF_FORMULA.sub('', latex), 'block')
        names = ''.join(f'<a class="tag" id="eq-{t}" href="#eq-{t}">[{t}]</a>' for t in tags)
        return f'<div class="equation"><div class="formula">{formula}</div>{names}</div>\n'

    def _formula(self, latex, display='inline') -> str:
        latex = latex.strip().strip('`')
        try:
            return mathml(latex, display)
        except Exception as error:  # latex2mathml's own are of many classes, without words
            why = str(error) or type(error).__name__
            raise TextError(f'{self.page}: the formula {latex}: {why}') from error

    def _code(self, token) -> str:
        try:
            lexer = get_lexer_by_name(token.info or 'text')
        except ClassNotFound:
            raise TextError(f'{self.page}: Pygments has no language {token.info}') from None
        lines = token.content.splitlines()
        tagged = [
            n for n, line in enumerate(lines, 1) if _TAGGED.search(line) and token.info != 'diff'
        ]
        text = highlight(token.content, lexer, HtmlFormatter(hl_lines=tagged))
        return _TAG_OF_CODE.sub(r'<a class="tag" href="#eq-\1">[\1]</a>', text)


# What MathML's elements need; a browser shows nothing of one that lacks a part.
_TWO = ('mfrac', 'mroot', 'msub', 'msup', 'mover', 'munder')
_PARTS = {**dict.fromkeys(_TWO, 2), 'msubsup': 3, 'munderover': 3}
# As TeX has them: capital Greek is upright, these are operators, {,} within a number is none.
_AS_TEX = (
    (r'<mi>(&#x0039[1-9A-F];|&#x003A[0-9];)</mi>', r'<mi mathvariant="normal">\1</mi>'),
    (r'<mi>(&#x000D7;|&#x000B7;|&#x0230[A-B];)</mi>', r'<mo>\1</mo>'),
    (r'</mn><mrow><mo>&#x0002C;</mo></mrow><mn>', ','),
)


def mathml(latex, display='inline') -> str:
    """Returns a formula of LaTeX as MathML.

    Raises:
        Exception: It is wrong, or latex2mathml does not know a command.
    """
    words = re.sub(r'\\mathrm\{([A-Za-z0-9]+)\}', r'\\text{\1}', latex)  # upright, and one word
    text = convert(words, display=display)
    unknown = re.search(r'<m\w+>(\\[^<]*|[&{}])</m\w+>', text)
    if unknown:
        raise ValueError(f'latex2mathml has no {unknown[1]}')
    for element in ElementTree.fromstring(text).iter():
        name = element.tag.partition('}')[2]
        if len(element) != _PARTS.get(name, len(element)):
            raise ValueError(f'{name} lacks a part')
    if latex.count('{') != latex.count('}'):
        raise ValueError('a brace is missing')
    for found, other in _AS_TEX:
        text = re.sub(found, other, text)
    return text


def _code_inline(code) -> str:
    """Keeps a short word in one line, and lets a long name break after / : . and _."""
    if len(code) <= 24:
        return f'<code class="short">{escapeHtml(code)}</code>'
    if ' ' in code:
        return f'<code>{escapeHtml(code)}</code>'
    return '<code>' + re.sub(r'(?<=\w[/:._])(?=\w)', '<wbr>', escapeHtml(code)) + '</code>'


def _slug(heading) -> str:
    """The anchor that GitHub gives to a heading."""
    words = re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', heading)
    return re.sub(r'[^\w\- ]', '', words.lower()).replace(' ', '-')
