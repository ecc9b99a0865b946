"""The part of the build that pyproject.toml cannot say: the core comes from the Makefile."""

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent))


class BuildCoreFirst(build_ext):
    def run(self):
        from pykvq._build import build_core

        build_core()
        super().run()


setup(
    cffi_modules=["pykvq/_build.py:ffibuilder"],
    cmdclass={"build_ext": BuildCoreFirst},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
