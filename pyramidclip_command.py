# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Starts the `pyramidclip` command, whose code is `pyramidclip_hf/cli.py`.

Importing `pyramidclip_hf` imports torch and transformers, which takes seconds. So this module stands beside the package
and runs `cli.py` without the package around it: help and wrong flags answer at once, and what a subcommand imports from
its siblings brings the package then.
"""

import importlib.util
import sys
from pathlib import Path


def main() -> int:
    """Runs `pyramidclip_hf.cli.main` and returns its exit code."""
    package = importlib.util.find_spec("pyramidclip_hf")
    file = Path(package.origin).with_name("cli.py")
    spec = importlib.util.spec_from_file_location("pyramidclip_hf.cli", file)
    cli = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cli)
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
