"""Build the documentation with pandoc alone, for machines that have no Quarto.

    python tools/site.py           # a page for each notebook in _docs/
    python tools/site.py readme    # README.md and its figures out of nbs/index.ipynb

Both start from what nbdev makes of the notebooks, so their text is that of `nbdev_docs` and `nbdev_readme`.
"""
import base64, html, json, re, shutil, subprocess, sys
from importlib.metadata import entry_points
from pathlib import Path
import pypandoc, yaml
from execnb.nbio import read_nb
from nbdev.config import get_config
from nbdev.processors import FilterDefaults
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs

cfg = get_config()

def pandoc(md, *args):
    cmd = [shutil.which('pandoc') or pypandoc.get_pandoc_path(), *map(str, args)]
    return subprocess.run(cmd, input=md, text=True, encoding='utf-8', capture_output=True, check=True).stdout

def split_options(src):
    "Quarto options (`#| echo: false`) and the code below them"
    ls, n = src.splitlines(), 0
    while n<len(ls) and re.match(r'\s*#\|', ls[n]): n += 1
    return dict(re.match(r'\s*#\|\s*([\w-]+):?\s*(.*)', l).groups() for l in ls[:n]), '\n'.join(ls[n:]).strip()

def verbatim(text, div):
    s = f'````\n{"".join(text).rstrip()}\n````'
    return f'::: {{.cell-output}}\n{s}\n:::' if div else s

def unlink_code(md):
    "Code is not markdown: the links that nbdev puts into the signatures of its own outputs are taken out again"
    return re.sub(r'^(```+).*?^\1', lambda m: re.sub(r'\[`([^`\n]+)`\]\([^)\s]+\)', r'\1', m[0]), md, flags=re.S|re.M)

def output_md(o, dest, stem, n, div, alt=''):
    "Markdown of one output; a figure becomes the file `dest/stem_files/n.svg` or `.png`, and `alt` says what it shows"
    if o.output_type=='stream': return verbatim(o.text, div) if o.name=='stdout' else ''
    if o.output_type=='error': return ''
    for mime,ext in ('image/svg+xml','svg'), ('image/png','png'):
        if mime not in o.data: continue
        f = dest/f'{stem}_files'/f'{n}.{ext}'
        f.parent.mkdir(exist_ok=True, parents=True)
        b = ''.join(o.data[mime]).encode() if ext=='svg' else base64.b64decode(''.join(o.data[mime]))
        f.write_bytes(b)
        w = o.get('metadata', {}).get('image/png', {}).get('width')
        # wide ones scroll on a phone: shrunk to it they can't be read
        size = w or (int.from_bytes(b[16:20], 'big') if ext=='png' else float(re.search(rb'width="([\d.]+)pt', b)[1])*4/3)
        opts = [f'width={w}']*bool(w) + ['.wide']*(div and size>560)
        return f'![{alt}]({f.relative_to(dest).as_posix()})' + (f'{{{" ".join(opts)}}}' if opts else '')
    if 'text/markdown' in o.data:
        md = unlink_code(''.join(o.data['text/markdown']))
        return re.sub(r'^(```.*?^```)|^#+ ([^\n]*)', lambda m: m[1] or f'**{m[2]}**', md, flags=re.M|re.S) if md.startswith('# ') or '\n# ' in md else md   # a document shown is not a section of this page
    if 'text/html' in o.data: return '```{=html}\n' + ''.join(o.data['text/html']) + '\n```'
    return verbatim(o.data['text/plain'], div) if 'text/plain' in o.data else ''

def nb2md(nb, stem, dest, div=True):
    "Front matter and pandoc markdown of one processed notebook"
    fm, parts = {}, []
    for i,c in enumerate(nb.cells):
        src = c.get('source', '')
        if c.cell_type=='raw':
            if m := re.match(r'---\n(.*?)\n---', src, re.S): fm.update(yaml.safe_load(m[1]))
        elif c.cell_type=='markdown': parts.append(src)
        else:
            d,code = split_options(src)
            if d.get('include')=='false': continue
            if d.get('echo')!='false' and code:
                block, fold = f'````python\n{code}\n````', d.get('code-fold', 'false')
                if fold!='false' and div: block = f'<details{" open" if fold=="show" else ""}><summary>{d.get("code-summary", "Code").strip(chr(34))}</summary>\n\n{block}\n\n</details>'
                parts.append(block)
            if d.get('output')!='false': parts += [output_md(o, dest, stem, f'{i}-{j}', div, d.get('fig-alt', '').strip('"')) for j,o in enumerate(c.get('outputs', []))]
    return fm, '\n\n'.join(p for p in parts if p)

def link_notebooks(md, target):
    "Point links between notebooks at `target(notebook name)`"
    return re.sub(r'\]\(([\w./-]+\.ipynb)(#[\w.-]+)?\)', lambda m: f']({target(m[1])}{m[2] or ""})', md)

PAGE = '''<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>$pagetitle$</title><meta name="description" content="$description$"><link rel="icon" href="data:,"><link rel="stylesheet" href="styles.css">
<script>try { document.documentElement.style.colorScheme = localStorage.theme || '' } catch {}</script><script src="site.js" defer></script></head>
<body class="moe"><header><a href="index.html">$site$</a>
<div class="search"><input id="search" type="search" placeholder="Search  /" aria-label="Search" autocomplete="off"><ul id="found" hidden></ul></div>
<button id="theme" aria-label="Light or dark" title="Light or dark">◐</button><a href="$source$">Notebook</a><a href="$repo$">GitHub</a></header>
<div class="page"><nav class="sidebar" aria-label="Pages"><details open><summary>Contents</summary>$sidebar$</details></nav>
<nav class="toc" aria-label="On this page">$if(toc)$<details open><summary>On this page</summary>$table-of-contents$</details>$endif$</nav>
<main><h1>$heading$</h1>$if(lead)$<p class="description">$lead$</p>$endif$
$body$
<footer>$turn$</footer></main></div></body></html>'''

def sections(page, title, text):
    "Rows for the search: [address, page, heading, the text below it]"
    main = re.sub(r'<(style|annotation)\b.*?</\1>', '', re.search(r'<main>(.*)<footer>', text, re.S)[1], flags=re.S)
    parts = re.split(r'<h[1-6][^>]*?(?: id="([^"]*)")?[^>]*>(.*?)</h[1-6]>', main, flags=re.S)[1:]
    plain = lambda s: ' '.join(html.unescape(re.sub(r'<[^>]+>', ' ', s)).split())
    return [[page + (f'#{i}' if i else ''), title, plain(re.sub(r'</?(code|em|span|strong)[^>]*>', '', h)), plain(t)] for i,h,t in zip(parts[::3], parts[1::3], parts[2::3])]

def flat(items): return [n for x in items for n in (flat(x['contents']) if isinstance(x, dict) else [x])]

def sidebar(items, pages, here):
    def item(x):
        if isinstance(x, dict): return f'<li><span>{html.escape(x["section"])}</span>{sidebar(x["contents"], pages, here)}</li>'
        out,title = pages[x]
        return f'<li><a{" class=here" if x==here else ""} href="{out}">{html.escape(title)}</a></li>'
    return f'<ul>{"".join(map(item, items))}</ul>'

def check_links(dest):
    "Every link inside the site leads to a page, and to a place on it"
    text = {f.name: f.read_text(encoding='utf-8') for f in dest.glob('*.html')}
    ids = {k: set(re.findall(r'\bid="([^"]+)"', t)) for k,t in text.items()}
    bad = []
    for k,t in text.items():
        for href in set(re.findall(r'<(?:a|img|link|script)\b[^>]*?\b(?:href|src)="([^"]+)"', t)):
            if re.match(r'[a-z]+:', href): continue
            page,_,place = href.partition('#')
            if not (dest/(page or k)).exists() or (place and place not in ids[page or k]): bad.append(f'{k}: {href}')
    if bad: sys.exit('broken links:\n  ' + '\n  '.join(sorted(bad)))

def site():
    refresh_quarto_yml()
    cache, dest = proc_nbs(n_workers=2, force=True), cfg.doc_path
    shutil.rmtree(dest, ignore_errors=True)
    dest.mkdir(parents=True)
    website = yaml.safe_load((cfg.nbs_path/'_quarto.yml').read_text())['website']
    contents = website['sidebar']['contents']
    nbs = {f.name: nb2md(read_nb(f), f.stem, dest) for f in sorted(cache.glob('*.ipynb'))}
    pages = {k: (fm['output-file'], fm['title']) for k,(fm,_) in nbs.items()}
    order = flat(contents)
    if set(order)!=set(pages): sys.exit(f'the sidebar in _quarto.yml and nbs/ differ: {sorted(set(order)^set(pages))}')
    home = f"{cfg.doc_host}{cfg.doc_baseurl}/"
    tmpl = cache/'page.html'
    tmpl.write_text(PAGE)
    for i,k in enumerate(order):
        (fm,md), (out,title) = nbs[k], pages[k]
        md = link_notebooks(md, lambda n: pages[n][0] if n in pages else n).replace(f']({home}', '](')
        turn = [f'<a href="{pages[n][0]}">{html.escape(t.format(pages[n][1]))}</a>' if n else '<span></span>'
                for n,t in ((order[i-1] if i else None, '← {}'), (order[i+1] if i+1<len(order) else None, '{} →'))]
        says = fm.get('description', '')
        opts = dict(site=website['title'], lead=re.sub('`(.+?)`', r'<code>\1</code>', html.escape(says, quote=False)), heading=html.escape(title), sidebar=sidebar(contents, pages, k), turn=''.join(turn),
                    repo=cfg.git_url, source=f'{cfg.git_url}/blob/{cfg.branch}/nbs/{k}')
        pandoc(md, '-f', 'markdown-implicit_figures', '-t', 'html5', '--standalone', '--template', tmpl, '--mathml', '--toc', '--toc-depth=3', '--wrap=preserve',
            '-M', f'pagetitle={title}' if title==website['title'] else f'pagetitle={title} – {website["title"]}', '-M', f'description={says.replace("`", "")}',
            *[a for k,v in opts.items() for a in ('-V', f'{k}={v}')], '-o', dest/out)
    index = [row for k in order for row in sections(*pages[k], (dest/pages[k][0]).read_text(encoding='utf-8'))]
    (dest/'sections.js').write_text(f'SECTIONS = {json.dumps(index, ensure_ascii=False)}\n', encoding='utf-8')   # a script, for pages may not fetch files from a disk
    for f in cfg.nbs_path/'styles.css', Path(__file__).with_name('site.js'): shutil.copy(f, dest)
    check_links(dest)
    print(f'{len(pages)} pages in {dest.name}/')

def readme():
    shutil.rmtree(cfg.config_path/'index_files', ignore_errors=True)
    nb = read_nb(cfg.nbs_path/cfg.readme_nb)
    FilterDefaults()(nb)
    fm,md = nb2md(nb, 'index', cfg.config_path, div=False)
    md = pandoc(link_notebooks(md, lambda n: f'nbs/{n}'), '-f', 'markdown-smart-implicit_figures', '-t', 'gfm', '--wrap=preserve')
    # the warning that nbdev puts into the page stands above the first line of prose
    md = md.replace('<!-- WARNING: THIS FILE WAS AUTOGENERATED! DO NOT EDIT! -->', '').lstrip()
    head = f'# {fm["title"]}\n\n<!-- Made from nbs/index.ipynb by `make readme`: edit there. -->\n\n'
    (cfg.config_path/'README.md').write_text(head + (f'> {fm["description"]}\n\n' if fm.get('description') else '') + md, encoding='utf-8')
    print('README.md')

if __name__=='__main__':
    # links to the library's own names are looked up through its entry point
    if cfg.lib_name not in {e.name for e in entry_points(group='nbdev')}: sys.exit(f'{cfg.lib_name} is not installed: pip install -e .')
    readme() if sys.argv[1:]==['readme'] else site()
