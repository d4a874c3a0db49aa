"""Breaks a process at named points: kills it, stops it, makes a call fail or slow.

    <folder>/plan.json     {"faults": [...], "constants": {"bigseg.lock": {"BEAT_S": 0.2}}}
    <folder>/log           a line for every point that is reached: pid, point, what
    <folder>/hits/ID.N     a link to the pid that met fault ID for the Nth time

The points are put around functions of bigseg when their modules are imported. The plan is read at
every point, so processes that live long follow the plan of the day. It imports nothing of bigseg.
"""

import importlib.abc
import json
import os
import re
import signal
import sys
import time
from functools import wraps

_folder = ""


def install(folder):
    """Put the points around what is imported from now on."""
    global _folder
    _folder = folder
    sys.meta_path.insert(0, _Finder())


def reached(point, what):
    """Note that `point` is reached, and suffer what the plan has for it."""
    _note(f"{os.getpid()} {point} {what}\n")
    for fault in _plan()["faults"]:
        if fault["point"] == point and re.search(fault["at"], what) and _is_due(fault):
            _suffer(fault)


def _note(line):
    log = os.open(f"{_folder}/log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(log, line.encode())
    os.close(log)


def _plan():
    try:
        with open(f"{_folder}/plan.json") as file:
            return json.load(file)
    except FileNotFoundError:
        return {"faults": [], "constants": {}}


def _is_due(fault):
    if fault["whose"] != "all":
        is_first = _first_to_claim(f"{fault['id']}.first") == os.getpid()
        if is_first != (fault["whose"] == "one"):
            return False
    n = 0
    while n < fault["skip"] + fault["times"]:
        if _claim(f"{fault['id']}.{n}"):
            return n >= fault["skip"]
        n += 1
    return False


def _claim(name):
    """Whether this process is the first to ask for this name: a link is made whole or not."""
    try:
        os.symlink(str(os.getpid()), f"{_folder}/hits/{name}")
    except FileExistsError:
        return False
    return True


def _first_to_claim(name):
    _claim(name)
    return int(os.readlink(f"{_folder}/hits/{name}"))


def _suffer(fault):
    action, value = fault["action"], fault["value"]
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action == "sleep":
        time.sleep(value)
    elif action == "error":
        raise OSError(int(value), os.strerror(int(value)))
    else:
        raise AssertionError(f"unknown action {action}")


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules that have points, through the finders behind it."""

    def find_spec(self, name, path, target=None):
        if name not in POINTS and name not in _plan()["constants"]:
            return None
        for finder in sys.meta_path:
            if finder is self:
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    def __init__(self, inner):
        self._inner = inner

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def create_module(self, spec):
        return self._inner.create_module(spec)

    def exec_module(self, module):
        self._inner.exec_module(module)
        POINTS.get(module.__name__, lambda module: None)(module)
        for name, value in _plan()["constants"].get(module.__name__, {}).items():
            _set_constant(module, name, value)


def _set_constant(module, name, value):
    """Change a constant, also where a function of the module took it as a default."""
    assert hasattr(module, name), f"{module.__name__} has no {name}"
    setattr(module, name, type(getattr(module, name))(value))
    for owner in [module, *(c for c in vars(module).values() if isinstance(c, type))]:
        for function in vars(owner).values():
            defaults = getattr(getattr(function, "__func__", function), "__kwdefaults__", None)
            if defaults and name.lower() in defaults:
                defaults[name.lower()] = value


def _around(function, point, describe):
    """The function, with a point before it and one after it."""

    @wraps(function)
    def announced(*args, **kwargs):
        what = describe(*args, **kwargs)
        reached(f"before-{point}", what)
        result = function(*args, **kwargs)
        reached(f"after-{point}", what)
        return result

    return announced


def _in_stages(module):
    make_stage = module.make_stage

    @wraps(make_stage)
    def announced(plan, name, *args, **kwargs):
        stage = make_stage(plan, name, *args, **kwargs)
        for step in ("read", "work", "write"):
            inner = getattr(stage, step)
            around = _around(inner, step, lambda block, *_: f"{name} {block.index}")
            setattr(stage, step, around)
        return stage

    module.make_stage = announced


def _in_durable(module):
    class Os:
        """The module os, with points around the rename that makes a write visible."""

        replace = staticmethod(_around(os.replace, "rename", lambda _, to: str(to)))
        link = staticmethod(_around(os.link, "rename", lambda _, to: str(to)))

        def __getattr__(self, name):
            return getattr(os, name)

    module.os = Os()


def _in_ledger(module):
    ledger = module.Ledger
    ledger.mark = _around(ledger.mark, "mark", lambda _, stage, block, __: f"{stage} {block}")
    ledger.finish = _around(ledger.finish, "finish", lambda *_: "")


def _in_segment(module):
    module.list_label = _around(module.list_label, "list", lambda _, name: name)


def _in_results(module):
    module.create_pyramid = _around(module.create_pyramid, "create", lambda _, url, *__, **___: url)


def _in_training(module):
    trainer = module._Trainer
    trainer._step = _around(
        trainer._step, "step", lambda self, batch: f"{self.runtime.rank} {batch.step + 1}"
    )


POINTS = {
    "bigseg.stages": _in_stages,
    "bigseg.durable": _in_durable,
    "bigseg.ledger": _in_ledger,
    "bigseg.results": _in_results,
    "bigseg.segment": _in_segment,
    "bigseg.training": _in_training,
}
