"Import every module of the library; what it uses that is deprecated is an error."
import importlib, warnings
from pathlib import Path

warnings.filterwarnings('error', category=DeprecationWarning, module=r'miniai\b')
modules = sorted(o.stem for o in (Path(__file__).resolve().parent.parent/'miniai').glob('[!_]*.py'))
for nm in modules: importlib.import_module(f'miniai.{nm}')

import fastcore
print(f'{len(modules)} modules with fastcore {fastcore.__version__}')
