"The flat door: every public name, none of them overwritten in silence, nothing imported before it is wanted."
import importlib, pkgutil, subprocess, sys
from collections import defaultdict

import miniai
import miniai.all as mi

rooms = [importlib.import_module(f'miniai.{o.name}') for o in pkgutil.iter_modules(miniai.__path__)
         if not o.name.startswith('_') and o.name != 'all']


def test_every_public_name_is_there():
    for room in rooms:
        for nm in room.__all__: assert nm in mi._preferred or getattr(mi, nm) is getattr(room, nm), (room.__name__, nm)
    assert set(mi.__all__) == {nm for o in rooms for nm in o.__all__}


def test_a_name_of_two_things_is_decided():
    "By introspection: whoever adds such a name says on the page of this room which is meant."
    things = defaultdict(set)
    for room in rooms:
        for nm in room.__all__: things[nm].add(id(getattr(room, nm)))
    assert {nm for nm, o in things.items() if len(o) > 1} <= set(mi._preferred)


def test_nothing_is_imported_before_it_is_wanted():
    code = 'import sys, miniai.all as mi; assert "torch" not in sys.modules; mi.Learner; assert "miniai.inspector" not in sys.modules'
    subprocess.run([sys.executable, '-c', code], check=True)


def test_star_import():
    ns = {}
    exec('from miniai.all import *', ns)
    assert ns['Learner'] is mi.Learner and ns['conv'] is importlib.import_module('miniai.init').conv
    assert set(mi.__all__) <= set(ns)


def test_help_on_a_method_of_a_later_room():
    "The class gives the function itself, before anybody has imported its module."
    code = 'from miniai.learner import TrainLearner; help(TrainLearner.check)'
    found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert 'check(self' in found.stdout and 'Fit a copy on one batch' in found.stdout, found.stderr
