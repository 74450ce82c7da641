"""Write `.ci/tested.txt`: the versions in this environment of everything that `miniai[dev]` needs.

Run it with the python of an environment where all tests pass: `.venv/bin/python .ci/freeze.py`
"""
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

oldest = Version('3.10')
minors = [Version(f'3.{n}') for n in range(oldest.minor, 30)]
head = '''# The versions that the tests passed with; written by .ci/freeze.py, used as `pip install -c .ci/tested.txt`.
# A line with a marker: that version needs a newer Python, and an older Python takes what suits it.
'''


def wanted(req, extras):
    "Whether `req` applies here, to a package asked for with `extras`"
    return req.marker is None or any(req.marker.evaluate({'extra': o}) for o in {'', *extras})


def closure(name, extras, seen):
    "Add to `seen` each installed distribution that `name[extras]` needs, itself included"
    key = canonicalize_name(name)
    if extras <= seen.get(key, (None, {None}))[1]: return seen
    try: dist = distribution(name)
    except PackageNotFoundError: raise SystemExit(f'{name} is needed but not installed') from None
    seen[key] = dist, {'', *extras} | (seen[key][1] if key in seen else set())
    for req in map(Requirement, dist.requires or []):
        if wanted(req, extras): closure(req.name, {'', *req.extras}, seen)
    return seen


def first_python(dist):
    "The first Python minor version that `dist` accepts"
    spec = SpecifierSet(dist.metadata['Requires-Python'] or '')
    return next(v for v in minors if any(spec.contains(f'{v}.{patch}') for patch in (0, 99)))


def line(key, dist):
    "One constraint: the public version (no build tag), with a marker where it excludes the oldest Python"
    python = first_python(dist)
    marker = f' ; python_version >= "{python}"' if python > oldest else ''
    return f'{key}=={Version(dist.version).public}{marker}'


if __name__ == '__main__':
    seen = closure('miniai', {'', 'dev'}, {})
    lines = sorted(line(key, dist) for key, (dist, _) in seen.items() if key != 'miniai')
    (Path(__file__).parent/'tested.txt').write_text(head + '\n'.join(lines) + '\n', encoding='utf-8')
    print(f'.ci/tested.txt: {len(lines)} packages')
