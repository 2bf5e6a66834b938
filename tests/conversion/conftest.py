"""What the tests of the converters share."""

import re

import pytest


@pytest.fixture
def refused(capsys):
    """Runs a command that must end with exit code 2 and one line on stderr that matches; returns the line."""

    def check(main, arguments, match):
        capsys.readouterr()
        assert main([str(word) for word in arguments]) == 2
        line = capsys.readouterr().err
        assert line.startswith("error: ") and line.count("\n") == 1 and re.search(match, line), line
        return line

    return check
