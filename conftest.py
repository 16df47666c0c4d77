"Each notebook cell becomes a pytest item, so `pytest nbs` counts cells and names the one that broke. The cell rules are those of `nbdev_test`."
import gc, os, re, sys, traceback
import pytest
from execnb.shell import CaptureShell
from fastcore.all import str2bool, working_directory
from nbdev.config import get_config
from nbdev.frontmatter import FrontmatterProc
from nbdev.process import NBProcessor

cfg = get_config()

def pytest_addoption(parser): parser.addoption('--nb-flags', default='', help='run cells with these flags too, e.g. "slow cuda"')

def pytest_collect_file(file_path, parent):
    if file_path.suffix=='.ipynb' and file_path.name[0] not in '._': return NbFile.from_parent(parent, path=file_path)

def library_classes():
    "The classes that the library's modules define"
    mods = [m for n,m in sys.modules.items() if n.split('.')[0]=='moe_fuse']
    return {c for m in mods for c in vars(m).values() if isinstance(c, type) and c.__module__.split('.')[0]=='moe_fuse'}

class NbFile(pytest.File):
    def collect(self):
        skip = set(cfg.tst_flags.split()) - set(self.config.getoption('--nb-flags').split())
        nb = NBProcessor(self.path, procs=FrontmatterProc, process=True).nb
        if str2bool(getattr(nb, 'frontmatter_', {}).get('skip_exec', False)): return
        if all(c.cell_type!='code' for c in nb.cells):
            it = NbWords.from_parent(self, name='links')
            it.source = '\n'.join(c.source for c in nb.cells)
            yield it
        for i,c in enumerate(nb.cells):
            d = getattr(c, 'directives_', {}) or {}
            if c.cell_type!='code' or not c.source.strip() or 'nbdev_export'+'(' in c.source: continue
            if d.get('eval:', [''])[0].lower()=='false': continue
            it = NbCell.from_parent(self, name=f'{i}-{c.id}')
            it.source = c.source
            for f in sorted(skip & d.keys()): it.add_marker(pytest.mark.skip(reason=f'#| {f}'))
            yield it

    def setup(self):
        os.environ['IN_TEST'] = '1'
        if str(cfg.config_path) not in sys.path: sys.path.insert(0, str(cfg.config_path))
        import moe_fuse.pipeline                                               # everything the library patches is patched before the snapshot
        self.failed, self.library = None, {c: dict(vars(c)) for c in library_classes()}
        self.k = CaptureShell(self.path)

    def teardown(self):
        "Free the notebook's models before the next one starts"
        os.environ.pop('IN_TEST', None)
        if 'matplotlib.pyplot' in sys.modules: sys.modules['matplotlib.pyplot'].close('all')
        if k := self.__dict__.pop('k', None): k.reset(new_session=False)
        for c,attrs in self.__dict__.pop('library', {}).items():               # a notebook's `@patch` must not outlive it
            for a in {*vars(c), *attrs}:
                if vars(c).get(a) is not attrs.get(a): setattr(c, a, attrs[a]) if a in attrs else delattr(c, a)
        gc.collect()

class CellError(Exception): pass

class NbCell(pytest.Item):
    def runtest(self):
        if self.parent.failed: pytest.skip(f'cell {self.parent.failed} failed before it')
        with working_directory(self.path.parent): self.parent.k.run(self.source)
        if e := self.parent.k.exc:
            self.parent.failed = self.name
            raise CellError(''.join(traceback.format_exception(e)[-3:])) from None

    def repr_failure(self, e):
        return f'{self.path.name}, cell {self.name}:\n\n{self.source}\n\n{e.value}' if isinstance(e.value, CellError) else super().repr_failure(e)

    def reportinfo(self): return self.path, 0, f'{self.path.stem}::{self.name}'

class NbWords(pytest.Item):
    "A page of words alone: what it links to is there."
    def runtest(self):
        gone = [l for l in re.findall(r'\]\(([^)#\s]+)', self.source) if '://' not in l and not (self.path.parent/l).exists()]
        assert not gone, f'{self.path.name} links to {gone}'
    def reportinfo(self): return self.path, 0, f'{self.path.stem}::{self.name}'
