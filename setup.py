"""The description on a package index: README without its relative links, which lead nowhere there."""

import re
from pathlib import Path

from setuptools import setup

_RELATIVE = r"\((?!https?:)[^)]*\)"

readme = (Path(__file__).parent / "README.md").read_text(encoding="utf8")
without_pictures = re.sub(rf"^(?:!\[[^\]]*\]{_RELATIVE}\n)+\n\*.*?\*\n\n", "", readme, flags=re.MULTILINE | re.DOTALL)
setup(long_description=re.sub(rf"\[([^\]]*)\]{_RELATIVE}", r"\1", without_pictures))
