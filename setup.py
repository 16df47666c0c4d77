"Packaging metadata comes from settings.ini, so that it is written down once."
import shlex
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages

cfg = ConfigParser(delimiters=['='], interpolation=None)
cfg.read('settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']
pys = [f'3.{i}' for i in range(int(cfg['min_python'].split('.')[1]), 13)]
extras = {k.removesuffix('_requirements'): shlex.split(v) for k,v in cfg.items() if k.endswith('_requirements')}

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'].split(),
    author=cfg['author'], url=cfg['git_url'], license='Apache-2.0',
    packages=find_packages(include=['moe_fuse', 'moe_fuse.*']), package_data={'moe_fuse': cfg['package_data'].split()}, include_package_data=False,
    python_requires=f">={cfg['min_python']}", install_requires=shlex.split(cfg['requirements']), extras_require=extras,
    long_description=Path('README.md').read_text(encoding='utf-8') if Path('README.md').exists() else cfg['description'],
    long_description_content_type='text/markdown',
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Developers', 'Intended Audience :: Science/Research',
                 'Topic :: Scientific/Engineering :: Artificial Intelligence', *[f'Programming Language :: Python :: {v}' for v in pys]],
    project_urls={'Documentation': cfg['doc_host']+cfg['doc_baseurl']},
    entry_points={'console_scripts': shlex.split(cfg['console_scripts']), 'nbdev': [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]})
