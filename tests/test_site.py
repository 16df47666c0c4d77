"The documentation as a reader meets it: every page and every link in headless Chromium, on a desktop and on a phone."
import os, re, shutil, subprocess, sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
import pytest

root = Path(__file__).resolve().parents[1]
nbs = sorted((root/'nbs').glob('*.ipynb'))

@pytest.fixture(scope='module')
def docs(tmp_path_factory):
    "`make docs`, in a copy; it stops at a broken link"
    d = tmp_path_factory.mktemp('site')/'repo'
    d.mkdir()
    for p in 'moe_fuse', 'nbs', 'tools': shutil.copytree(root/p, d/p, symlinks=True, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    for p in 'settings.ini', 'pyproject.toml', '_quarto.yml': shutil.copy(root/p, d)
    r = subprocess.run([sys.executable, 'tools/site.py'], cwd=d, capture_output=True, text=True)
    assert r.returncode==0, r.stdout + r.stderr
    return d/'_docs'

@pytest.fixture(scope='module')
def site(docs):
    "Its address on this machine, below a folder as on the public host"
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    with ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=docs.parent)) as s:
        Thread(target=s.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{s.server_port}/{docs.name}'
        s.shutdown()

@pytest.fixture(scope='module')
def browser():
    "Chromium; with CI set it must be there"
    try:
        from playwright.sync_api import sync_playwright
        exe = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
        if exe is None: raise FileNotFoundError('no chromium, chromium-browser or google-chrome')
    except (ImportError, FileNotFoundError) as e: (pytest.fail if os.environ.get('CI') else pytest.skip)(f'Chromium and playwright walk the site: {e}')
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=exe, args=['--no-sandbox'])
        yield b
        b.close()

def open_page(browser, wrong, width=1280, height=900, **kw):
    "A tab that notes in `wrong` what goes wrong on it"
    page = browser.new_context(viewport=dict(width=width, height=height), **kw).new_page()
    page.on('console', lambda m: wrong.append(f'{page.url}: {m.text}') if m.type in ('error', 'warning') else None)
    page.on('pageerror', lambda e: wrong.append(f'{page.url}: {e}'))
    page.on('requestfailed', lambda r: wrong.append(f'{page.url}: {r.url} failed'))
    page.on('response', lambda r: wrong.append(f'{page.url}: {r.url} is {r.status}') if r.status>=400 else None)
    return page

# what a reader would see as a fault
FAULTS = r'''() => {
  const text = [], walk = document.createTreeWalker(document.querySelector('main'), NodeFilter.SHOW_TEXT)
  while (walk.nextNode()) if (!walk.currentNode.parentElement.closest('code, pre, annotation, script, style, table.dataframe')) text.push(walk.currentNode.data)
  const prose = text.join(''), out = []
  for (const i of document.images) { if (!i.complete || !i.naturalWidth) out.push(`broken image ${i.src}`); if (!i.alt.trim()) out.push(`image without alternative text ${i.src}`); if (i.clientWidth < .5*(i.getAttribute('width') || i.naturalWidth)) out.push(`image shrunk to ${i.clientWidth} pixels ${i.src}`) }
  for (const m of prose.match(/\\(frac|sum|mathbf|top|le|cdot|text)\b.{0,20}|\$[^$\n]{1,60}\$|\]\([\w.#/-]+\)|^:::.*|`[^`\n]+`/gm) || []) out.push(`unrendered: ${m}`)
  if (document.querySelector('merror, .math:not(math)')) out.push(`maths not understood: ${document.querySelector('merror, .math:not(math)').textContent}`)
  if (!document.title || document.querySelectorAll('h1').length!=1) out.push('no title, or not one h1')
  const ids = [...document.querySelectorAll('[id]')].map(e => e.id), twice = ids.filter((x, i) => ids.indexOf(x)!=i)
  if (twice.length) out.push(`ids used twice: ${twice}`)
  if (document.documentElement.scrollWidth > innerWidth) out.push(`${document.documentElement.scrollWidth - innerWidth} pixels too wide`)
  return out
}'''

def test_a_page_for_each_notebook(docs): assert len(list(docs.glob('*.html')))==len(nbs)

def test_nothing_is_loaded_from_elsewhere(docs):
    "No font, script, style or picture comes from another host when a page is read"
    for f in docs.glob('*.html'): assert not re.findall(r'<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)="(?:https?:)?//[^"]*', f.read_text(encoding='utf-8')), f.name

def test_every_page_at_two_widths(docs, site, browser):
    wrong = []
    for width,height in (1280,900), (390,844):
        page = open_page(browser, wrong, width, height)
        for f in sorted(docs.glob('*.html')):
            page.goto(f'{site}/{f.name}')
            wrong += [f'{f.name} at {width}: {w}' for w in page.evaluate(FAULTS)]
    assert wrong==[]

def test_every_link_leads_somewhere(docs, site, browser):
    "From page to page as a reader would, from the first one; every page is reached, and every place on it exists"
    wrong, seen, todo, places = [], set(), ['index.html'], {}
    page = open_page(browser, wrong)
    while todo:
        name = todo.pop()
        if name in seen: continue
        seen.add(name)
        page.goto(f'{site}/{name}')
        places[name] = set(page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)"))
        for href in page.evaluate("[...document.links].map(a => a.href)"):
            if not href.startswith(site): continue
            to,_,place = href.removeprefix(f'{site}/').partition('#')
            todo.append(to)
            if place: wrong.append((name, to, place))
    assert [w for w in wrong if isinstance(w, str) or w[2] not in places[w[1]]]==[]
    assert seen=={f.name for f in docs.glob('*.html')}

def test_navigation(site, browser):
    "The sidebar, the list of a page's sections and the arrows below a page go where they say; on a phone the lists unfold first"
    wrong = []
    for width in 1280, 390:
        page = open_page(browser, wrong, width, 844)
        page.goto(f'{site}/index.html')
        if width==390: page.locator('.sidebar summary').click()
        page.locator('.sidebar a', has_text='Fusion in closed form').click()
        assert page.url==f'{site}/fusion.html' and page.locator('h1').inner_text()=='Fusion in closed form'
        if width==390: page.locator('.toc summary').click()
        link = page.locator('.toc a').nth(1)
        place = link.get_attribute('href')
        link.click()
        assert page.url==f'{site}/fusion.html{place}'
        page.wait_for_function('p => { const y = document.querySelector(p).getBoundingClientRect().top; return y>=0 && y<innerHeight }', arg=place)
        arrow = page.locator('footer a').last
        title = arrow.inner_text().rstrip(' →')
        arrow.click()
        assert page.locator('h1').inner_text()==title
    assert wrong==[]

def test_search(docs, site, browser):
    "By key and by click, over http and from a disk"
    wrong = []
    page = open_page(browser, wrong)
    page.goto(f'{site}/index.html')
    page.keyboard.press('/')
    page.keyboard.type('choose_neurons')
    page.locator('#found a').first.wait_for()
    page.keyboard.press('Enter')
    page.wait_for_url(f'{site}/fusion.html#choose_neurons')
    page.goto((docs/'index.html').as_uri())
    page.locator('#search').fill('ridge down projection')
    page.locator('#found a').first.wait_for()
    page.locator('#found a').first.click()
    assert page.url!=(docs/'index.html').as_uri()
    page.locator('#search').fill('zzyzx')
    page.locator('#found .none', has_text='Nothing found.').wait_for()         # the index may still be on its way
    assert page.locator('#found').inner_text()=='Nothing found.'
    assert wrong==[]

def test_light_and_dark(site, browser):
    "The system's choice counts, the button turns it over, and the next page remembers"
    for scheme in 'light', 'dark':
        page = open_page(browser, [], color_scheme=scheme)
        paper = lambda: sum(map(int, re.findall(r'\d+', page.evaluate('getComputedStyle(document.body).backgroundColor'))[:3]))/3
        page.goto(f'{site}/index.html')
        assert (paper()<64)==(scheme=='dark')
        page.locator('#theme').click()
        page.goto(f'{site}/fusion.html')
        assert (paper()<64)!=(scheme=='dark')
