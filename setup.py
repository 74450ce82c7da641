"Packaging, read from settings.ini: the one place where the project's settings live."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

root = Path(__file__).parent
parser = ConfigParser(delimiters=['='], interpolation=None)
parser.read(root/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']
extras = [nm.removesuffix('_requirements') for nm in cfg if nm.endswith('_requirements')]

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0',
    long_description=(root/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    # With its folder named, `pip install -e` puts it on the path: a clone called miniai beside a script then hides nothing.
    package_dir={'': '.'}, packages=find_packages(include=['miniai', 'miniai.*']),
    package_data={'miniai': ['py.typed', 'data/*', 'templates/*']},
    python_requires=f">={cfg['min_python']}", install_requires=cfg['requirements'].split(),
    extras_require={nm: cfg[f'{nm}_requirements'].split() for nm in extras},
    entry_points={'console_scripts': cfg['console_scripts'].split(),
                  'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]},
    classifiers=['Intended Audience :: Developers', 'Programming Language :: Python :: 3'], zip_safe=False)
