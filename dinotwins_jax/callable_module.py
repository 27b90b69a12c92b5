"""Modules that are called as the function of their name.

`dinotwins_jax.train` is a module (`dinotwins_jax.train.train`) and a function of the public API: importing
the module would hide a function of that name in the package.
"""

import sys
from types import ModuleType


class _Callable(ModuleType):
    def __call__(self, *args, **options):
        return self.__dict__["api"](*args, **options)


def call_as_function(module: str) -> None:
    """Makes a module callable: a call is one of its function `api`."""
    sys.modules[module].__class__ = _Callable
