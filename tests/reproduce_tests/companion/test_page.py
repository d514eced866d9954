"""The page: what the Markdown becomes, that all tags are on it, and that a browser shows it."""

import base64
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reproduce.companion import page
from reproduce.companion.__main__ import PAGES
from reproduce.companion.markdown import TextError

ROOT = Path(__file__).resolve().parents[3]
TAGGED = re.compile(r'  (?:#|//) \[([A-Z]\d?)\]$', re.MULTILINE)
BROWSERS = ('chromium-headless-shell', 'chromium', 'chromium-browser', 'google-chrome')
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
in_browser = pytest.mark.skipif(
    BROWSER is None, reason='no Chromium: apt-get install chromium-headless-shell'
)
WIDTHS, SCHEMES = (1400, 400), ('light', 'dark')

# One of everything that a text of the companion has.
SAMPLE = r"""# The method

With $\alpha_\mathrm{SGD}$ and $`\eta`$, for $5 and $6.
[The end](#the-end), [again](../b/README.md#and-now),
[the other](../b/README.md), [a source](../code.py#L1-L2), [afar](https://arxiv.org/abs/1711).

## Two rules: `a_b` & more

```math
m_t = \mu_2 m_{t-1} + (1 - \mu_2) g_t^2 \tag{W1}
```

$$\Delta_t = \begin{cases} \frac{1}{2} & u < 0 \\ 1 & \text{otherwise} \end{cases} \tag{W2}$$

<!-- [[[cog excerpt('code.py') ]]] -->

[`code.py`](../code.py#L1-L2)

```python
m = 1  # [W1]
delta = "<2>"  # [W2]
```

<!-- [[[end]]] -->

<!-- [[[cog tested('[W1] [W2]', 'tests/test_code.py:test_it') ]]] -->

**Test of [W1] [W2]:** [`test_it`](../code.py#L1).

<!-- [[[end]]] -->

A paragraph.

<!-- [[[cog excerpt('code.py', 'm') ]]] -->

[`code.py`](../code.py#L1)

```diff
- m = 1  # [W1]
```

<!-- [[[end]]] -->

| a | b |
|---|---|
| `a/long/name/of/a/file.py:with_a_symbol` | $x$ |

![A picture](picture.png)

*What it shows, in $x$.*

Not *a* caption *here*.

## The end
"""


@pytest.fixture
def project(tmp_path):
    """``project(text)``: the page of a small project whose first text this is."""
    (tmp_path / 'code.py').write_text('m = 1  # [W1]\ndelta = "<2>"  # [W2]\n')
    for name in 'ab':
        (tmp_path / name).mkdir()
    Image.new('RGB', (40, 30), 'navy').save(tmp_path / 'a' / 'picture.png')
    (tmp_path / 'b' / 'README.md').write_text('# The experiment\n\n## And now\n\nNothing.\n')
    out = tmp_path / 'results' / 'page.html'
    out.parent.mkdir()

    def write(text=SAMPLE):
        (tmp_path / 'a' / 'README.md').write_text(text)
        out.write_text(page.make(tmp_path, ('a/README.md', 'b/README.md'), out))
        return out.read_text()

    write.out = out
    return write


@pytest.fixture(scope='module')
def companion(tmp_path_factory):
    """The file of the whole page."""
    out = tmp_path_factory.mktemp('results') / 'companion.html'
    out.write_text(page.make(ROOT, PAGES, out))
    return out


# ---------------------------------------------------------------- from Markdown to HTML


def test_equations_stand_beside_the_excerpt_that_follows_them(project):
    first, second = project().split('<div class="pair">')[1:]
    code, beside = first.split('<div class="beside">')
    assert re.findall(r'id="(eq-\w+)"', beside) == ['eq-W1', 'eq-W2']
    beside = beside.partition('</div>\n</div>\n<div class="tested">')[0]
    assert beside.count('<math ') == 2 and r'\tag' not in beside
    assert '"&lt;2&gt;"' in code and '<a href="../code.py#L1-L2"><code' in code
    # The tag of a line leads to its equation; the line is marked.
    assert re.findall(r'<a class="tag" href="#eq-(\w+)">\[\1\]</a>', code) == ['W1', 'W2']
    assert code.count('class="hll"') == 2
    # Without an equation, it is the paragraph; and no line of a diff is marked.
    code, beside = second.split('<div class="beside">')
    assert beside.startswith('\n<p>A paragraph.</p>\n</div>\n</div>\n') and 'hll' not in code


def test_a_list_and_a_quotation_have_formulas_and_code(project):
    text = project(
        '# A\n\n- b\n\n  $$x$$\n\n  ```python\n  y = 1\n  ```\n\n> $z$ and `w`\n\n    v = 2\n'
    )
    assert text.count('<math ') == 2 and text.count('class="highlight"') == 2
    assert '<div class="equation">' in text and '<code class="short">w</code>' in text


def test_headings_links_and_formulas(project):
    text = project()
    assert re.findall(r'<h\d id="([^"]*)"', text) == [
        *('a', 'a-two-rules-a_b--more', 'a-the-end', 'b', 'b-and-now')
    ]
    nav = text[text.index('<nav') : text.index('</nav>')]
    assert re.findall('href="#([^"]*)"', nav) == re.findall(r'<h\d id="([^"]*)"', text)
    for target in ('#a-the-end', '#b-and-now', '#b', '../code.py#L1-L2', 'https://arxiv.org'):
        assert f'<a href="{target}' in text
    assert 'for $5 and $6.' in text and text.count('<math ') == 6
    assert '<mtext>SGD</mtext>' in text and '<mi mathvariant="normal">&#x00394;</mi>' in text
    assert re.search(r'<p class="picture"><img .*></p>\n\n<p class="caption">What it shows', text)
    assert text.count('class="caption"') == 1
    assert 'cog' not in text and '<wbr>' in text


def test_the_page_needs_no_network_and_no_script(companion):
    text = companion.read_text()
    sources = re.findall(r'\bsrc="([^"]*)"', text)
    assert sources and all(source.startswith('data:image/png;base64,') for source in sources)
    for word in ('<script', '<link', '<iframe', '@import', 'url(', ' onload', ' onclick'):
        assert word not in text


@pytest.mark.parametrize(
    'latex, text',
    [
        (r'\alpha_\mathrm{SGD}', '<mtext>SGD</mtext>'),
        (r'\mathrm{a}', '<mtext>a</mtext>'),
        (r'\mathrm{float16}', '<mtext>float16</mtext>'),
        (r'\Delta_t', '<mi mathvariant="normal">&#x00394;</mi>'),
        (r'a \times b', '<mo>&#x000D7;</mo>'),
        (r'32{,}768', '<mn>32,768</mn>'),
    ],
)
def test_formulas_look_as_in_tex(latex, text):
    assert text in page.mathml(latex)


BROKEN = {
    r'$\foo$': r'a/README.md: the formula \foo: latex2mathml has no \foo',
    r'$$\begin{aligned} a &= b \end{aligned}$$': 'latex2mathml has no &',
    r'$\frac{1}$': r'a/README.md: the formula \frac{1}: mfrac lacks a part',
    '$x^$': 'a/README.md: the formula x^: MissingSuperScriptOrSubscriptError',
    '${x$': 'a/README.md: the formula {x: ',
    '$x}$': 'a/README.md: the formula x}: ',
    '![x](none.png)': 'a/README.md: there is no picture none.png',
    '[x](../none.py)': 'a/README.md: the link ../none.py leads nowhere',
    '[x](#none)': 'a/README.md and b/README.md: there is no heading or tagged formula a-none',
    '[x](../b/README.md#none)': 'there is no heading or tagged formula b-none',
    '# y\n\n## z\n\n## z': 'two headings or tagged formulas are a-z',
    '$$x \\tag{W1}$$\n\n$$y \\tag{W1}$$': 'two headings or tagged formulas are eq-W1',
    '```pyhton\nx\n```': 'a/README.md: Pygments has no language pyhton',
    '```python\nx = 1  # [W9]\n```': 'there is no heading or tagged formula eq-W9',
    '$ \\eta $': 'a/README.md: no formula of GitHub: $ \\eta $ has \\eta. ',
    '$\\eta$2': 'a/README.md: no formula of GitHub: $\\eta$2 has \\eta',
    '- a\n\n  $$\\foo$$': 'latex2mathml has no \\foo',
    '- a\n\n  <div>x</div>': 'a/README.md: only Markdown, not <div>x</div>',
    '<details>': 'a/README.md: only Markdown, not <details>',
}


@pytest.mark.parametrize('text', BROKEN)
def test_what_is_broken_is_an_error(project, text):
    with pytest.raises(TextError) as caught:
        project(f'# A\n\n{text}\n')
    assert BROKEN[text] in str(caught.value)


# ---------------------------------------------------------------- the tags


def lacking(text, tags):
    """What each tag lacks on the page: its equation, an excerpt with its line, or its test."""
    excerpts, tests = (
        ''.join(re.findall(rf'<div class="{name}">(.*?)</div>\n', text, re.DOTALL))
        for name in ('excerpt', 'tested')
    )
    found = {
        'equation': set(re.findall(r'<a class="tag" id="eq-(\w+)"', text)),
        'excerpt': set(re.findall(r'<a class="tag" href="#eq-(\w+)">', excerpts)),
        'test': set(re.findall(r'\[([A-Z]\d?)\]', tests)),
    }
    return [f'{tag}: {what}' for tag in tags for what in found if tag not in found[what]]


def test_each_tag_has_its_equation_excerpt_and_test(companion):
    files = [path for path in (ROOT / 'extensions').rglob('*') if path.suffix in ('.py', '.h')]
    tags = sorted({tag for path in files for tag in TAGGED.findall(path.read_text())})
    assert len(tags) == 8
    assert not lacking(companion.read_text(), tags)


def test_a_tag_that_lacks_something_is_found(project):
    assert not lacking(project(), ['W1', 'W2'])
    lost = project().replace('id="eq-W1"', '')
    assert lacking(lost, ['W1', 'W2']) == ['W1: equation']
    assert lacking(project(), ['W3']) == ['W3: equation', 'W3: excerpt', 'W3: test']
    assert lacking(project(SAMPLE.replace('= 1  # [W1]', '= 1')), ['W1']) == ['W1: excerpt']
    assert lacking(project(SAMPLE.replace('of [W1] ', 'of ')), ['W1']) == ['W1: test']


# ---------------------------------------------------------------- in a browser

# What the browser finds broken. It replaces the page, so that --dump-dom prints it alone.
CHECK = r"""<script>
addEventListener('load', () => {
    const all = [...document.querySelectorAll('body, body *')], broken = [];
    const name = element => element.outerHTML.slice(0, 90).replace(/\s+/g, ' ');
    const say = (what, element) => broken.push(`${what}: ${name(element)}`);
    const box = element => element.getBoundingClientRect();
    for (const math of document.querySelectorAll('math')) {
        if (!(box(math).width > 3 && box(math).height > 3)) say('formula without a size', math);
        if (/\\|&/.test(math.textContent)) say('formula with a command', math);
        if (math.querySelector('merror')) say('formula with an error', math);
    }
    for (const image of document.images) {
        if (!(image.complete && image.naturalWidth > 0)) say('picture', image);
        else if (!(box(image).width > 30)) say('picture too small', image);
        if (!image.alt) say('picture without words', image);
    }
    for (const link of document.querySelectorAll('a[href^="#"]'))
        if (!document.getElementById(link.getAttribute('href').slice(1))) say('link', link);
    if (document.documentElement.scrollWidth > innerWidth)
        for (const element of all)
            if (box(element).right > innerWidth + 1 && !scrolls(element)) say('too wide', element);
    function scrolls(element) {
        for (let e = element.parentElement; e; e = e.parentElement)
            if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(e).overflowX)) return true;
    }
    // Contrast, after WCAG: 4.5 for text.
    const numbers = colour => colour.match(/[\d.]+/g).map(Number);
    function luminance(colour) {
        const [r, g, b] = numbers(colour).slice(0, 3).map(x => x / 255)
            .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    }
    function behind(element) {
        for (let e = element; e; e = e.parentElement) {
            const colour = getComputedStyle(e).backgroundColor, [, , , alpha] = numbers(colour);
            if (alpha === undefined || alpha > 0) return colour;
        }
        return 'rgb(255, 255, 255)';
    }
    for (const element of all) {
        if (![...element.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
        const [a, b] = [getComputedStyle(element).color, behind(element)].map(luminance);
        const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (contrast < 4.5) say(`contrast ${contrast.toFixed(2)}`, element);
    }
    const pairs = [...document.querySelectorAll('.pair')].map(pair =>
        ['.beside', '.excerpt'].map(part => box(pair.querySelector(part)))
            .map(({left, right, top, bottom}) => ({left, right, top, bottom})));
    const found = {
        broken: [...new Set(broken)], pairs, width: innerWidth,
        dark: matchMedia('(prefers-color-scheme: dark)').matches,
        files: [...document.querySelectorAll('a[href]')].map(a => a.href.split('#')[0])
            .filter(href => href.startsWith('file:')),
        counts: ['math', 'img', 'a'].map(tag => document.querySelectorAll(tag).length),
    };
    document.documentElement.innerHTML = '<body></body>';
    document.body.textContent = `FOUND${JSON.stringify(found)}FOUND`;
});
</script>
</body>"""


def browse(path, tmp_path, *options):
    done = subprocess.run(
        [
            *(BROWSER, '--headless', '--no-sandbox', '--disable-gpu', '--hide-scrollbars'),
            *('--disable-dev-shm-usage', f'--user-data-dir={tmp_path / "profile"}'),
            *(*options, path.as_uri()),
        ],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout


def appearance(width, scheme):
    dark = SCHEMES.index(scheme) == 1
    return [f'--window-size={width},1000', f'--blink-settings=preferredColorScheme={int(not dark)}']


def examined(path, tmp_path, width, scheme):
    """What CHECK finds on the page."""
    copy = path.with_name('examined.html')
    copy.write_text(path.read_text().replace('</body>', CHECK))
    text = browse(copy, tmp_path, *appearance(width, scheme), '--dump-dom')
    found = json.loads(html.unescape(text.split('FOUND')[1]))
    assert (found['width'], found['dark']) == (width, scheme == 'dark')
    return found


@pytest.mark.slow
@in_browser
@pytest.mark.slow
@pytest.mark.parametrize('scheme', SCHEMES)
@pytest.mark.parametrize('width', WIDTHS)
def test_nothing_is_broken_in_a_browser(companion, tmp_path, width, scheme):
    found = examined(companion, tmp_path, width, scheme)
    assert not found['broken']
    assert found['counts'][1] >= 1 and found['counts'][2] > 100
    outside = {href for href in found['files'] if not Path(href.removeprefix('file://')).exists()}
    assert found['files'] and not outside


@pytest.mark.slow
@in_browser
@pytest.mark.slow
def test_equation_and_code_are_side_by_side_on_a_wide_screen_alone(project, tmp_path):
    project()
    for beside, excerpt in examined(project.out, tmp_path, 1400, 'light')['pairs']:
        assert beside['right'] < excerpt['left'] and abs(beside['top'] - excerpt['top']) < 40
    for beside, excerpt in examined(project.out, tmp_path, 400, 'light')['pairs']:
        assert beside['bottom'] <= excerpt['top'] and abs(beside['left'] - excerpt['left']) < 1


@pytest.mark.slow
@in_browser
@pytest.mark.slow
def test_the_browser_finds_what_is_broken(project, tmp_path):
    project()
    assert not examined(project.out, tmp_path, 400, 'light')['broken']
    empty = base64.b64encode(b'nothing').decode()
    faults = {
        '<math></math>': 'formula without a size',
        r'<math><mi>\tag</mi></math>': 'formula with a command',
        '<math><merror><mi>x</mi></merror></math>': 'formula with an error',
        f'<img alt="x" src="data:image/png;base64,{empty}">': 'picture: ',
        '<img src="../a/picture.png">': 'picture without words',
        '<img alt="x" width="9" src="../a/picture.png">': 'picture too small',
        '<a href="#none">x</a>': 'link: ',
        '<div style="width: 450px">x</div>': 'too wide',
        '<p style="color: #999">x</p>': 'contrast 2.',
    }
    text = project.out.read_text()
    project.out.write_text(text.replace('</main>', f'{"".join(faults)}</main>'))
    broken = examined(project.out, tmp_path, 400, 'light')['broken']
    for fault, message in faults.items():
        assert any(line.startswith(message) for line in broken), (fault, broken)


@pytest.mark.slow
@in_browser
@pytest.mark.slow
@pytest.mark.parametrize('width', WIDTHS)
def test_pictures_of_the_page(companion, tmp_path, width):
    brightness = {}
    for scheme in SCHEMES:
        file = tmp_path / f'{scheme}.png'
        browse(companion, tmp_path, *appearance(width, scheme), f'--screenshot={file}')
        with Image.open(file) as image:
            assert image.size == (width, 1000)
            pixels = np.asarray(image.convert('L'))
        assert pixels.std() > 10, 'the page is empty'
        brightness[scheme] = np.median(pixels)
    assert brightness['dark'] < 60 and brightness['light'] > 200


@pytest.mark.slow
@in_browser
@pytest.mark.slow
def test_the_printed_page(companion, tmp_path):
    file = tmp_path / 'page.pdf'
    browse(companion, tmp_path, '--no-pdf-header-footer', f'--print-to-pdf={file}')
    data = file.read_bytes()
    assert data.startswith(b'%PDF') and 5 < len(re.findall(rb'/Type\s*/Page\b', data)) < 100
